"""Formats times, payloads and errors for people. All text that these functions return is safe to print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final, cast
from uuid import UUID

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from squidstep_redis import StepRun, StepStatus, UndecodablePayloadError
from squidstep_redis.durations import format_duration
from squidstep_redis.escaping import escaped

STATUS_STYLES: Final = {
    StepStatus.FAILED: "red",
    StepStatus.RUNNING: "cyan",
    StepStatus.PENDING: "dim",
    StepStatus.COMPLETED: "green",
}
_MAX_PAYLOAD: Final = 400  # characters, unless a command is called with --full


def fit(text: str, width: int) -> str:
    """Returns escaped text, padded to `width` columns, or cut to `width` columns with an ellipsis."""
    text = escaped(text)
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def widest(texts: Iterable[str], limit: int) -> int:
    """Returns the width of the widest text in columns, at most `limit`."""
    return min(max((cell_len(escaped(text)) for text in texts), default=0), limit)


def format_age(moment: datetime | None) -> str:
    """Returns how long ago a moment was, by this machine's clock."""
    return "" if moment is None else f"{format_duration((datetime.now(UTC) - moment).total_seconds())} ago"


def format_lease(step_run: StepRun) -> str:
    """Returns the remaining time of a running step's lease, or when a failed step can be claimed again."""
    if step_run.final:
        return "failed permanently"
    if step_run.retry_at is not None:
        left = (step_run.retry_at - datetime.now(UTC)).total_seconds()
        return f"can be retried in {format_duration(left)}" if left > 0 else ""
    if step_run.status is not StepStatus.RUNNING:
        return ""
    if step_run.lease_ends_at is None:
        return "no lease"
    left = (step_run.lease_ends_at - datetime.now(UTC)).total_seconds()
    return f"lease ends in {format_duration(left)}" if left > 0 else f"lease expired {format_duration(-left)} ago"


def format_time(moment: datetime) -> str:
    """Returns a moment such as `2026-11-27 08:20:01`, in UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def cut(text: str, length: int) -> str:
    """Returns text, cut to `length` characters with an ellipsis."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def format_payload(step_run: StepRun, name: str, *, full: bool = True) -> str | None:
    """Returns a payload as one line that resembles JSON.

    Args:
        step_run: The step run that has the payload.
        name: The payload's attribute: `input`, `output`, `last_error` or `progress`.
        full: Do not cut a long payload.

    Returns:
        None if there is no such payload.
    """
    try:
        value = getattr(step_run, name)
    except UndecodablePayloadError as error:
        return f"({escaped(str(error))})"
    if value is None:
        return None
    text = _to_line(value)
    return text if full else _shortened(text)


def _shortened(text: str) -> str:
    if len(text) <= _MAX_PAYLOAD:
        return text
    return f"{text[:_MAX_PAYLOAD]}… ({len(text):,} characters; use --full to see all)"


def format_error(error: Mapping[str, Any], *, full: bool = True) -> str:
    """Returns an error's type and message in one line, or all of it if it has no type or message.

    Args:
        error: The error.
        full: Do not cut a long error.
    """
    named = "type" in error and "message" in error
    text = escaped(f"{error['type']}: {error['message']}") if named else _to_line(error)
    return text if full else _shortened(text)


def format_last_error(step_run: StepRun, *, full: bool = True) -> str:
    """Returns the last error of a step run in one line.

    Args:
        step_run: The step run.
        full: Do not cut a long error.
    """
    try:
        error = step_run.last_error
    except UndecodablePayloadError:
        return format_payload(step_run, "last_error") or ""
    return "" if error is None else format_error(error, full=full)


def error_type(step_run: StepRun) -> str:
    """Returns the type of a step run's last error."""
    try:
        return escaped(str((step_run.last_error or {}).get("type", "(without a type)")))
    except UndecodablePayloadError:
        return "(cannot be decoded)"


def traceback_lines(step_run: StepRun) -> list[str]:
    """Returns the traceback that `fail_step` stored for an exception."""
    with suppress(UndecodablePayloadError):
        traceback = (step_run.last_error or {}).get("traceback")
        if isinstance(traceback, str):
            return [escaped(line) for line in traceback.splitlines()]
    return []


def format_counts(counts: Mapping[StepStatus, int]) -> Text:
    """Returns colored counts such as `1 failed, 3 completed`."""
    parts = [Text(f"{counts[status]} {status}", style) for status, style in STATUS_STYLES.items() if counts[status]]
    return Text(", ").join(parts)


def format_run_count(count: int) -> str:
    """Returns a count such as `1 run` or `1,234 runs`."""
    return f"{count:,} run{'s' * (count != 1)}"


def format_labels(labels: Mapping[str, str]) -> str:
    """Formats the labels of a run as one line."""
    return escaped(" ".join(f"{name}={value}" for name, value in labels.items()))


def _to_line(value: Any) -> str:
    return escaped(json.dumps(_readable(value), ensure_ascii=False))


def _readable(value: Any) -> Any:
    """Replaces the values that JSON does not have."""
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {key if isinstance(key, str) else str(key): _readable(item) for key, item in items}
    if isinstance(value, list):
        return [_readable(item) for item in cast("list[Any]", value)]
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID, date, time, timedelta)):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
