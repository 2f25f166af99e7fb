"""What became of a step: assertions whose failures show the run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

from squidstep_redis import AsyncStepRunStore, Attempt, Outcome, StepRun, StepRunStore, StepStatus
from squidstep_redis.protocol.arguments import RunId, Step
from squidstep_redis.protocol.arguments import step as step_name
from squidstep_redis.testing.kit import observer_of

Store = StepRunStore | AsyncStepRunStore

_ANY: Final = object()
_WIDTH: Final = 60


def assert_completed(store: Store, run: RunId, step: Step, output: Mapping[str, Any] | object = _ANY) -> StepRun:
    """Asserts that a step is completed. One round trip; nothing to await, also with the asyncio store of a kit.

    Args:
        store: on which to look.
        run: the run.
        step: the step.
        output: what it gave; left out: anything.

    Returns:
        The step run.

    Raises:
        AssertionError: it is not; the message shows the run.
    """
    __tracebackhide__ = True
    found = _found(store, run, step, StepStatus.COMPLETED)
    if output is not _ANY and found.output != output:
        _fail(store, run, step, f"gave {found.output!r}, not {output!r}")
    return found


def assert_failed(store: Store, run: RunId, step: Step, match: str = "") -> StepRun:
    """Asserts that the latest attempt at a step failed, and nobody has begun another. One round trip.

    Args:
        store: as for `assert_completed`.
        run: see there.
        step: see there.
        match: a pattern to find in the error, as `"type: message"` for exceptions, else as the dict's `repr`.

    Returns:
        The step run.

    Raises:
        AssertionError: it did not; the message shows the run.
    """
    __tracebackhide__ = True
    found = _found(store, run, step, StepStatus.FAILED)
    error = _error(found.last_error)
    if not re.search(match, error):
        _fail(store, run, step, f"failed with {error!r}, in which {match!r} is not found")
    return found


def assert_executed_once(store: Store, run: RunId, step: Step) -> StepRun:
    """Asserts that a step is completed, and that one delivery alone was ever told to execute it. Two round trips.

    A takeover, or an attempt that failed, is another execution; one that was released is none.

    Args:
        store: as for `assert_completed`.
        run: see there.
        step: see there.

    Returns:
        The step run.

    Raises:
        AssertionError: it is not; the message shows the run, and the attempts.
    """
    __tracebackhide__ = True
    found = _found(store, run, step, StepStatus.COMPLETED)
    executed = [attempt for attempt in _attempts(store, run, step) if attempt.outcome is not Outcome.RELEASED]
    if len(executed) != 1:
        _fail(store, run, step, f"was executed {len(executed)} times, not once")
    return found


def assert_not_begun(store: Store, run: RunId, step: Step) -> None:
    """Asserts that nobody was ever told to execute a step: there is no record, or one that was never claimed.

    One round trip.

    Args:
        store: as for `assert_completed`.
        run: see there.
        step: see there.

    Raises:
        AssertionError: somebody was; the message shows the run.
    """
    __tracebackhide__ = True
    found = observer_of(store).send(store.calls.get_step_run(run, step))
    if found is not None and found.attempt:
        _fail(store, run, step, f"was begun: it is {found.status}")


def describe_run(store: Store, run: RunId) -> str:
    """The steps of a run as a table, and the attempts at those that took more than one. One round trip, and one each.

    Args:
        store: as for `assert_completed`.
        run: the run.
    """
    steps = observer_of(store).send(store.calls.get_run(run))
    if not steps:
        return f"run {str(run)!r} has no steps"
    rows = [("step", "status", "attempt", "owner", "input", "output or error")]
    rows += [
        (each.step, each.status, str(each.attempt), each.owner or "", _short(each.input), _short(_result(each)))
        for each in steps
    ]
    parts = [f"run {str(run)!r}", _table(rows)]
    for each in steps:
        if each.attempt > 1:
            parts += [f"attempts at {each.step!r}", _table([_row(one) for one in _attempts(store, run, each.step)])]
    return "\n".join(parts)


def _found(store: Store, run: RunId, step: Step, wanted: StepStatus) -> StepRun:
    __tracebackhide__ = True
    found = observer_of(store).send(store.calls.get_step_run(run, step))
    if found is None:
        _fail(store, run, step, "has no record")
    if found.status is not wanted:
        _fail(store, run, step, f"is {found.status}, not {wanted}")
    return found


def _fail(store: Store, run: RunId, step: Step, what: str) -> NoReturn:
    __tracebackhide__ = True
    raise AssertionError(f"step {step_name(step).text!r} of run {str(run)!r} {what}\n\n{describe_run(store, run)}")


def _attempts(store: Store, run: RunId, step: Step) -> list[Attempt]:
    return observer_of(store).send(store.calls.attempts(run, step))


def _row(attempt: Attempt) -> tuple[str, ...]:
    span = f"{(attempt.ended_at - attempt.started_at).total_seconds():.3f} s" if attempt.ended_at else ""
    return str(attempt.number), attempt.outcome, attempt.owner or "", span, _short(_error(attempt.error))


def _result(step_run: StepRun) -> str:
    return _error(step_run.last_error) if step_run.output is None else repr(step_run.output)


def _error(error: Mapping[str, Any] | None) -> str:
    if error is None:
        return ""
    return f"{error['type']}: {error['message']}" if {"type", "message"} <= error.keys() else repr(error)


def _short(value: object) -> str:
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
