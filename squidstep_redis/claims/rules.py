"""Claims that keep themselves: the rules of `run_step`, without any waiting.

`BaseClaim` says, as generators, what to send and how long to pause; `Claim` and `AsyncClaim`, beside their stores, do
as told. What extends the leases meanwhile is in `heartbeats`.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from typing import Any, Final, Generic, Literal, TypeVar, cast
from weakref import ref

from squidstep_redis.errors import (
    InvalidArgumentError,
    ServerError,
    SquidstepError,
    StaleStepRunError,
    StepBusyError,
    StepExhaustedError,
    StepRunNotFoundError,
    described,
)
from squidstep_redis.model import BeginResult, StepRun, StepStatus
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.arguments import RunId, Seconds, Step, StepInputs, lease_ms
from squidstep_redis.protocol.call import Call, Plan, Queued, queue

E = TypeVar("E", threading.Event, asyncio.Event)
T = TypeVar("T")
C = TypeVar("C", bound="BaseClaim[Any]")

OnBusy = Literal["raise", "wait"]

DEFAULT_LEASE: Final = 30.0
BEATS_PER_LEASE: Final = 3
MAX_RETRY_SECONDS: Final = 60.0  # seconds for which a result that cannot get through is sent again

_FIRST_PAUSE: Final = 0.05
LAST_PAUSE: Final = 1.0

_current: ContextVar[tuple[ref[BaseClaim[Any]], ...]] = ContextVar("squidstep_claims", default=())


def current_claim() -> BaseClaim[threading.Event] | BaseClaim[asyncio.Event] | None:
    """The claim under which this code runs, inside `run_step` or a `claim_step` block; None outside."""
    return next(_current_claims(), None)


def _current_claims() -> Iterator[BaseClaim[Any]]:
    """All those under which this code runs, the innermost first."""
    for reference in _current.get():
        claim = reference()
        if claim is not None:
            yield claim


@cache
def _hostname() -> str:
    return socket.gethostname()


def default_owner() -> str:
    """Who claims, unless said otherwise: `host:pid`."""
    return f"{_hostname()}:{os.getpid()}"


class BaseClaim(Generic[E]):
    """A step to be executed by at most one delivery at a time, and the claim on it while this one executes.

    Attributes:
        decision: "execute" if the claim is this delivery's, "skip" if the step was completed before; None until the
            `with` block is entered.
        lost: an event, set when the claim is found to be taken over or deleted; look at it in long work, and stop.
    """

    store: Any
    lost: E
    decision: Literal["execute", "skip"] | None

    def __init__(
        self,
        calls: Calls,
        run_id: RunId,
        step: Step,
        input: Mapping[str, Any],
        lease: Seconds | None,
        max_attempts: int | None,
        on_busy: OnBusy,
        owner: str | None,
        lost: E,
    ) -> None:
        """Made by `claim_step` alone; raises InvalidArgumentError if `lease` or `on_busy` is refused."""
        if cast("object", on_busy) not in ("raise", "wait"):
            raise InvalidArgumentError("on_busy", f"must be 'raise' or 'wait', not {described(on_busy)}")
        self._calls = calls
        self._lease = lease
        self._lease_seconds = int(lease_ms(lease) or 0) / 1_000
        self._on_busy = on_busy

        def begin() -> Call[BeginResult]:
            claimant = default_owner() if owner is None else owner
            return calls.begin_step(run_id, step, input, lease=lease, max_attempts=max_attempts, owner=claimant)

        self._begin: Callable[[], Call[BeginResult]] = begin
        self._sent: Call[BeginResult] | None = None
        self._loss: StaleStepRunError | StepRunNotFoundError | None = None
        self._step_run: StepRun | None = None
        self._claim: StepRun | None = None  # the step run that carries the claim
        self._sent_at = 0.0
        self._state: Literal["out", "held", "ending", "ended"] = "out"
        self._entered_by: int | None = None  # the process that is in its block
        self.lost = lost
        self.decision = None

    # What the code under the claim looks at

    @property
    def step_run(self) -> StepRun:
        """The step run, as last answered: with `id` and `attempt` it makes an idempotency key."""
        if self._step_run is None:
            raise InvalidArgumentError("claim", "has no step run before its `with` block is entered")
        return self._step_run

    @property
    def input(self) -> dict[str, Any]:
        """What the step is given: the input that is stored, which may be one that it was scheduled with."""
        return self.step_run.input

    @property
    def output(self) -> dict[str, Any] | None:
        """What the step gave, once completed, by whomever."""
        return self.step_run.output

    @property
    def ended(self) -> bool:
        """Whether the code under the claim has ended it itself: completed, failed or released."""
        return self._state == "ended" and self._loss is None

    @property
    def lease_left(self) -> float:
        """Seconds for which nobody else can have taken over, by what is known here; inf without a lease."""
        if self._lease is None:
            return float("inf")
        return max(0.0, self._sent_at + self._lease_seconds - time.monotonic())

    def queue_completion(
        self, pipeline: Any, output: Mapping[str, Any], *, schedule: StepInputs | None = None
    ) -> Queued[StepRun]:
        """Appends the completion to a pipeline of your own: in a transaction, what else is in it commits with it.

        The claim counts as ended once `queued.result(pipeline.execute())` has answered.

        Args:
            pipeline: of a redis-py client of the same server, see `queue` of the store.
            output: as for `complete_step`.
            schedule: likewise.

        Returns:
            What reads the reply; it raises as `complete_step`, but the other commands of the pipeline ran.

        Raises:
            PayloadError: the output cannot be kept; UnsupportedClientError for the pipeline. Nothing was queued.
        """
        call = self._calls.complete_step(self.step_run, output, schedule=schedule)

        def parse(reply: list[Any]) -> StepRun:
            self._step_run, self._state = call.parse(reply), "ended"
            return self._step_run

        queued = queue(pipeline, call._replace(parse=parse))
        self._state = "ending"  # a beat that comes before the reply is read finds no loss
        return queued

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._step_run!r} {self.decision}>"

    # The heartbeat's side

    @property
    def interval(self) -> float:
        """Seconds between extensions."""
        return self._lease_seconds / BEATS_PER_LEASE

    @property
    def is_live(self) -> bool:
        """Whether it is still to be extended."""
        return self._state in ("held", "ending")

    def is_of_this_code(self, step_run: StepRun) -> bool:
        """Whether it is this claim under which the step is executed, by the code that now runs."""
        mine = self.step_run
        return self.is_live and (mine.id, mine.attempt) == (step_run.id, step_run.attempt)

    @property
    def next_extension_at(self) -> float:
        """When to extend it, by the monotonic clock."""
        return self._sent_at + self.interval

    def extension(self) -> Call[StepRun]:
        """The call that extends it."""
        return self._calls.extend_claim(self._claim or self.step_run, self._lease)

    def on_extension_result(self, result: object, sent_at: float) -> bool:
        """Takes in what an extension answered.

        Returns:
            Whether the claim is still held, as far as is known.
        """
        if isinstance(result, StaleStepRunError | StepRunNotFoundError):
            if self._state == "held":
                self._state, self._loss = "ended", result
                self._signal_lost()
            return False
        if not isinstance(result, Exception):
            self._sent_at = sent_at
        return True

    def _signal_lost(self) -> None:
        """Tells the code under the claim that it was lost."""
        self.lost.set()

    # What to do, and in which order

    def _acquire(self) -> Plan[None]:
        """Asks until the step is this delivery's to execute, or was completed.

        Raises:
            StepBusyError: it is another's, and waiting was not asked for.
            StepExhaustedError: it has failed for good.
            InvalidArgumentError: this very code is executing it, and was to wait for itself.
        """
        if self._entered_by is not None:
            raise InvalidArgumentError("claim", "is one block's at a time, and has one: make another by claim_step")
        self.lost.clear()
        self._loss = None
        pause = _FIRST_PAUSE
        while True:
            self._sent, self._sent_at = self._begin(), time.monotonic()
            begun = yield self._sent
            self._step_run = cast("StepRun", begun.step_run)
            if begun.decision == "execute" or begun.reason == "completed":
                self._claim = self._step_run
                self._state = "held" if begun.decision == "execute" else "ended"
                self.decision = begun.decision
                return
            if begun.exhausted:
                raise StepExhaustedError(self._step_run)
            if begun.busy:
                self._sent = None
                if self._on_busy == "raise":
                    raise StepBusyError(self._step_run, begun.retry_in)
                if any(claim.is_of_this_code(self._step_run) for claim in _current_claims()):
                    raise InvalidArgumentError(
                        "on_busy",
                        f"'wait' would be for ever: step {self._step_run.step!r} of run {self._step_run.run_id!r} is "
                        "being executed by this very code. What is executed within a step wants a name of its own",
                    )
                yield min(_spread(pause), begun.retry_in or pause)
                pause = min(2 * pause, LAST_PAUSE)

    def _undo_acquire(self) -> Plan[None]:
        """Gives back what `_acquire` may have claimed: it was interrupted, and the step's work has not begun."""
        self._state = "ended"
        if self._sent is not None:
            begun = yield self._sent  # sent again, it answers the same
            if begun.decision == "execute":
                yield self._calls.release_step(begun.step_run)

    def _completing(self, output: Mapping[str, Any], schedule: StepInputs | None) -> Plan[StepRun]:
        if self._loss is not None:
            return (yield from self._reconcile())
        call = self._calls.complete_step(self.step_run, output, schedule=schedule)
        return (yield from self._finish(call))

    def _failing(self, error: Mapping[str, Any] | BaseException, insist: bool = True) -> Plan[StepRun]:
        call = self._calls.fail_step(self.step_run, error)
        return (yield from self._finish(call if insist else call._replace(retryable=False)))

    def _releasing(self) -> Plan[StepRun]:
        return (yield from self._finish(self._calls.release_step(self.step_run)))

    def _finish(self, call: Call[StepRun]) -> Plan[StepRun]:
        """Ends the claim, and does not give up lightly: the work is done, and would be done again."""
        before, self._state = self._state, "ending"
        try:
            patience = min(self._lease_seconds or MAX_RETRY_SECONDS, MAX_RETRY_SECONDS) if call.retryable else 0
            self._step_run = yield from retry_until(call, patience)
            self._state = "ended"
        except (StaleStepRunError, StepRunNotFoundError) as error:
            self._state, self._loss = "ended", error
            self.lost.set()
            if isinstance(error, StepRunNotFoundError):
                raise
            return self._accept_winner(error)
        finally:
            if self._state == "ending":
                self._state = before
        return self._step_run

    def _reconcile(self) -> Plan[StepRun]:
        """Looks what became of the step that was lost: the winner's result stands, whatever came of the work here."""
        current = yield self._calls.get_step_run(self.step_run.run_id, self.step_run.step)
        if current is None:
            if isinstance(self._loss, StepRunNotFoundError):
                raise self._loss
            raise StepRunNotFoundError(
                self.step_run.run_id, self.step_run.step, "the claim was lost, and there is no such step run any more"
            )
        self._loss = StaleStepRunError(current, "the claim was lost while the work was done. Nothing was written")
        return self._accept_winner(self._loss)

    def _accept_winner(self, error: StaleStepRunError) -> StepRun:
        """Lets the result of whoever took over stand; raises the error if there is none."""
        if error.current.status is not StepStatus.COMPLETED:
            raise error
        self._step_run = error.current
        return error.current

    def result(self) -> dict[str, Any]:
        """What `run_step` answers; raises StaleStepRunError if the work ended its claim without a result."""
        output = self.output
        if output is None:
            raise StaleStepRunError(self.step_run, f"the work ended its own claim: the step is {self.step_run.status}")
        return output

    def may_ask_again(self, error: StaleStepRunError) -> None:
        """Returns if the claim was lost to a worker that is to be waited for; else raises what `run_step` raises."""
        if error is not self._loss or error.current.status is not StepStatus.RUNNING:
            raise error
        if self._on_busy == "raise":
            raise StepBusyError(error.current, None) from error

    def _on_exit(self, error: BaseException | None) -> Plan[BaseException | None]:
        """What is left to do at the end of the block.

        Returns:
            What is to be raised, if the block itself raised nothing.
        """
        if self._state == "ended" or self._entered_by != os.getpid():  # a forked child leaves it to its parent
            return None
        missing = None
        if error is None:
            missing = error = InvalidArgumentError(
                "output", "the block ended without complete(), fail() or release(); the step is recorded as failed"
            )
        try:
            yield from self._failing(error, insist=False)  # what was raised should not wait: the lease ends by itself
        except SquidstepError as problem:
            error.add_note(f"squidstep_redis could not record this failure: {type(problem).__name__}: {problem}")
        return missing

    def _enter(self) -> None:
        self._entered_by = os.getpid()
        _current.set((ref(self), *map(ref, _current_claims())))

    def _exit(self) -> None:
        # A block may be left in another context than it was entered in, and not be the innermost: of two generators the
        # first may end first.
        self._state, self._entered_by = "ended", None
        _current.set(tuple(ref(claim) for claim in _current_claims() if claim is not self))


def retry_until(call: Call[T], patience: float) -> Plan[T]:
    """Sends a call, and again for so many seconds after errors that may pass: beyond the store's own time-out."""
    deadline = time.monotonic() + patience
    pause = _FIRST_PAUSE
    while True:
        try:
            return (yield call)
        except ServerError as error:
            if not error.transient or time.monotonic() + pause > deadline:
                raise
        yield _spread(pause)
        pause = min(2 * pause, LAST_PAUSE)


def _spread(seconds: float) -> float:
    """A little more or less, so that those who wait for the same do not all come at once."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 -- nothing secret
