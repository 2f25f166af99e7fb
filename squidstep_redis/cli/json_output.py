"""Converts runs, step runs and attempts to what `--json` prints."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from squidstep_redis import Attempt, RunSummary, StepRun, UndecodablePayloadError
from squidstep_redis.operations.documents import to_json


def step_run_as_dict(step_run: StepRun) -> dict[str, Any]:
    """Converts a step run. Values that JSON does not have look as in the output of `export_run`."""

    def payload(name: str) -> Any:
        try:
            return _payload(getattr(step_run, name))
        except UndecodablePayloadError as error:
            return {"$undecodable": str(error)}

    return {
        "run_id": step_run.run_id,
        "step": step_run.step,
        "status": step_run.status,
        "attempt": step_run.attempt,
        "owner": step_run.owner,
        **{name: _time(getattr(step_run, name)) for name in ("created_at", "started_at", "ended_at", "lease_ends_at")},
        "input": payload("input"),
        "output": payload("output"),
        "last_error": payload("last_error"),
    }


def summary_as_dict(summary: RunSummary) -> dict[str, Any]:
    """Converts a run's entry in a list of runs."""
    return {
        "run_id": summary.run_id,
        "steps": summary.steps,
        "counts": dict(summary.counts),
        "changed_at": _time(summary.changed_at),
        "problem": summary.problem,
    }


def attempt_as_dict(attempt: Attempt) -> dict[str, Any]:
    """Converts an attempt."""
    return {
        "number": attempt.number,
        "owner": attempt.owner,
        "outcome": attempt.outcome,
        "error": _payload(attempt.error),
        "started_at": _time(attempt.started_at),
        "ended_at": _time(attempt.ended_at),
    }


def _payload(value: Any) -> Any:
    try:
        return to_json(value)
    except TypeError as error:  # another codec may decode to any type
        return {"$undecodable": str(error)}


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds")
