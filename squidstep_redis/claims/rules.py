"""The rules of `run_step` and `claim_step`, as workflows. This module does no I/O.

`Claim` (claim.py) and `AsyncClaim` (aio_claim.py) run these workflows. The heartbeats extend the leases meanwhile.

A claim has four states:

    new ──_acquire──▶ held ──_finish──▶ ending ──▶ ended      ending: the call was sent, and its result is not known yet
                        └──the heartbeat finds it taken over──▶ ended, with the loss recorded

If the code of a claim was interrupted or got no reply, the rest is done later: see `unfinished.py`.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, Generic, Literal, TypeVar

from squidstep_redis.claims.checkpoints import LazyCheckpoint
from squidstep_redis.claims.current import current_claims, enter, leave
from squidstep_redis.claims.failures import AT_ONCE, NEVER, Verdict
from squidstep_redis.claims.request import ClaimRequest
from squidstep_redis.claims.retrying import FIRST_PAUSE, LAST_PAUSE, is_refusal, jittered, retry_until
from squidstep_redis.claims.skips import cancelled_error, skip_error
from squidstep_redis.claims.unfinished import give_back
from squidstep_redis.errors import (
    InvalidArgumentError,
    RunCancelledError,
    SquidstepError,
    StaleStepRunError,
    StepBusyError,
    StepDelayedError,
    StepRunNotFoundError,
    add_note,
)
from squidstep_redis.model import BeginResult, StepRun, StepStatus
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.arguments import Seconds, StepInputs
from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.pipeline import Queued, queue
from squidstep_redis.protocol.workflow import Send, Sleep, Workflow
from squidstep_redis.server_errors import ServerError
from squidstep_redis.signals import is_raised_by_handler
from squidstep_redis.steady import steady_time as time

E = TypeVar("E", threading.Event, asyncio.Event)
T = TypeVar("T")

EXTENSIONS_PER_LEASE: Final = 3
MAX_RETRY_SECONDS: Final = 60.0  # for the result of finished work


def current_claim() -> BaseClaim[threading.Event] | BaseClaim[asyncio.Event] | None:
    """Returns the claim under which this code runs, inside `run_step` or a `claim_step` block; None outside."""
    return next(current_claims(), None)


class BaseClaim(Generic[E]):
    """A step that at most one delivery executes at a time, and the claim on it while this delivery executes it.

    Attributes:
        decision: "execute" if this delivery holds the claim, "skip" if the step was completed before; None until the
            `with` block is entered.
        lost: an event that is set when the claim was taken over or the run deleted. Check it in long work, and stop.
        cancelled: an event that is set when the run was cancelled. The claim is still held: complete the work, or stop
            and raise `cancellation`.
    """

    store: Any
    lost: E
    cancelled: E
    decision: Literal["execute", "skip"] | None

    def __init__(self, calls: Calls, request: ClaimRequest, lost: E, cancelled: E) -> None:
        """Called only by `claim_step`."""
        self._calls = calls
        self._request = request
        self._lease, self._lease_seconds = request.lease, request.lease_seconds
        self._sent: Call[BeginResult] | None = None  # what may have acquired the claim
        self._unrecorded: ServerError | None = None  # what ending the claim raised
        self._unstorable: Exception | None = None  # why the output was rejected
        self._interruption: BaseException | None = None  # an exception from outside while the claim was ended
        self._loss: StaleStepRunError | StepRunNotFoundError | None = None
        self._step_run: StepRun | None = None
        self._claim: StepRun | None = None  # the step run that carries the claim
        self._sent_at = 0.0
        self._lazy = LazyCheckpoint()
        self._state: Literal["new", "held", "ending", "ended"] = "new"
        self._entered_by: int | None = None  # the process that is in its block
        self.lost, self.cancelled = lost, cancelled
        self.cancellation: RunCancelledError | None = None
        self.decision = None

    # For the code under the claim

    @property
    def step_run(self) -> StepRun:
        """The step run as last returned by the server: its `id` and `attempt` make an idempotency key."""
        if self._step_run is None:
            raise InvalidArgumentError("claim", "has no step run before its `with` block is entered")
        return self._step_run

    @property
    def input(self) -> dict[str, Any]:
        """The stored input: that of `schedule_step`, if the step was scheduled."""
        return self.step_run.input

    @property
    def output(self) -> dict[str, Any] | None:
        """The step's output; None until it is completed, here or by another worker."""
        return self.step_run.output

    @property
    def progress(self) -> dict[str, Any] | None:
        """The progress that an earlier attempt had stored when this attempt began; None without any."""
        return (self._claim or self.step_run).progress

    @property
    def ended(self) -> bool:
        """Whether the code under the claim has completed, failed or released it."""
        return self._state == "ended" and self._loss is None

    @property
    def lease_left(self) -> float:
        """Seconds until the lease expires, as far as this process knows; inf without a lease."""
        if self._lease is None:
            return float("inf")
        return max(0.0, self._sent_at + self._lease_seconds - time.monotonic())

    def queue_completion(
        self, pipeline: Any, output: Mapping[str, Any], *, schedule: StepInputs | None = None
    ) -> Queued[StepRun]:
        """Appends the completion to your own pipeline; in a transaction, it commits with the other commands.

        The claim has ended once `queued.result(pipeline.execute())` has returned.

        Args:
            pipeline: a redis-py pipeline on the same server, not yet executed.
            output: the step's output, a dict.
            schedule: a dict of input by step: the steps in it that have no record become pending; None: none.

        Returns:
            An object that reads the reply. It raises what `complete_step` raises; the other commands of the pipeline
            still take effect.

        Raises:
            PayloadError: the output cannot be stored; UnsupportedClientError for the pipeline. Nothing was queued.
        """
        call = self._completion(output, schedule)

        def parse(reply: list[Any]) -> StepRun:
            self._step_run, self._state = call.parse(reply), "ended"
            return self._step_run

        queued = queue(pipeline, call._replace(parse=parse))
        self._state = "ending"  # an extension that fails before the reply is read does not mean that the claim is lost
        return queued

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._step_run!r} {self.decision}>"

    # For the heartbeat

    @property
    def interval(self) -> float:
        """Seconds between extensions."""
        return self._lease_seconds / EXTENSIONS_PER_LEASE

    @property
    def is_live(self) -> bool:
        """Whether the lease must still be extended."""
        return self._state in ("held", "ending")

    def is_of_this_code(self, step_run: StepRun) -> bool:
        """Whether the code that runs now executes the step under this claim."""
        own = self.step_run
        return self.is_live and (own.id, own.attempt) == (step_run.id, step_run.attempt)

    @property
    def next_extension_at(self) -> float:
        """When to extend the lease, on the monotonic clock."""
        return self._sent_at + self.interval

    def extension(self) -> Call[StepRun]:
        """Returns the call that extends the lease, and carries a lazy checkpoint if there is one."""
        return self._lazy.take() or self._calls.extend_claim(self._claim or self.step_run, self._lease)

    def on_extension_result(self, result: object, sent_at: float) -> bool:
        """Applies the result of a lease extension; returns False if the claim is known to be lost."""
        if isinstance(result, StaleStepRunError | StepRunNotFoundError):
            if self._state == "held":
                self._state, self._loss = "ended", result
                self._signal_lost()
            return False
        if not isinstance(result, Exception):
            self._sent_at = sent_at
            self._lazy.on_extended()
            self._on_cancelled(result)
        return True

    def _on_cancelled(self, result: object) -> None:
        """Signals a cancelled run to the code under the claim, once, if the result of a call says so."""
        if not isinstance(result, StepRun) or result.cancel_reason is None:
            return
        if self._state == "held" and not self.cancelled.is_set():
            self.cancellation = cancelled_error(result)
            self._signal_cancelled()

    def _signal_cancelled(self) -> None:
        """Signals that the run was cancelled."""
        self.cancelled.set()

    def _signal_lost(self) -> None:
        """Signals the loss to the code under the claim."""
        self.lost.set()

    # Workflows

    def _acquire(self) -> Workflow[None]:
        """Sends begin_step until this delivery may execute the step, or the step is completed.

        Raises:
            InputMismatchError: the step has a different fingerprint.
            StepBusyError: another worker holds the step, and `on_busy` is "raise".
            StepDelayedError: the step has failed and may not be retried yet, and `on_busy` is "raise".
            RunCancelledError: the run is cancelled.
            StepFailedError: the step has failed permanently.
            StepExhaustedError: `max_attempts` is reached.
            InvalidArgumentError: this code itself is executing the step, and would wait for itself.
        """
        self._raise_if_entered()
        self.lost.clear()
        self.cancelled.clear()
        self.cancellation = None
        self._loss = self._sent = self._unrecorded = self._unstorable = self._interruption = None
        self._lazy = LazyCheckpoint()
        pause = FIRST_PAUSE
        while True:
            call = self._request.begin(self._calls)
            self._sent, self._sent_at = call, time.monotonic()
            try:
                result: BeginResult = yield Send(call)
            except SquidstepError as error:
                if is_refusal(error, call):
                    self._sent = None
                raise
            self._step_run = result.step_run
            if result.decision == "execute":
                self._claim = self._step_run
                self.decision = "execute"
                self._state = "held"
                return
            self._sent = None
            if result.reason == "completed":
                self._claim = self._step_run
                self.decision = "skip"
                self._state = "ended"
                return
            error = skip_error(result)
            if error is not None:
                if self._request.on_busy == "raise" or not isinstance(error, StepBusyError | StepDelayedError):
                    raise error
                if result.busy and any(claim.is_of_this_code(self._step_run) for claim in current_claims()):
                    raise InvalidArgumentError(
                        "on_busy",
                        f"'wait' would never end: this code itself is executing step {self._step_run.step!r} of run "
                        f"{self._step_run.run_id!r}. A nested step needs its own name",
                    )
                yield Sleep(min(jittered(pause), result.retry_in or pause))
                pause = min(2 * pause, LAST_PAUSE)

    def _raise_if_entered(self) -> None:
        if self._entered_by is not None:
            raise InvalidArgumentError("claim", "is already in a `with` block: make another one with claim_step")

    def _undo_acquire(self) -> Workflow[None]:
        """Releases what an interrupted `_acquire` may have claimed, before the work starts."""
        self._state = "ended"
        if self._sent is not None:
            yield from give_back(self._calls, self._sent)

    def _checkpoint(self, progress: Mapping[str, Any], lazy: bool) -> Workflow[None]:
        """Stores progress for the next attempt: now, or with the next extension."""
        if self._loss is not None:
            raise self._loss
        if lazy and self._lease is not None:
            self._lazy.latest = self._calls.extend_claim(self.step_run, self._lease, progress=progress)
            return
        call, earlier = self._calls.checkpoint_step(self.step_run, progress), self._lazy.latest
        try:
            self._on_cancelled((yield Send(call)))
        except (StaleStepRunError, StepRunNotFoundError) as error:
            self._lose(error)
            raise
        if self._lazy.latest is earlier:
            self._lazy.latest = None

    def _store_lazy_checkpoint(self, retryable: bool = True) -> Workflow[None]:
        """Stores the checkpoint that no extension has carried yet, because the attempt ends without a result."""
        call = self._lazy.pending
        if call is not None and self._state == "held":
            with suppress(SquidstepError):  # ending the claim has the same problem, and raises the error
                yield Send(call if retryable else call._replace(retryable=False))
            self._lazy.latest = None

    def _complete(self, output: Mapping[str, Any], schedule: StepInputs | None) -> Workflow[StepRun]:
        if self._loss is not None:
            return (yield from self._reconcile())
        return (yield from self._finish(self._completion(output, schedule)))

    def _completion(self, output: Mapping[str, Any], schedule: StepInputs | None) -> Call[StepRun]:
        try:
            return self._calls.complete_step(self.step_run, output, schedule=schedule)
        except Exception as error:
            if not self._is_interruption(error):  # a codec may raise anything
                self._unstorable = error
            raise

    def _fail(
        self, error: Mapping[str, Any] | BaseException, final: bool, retry_after: Seconds | None, retryable: bool = True
    ) -> Workflow[StepRun]:
        call = self._calls.fail_step(self.step_run, error, final=final, retry_after=retry_after)
        yield from self._store_lazy_checkpoint(retryable)
        return (yield from self._finish(call if retryable else call._replace(retryable=False)))

    def _release(self) -> Workflow[StepRun]:
        yield from self._store_lazy_checkpoint()
        return (yield from self._finish(self._calls.release_step(self.step_run)))

    def _finish(self, call: Call[StepRun]) -> Workflow[StepRun]:
        """Ends the claim. It retries beyond the store's timeout: if the result is lost, the work must be repeated."""
        before, self._state = self._state, "ending"
        try:
            seconds = self._longest_retry if call.retryable else 0
            self._step_run = yield from retry_until(call, time.monotonic() + seconds)
            self._state = "ended"
        except (StaleStepRunError, StepRunNotFoundError) as error:
            self._lose(error)
            if isinstance(error, StepRunNotFoundError):
                raise
            return self._accept_winner(error)
        except ServerError as error:
            self._unrecorded = error
            raise
        finally:
            if self._state == "ending":
                self._state = before
        return self._step_run

    def _lose(self, error: StaleStepRunError | StepRunNotFoundError) -> None:
        """Records that a call of the code under the claim has found it lost; the call raises the error."""
        self._state, self._loss = "ended", error
        self.lost.set()

    @property
    def _longest_retry(self) -> float:
        """How many seconds to retry ending the claim while the server cannot be reached."""
        return min(self._lease_seconds or MAX_RETRY_SECONDS, MAX_RETRY_SECONDS)

    def _reconcile(self) -> Workflow[StepRun]:
        """Reads the step whose claim was lost. The winner's result is valid; the local one is discarded."""
        current = yield Send(self._calls.get_step_run(self.step_run.run_id, self.step_run.step))
        if current is None:
            if isinstance(self._loss, StepRunNotFoundError):
                raise self._loss
            raise StepRunNotFoundError(
                self.step_run.run_id, self.step_run.step, "the claim was lost, and the step run no longer exists"
            )
        self._loss = StaleStepRunError(current, "the claim was lost during the work. Nothing was written")
        return self._accept_winner(self._loss)

    def _accept_winner(self, error: StaleStepRunError) -> StepRun:
        """Returns the step run that the winner completed; raises the error if it is not completed."""
        if error.current.status is not StepStatus.COMPLETED:
            raise error
        self._step_run = error.current
        return error.current

    def result(self) -> dict[str, Any]:
        """Returns the output for `run_step`; raises StaleStepRunError if the work ended its claim without one."""
        output = self.output
        if output is None:
            raise StaleStepRunError(self.step_run, f"the work ended its own claim: the step is {self.step_run.status}")
        return output

    def raise_unless_taken_over(self, error: StaleStepRunError) -> None:
        """Returns if `run_step` must check the step again: the winner has completed it, or `run_step` waits for it.

        Otherwise raises what `run_step` raises.
        """
        status = error.current.status
        if error is not self._loss or status not in (StepStatus.RUNNING, StepStatus.COMPLETED):
            raise error
        if status is StepStatus.RUNNING and self._request.on_busy == "raise":
            raise StepBusyError(error.current, None) from error

    def _on_exit(self, error: BaseException | None) -> Workflow[BaseException | None]:
        """Records what the block raised, when the block exits: retried for as long as a result.

        There is one attempt if a retried ending has just failed, or if the block was interrupted from outside: it
        must end soon.

        Returns:
            The error to raise if the block itself raised nothing.
        """
        if not self._is_held_here:
            return None
        missing = None
        if error is None:
            missing = error = InvalidArgumentError(
                "output", "the block ended without complete(), fail() or release(); the step is recorded as failed"
            )
        try:
            retryable = error is not self._unrecorded and not self._is_interruption(error)
            yield from self._fail(error, *self._verdict(error), retryable)
        except SquidstepError as problem:
            add_note(error, f"squidstep_redis could not record this failure: {type(problem).__name__}: {problem}")
        return missing

    def _verdict(self, error: BaseException) -> Verdict:
        """Returns when the step can be claimed again after an exception left the block."""
        if error is self.cancellation:
            return AT_ONCE
        if error is not self._unstorable:
            return self._request.failures.verdict(error, self.step_run.attempts_used)
        error.add_note("The result of the work cannot be stored: the step has failed permanently, until retry_step")
        return NEVER

    @property
    def _is_held_here(self) -> bool:
        """Whether the claim must still be ended. In a forked child, it belongs to the parent."""
        return self._state in ("held", "ending") and self._entered_by == os.getpid()

    def _is_interruption(self, error: BaseException) -> bool:
        """Whether the block was interrupted from outside: then it must be left within INTERRUPTED_SECONDS.

        This is not known of an `Exception` that another thread set: it looks like an exception of the work.
        """
        return not isinstance(error, Exception) or error is self._interruption or is_raised_by_handler(error)

    def _enter(self) -> None:
        self._entered_by = os.getpid()
        enter(self)

    def _exit(self) -> None:
        self._state, self._entered_by = "ended", None
        leave(self)
