"""What a store decided, told to whoever asked: a line in the log, a function of the user's, a metric.

Nobody is told of payloads. Where nobody asked, a call takes 0.2 µs more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

from squidstep_redis.errors import StaleStepRunError, StepRunNotFoundError
from squidstep_redis.model import BeginResult, StepRun
from squidstep_redis.protocol.call import Call

_log: Final = logging.getLogger("squidstep_redis")

Kind = Literal["execute", "skip", "complete", "fail", "release", "extend", "schedule", "refuse", "error"]

_ENDINGS: Final[dict[str, Kind]] = {
    "complete_step": "complete",
    "fail_step": "fail",
    "release_step": "release",
    "extend_claim": "extend",
    "schedule_step": "schedule",
    "schedule_steps": "schedule",
}
# What an operator wants to see is said aloud, what happens at every step is not.
INFO_KINDS: Final = ("fail", "refuse", "error")


class Event(NamedTuple):
    """One decision of a store, or one that it could not have made.

    Attributes:
        kind: "execute" or "skip" of a begin_step; "complete", "fail", "release", "extend" and "schedule" of the
            transition of that name; "refuse" for a claim that was not held (any more): the work of a zombie; "error"
            for every other error.
        operation: the method, or the script, that was sent.
        run_id: the run.
        step: the step; None where a call is about several.
        attempt: number of the claim, where it is known.
        owner: who holds or held the claim, likewise.
        reason: of a skip: that of the `BeginResult`; of a refusal or an error: the name of its class.
        takeover: whether a claim was granted over one whose lease had ended.
        seconds: what the call took, re-sends included; of a call in a batch: what the batch took.
        batched: whether it was in a batch.
        prefix: the store's.
    """

    kind: Kind
    operation: str
    run_id: str
    step: str | None
    attempt: int | None
    owner: str | None
    reason: str | None
    takeover: bool
    seconds: float
    batched: bool
    prefix: str

    def __str__(self) -> str:
        step = "" if self.step is None else f", step {self.step!r}"
        attempt = f", attempt {self.attempt}" if self.attempt else ""
        owner = f" by {self.owner}" if self.owner else ""
        takeover = ", a takeover" if self.takeover else ""
        reason = f": {self.reason}" if self.reason else ""
        return (
            f"run {self.run_id!r}{step}: {self.kind}{reason}{attempt}{takeover}{owner} "
            f"({self.operation}, {1_000 * self.seconds:.1f} ms)"
        )


Listener = Callable[[Event], object]


class EventEmitter:
    """Who is to be told of a store's decisions. False while it is nobody."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.listeners: list[Listener] = []

    def __bool__(self) -> bool:
        return bool(self.listeners) or _log.isEnabledFor(logging.INFO)

    def emit_all(self, calls: Sequence[Call[Any]], outcomes: Sequence[object], seconds: float) -> None:
        """Tells of a batch."""
        for call, outcome in zip(calls, outcomes, strict=True):
            self.emit(call, outcome, seconds, batched=True)

    def emit(self, call: Call[Any], outcome: object, seconds: float, *, batched: bool = False) -> None:
        """Tells of what a call came to: its result, or the error that it raises."""
        for event in events_of(call, outcome, seconds, batched, self._prefix):
            aloud = event.takeover or event.kind in INFO_KINDS or event.reason == "exhausted"
            _log.log(logging.INFO if aloud else logging.DEBUG, "%s", event)
            for listener in self.listeners:
                try:
                    listener(event)
                except Exception:  # noqa: BLE001 -- the decision stands, whatever becomes of the news
                    _log.exception("a listener failed at %s", event)


def events_of(call: Call[Any], outcome: object, seconds: float, batched: bool, prefix: str) -> Iterator[Event]:
    """What there is to tell of a call: nothing of a read, two events of an advance_step."""
    operation = call.script.name
    if not call.script.is_transition or call.run_id is None:
        return

    def event(kind: Kind, step_run: StepRun | None, reason: str | None = None, takeover: bool = False) -> Event:
        step, attempt, owner = call.step, None, None
        if step_run is not None:
            step, attempt, owner = step_run.step, step_run.attempt or None, step_run.owner
        return Event(
            kind, operation, call.run_id or "", step, attempt, owner, reason, takeover, seconds, batched, prefix
        )

    if isinstance(outcome, Exception):
        name = type(outcome).__name__
        if isinstance(outcome, StaleStepRunError | StepRunNotFoundError):
            yield event("refuse", getattr(outcome, "current", None), name)
        else:
            yield event("error", None, name)
    elif isinstance(outcome, BeginResult):
        if operation == "advance_step":
            yield event("complete", None)
        kind: Kind = "execute" if outcome.decision == "execute" else "skip"
        yield event(kind, outcome.step_run, outcome.reason, outcome.takeover)
    elif operation in _ENDINGS:
        yield event(_ENDINGS[operation], outcome if isinstance(outcome, StepRun) else None)
