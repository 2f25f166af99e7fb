"""The operations that write: for each, what is sent and how its reply is read.

The rules themselves are the Lua scripts, one per operation, of the same name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from typing import Any, Final, cast

from squidstep_redis.errors import InvalidArgumentError, StaleStepRunError, StepRunNotFoundError, described
from squidstep_redis.model import BeginResult, ScheduleResult, SkipReason, StepRun, StepStatus, parse_step_run_id
from squidstep_redis.operations.context import Operations, Run, nonce, token
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Name, RunId, Seconds, Step, StepInputs
from squidstep_redis.protocol.call import Call, Reply
from squidstep_redis.protocol.codec import error_payload
from squidstep_redis.protocol.scripts import script

MAX_ATTEMPTS: Final = 1_000_000

# How many of a run's keys a transition of a claim in hand touches.
_KEYS: Final[Mapping[str, int]] = {"complete_step": 3, "fail_step": 4, "extend_claim": 3, "release_step": 3}


class Transitions(Operations):
    """Makes the call for each operation that writes."""

    def schedule_step(self, run_id: RunId, step: Step, input: Mapping[str, Any]) -> Call[ScheduleResult]:
        """Makes a pending record for a step that has none; the input stays whoever begins it.

        One round trip.

        Args:
            run_id: non-empty str of at most 512 bytes of UTF-8, or a UUID.
            step: likewise, or an enum member (its value if that is a str, else its name).
            input: what the step is to be given.

        Returns:
            `(step_run, "schedule")`, or `(step_run, "skip")` with the record that stands there already.

        Raises:
            InvalidArgumentError: refused before anything was sent; PayloadError for the input.
            RunDeletedError: the run was deleted a short while ago.
            CorruptRunError: what is stored cannot be trusted.
        """
        made = token()[:8]
        run = self._run(run_id)
        name = arguments.step(step)
        data = self.payloads.encode("input", input)

        def parse(reply: Reply) -> ScheduleResult:
            values = reply[2:] if len(reply) > 3 else [reply[2], data, None, None]
            decision = "schedule" if reply[0] == b"schedule" else "skip"
            return ScheduleResult(self._records.record(run.text, name.text, values, run.keys.steps), decision)

        args = (made, self._ttl_ms, name.data, data)
        return Call(run.text, script("schedule_step"), run.keys[:2], args, parse, step=name.text)

    def schedule_steps(self, run_id: RunId, steps: StepInputs) -> Call[list[str]]:
        """Makes pending records for those of many steps that have none, all of them or, if refused, none.

        One round trip, and one script: 10,000 steps hold the server up for 0.04 to 0.1 s. Where that is too long, and
        none of them depends on the others, schedule them by the thousand.

        Args:
            run_id: as for `schedule_step`.
            steps: the input of each step, by step.

        Returns:
            The newly scheduled steps, in the order given.

        Raises:
            As `schedule_step`.
        """
        run = self._run(run_id)
        inputs = self._inputs("steps", steps)

        def parse(reply: Reply) -> list[str]:
            return [inputs[2 * int(position)].decode() for position in sorted(reply[2:])]

        args = (token()[:8], self._ttl_ms, *inputs)
        return Call(run.text, script("schedule_steps"), run.keys[:2], args, parse)

    def begin_step(
        self,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        *,
        lease: Seconds | None = None,
        max_attempts: int | None = None,
        owner: str | None = None,
    ) -> Call[BeginResult]:
        """Asks whether this delivery may execute the step, and claims it if so.

        One round trip. Sent again after a lost reply it answers the same, with the same claim.

        Args:
            run_id: as for `schedule_step`.
            step: likewise.
            input: kept, unless the step was scheduled with its own. A new attempt replaces it.
            lease: seconds after which another delivery may take over, by the server's clock; None: never.
            max_attempts: claims to grant in all, released ones not counted; None: any number.
            owner: who claims, for operators: up to 256 bytes, no control characters.

        Returns:
            `(step_run, "execute")` to exactly one delivery of each attempt; its step run carries the claim. To all
            others `(step_run, "skip")`, with what is known and the `reason`.

        Raises:
            As `schedule_step`.
        """
        run = self._run(run_id)
        name = arguments.step(step)
        args = self._claiming(run, name, self.payloads.encode("input", input), lease, max_attempts, owner)
        parse = partial(self._parse_begin, run, name, args[0], args[3])
        while len(args) > 5 and not args[-1]:
            args.pop()  # what is sent takes time
        return Call(run.text, script("begin_step"), run.keys, tuple(args), parse, None, name.text)

    def complete_step(
        self,
        step_run: StepRun | str,
        output: Mapping[str, Any],
        *,
        schedule: StepInputs | None = None,
    ) -> Call[StepRun]:
        """Ends a claim with an output, and schedules what follows in the same atomic step.

        One round trip. Sent again, also by you, with the same output, it answers the same. A lease that has ended
        does no harm as long as nobody took over: late is not wrong.

        Args:
            step_run: the one that `begin_step` answered with "execute". A bare `StepRun.id` is checked against
                "running" only and stands for whoever holds the claim: for operators, and for hand-overs.
            output: what the step gave.
            schedule: input by step; those of these steps that have no record become pending.

        Returns:
            The completed step run.

        Raises:
            InvalidArgumentError: refused before anything was sent, also for a step run of another prefix.
            StaleStepRunError: the claim is not held (any more): taken over, ended, or it never was one.
            StepRunNotFoundError: there is no such record; RunDeletedError if the run was deleted.
            CorruptRunError: what is stored cannot be trusted.
        """
        data = self.payloads.encode("output", output)
        successors = self._inputs("schedule", schedule) if schedule is not None else []
        return self._ending("complete_step", step_run, (data, *successors), output=data)

    def advance_step(
        self,
        step_run: StepRun | str,
        output: Mapping[str, Any],
        step: Step,
        input: Mapping[str, Any],
        *,
        lease: Seconds | None = None,
        max_attempts: int | None = None,
        owner: str | None = None,
    ) -> Call[BeginResult]:
        """Completes a step and begins the next one of its run: `complete_step` and `begin_step` in one atomic step.

        One round trip: a chain of ten steps by one worker costs eleven. If the completion is refused, nothing is
        begun. If the next step is another's, or was completed before, the first is completed all the same.

        Args:
            step_run: what to complete, as for `complete_step`.
            output: what it gave.
            step: what to begin, another step of the same run.
            input: as for `begin_step`, like the rest.
            lease: see there.
            max_attempts: see there.
            owner: see there.

        Returns:
            What `begin_step` answers, of the next step.

        Raises:
            As `complete_step`.
        """
        data = self.payloads.encode("output", output)
        run, from_step, held = self._claim_of("advance_step", step_run)
        name = arguments.step(step)
        if name == from_step:
            raise InvalidArgumentError("step", f"must be another step than the one to complete, {from_step.text!r}")
        args = self._claiming(run, name, self.payloads.encode("input", input), lease, max_attempts, owner)

        def parse_either(reply: Reply) -> BeginResult:
            self._check_held("advance_step", run, from_step, held, reply)
            return self._parse_begin(run, name, args[0], args[3], reply)

        sent = (*args, from_step.data, held, data)
        return Call(run.text, script("advance_step"), run.keys, sent, parse_either, step=from_step.text)

    def fail_step(self, step_run: StepRun | str, error: Mapping[str, Any] | BaseException) -> Call[StepRun]:
        """Ends a claim with an error; the step can be begun again.

        One round trip. Sent again, also by you, with the same error, it answers the same.

        Args:
            step_run: as for `complete_step`.
            error: a dict; or an exception, of which a dict of `type`, `message` and `traceback` is kept.

        Returns:
            The failed step run.

        Raises:
            As `complete_step`.
        """
        if isinstance(error, BaseException):
            data = self.payloads.encode_own(error_payload(error))
        else:
            data = self.payloads.encode("error", error)
        return self._ending("fail_step", step_run, (data,), last_error=data)

    def extend_claim(self, step_run: StepRun | str, lease: Seconds | None) -> Call[StepRun]:
        """Lets the lease of a claim run from now, by the server's clock.

        One round trip.

        Args:
            step_run: as for `complete_step`.
            lease: seconds; None: the claim never ends by itself.

        Returns:
            The running step run, which carries the claim on.

        Raises:
            As `complete_step`.
        """
        return self._ending("extend_claim", step_run, (arguments.lease_ms(lease),))

    def expire_claim(self, step_run: StepRun | str) -> Call[StepRun]:
        """Ends the lease of a claim whose holder is known to be dead: it can be taken over at once.

        One round trip.

        Args:
            step_run: as any read answers it (`live_claims`, `get_step_run`): exactly the claim that it shows is
                ended, none that came after it. A bare `StepRun.id` stands for whoever holds the claim.

        Returns:
            The step run: running, its lease over. The next `begin_step` is a takeover.

        Raises:
            As `complete_step`.
        """
        if not isinstance(step_run, StepRun):
            return self._ending("extend_claim", step_run, (b"0",))
        self._check_prefix(step_run)
        held = step_run.token or step_run.current_token
        if not held:
            raise StaleStepRunError(step_run, "expire_claim was refused, the step was never claimed. Nothing was sent")
        run, name = self._run(step_run.run_id), arguments.step(step_run.step)
        return self._on_claim("extend_claim", step_run, run, name, held, (b"0",))

    def release_step(self, step_run: StepRun | str) -> Call[StepRun]:
        """Gives a claim back before its work took effect: the step is pending again, with the input it had.

        One round trip. The attempt keeps its number, for it may have been handed out as a fencing token, but it
        does not count against `max_attempts`.

        Args:
            step_run: as for `complete_step`.

        Returns:
            The pending step run.

        Raises:
            As `complete_step`.
        """
        return self._ending("release_step", step_run, ())

    def delete_pending_steps(self, run_id: RunId, steps: Iterable[Step]) -> Call[list[str]]:
        """Forgets those of the given steps that are pending; all others stay as they are.

        One round trip, and one script, as for `schedule_steps`.

        Returns:
            Those of the given steps that have no record now, in the order given: a step that is missing from the
            list was claimed before it could be deleted.

        Raises:
            InvalidArgumentError: refused before anything was sent.
            CorruptRunError: what is stored cannot be trusted.
        """
        run = self._run(run_id)
        if isinstance(steps, str | bytes | Mapping) or not isinstance(cast("object", steps), Iterable):
            raise InvalidArgumentError("steps", f"must be an iterable of steps, not {described(cast('object', steps))}")
        names = arguments.distinct(
            "steps", (arguments.step(step, f"steps[{index}]") for index, step in enumerate(steps))
        )

        def parse(reply: Reply) -> list[str]:
            return [names[int(position)].text for position in reply[2:]]

        return Call(
            run.text,
            script("delete_pending_steps"),
            run.keys[:2],
            (nonce(), *(name.data for name in names)),
            parse,
            lambda: [name.text for name in names],
        )

    # What the transitions share

    def _claiming(
        self,
        run: Run,
        step: Name,
        input: bytes,
        lease: Seconds | None,
        max_attempts: int | None,
        owner: str | None,
    ) -> list[bytes]:
        """What begin_step is sent, all nine arguments."""
        limit = lapse_error = b""
        if max_attempts is not None:
            limit = b"%d" % arguments.integer("max_attempts", max_attempts, MAX_ATTEMPTS)
            lapse_error = self._lease_expired_payload
        made_by = arguments.owner(owner)
        lease_ms = arguments.lease_ms(lease)
        return [token(), step.data, run.member, input, lease_ms, made_by, self._ttl_ms, limit, lapse_error]

    def _parse_begin(self, run: Run, step: Name, claim: bytes, input: bytes, reply: Reply) -> BeginResult:
        """Reads what begin_step replies."""
        if reply[0] in (b"execute", b"takeover"):
            payloads = (reply[3] if len(reply) > 3 else input, None, None)
            claimed = self._records.step_run(run.text, step.text, reply[2], payloads, run.keys.steps, claim)
            return BeginResult(claimed, None, None, reply[0] == b"takeover")
        step_run = self._records.record(run.text, step.text, reply[2:6], run.keys.steps)
        retry_in = int(reply[6]) / 1_000 if len(reply) > 6 and reply[6] else None
        return BeginResult(step_run, cast("SkipReason", reply[0].decode()), retry_in)

    def _claim_of(self, operation: str, step_run: StepRun | str) -> tuple[Run, Name, bytes]:
        """Run, step and token of the claim that is to be ended."""
        if not isinstance(step_run, StepRun):
            run_id, step = self._parse_id(step_run)
            return self._run(run_id), arguments.step(step), b""
        self._check_prefix(step_run)
        if not step_run.token:
            raise StaleStepRunError(
                step_run,
                f"{operation} takes the step run that begin_step answered with 'execute'; this one carries no "
                "claim (an operator may pass its id). Nothing was sent",
            )
        return self._run(step_run.run_id), arguments.step(step_run.step), step_run.token

    def _check_prefix(self, step_run: StepRun) -> None:
        if step_run.prefix != self.prefix:
            raise InvalidArgumentError(
                "step_run", f"belongs to a store with prefix {step_run.prefix!r}, this one has {self.prefix!r}"
            )

    def _check_held(self, operation: str, run: Run, step: Name, held: bytes, reply: Reply) -> None:
        """Raises what the script found, if it is not the claim."""
        if reply[0] == b"missing":
            raise StepRunNotFoundError(run.text, step.text, "there is no such step run; nothing was written")
        if reply[0] == b"stale":
            raise self._stale(self._records.record(run.text, step.text, reply[2:], run.keys.steps), operation, held)

    def _ending(
        self,
        operation: str,
        step_run: StepRun | str,
        args: tuple[bytes, ...],
        output: bytes | None = None,
        last_error: bytes | None = None,
    ) -> Call[StepRun]:
        """The transitions of a claim in hand, which differ in their script and in what they leave on the step run."""
        run, name, held = self._claim_of(operation, step_run)
        return self._on_claim(operation, step_run, run, name, held, args, output, last_error)

    def _on_claim(
        self,
        operation: str,
        step_run: StepRun | str,
        run: Run,
        step: Name,
        held: bytes,
        args: tuple[bytes, ...],
        output: bytes | None = None,
        last_error: bytes | None = None,
    ) -> Call[StepRun]:
        sent = (nonce(), step.data, run.member, held, *args)
        parse = partial(self._parse_end, operation, step_run, run, step, held, output, last_error)
        return Call(run.text, script(operation), run.keys[: _KEYS[operation]], sent, parse, None, step.text)

    def _parse_end(
        self,
        operation: str,
        step_run: StepRun | str,
        run: Run,
        step: Name,
        held: bytes,
        output: bytes | None,
        last_error: bytes | None,
        reply: Reply,
    ) -> StepRun:
        """Reads what such a transition replies."""
        self._check_held(operation, run, step, held, reply)
        if isinstance(step_run, StepRun):
            return step_run.after_transition(reply[2], output, last_error)
        return self._records.record(run.text, step.text, [*reply[2:4], output, last_error], run.keys.steps)

    def _parse_id(self, id: object) -> tuple[str, str]:
        if not isinstance(id, str):
            raise InvalidArgumentError("step_run", f"must be a StepRun or a StepRun.id, not {described(id)}")
        try:
            return parse_step_run_id(self.prefix, id)
        except ValueError:
            raise InvalidArgumentError(
                "step_run", f"is not the id of a step run of prefix {self.prefix!r}: {described(id)}"
            ) from None

    def _stale(self, current: StepRun, operation: str, held: bytes) -> StaleStepRunError:
        if not held:
            why = f"is {current.status}, not running"
        elif current.status is StepStatus.RUNNING:
            why = f"was taken over: attempt {current.attempt} holds the claim"
        else:
            why = f"is {current.status} by attempt {current.attempt}, and not by this very call"
        return StaleStepRunError(current, f"{operation} was refused, the step {why}. Nothing was written")

    def _inputs(self, argument: str, steps: object) -> list[bytes]:
        """Step, input, step, input, … as they are sent."""
        if not isinstance(steps, Mapping):
            raise InvalidArgumentError(argument, f"must be a dict of input by step, not {described(steps)}")
        items = cast("StepInputs", steps).items()
        names = arguments.distinct(argument, (arguments.step(step, f"a step of {argument}") for step, _ in items))
        inputs = (
            self.payloads.encode(f"{argument}[{name.text!r}]", input)
            for name, (_, input) in zip(names, items, strict=True)
        )
        return [part for name, input in zip(names, inputs, strict=True) for part in (name.data, input)]

    @cached_property
    def _lease_expired_payload(self) -> bytes:
        """The last error of a step whose claim lapsed with no attempt left. Lua writes no payloads."""
        message = "the lease of the last attempt ended without a result"
        return self.payloads.encode_own({"type": "LeaseExpired", "message": message})
