"""Assertions about steps. Their failure messages show the whole run."""

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
    """Asserts that a step is completed. One round trip. Do not await it, even with the asyncio store of a kit.

    Args:
        store: a blocking store, or the asyncio store of a kit.
        run: the id of the run.
        step: the name of the step.
        output: the expected output; any output if omitted.

    Returns:
        The step run.

    Raises:
        AssertionError: the step is not completed, or its output differs. The message shows the run.
    """
    __tracebackhide__ = True
    found = _found(store, run, step, StepStatus.COMPLETED)
    if output is not _ANY and found.output != output:
        _fail(store, run, step, f"has the output {found.output!r}, not {output!r}")
    return found


def assert_failed(store: Store, run: RunId, step: Step, match: str = "") -> StepRun:
    """Asserts that the latest attempt at a step failed, and that no other has started. One round trip.

    Args:
        store: a blocking store, or the asyncio store of a kit.
        run: the id of the run.
        step: the name of the step.
        match: a regular expression to find in the error: in `"type: message"` for an exception, else in the dict's
            `repr`. Any error if empty.

    Returns:
        The step run.

    Raises:
        AssertionError: the step is not failed, or its error does not match. The message shows the run.
    """
    __tracebackhide__ = True
    found = _found(store, run, step, StepStatus.FAILED)
    error = _error(found.last_error)
    if not re.search(match, error):
        _fail(store, run, step, f"failed with {error!r}, which does not match {match!r}")
    return found


def assert_executed_once(store: Store, run: RunId, step: Step) -> StepRun:
    """Asserts that a step is completed, and that exactly one delivery executed it. Two round trips.

    A takeover and a failed attempt count as executions; a released attempt does not.

    Args:
        store: a blocking store, or the asyncio store of a kit.
        run: the id of the run.
        step: the name of the step.

    Returns:
        The step run.

    Raises:
        AssertionError: the step is not completed, or was executed more than once. The message shows the run and the
            attempts.
    """
    __tracebackhide__ = True
    found = _found(store, run, step, StepStatus.COMPLETED)
    executed = [attempt for attempt in _attempts(store, run, step) if attempt.outcome is not Outcome.RELEASED]
    if len(executed) != 1:
        _fail(store, run, step, f"was executed {len(executed)} times, not once")
    return found


def assert_not_begun(store: Store, run: RunId, step: Step) -> None:
    """Asserts that no delivery ever claimed a step: it has no record, or only a scheduled one. One round trip.

    Args:
        store: a blocking store, or the asyncio store of a kit.
        run: the id of the run.
        step: the name of the step.

    Raises:
        AssertionError: the step was claimed. The message shows the run.
    """
    __tracebackhide__ = True
    found = observer_of(store).send(store.calls.get_step_run(run, step))
    if found is not None and found.attempt:
        _fail(store, run, step, f"was claimed, and is {found.status}")


def describe_run(store: Store, run: RunId) -> str:
    """Returns a table of a run's steps, and one of the attempts at each step that has more than one.

    One round trip, and another for each step with several attempts.

    Args:
        store: a blocking store, or the asyncio store of a kit.
        run: the id of the run.
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


def _found(store: Store, run: RunId, step: Step, expected: StepStatus) -> StepRun:
    __tracebackhide__ = True
    found = observer_of(store).send(store.calls.get_step_run(run, step))
    if found is None:
        _fail(store, run, step, "has no record")
    if found.status is not expected:
        _fail(store, run, step, f"is {found.status}, not {expected}")
    return found


def _fail(store: Store, run: RunId, step: Step, problem: str) -> NoReturn:
    __tracebackhide__ = True
    raise AssertionError(f"step {step_name(step).text!r} of run {str(run)!r} {problem}\n\n{describe_run(store, run)}")


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
