"""What the commands show of runs and steps: for people, safe in any terminal, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, cast

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from squidstep_redis import Attempt, Outcome, RunSummary, StepRun, StepStatus, UndecodablePayloadError
from squidstep_redis.operations.documents import to_json

STYLES: Final = {
    StepStatus.FAILED: "red",
    StepStatus.RUNNING: "cyan",
    StepStatus.PENDING: "dim",
    StepStatus.COMPLETED: "green",
}
OUTCOME_STYLES: Final = {
    Outcome.COMPLETED: "green",
    Outcome.RUNNING: "cyan",
    Outcome.RELEASED: "yellow",
    Outcome.FAILED: "red",
    Outcome.LEASE_EXPIRED: "magenta",
}
_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"))
_CUT: Final = 400  # characters of a payload that are shown unless all are asked for


def clean(text: str) -> str:
    """Text that may come from anybody, in one line, and unable to tell the terminal anything."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def fitted(text: str, width: int) -> str:
    """Clean text in exactly so many columns, cut with an ellipsis if need be."""
    text = clean(text)
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def width_of(texts: Iterable[str], most: int) -> int:
    """The columns that the widest of them takes, or `most`."""
    return min(max((cell_len(clean(text)) for text in texts), default=0), most)


def span(seconds: float) -> str:
    """Such as `1.25 s` or `3 h 20 min`."""
    if seconds < 0.9995:
        return f"{max(seconds, 0) * 1_000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    for index, (unit, name) in enumerate(_UNITS):
        if seconds >= unit:
            least, smaller = _UNITS[index + 1] if index + 1 < len(_UNITS) else (1, "s")
            rest = int(seconds % unit // least)
            return f"{int(seconds // unit)} {name}" + (f" {rest} {smaller}" if rest else "")
    raise AssertionError


def ago(moment: datetime | None) -> str:
    """How long ago that was, by this machine's clock."""
    return "" if moment is None else f"{span((datetime.now(UTC) - moment).total_seconds())} ago"


def lease_left(step_run: StepRun) -> str:
    """What is left of a claim's lease."""
    if step_run.status is not StepStatus.RUNNING:
        return ""
    if step_run.lease_ends_at is None:
        return "no lease"
    left = (step_run.lease_ends_at - datetime.now(UTC)).total_seconds()
    return f"lease {span(left)}" if left > 0 else f"lapsed {span(-left)} ago"


def took(step_run: StepRun) -> str:
    """How long the latest attempt took, or has been going on."""
    if step_run.started_at is None or step_run.status is StepStatus.PENDING:
        return ""
    return span(((step_run.ended_at or datetime.now(UTC)) - step_run.started_at).total_seconds())


def payload_of(step_run: StepRun, name: str, *, full: bool = True) -> str | None:
    """A payload as one line of JSON, more or less; None if there is none."""
    try:
        value = getattr(step_run, name)
    except UndecodablePayloadError as error:
        return f"({clean(str(error))})"
    return None if value is None else shown(value, full=full)


def shown(value: Any, *, full: bool = True) -> str:
    """A payload as one line, cut unless `full`."""
    text = clean(json.dumps(_readable(value), ensure_ascii=False))
    return text if full or len(text) <= _CUT else f"{text[:_CUT]}… ({len(text):,} characters; all with --full)"


def _readable(value: Any) -> Any:
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {key if isinstance(key, str) else str(key): _readable(item) for key, item in items}
    if isinstance(value, list):
        return [_readable(item) for item in cast("list[Any]", value)]
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def error_type(error: Mapping[str, Any] | None) -> str:
    """The type of an error, by which failures are grouped."""
    return clean(str((error or {}).get("type", "(without a type)")))


def brief_error(step_run: StepRun) -> str:
    """An error in one line: type and message, or all of it."""
    try:
        error = step_run.last_error
    except UndecodablePayloadError:
        return payload_of(step_run, "last_error") or ""
    return "" if error is None else error_in_brief(error)


def error_in_brief(error: Mapping[str, Any]) -> str:
    """Likewise, of an error that is at hand."""
    if "type" in error and "message" in error:
        return clean(f"{error['type']}: {error['message']}")
    return shown(error)


def traceback_of(step_run: StepRun) -> list[str]:
    """The lines of the traceback that `fail_step` kept of an exception; not clean yet."""
    with suppress(UndecodablePayloadError):
        traceback = (step_run.last_error or {}).get("traceback")
        if isinstance(traceback, str):
            return traceback.splitlines()
    return []


def counts_of(summary: RunSummary) -> Text:
    """Such as `1 failed, 3 completed`."""
    if summary.problem is not None:
        return Text(clean(summary.problem), style="bold red")
    parts = [Text(f"{count} {status}", STYLES[status]) for status in STYLES if (count := summary.counts[status])]
    return Text(", ").join(parts)


# For programs


def step_run_as_dict(step_run: StepRun) -> dict[str, Any]:
    """All that a step run shows. What JSON does not have is written as `export_run` does."""

    def payload(name: str) -> Any:
        try:
            return _json(getattr(step_run, name))
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
    """What a list says of a run."""
    return {
        "run_id": summary.run_id,
        "steps": summary.steps,
        "counts": dict(summary.counts),
        "changed_at": _time(summary.changed_at),
        "problem": summary.problem,
    }


def attempt_as_dict(attempt: Attempt) -> dict[str, Any]:
    """All that an attempt shows."""
    return {
        "number": attempt.number,
        "owner": attempt.owner,
        "outcome": attempt.outcome,
        "error": _json(attempt.error),
        "started_at": _time(attempt.started_at),
        "ended_at": _time(attempt.ended_at),
    }


def _json(payload: Any) -> Any:
    try:
        return to_json(payload)
    except TypeError as error:  # what another codec made of it
        return {"$undecodable": str(error)}


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds")
