"""The operations: for each, what is sent and how its reply is read. Pure: no I/O, and no rule in a second place.

`StepRunStore` and `AsyncStepRunStore` have a method of the same name for each, which sends the call and answers what
it answers here. The rules themselves are the Lua scripts, one per operation, of the same name again.
"""

from __future__ import annotations

import os
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from typing import Any, Final, TypeVar, cast

from squidstep_redis import arguments
from squidstep_redis.arguments import Name, RunId, Seconds, Step, StepInputs
from squidstep_redis.codec import Codec, MsgpackCodec, Payloads, error_payload
from squidstep_redis.errors import (
    CorruptRunError,
    InvalidArgumentError,
    StaleStepRunError,
    StepRunNotFoundError,
    described,
)
from squidstep_redis.keys import Keys, RunKeys, member_prefix, parse_member
from squidstep_redis.model import (
    Attempt,
    BeginResult,
    ScheduleResult,
    SkipReason,
    StepRun,
    StepStatus,
    parse_step_run_id,
)
from squidstep_redis.records import Records
from squidstep_redis.scripts import script
from squidstep_redis.wire import Call, Exchange, Reply, check_calls

MAX_PAYLOAD_BYTES: Final = 512 * 1024 * 1024  # the server's own limit on one value
MAX_ATTEMPTS: Final = 1_000_000
MAX_LIMIT: Final = 1_000

T = TypeVar("T")

# The parts of a record beside its state line, by the first byte of their field.
_KINDS: Final = (b"i", b"o", b"e")

_nonces = count()


def _nonce() -> bytes:
    """Tells a call from the others of this process: no connection is shared with another process."""
    return b"%d" % next(_nonces)


def _token() -> bytes:
    """Tells a claim from all others: 72 random bits in 12 characters, so that a state line stays compact."""
    return urlsafe_b64encode(os.urandom(9))


class Calls:
    """Makes the call for each operation of one store."""

    def __init__(self, prefix: str, codec: Codec | None, max_payload_bytes: int, run_ttl: Seconds | None) -> None:
        """Raises InvalidArgumentError for settings that a store cannot have."""
        if codec is not None and (isinstance(codec, type) or not isinstance(cast("object", codec), Codec)):
            raise InvalidArgumentError("codec", f"must have encode() and decode(), not {described(codec)}")
        self.prefix = prefix
        self.keys = Keys(arguments.prefix(prefix))
        max_bytes = arguments.integer("max_payload_bytes", max_payload_bytes, MAX_PAYLOAD_BYTES)
        self.payloads = Payloads(codec or MsgpackCodec(), max_bytes)
        self._records = Records(prefix, self.payloads)
        self._ttl_ms = arguments.milliseconds("run_ttl", run_ttl)
        self._lapse_error: bytes | None = None

    # Transitions

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
        nonce = _token()[:8]
        run, keys = self._run(run_id)
        name = arguments.step(step)
        data = self.payloads.encode("input", input)

        def parse(reply: Reply) -> ScheduleResult:
            values = reply[2:] if len(reply) > 3 else [reply[2], data, None, None]
            decision = "schedule" if reply[0] == b"schedule" else "skip"
            return ScheduleResult(self._records.record(run.text, name.text, values, keys.steps), decision)

        args = (nonce, self._ttl_ms, name.data, data)
        return Call(run.text, script("schedule_step"), keys[:2], args, parse, step=name.text)

    def schedule_steps(self, run_id: RunId, steps: StepInputs) -> Call[list[str]]:
        """Makes pending records for those of many steps that have none, all of them or, if refused, none.

        One round trip.

        Args:
            run_id: as for `schedule_step`.
            steps: the input of each step, by step.

        Returns:
            The newly scheduled steps, in the order given.

        Raises:
            As `schedule_step`.
        """
        run, keys = self._run(run_id)
        inputs = self._inputs("steps", steps)

        def parse(reply: Reply) -> list[str]:
            return [inputs[2 * int(position)].decode() for position in sorted(reply[2:])]

        args = (_token()[:8], self._ttl_ms, *inputs)
        return Call(run.text, script("schedule_steps"), keys[:2], args, parse)

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
        run, keys = self._run(run_id)
        name = arguments.step(step)
        args, parse = self._claiming(run, name, keys, self.payloads.encode("input", input), lease, max_attempts, owner)
        while len(args) > 5 and not args[-1]:
            args.pop()  # what is sent costs time, above all in redis-py's packing
        return Call(run.text, script("begin_step"), keys, tuple(args), parse, step=name.text)

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
        return self._ending("complete_step", step_run, 3, (data, *successors), output=data)

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
        run_id, from_step, held = self._held("advance_step", step_run)
        run, keys = self._run(run_id)
        name = arguments.step(step)
        if name.text == from_step:
            raise InvalidArgumentError("step", f"must be another step than the one to complete, {from_step!r}")
        args, parse = self._claiming(run, name, keys, self.payloads.encode("input", input), lease, max_attempts, owner)

        def parse_either(reply: Reply) -> BeginResult:
            self._check_held("advance_step", run_id, from_step, held, keys.steps, reply)
            return parse(reply)

        sent = (*args, from_step.encode(), held, data)
        return Call(run_id, script("advance_step"), keys, sent, parse_either, step=from_step)

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
        return self._ending("fail_step", step_run, 4, (data,), last_error=data)

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
        return self._ending("extend_claim", step_run, 3, (arguments.milliseconds("lease", lease, arguments.MAX_LEASE),))

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
            return self._ending("extend_claim", step_run, 3, (b"0",))
        self._check_prefix(step_run)
        token = step_run.token or step_run.observed_token
        if not token:
            raise StaleStepRunError(step_run, "expire_claim was refused, the step was never claimed. Nothing was sent")
        return self._on_claim("extend_claim", step_run, step_run.run_id, step_run.step, token, 3, (b"0",))

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
        return self._ending("release_step", step_run, 3, ())

    def delete_pending_steps(self, run_id: RunId, steps: Iterable[Step]) -> Call[list[str]]:
        """Forgets those of the given steps that are pending; all others stay as they are.

        One round trip.

        Returns:
            Those of the given steps that have no record now, in the order given: a step that is missing from the
            list was claimed before it could be deleted.

        Raises:
            InvalidArgumentError: refused before anything was sent.
            CorruptRunError: what is stored cannot be trusted.
        """
        run, keys = self._run(run_id)
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
            keys[:2],
            (_nonce(), *(name.data for name in names)),
            parse,
            lambda: [name.text for name in names],
        )

    # Reads

    def get_step_run(self, run_id: RunId, step: Step) -> Call[StepRun | None]:
        """Reads one step run; it carries no claim. None if there is no record. One round trip.

        Raises:
            InvalidArgumentError: refused before anything was sent.
            CorruptRunError: what is stored cannot be trusted.
        """
        run, keys = self._run(run_id)
        name = arguments.step(step)

        def parse(reply: Reply) -> StepRun | None:
            return self._records.record(run.text, name.text, reply[2:], keys.steps) if reply[0] == b"found" else None

        args = (_nonce(), name.data)
        return Call(run.text, script("get_step_run"), keys[:2], args, parse, lambda: None, name.text)

    def get_run(self, run_id: RunId) -> Call[list[StepRun]]:
        """Reads all step runs of a run, in the order they came to be. One round trip.

        Raises:
            As `get_step_run`.
        """
        run, keys = self._run(run_id)

        def parse(reply: Reply) -> list[StepRun]:
            fields = dict(_pairs(reply[2]))
            found = [
                self._records.record(
                    run.text, field[1:].decode(), [line, *(fields.get(kind + field[1:]) for kind in _KINDS)], keys.steps
                )
                for field, line in fields.items()
                if field[:1] == b"s"
            ]
            return sorted(found, key=_nth)

        return Call(run.text, script("get_run"), keys[:2], (_nonce(),), parse, list)

    def attempts(self, run_id: RunId, step: Step) -> Call[list[Attempt]]:
        """Reads what is known of a step's attempts, oldest first: the latest and up to eight before it.

        One round trip.

        Raises:
            As `get_step_run`.
        """
        run, keys = self._run(run_id)
        name = arguments.step(step)

        def parse(reply: Reply) -> list[Attempt]:
            return [self._records.attempt(run.text, name.text, entry, keys.steps) for entry in reply[2:]]

        return Call(run.text, script("attempts"), keys[:2], (_nonce(), name.data), parse, list, name.text)

    def completed_steps(self, run_id: RunId) -> Call[list[str]]:
        """Lists the completed steps of a run, in the order of their completion. One round trip.

        Raises:
            As `get_step_run`.
        """
        run, keys = self._run(run_id)

        def parse(reply: Reply) -> list[str]:
            return [step.decode() for step in reply[2]]

        return Call(run.text, script("completed_steps"), keys[:2], (_nonce(),), parse, list)

    def completed_outputs(self, run_id: RunId) -> Call[list[dict[str, Any]]]:
        """Lists the outputs of a run's completed steps, in the order of their completion. One round trip.

        Raises:
            As `get_step_run`, and UndecodablePayloadError.
        """
        run, keys = self._run(run_id)

        def parse(reply: Reply) -> list[dict[str, Any]]:
            return [
                self.payloads.decode(output, run.text, step.decode(), "output")
                for step, output in zip(reply[2], reply[3], strict=True)
            ]

        return Call(run.text, script("completed_outputs"), keys[:2], (_nonce(),), parse, list)

    def step_statuses(self, run_id: RunId) -> Call[dict[str, StepStatus]]:
        """Reads where each step of a run stands, in the order the steps came to be. One round trip.

        Raises:
            As `get_step_run`.
        """
        run, keys = self._run(run_id)

        def parse(reply: Reply) -> dict[str, StepStatus]:
            found = [
                self._records.step_run(run.text, field[1:].decode(), line, (None, None, None), keys.steps)
                for field, line in zip(reply[2], reply[3], strict=True)
            ]
            return {step_run.step: step_run.status for step_run in sorted(found, key=_nth)}

        return Call(run.text, script("step_statuses"), keys[:2], (_nonce(),), parse, dict)

    # Whole runs

    def expire_run(self, run_id: RunId, ttl: Seconds | None) -> Call[bool]:
        """Sets how long after its last write a run expires, all its keys at once; None: not at all.

        One round trip. Each further write renews it, and a run with a live claim does not expire; a claim without a
        lease lives until it is ended.

        Args:
            run_id: as for `schedule_step`.
            ttl: seconds, up to ten years.

        Returns:
            Whether there is such a run.

        Raises:
            As `get_step_run`.
        """
        run, keys = self._run(run_id)

        def parse(reply: Reply) -> bool:
            return reply[0] == b"set"

        return Call(
            run.text,
            script("expire_run"),
            keys[:2],
            (_nonce(), arguments.milliseconds("ttl", ttl)),
            parse,
            lambda: False,
        )

    def delete_run(self, run_id: RunId, *, tombstone: Seconds = 3_600) -> Call[bool]:
        """Forgets a run. A tombstone refuses late writes for a while, so that none brings it back to life.

        One round trip. It also deletes a run that is corrupt or half evicted.

        Args:
            run_id: as for `schedule_step`.
            tombstone: seconds for which writes are refused with RunDeletedError.

        Returns:
            Whether there was such a run.

        Raises:
            As `get_step_run`.
        """
        run, keys = self._run(run_id)

        def parse(reply: Reply) -> bool:
            return reply[0] == b"deleted"

        if cast("object", tombstone) is None:
            raise InvalidArgumentError("tombstone", "must be a number of seconds, not None")
        args = (_token(), member_prefix(run.data), arguments.milliseconds("tombstone", tombstone))
        return Call(run.text, script("delete_run"), keys, args, parse)

    # Across runs

    def batch(self, calls: Iterable[Call[T]]) -> Exchange[list[T | Exception]]:
        """Sends any mixture of operations, on any runs, in one round trip per server.

        They are not one transaction: each is atomic, and those of one run take effect in the order given.

        Args:
            calls: made by `store.calls`, such as `store.calls.begin_step("run", "step", {})`.

        Returns:
            For each call, in order, what the operation answers or the error it would have raised.

        Raises:
            InvalidArgumentError: one of the items is no call; nothing was sent.
            ServerError: the server could not be reached, or did not answer, before the store's `timeout`. After an
                OutcomeUnknownError any of the operations may have taken effect; sending the same calls again is safe.
        """
        items = check_calls(calls)
        return (yield items) if items else []

    def lapsed_claims(self, limit: int = 100) -> Exchange[list[StepRun]]:
        """Lists step runs whose lease is over and that nobody has taken over, longest over first.

        Two round trips per server as a rule: one reads the index of each of 1,024 buckets, one holds what was found
        against its record. An entry without its record is dropped from the index.

        Args:
            limit: how many at most, up to 1,000.

        Raises:
            InvalidArgumentError: refused before anything was sent.
        """
        return self._scan("lapsed_claims", self.keys.claims(), limit)

    def live_claims(self, limit: int = 100, *, owner: str | None = None) -> Exchange[list[StepRun]]:
        """Lists step runs that are being executed under a lease, soonest over first.

        Round trips and errors as for `lapsed_claims`; with an `owner`, one more for each `limit` of live claims that
        are not its own, out of the thousand or so soonest over of each of 1,024 buckets.

        Args:
            limit: how many at most, up to 1,000.
            owner: whose claims alone, as it was given to `begin_step`; None: anybody's.
        """
        return self._scan("live_claims", self.keys.claims(), limit, arguments.owner(owner))

    def failed_steps(self, limit: int = 100) -> Exchange[list[StepRun]]:
        """Lists failed step runs, newest first, out of the newest thousand or so of each of 1,024 buckets.

        Round trips, `limit` and errors as for `lapsed_claims`.
        """
        return self._scan("failed_steps", self.keys.failed(), limit)

    def _scan(self, name: str, indexes: list[bytes], limit: int, owner: bytes = b"") -> Exchange[list[StepRun]]:
        wanted = arguments.integer("limit", limit, MAX_LIMIT)
        page_size = MAX_LIMIT if owner else wanted
        newest_first = name == "failed_steps"
        while True:
            args = b"%d" % page_size
            pages = yield [Call(None, script(name), (key,), (_nonce(), args), _entries) for key in indexes]
            entries = sorted((entry for page in _all(pages) for entry in page), reverse=newest_first)
            found: list[StepRun] = []
            gone = 0
            for start in range(0, len(entries), wanted):
                confirmed = yield [self._confirm(name, member, owner) for _, member in entries[start : start + wanted]]
                for answer in confirmed:
                    if isinstance(answer, StepRun):
                        found.append(answer)
                    elif isinstance(answer, bool):
                        gone += answer
                    elif not isinstance(answer, CorruptRunError):  # a corrupt run must not hide the others
                        raise answer
                if len(found) >= wanted:
                    break
            # Entries that are gone may have kept good ones off their page.
            if len(found) >= wanted or not gone or all(len(page) < page_size for page in pages):
                return found[:wanted]

    def _confirm(self, name: str, member: bytes, owner: bytes) -> Call[StepRun | bool]:
        """Reads the step run that an entry stands for; or answers whether the entry has left its place in the index."""
        run, step = parse_member(member)
        keys = self.keys.run(run)
        wanted = {"failed_steps": b"failed", "lapsed_claims": b"lapsed", "live_claims": b"live"}[name]

        def parse(reply: Reply) -> StepRun | bool:
            if len(reply) > 2:
                return self._records.record(run.decode(), step.decode(), reply[2:], keys.steps)
            return reply[0] == b"dropped" or wanted == b"lapsed"  # what is live has been put where it belongs

        index = keys.failed if wanted == b"failed" else keys.claims
        args = (_nonce(), step, member_prefix(run), wanted, owner)
        return Call(run.decode(), script("confirm_entry"), (keys.steps, keys.done, index), args, parse)

    # What the operations share

    def _run(self, run_id: RunId) -> tuple[Name, RunKeys]:
        name = arguments.run_id(run_id)
        return name, self.keys.run(name.data)

    def _claiming(
        self,
        run: Name,
        step: Name,
        keys: RunKeys,
        input: bytes,
        lease: Seconds | None,
        max_attempts: int | None,
        owner: str | None,
    ) -> tuple[list[bytes], Callable[[Reply], BeginResult]]:
        """What begin_step is sent, all nine arguments, and what reads its reply."""
        token = _token()
        limit = lapse_error = b""
        if max_attempts is not None:
            limit = b"%d" % arguments.integer("max_attempts", max_attempts, MAX_ATTEMPTS)
            lapse_error = self._lapse()

        def parse(reply: Reply) -> BeginResult:
            if reply[0] == b"execute":
                payloads = (reply[3] if len(reply) > 3 else input, None, None)
                claimed = self._records.step_run(run.text, step.text, reply[2], payloads, keys.steps, token)
                return BeginResult(claimed, None, None)
            step_run = self._records.record(run.text, step.text, reply[2:6], keys.steps)
            retry_in = int(reply[6]) / 1_000 if len(reply) > 6 and reply[6] else None
            return BeginResult(step_run, cast("SkipReason", reply[0].decode()), retry_in)

        lease_ms = arguments.milliseconds("lease", lease, arguments.MAX_LEASE)
        rest = (arguments.owner(owner), self._ttl_ms, limit, lapse_error)
        return [token, step.data, member_prefix(run.data), input, lease_ms, *rest], parse

    def _held(self, operation: str, step_run: StepRun | str) -> tuple[str, str, bytes]:
        """Run, step and token of the claim that is to be ended."""
        if not isinstance(step_run, StepRun):
            return *self._parse_id(step_run), b""
        self._check_prefix(step_run)
        if not step_run.token:
            raise StaleStepRunError(
                step_run,
                f"{operation} takes the step run that begin_step answered with 'execute'; this one carries no "
                "claim (an operator may pass its id). Nothing was sent",
            )
        return step_run.run_id, step_run.step, step_run.token

    def _check_prefix(self, step_run: StepRun) -> None:
        if step_run.prefix != self.prefix:
            raise InvalidArgumentError(
                "step_run", f"belongs to a store with prefix {step_run.prefix!r}, this one has {self.prefix!r}"
            )

    def _check_held(self, operation: str, run: str, step: str, token: bytes, key: bytes, reply: Reply) -> None:
        """Raises what the script found, if it is not the claim."""
        if reply[0] == b"missing":
            raise StepRunNotFoundError(run, step, "there is no such step run; nothing was written")
        if reply[0] == b"stale":
            raise self._stale(self._records.record(run, step, reply[2:], key), operation, token)

    def _ending(
        self,
        operation: str,
        step_run: StepRun | str,
        key_count: int,
        args: tuple[bytes, ...],
        output: bytes | None = None,
        last_error: bytes | None = None,
    ) -> Call[StepRun]:
        """The transitions of a claim in hand, which differ in their script and in what they leave on the step run."""
        run, name, token = self._held(operation, step_run)
        return self._on_claim(operation, step_run, run, name, token, key_count, args, output, last_error)

    def _on_claim(
        self,
        operation: str,
        step_run: StepRun | str,
        run: str,
        step: str,
        token: bytes,
        key_count: int,
        args: tuple[bytes, ...],
        output: bytes | None = None,
        last_error: bytes | None = None,
    ) -> Call[StepRun]:
        run_data = run.encode()
        keys = self.keys.run(run_data)

        def parse(reply: Reply) -> StepRun:
            self._check_held(operation, run, step, token, keys.steps, reply)
            line, *rest = reply[2:]
            if isinstance(step_run, StepRun):
                return step_run.moved(line, output, last_error)
            return self._records.record(run, step, [line, rest[0], output, last_error], keys.steps)

        sent = (_nonce(), step.encode(), member_prefix(run_data), token, *args)
        return Call(run, script(operation), keys[:key_count], sent, parse, step=step)

    def _parse_id(self, id: object) -> tuple[str, str]:
        if not isinstance(id, str):
            raise InvalidArgumentError("step_run", f"must be a StepRun or a StepRun.id, not {described(id)}")
        try:
            return parse_step_run_id(self.prefix, id)
        except ValueError:
            raise InvalidArgumentError(
                "step_run", f"is not the id of a step run of prefix {self.prefix!r}: {described(id)}"
            ) from None

    def _stale(self, current: StepRun, operation: str, token: bytes) -> StaleStepRunError:
        if not token:
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

    def _lapse(self) -> bytes:
        """The last error of a step whose claim lapsed with no attempt left. Lua writes no payloads."""
        if self._lapse_error is None:
            message = "the lease of the last attempt ended without a result"
            self._lapse_error = self.payloads.encode_own({"type": "LeaseExpired", "message": message})
        return self._lapse_error


def _entries(reply: Reply) -> list[tuple[float, bytes]]:
    return [(float(score), member) for member, score in _pairs(reply[2])]


def _nth(step_run: StepRun) -> int:
    return step_run.nth


def _pairs(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _all(results: list[Any]) -> list[Any]:
    """The results of a batch whose calls all have to succeed."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
