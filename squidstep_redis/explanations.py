"""Why a step is in its state, what happens next, and what an operator can do, as plain sentences. No I/O.

`explain` is a pure function of what the store has read. `operations/explain.py` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final, Literal, NamedTuple

from squidstep_redis.durations import format_moment
from squidstep_redis.errors import UndecodablePayloadError
from squidstep_redis.escaping import escaped
from squidstep_redis.model import Outcome, StepRun, StepStatus
from squidstep_redis.summaries import RunSummary

Reason = Literal[
    "completed",
    "leased",
    "unleased",
    "lapsed",
    "pending",
    "failed",
    "delayed",
    "exhausted",
    "final",
    "cancelled",
]
_MAX_ERROR: Final = 300  # characters


class Action(NamedTuple):
    """Something that an operator can do.

    Attributes:
        operation: the store's method; None if it is done outside of the store.
        effect: when to do it, and what it does.
    """

    operation: str | None
    effect: str


class StepExplanation(NamedTuple):
    """Why a step is in its state. The texts are plain English, without control characters.

    Attributes:
        run_id: the run.
        step: the step.
        status: the state of the step.
        reason: "completed"; "leased": a worker holds it, under a lease; "unleased": a worker holds it, without a lease;
            "lapsed": the lease of its worker has expired; "pending": no worker has claimed it; "failed": it can be
            claimed again at once; "delayed": it has failed, and can be claimed again later; "exhausted": no attempt was
            left; "final": it has failed permanently; "cancelled": its run is cancelled, so it does not begin.
        attempt: number of the latest claim; 0 if there was none.
        owner: who made the latest claim, if known.
        started_at: when the latest claim was made; None if there was none.
        until: when the lease ends or has ended, or when the step can be claimed again; None if neither applies.
        why: why it is in this state.
        next: what happens next, if no operator acts.
        actions: what an operator can do, the most common action first.
    """

    run_id: str
    step: str
    status: StepStatus
    reason: Reason
    attempt: int
    owner: str | None
    started_at: datetime | None
    until: datetime | None
    why: str
    next: str
    actions: tuple[Action, ...]


class RunExplanation(NamedTuple):
    """Why a run is not finished.

    Attributes:
        summary: its counts, its latest change, and whether it is cancelled.
        read_at: when it was read, by the server's clock.
        steps: an explanation of each step that is not completed; steps that need an operator come first.
        omitted: how many further steps are not completed.
    """

    summary: RunSummary
    read_at: datetime
    steps: list[StepExplanation]
    omitted: int


class PastAttempt(NamedTuple):
    """One attempt: the step run as the attempt left it, and its outcome."""

    step_run: StepRun
    outcome: Outcome


# Those that wait for an operator come first, then those that wait for a delivery, then those that wait for a time.
URGENCY: Final[tuple[Reason, ...]] = (
    "final",
    "exhausted",
    "unleased",
    "lapsed",
    "failed",
    "cancelled",
    "delayed",
    "pending",
    "leased",
    "completed",
)

_DELIVER: Final = Action(
    None,
    "Find out whether the step is still queued and whether workers are running. If it is not queued, deliver it again: "
    "enqueue its job, or call the code that executes it.",
)
_RESUME: Final = Action("resume_run", "Let the steps of the run begin again. Deliver them again afterwards.")
_LIMIT: Final = "the limit that your worker passes (max_attempts) is reached"
_NOT_BY_THE_STORE: Final = "The store itself delivers nothing: your queue does."


def reason_of(step_run: StepRun, outcome: Outcome | None, cancelled: bool, now: datetime) -> Reason:
    """Returns why a step is in its state.

    Args:
        step_run: the step.
        outcome: the outcome of its latest attempt; None if there was none, or if it is not known.
        cancelled: whether the run is cancelled.
        now: the server's clock.
    """
    match step_run.status:
        case StepStatus.COMPLETED:
            return "completed"
        case StepStatus.RUNNING if step_run.lease_ends_at is None:
            return "unleased"
        case StepStatus.RUNNING if step_run.lease_ends_at and step_run.lease_ends_at > now:
            return "leased"
        case StepStatus.FAILED if step_run.final:
            return "final"
        case StepStatus.FAILED if outcome is Outcome.LEASE_EXPIRED:
            return "exhausted"
        case _ if cancelled:
            return "cancelled"
        case StepStatus.RUNNING:
            return "lapsed"
        case StepStatus.FAILED:
            return "delayed" if step_run.retry_at and step_run.retry_at > now else "failed"
        case _:
            return "pending"


def explain(
    step_run: StepRun, attempts: Sequence[PastAttempt], cancel_reason: str | None, now: datetime
) -> StepExplanation:
    """Explains one step.

    Args:
        step_run: the step.
        attempts: its known attempts, oldest first; the last one is the latest.
        cancel_reason: why the run is cancelled, empty without a reason; None if it is not.
        now: the server's clock.
    """
    latest = attempts[-1].outcome if attempts else None
    reason = reason_of(step_run, latest, cancel_reason is not None, now)
    facts = _Facts(step_run, attempts, cancel_reason, now)
    why, after, actions = facts.explain(reason)
    until = step_run.lease_ends_at or step_run.retry_at
    head = (step_run.run_id, step_run.step, step_run.status, reason)
    claim = (step_run.attempt, step_run.owner, step_run.started_at, until)
    return StepExplanation(*head, *claim, why, after, actions)


class _Facts(NamedTuple):
    """What is known about a step, and the sentences that say it."""

    step_run: StepRun
    attempts: Sequence[PastAttempt]
    cancel_reason: str | None
    now: datetime

    def explain(self, reason: Reason) -> tuple[str, str, tuple[Action, ...]]:
        """Returns why, what happens next, and what an operator can do."""
        why = " ".join(self._why(reason))
        if reason == "cancelled":
            begins = "Nothing, until the run is resumed: every delivery of the step is skipped."
            return why, begins, (_RESUME,)
        after = " ".join(self._next(reason))
        actions = tuple(self._actions(reason))
        if self.cancel_reason is None or reason == "completed":
            return why, after, actions
        if reason in ("leased", "unleased"):
            note = " The run is cancelled: the worker learns this when it next extends its lease, and may still finish."
        else:
            note = " The run is cancelled, too: resume it before you deliver the step again."
        return why, after + note, (*actions, _RESUME)

    def _why(self, reason: Reason) -> Iterator[str]:
        step_run, number = self.step_run, self.step_run.attempt
        if reason == "cancelled":
            given = f", with the reason: {escaped(self.cancel_reason)}" if self.cancel_reason else ""
            yield f"The run is cancelled{given}. No step of a cancelled run begins."
        match step_run.status:
            case StepStatus.COMPLETED:
                yield f"Attempt {number}{self._by()} completed it {self._at(step_run.ended_at)}."
                return
            case StepStatus.PENDING:
                yield from self._why_pending()
                return
            case StepStatus.FAILED:
                yield from self._why_failed(reason)
            case _:
                yield from self._why_running()
        yield from self._earlier(self.attempts[:-1])

    def _why_running(self) -> Iterator[str]:
        step_run = self.step_run
        worker = f"Worker {escaped(step_run.owner)}" if step_run.owner else "A worker without a name"
        yield f"{worker} began attempt {step_run.attempt} {self._at(step_run.started_at)}, and has not ended it."
        if step_run.lease_ends_at is None:
            yield "It has no lease: the claim never ends by itself, even if the worker is dead."
        elif step_run.lease_ends_at > self.now:
            yield f"It holds the step until its lease ends, {self._at(step_run.lease_ends_at)}, unless it extends the"
            yield "lease before that."
        else:
            yield f"Its lease ended {self._at(step_run.lease_ends_at)} without a result: it has died, hangs, or cannot"
            yield "reach the server. No other worker has taken over the step since."

    def _why_failed(self, reason: Reason) -> Iterator[str]:
        step_run, number = self.step_run, self.step_run.attempt
        if reason == "exhausted":
            yield f"The lease of attempt {number}{self._by()} ended without a result, {self._at(step_run.ended_at)}."
            yield "The next delivery found that the limit that your worker passes (max_attempts) was reached, so the"
            yield "step failed instead of being executed again."
            return
        permanently = " permanently" if step_run.final else ""
        yield f"Attempt {number}{self._by()} failed{permanently} {self._at(step_run.ended_at)}{self._error(step_run)}."
        if step_run.final:
            yield "Its worker reported that no further attempt can succeed."
        elif step_run.retry_at is not None and step_run.retry_at > self.now:
            yield f"Its worker asked for a delay: the step cannot be claimed before {self._when(step_run.retry_at)}."

    def _why_pending(self) -> Iterator[str]:
        step_run = self.step_run
        if not step_run.attempt:
            yield f"It was scheduled {self._at(step_run.created_at)}, and no worker has claimed it since."
            return
        yield f"Attempt {step_run.attempt}{self._by()} was released {self._at(step_run.ended_at)}. It does not count"
        yield "against max_attempts. No worker has claimed the step since."
        yield from self._earlier(self.attempts[:-1])

    def _earlier(self, attempts: Sequence[PastAttempt]) -> Iterator[str]:
        """Says how the last attempt before the latest ended."""
        for step_run, outcome in reversed(attempts):
            if outcome is Outcome.FAILED:
                when = self._at(step_run.ended_at)
                yield f"Before that, attempt {step_run.attempt} failed {when}{self._error(step_run)}."
                return
            if outcome is Outcome.LEASE_EXPIRED:
                yield f"Before that, the lease of attempt {step_run.attempt} ended without a result."
                return

    def _next(self, reason: Reason) -> Iterator[str]:
        number = self.step_run.attempt + 1
        if reason == "leased":
            yield "The worker completes the step, or records a failure. If it is dead, the lease ends at that time, and"
            yield "the next delivery after it takes over the step. Until then, every delivery is skipped as busy."
        elif reason == "unleased":
            yield "If the worker is alive, it completes the step, or records a failure. If it is dead, nothing happens:"
            yield "every delivery is skipped as busy, forever."
        elif reason == "lapsed":
            yield f"The next delivery of the step takes over, with attempt {number}, unless {_LIMIT}."
            yield f"Until one arrives, nothing happens. {_NOT_BY_THE_STORE}"
        elif reason == "pending":
            yield f"The next delivery of the step executes it. Until one arrives, nothing happens. {_NOT_BY_THE_STORE}"
        elif reason == "delayed":
            yield f"Deliveries before that time are skipped. The first one after it executes attempt {number}, unless"
            yield f"{_LIMIT}. {_NOT_BY_THE_STORE}"
        elif reason == "failed":
            used = self.step_run.attempts_used
            yield f"The next delivery executes attempt {number}, unless your worker limits the attempts (max_attempts)"
            yield f"to {used} or fewer: then the delivery is skipped. {_NOT_BY_THE_STORE}"
        elif reason == "exhausted":
            yield "Nothing: a delivery is skipped unless it allows more attempts than before."
        elif reason == "final":
            yield "Nothing: every delivery is skipped, even one that allows more attempts."
        else:
            yield "Nothing more: every further delivery of it receives the stored output."

    def _actions(self, reason: Reason) -> Iterator[Action]:
        again = "Then deliver it again."
        if reason == "leased":
            yield Action(None, "Wait for the worker, or for the end of the lease.")
            yield Action(
                "release_step",
                f"If you know that the worker is dead: make the step pending now, before the lease ends. {again} "
                "If the worker is alive after all, it continues, but its result is rejected.",
            )
        elif reason == "unleased":
            owner = f", {escaped(self.step_run.owner)}," if self.step_run.owner else ""
            yield Action(None, f"Find out whether the worker{owner} is alive. If it is, wait for it.")
            yield Action("release_step", f"If it is dead: make the step pending. {again}")
        elif reason == "lapsed":
            yield _DELIVER
            yield Action("release_step", f"If the lost attempt should not count: make the step pending. {again}")
        elif reason == "pending":
            yield _DELIVER
        elif reason == "delayed":
            yield Action(None, "Wait, if a delivery will arrive after that time.")
            yield Action("retry_step", f"To retry now: make the step pending and reset its attempt counter. {again}")
        elif reason == "failed":
            yield _DELIVER
            yield Action("retry_step", f"If deliveries are skipped: reset its attempt counter. {again}")
        elif reason in ("exhausted", "final"):
            cause = "the cause of the failure is removed" if reason == "final" else "you know why the worker was lost"
            yield Action("retry_step", f"Once {cause}: make the step pending and reset its attempt counter. {again}")
        if reason in ("failed", "exhausted", "final", "lapsed"):
            yield Action("complete_step", "If you have done the work by hand: store its output to complete the step.")

    def _by(self) -> str:
        return f" by {escaped(self.step_run.owner)}" if self.step_run.owner else ""

    def _when(self, moment: datetime) -> str:
        return format_moment(moment, self.now)

    def _at(self, moment: datetime | None) -> str:
        return "at an unknown time" if moment is None else f"at {self._when(moment)}"

    @staticmethod
    def _error(step_run: StepRun) -> str:
        try:
            error = step_run.last_error
        except UndecodablePayloadError:
            return ", with an error that the store's codec cannot decode"
        if not error:
            return ""
        named = {"type", "message"} <= error.keys()
        text = escaped(f"{error['type']}: {error['message']}" if named else str(error)).rstrip(".")
        return f", with {text if len(text) <= _MAX_ERROR else text[:_MAX_ERROR] + '…'}"
