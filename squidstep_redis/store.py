"""The blocking store: its operations, and the claim that is a `with` block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from squidstep_redis.claims.heartbeat import heartbeat_of
from squidstep_redis.claims.rules import DEFAULT_LEASE, BaseClaim, OnBusy
from squidstep_redis.doctor.examine import Diagnosis, examine
from squidstep_redis.errors import InvalidArgumentError, SquidstepError, StaleStepRunError, described
from squidstep_redis.model import StepRun
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.arguments import RunId, Seconds, Step, StepInputs
from squidstep_redis.protocol.call import Call, Exchange, Plan
from squidstep_redis.settings import documented
from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.transport.blocking import Sender, run_workflow

P = ParamSpec("P")
T = TypeVar("T")


def _operation(
    make: Callable[Concatenate[Calls, P], Call[T]],
) -> Callable[Concatenate[StepRunStore, P], T]:
    """The method that makes a call and sends it."""

    def operation(self: StepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(make(self.calls, *args, **kwargs))

    return documented(operation, make, "StepRunStore")


def _exchange(
    make: Callable[Concatenate[Calls, P], Exchange[T]],
) -> Callable[Concatenate[StepRunStore, P], T]:
    """The method that carries an exchange through."""

    def carried(self: StepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        exchange = make(self.calls, *args, **kwargs)
        try:
            calls = next(exchange)
            while True:
                calls = exchange.send(self._send_all(calls))  # pyright: ignore[reportPrivateUsage]: its own
        except StopIteration as end:
            return end.value

    return documented(carried, make, "StepRunStore")


def _planned(
    make: Callable[Concatenate[Calls, P], Plan[T]],
) -> Callable[Concatenate[StepRunStore, P], T]:
    """The method that carries a plan out."""

    def planned(self: StepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        return run_workflow(self, make(self.calls, *args, **kwargs))

    return documented(planned, make, "StepRunStore")


class StepRunStore(Sender):
    """Decides which delivery of a step executes, and keeps what came of it: the store, blocking."""

    schedule_step = _operation(Calls.schedule_step)
    schedule_steps = _operation(Calls.schedule_steps)
    begin_step = _operation(Calls.begin_step)
    complete_step = _operation(Calls.complete_step)
    advance_step = _operation(Calls.advance_step)
    fail_step = _operation(Calls.fail_step)
    extend_claim = _operation(Calls.extend_claim)
    expire_claim = _operation(Calls.expire_claim)
    release_step = _operation(Calls.release_step)
    retry_step = _operation(Calls.retry_step)
    delete_pending_steps = _operation(Calls.delete_pending_steps)

    get_step_run = _operation(Calls.get_step_run)
    get_run = _operation(Calls.get_run)
    scan_steps = _operation(Calls.scan_steps)
    attempts = _operation(Calls.attempts)
    completed_steps = _operation(Calls.completed_steps)
    completed_outputs = _operation(Calls.completed_outputs)
    step_statuses = _operation(Calls.step_statuses)
    wait_for_step = _planned(Calls.wait_for_step)

    expire_run = _operation(Calls.expire_run)
    delete_run = _operation(Calls.delete_run)
    export_run = _operation(Calls.export_run)
    import_run = _operation(Calls.import_run)

    batch = _exchange(Calls.batch)
    lapsed_claims = _exchange(Calls.lapsed_claims)
    live_claims = _exchange(Calls.live_claims)
    failed_steps = _exchange(Calls.failed_steps)
    count_claims = _exchange(Calls.count_claims)
    retry_run = _exchange(Calls.retry_run)
    runs = _planned(Calls.runs)
    purge = _planned(Calls.purge)

    def run_step(
        self,
        run_id: RunId,
        step: Step,
        fn: Callable[[dict[str, Any]], Mapping[str, Any]],
        input: Mapping[str, Any],
        *,
        lease: Seconds | None = DEFAULT_LEASE,
        max_attempts: int | None = None,
        on_busy: OnBusy = "raise",
        owner: str | None = None,
    ) -> dict[str, Any]:
        """Executes a step once across all deliveries, and answers its stored output ever after.

        Two round trips if it executes, one if it skips. Meanwhile a heartbeat extends the leases of all claims of
        this process, a third of the lease after they were last extended: one round trip for all of one client's.

        An exception of `fn` is recorded with `fail_step` and raised again. If the claim is lost to a takeover,
        `current_claim().lost` is set, the late result is discarded, and the winner's is answered in its place. A
        result that cannot get through is sent again for as long as the lease, but for at most a minute.

        Args:
            run_id: as for `begin_step`.
            step: likewise.
            fn: given the stored input, answers the output: does the work. `current_claim()` is its claim.
            input: kept, unless the step was scheduled with its own.
            lease: seconds after which another worker may take over from one that is dead or hangs; None: never.
            max_attempts: claims to grant in all.
            on_busy: what to do while another worker holds the step: "raise", or "wait" until it is completed or can
                be claimed (asking again, at most once a second).
            owner: who claims, for operators; None: `host:pid`.

        Returns:
            The stored output.

        Raises:
            StepBusyError: another worker holds the step, or has taken it over.
            StepExhaustedError: `max_attempts` are used up.
            StaleStepRunError: the claim was lost, and nobody has completed the step or is at it.
            PayloadError: what `fn` answered cannot be kept; the step is recorded as failed.
            InvalidArgumentError: refused before anything was sent.
            ServerError: the server could not be asked, or not be told of the result.
        """
        if not callable(fn):
            raise InvalidArgumentError("fn", f"must be callable, not {described(fn)}")
        while True:
            claim = self.claim_step(
                run_id, step, input, lease=lease, max_attempts=max_attempts, on_busy=on_busy, owner=owner
            )
            try:
                with claim:
                    if claim.decision == "execute":
                        output = fn(claim.input)
                        if not claim.ended:
                            claim.complete(output)
                return claim.result()
            except StaleStepRunError as error:
                claim.may_ask_again(error)

    def claim_step(
        self,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        *,
        lease: Seconds | None = DEFAULT_LEASE,
        max_attempts: int | None = None,
        on_busy: OnBusy = "raise",
        owner: str | None = None,
    ) -> Claim:
        """Makes a `with` block that holds the claim on a step: `run_step` for code that is not one function.

        Nothing is sent before the block is entered. The block looks at `claim.decision`: on "execute" it does the
        work and calls `claim.complete(output)`; on "skip" the step was completed before, see `claim.output`. An
        exception that leaves the block is recorded with `fail_step`.

        Args:
            run_id: as for `run_step`, like all the others.
            step: see there.
            input: see there.
            lease: see there.
            max_attempts: see there.
            on_busy: see there.
            owner: see there.

        Raises:
            As `run_step`, from entering the block.
        """
        return Claim(self, run_id, step, input, lease, max_attempts, on_busy, owner)

    def doctor(self, *, lease: Seconds | None = None, job_timeout: Seconds | None = None) -> Diagnosis:
        """Examines the server and the client: can the promises be kept here, and what limits them?

        A scratch run of its own is taken through every transition, and deleted; on a cluster, one on each primary.
        Twenty round trips per server. What goes wrong is a finding, not an exception.

        Args:
            lease: seconds of the leases that you give `begin_step` and that nothing extends, to be examined too.
            job_timeout: seconds that the work under such a lease may take.

        Raises:
            InvalidArgumentError: refused before anything was sent.
        """
        return run_workflow(self, examine(self.calls, self._client_facts(lease, job_timeout)))

    def close(self) -> None:
        """Closes the client, if `from_url` made it."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Claim(BaseClaim[threading.Event]):
    """A step to be executed by this delivery or skipped: the `with` block that `claim_step` makes."""

    store: StepRunStore

    def __init__(
        self,
        store: StepRunStore,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        lease: Seconds | None,
        max_attempts: int | None,
        on_busy: OnBusy,
        owner: str | None,
    ) -> None:
        super().__init__(store.calls, run_id, step, input, lease, max_attempts, on_busy, owner, threading.Event())
        self.store = store

    def __enter__(self) -> Self:
        try:
            with defer_sigalrm() as alarm:
                run_workflow(self.store, self._acquire(), alarm.sleep)
                self._enter()
                if self._state == "held" and self._lease is not None:
                    heartbeat_of(self.store.client).add(self)
        except SquidstepError:
            raise
        except BaseException:  # a signal handler raised: the work has not begun
            with defer_sigalrm(), suppress(SquidstepError):
                self._stop()
                run_workflow(self.store, self._undo_acquire())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with defer_sigalrm():
            try:
                missing = run_workflow(self.store, self._on_exit(error))
            finally:
                self._stop()
        if missing is not None:
            raise missing

    def complete(self, output: Mapping[str, Any], *, schedule: StepInputs | None = None) -> StepRun:
        """Ends the claim with an output, see `complete_step`; one round trip, insistent as `run_step`.

        Returns:
            The completed step run: the winner's, if the claim was lost to it.

        Raises:
            StaleStepRunError: the claim was lost, and the step is not completed.
            StepRunNotFoundError: the run was deleted.
            PayloadError: the output cannot be kept; the claim is still held.
            ServerError: the server could not be told in time; the claim ends with its lease.
        """
        with defer_sigalrm():
            return run_workflow(self.store, self._completing(output, schedule))

    def fail(self, error: Mapping[str, Any] | BaseException) -> StepRun:
        """Ends the claim with an error, see `fail_step`; round trips and errors as for `complete`."""
        with defer_sigalrm():
            return run_workflow(self.store, self._failing(error))

    def release(self) -> StepRun:
        """Gives the claim back before the work took effect, see `release_step`; otherwise as `complete`.

        For a worker that is told to stop (SIGTERM): the attempt does not count, and the step can be claimed at once.
        """
        with defer_sigalrm():
            return run_workflow(self.store, self._releasing())

    def _stop(self) -> None:
        if self._lease is not None:
            heartbeat_of(self.store.client).discard(self)
        self._exit()
