"""Helpers of test_machine.py: operations on the store and on the model, and results that can be compared."""

from __future__ import annotations

import time
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

from squidstep_redis import (
    Attempt,
    BeginResult,
    Call,
    InputMismatchError,
    RunDeletedError,
    RunExistsError,
    ScheduleResult,
    StaleStepRunError,
    StepPage,
    StepRun,
    StepRunNotFoundError,
)
from support.model import Claim, Model, PastAttempt, RefusedError, Snapshot


class Holder(NamedTuple):
    """A claim as the store and as the model know it: `step_run` is the claimed step run, or a bare id."""

    step_run: StepRun | str
    claim: Claim


class Operation(NamedTuple):
    """An operation and its arguments, for the store and for the model."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def run(self) -> str:
        """The run of the first argument, which is a run or a holder."""
        first = self.args[0]
        return first.claim.run if isinstance(first, Holder) else first

    def call(self, calls: Any) -> Call[Any]:
        args = (arg.step_run if isinstance(arg, Holder) else arg for arg in self.args)
        return getattr(calls, self.name)(*args, **self.kwargs)

    def apply(self, model: Model, call: int | None = None) -> object:
        args = (arg.claim if isinstance(arg, Holder) else arg for arg in self.args)
        resendable = {} if call is None else {"call": call}
        try:
            return getattr(model, self.name)(*args, **self.kwargs, **resendable)
        except RefusedError as refusal:
            return refusal.args


class RecordedCall(NamedTuple):
    """A call of an operation, which can be sent several times."""

    operation: Operation
    call: Call[Any]
    id: int

    def __repr__(self) -> str:
        return f"<call {self.id}, {self.operation}>"


def as_model(result: object) -> object:
    """Converts a result of the store to what the model returns."""
    match result:
        case StepRun():
            return snapshot(result)
        case BeginResult():
            assert result.decision == ("skip" if result.reason else "execute")
            return snapshot(result.step_run), result.reason, seconds_left(result.retry_in)
        case StepPage():
            assert result.cursor is None
            return [snapshot(each) for each in sorted(result.step_runs, key=lambda step_run: step_run.position)]
        case ScheduleResult():
            return snapshot(result.step_run), result.decision
        case Attempt():
            assert_in_order(result.started_at, result.ended_at)
            assert (result.ended_at is None) == (result.outcome == "running")
            return PastAttempt(result.number, result.owner, result.outcome, result.error)
        case Exception():
            return refusal(result)
        case list():
            return [as_model(each) for each in result]
        case _:
            return result


def refusal(error: Exception) -> tuple[str, object]:
    """Converts an error to what the model raises; raises those that the model does not know."""
    match error:
        case RunDeletedError():
            return "deleted", None
        case StepRunNotFoundError():
            return "missing", None
        case RunExistsError():
            return "exists", None
        case StaleStepRunError():
            return "stale", snapshot(error.current)
        case InputMismatchError():
            return "mismatch", error.stored
        case _:
            raise error


def without_unread(recorded: RecordedCall, result: Any) -> object:
    """Drops what the operation does not read: an extension returns the progress that its argument knew."""
    if recorded.operation.name == "extend_claim" and isinstance(result, Snapshot):
        return result._replace(progress=None)
    return result


def snapshot(step_run: StepRun) -> Snapshot:
    assert_in_order(step_run.created_at, step_run.started_at, step_run.ended_at)
    assert (step_run.started_at is None) == (step_run.attempt == 0)
    assert (step_run.ended_at is None) == (step_run.attempt == 0 or step_run.status == "running")
    return Snapshot(
        step_run.run_id,
        step_run.step,
        step_run.status,
        step_run.attempt,
        step_run.owner,
        step_run.input,
        step_run.output,
        step_run.last_error,
        seconds_left(step_run.lease_ends_at and step_run.lease_ends_at.timestamp() - time.time()),
        step_run.position,
        step_run.final,
        seconds_left(step_run.retry_at and step_run.retry_at.timestamp() - time.time()),
        step_run.progress,
    )


def seconds_left(left: float | None) -> int | None:
    """Rounds the rest of a lease to the model's lease: leases are so long that the test's own time rounds away."""
    return None if left is None else max(0, round(left, -3))


def assert_in_order(*times: datetime | None) -> None:
    assert all(earlier <= later for earlier, later in pairwise(time for time in times if time is not None))


def expire_lease(raw: Any, keys: list[bytes], run: str, step: str) -> None:
    """Expires the lease of a step's claim without waiting, by setting its length to zero.

    Rewrites what the scripts wrote: the lease in the step's state line (lua/lib/record.lua), and the score of the entry
    in the claims index (lua/lib/indexes.lua) if there is one.
    """
    steps, _, claims, _ = keys
    head, attempt, released, token, _, started, ended, created, rest = raw.hget(steps, f"s{step}").split(b" ", 8)
    raw.hset(steps, f"s{step}", b" ".join((head, attempt, released, token, b"0", started, ended, created, rest)))
    raw.zadd(claims, {f"{len(run)}:{run}{step}": int(created) + int(started)}, xx=True)


def index_members(runs: set[str], entries: set[tuple[str, str]]) -> set[bytes]:
    """Returns the entries of these runs as members of an index."""
    return {f"{len(run)}:{run}{step}".encode() for run, step in entries if run in runs}
