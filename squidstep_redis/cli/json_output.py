"""Converts runs, step runs and attempts to what `--json` prints."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from squidstep_redis import Attempt, RunSummary, StepRun, UndecodablePayloadError
from squidstep_redis.operations.payload_json import to_json

_TIMES: Final = ("created_at", "started_at", "ended_at", "lease_ends_at", "retry_at")
_OF_STEP_RUN: Final = ("input", "output", "last_error", "progress")
_NOT_LISTED: Final = ("input", "output", "progress")
_PAYLOADS: Final = (*_OF_STEP_RUN, "error")
_FIELDS: Final = {
    StepRun: ("run_id", "step", "status", "final", "attempt", "owner", *_TIMES, *_OF_STEP_RUN),
    RunSummary: ("run_id", "labels", "steps", "counts", "created_at", "changed_at", "cancel_reason", "problem"),
    Attempt: ("number", "owner", "outcome", "error", "started_at", "ended_at"),
}


def as_dict(record: StepRun | RunSummary | Attempt) -> dict[str, Any]:
    """Converts a record. Values that JSON does not have are encoded as in `export_run`."""
    return {name: _convert(record, name) for name in _FIELDS[type(record)]}


def as_shown(step_run: StepRun, run: RunSummary | None) -> dict[str, Any]:
    """Converts a step run, with what `show` says about its run; None: the run has been deleted meanwhile."""
    labels = dict(run.labels) if run else dict[str, str]()
    return {**as_dict(step_run), "labels": labels, "cancel_reason": run.cancel_reason if run else None}


def as_listed(step_run: StepRun) -> dict[str, Any]:
    """Converts a step run for a list, which shows its last error and no other payload."""
    return {name: _convert(step_run, name) for name in _FIELDS[StepRun] if name not in _NOT_LISTED}


def _convert(record: object, name: str) -> Any:
    try:
        value = getattr(record, name)
        if isinstance(value, datetime):
            return value.isoformat(timespec="milliseconds")
        return to_json(value) if name in _PAYLOADS else value
    except (UndecodablePayloadError, TypeError) as error:  # TypeError: another codec may decode to any type
        return {"$undecodable": str(error)}
