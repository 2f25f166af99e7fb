"""Formats payloads, errors and counts for terminals. All text that these functions return is safe to print."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from squidstep_redis import StepRun, StepStatus, UndecodablePayloadError
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import error_line, last_error_line, payload_line

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
    text = payload_line(value)
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
    text = error_line(error)
    return text if full else _shortened(text)


def format_last_error(step_run: StepRun, *, full: bool = True) -> str:
    """Returns the last error of a step run in one line.

    Args:
        step_run: The step run.
        full: Do not cut a long error.
    """
    text = last_error_line(step_run)
    return text if full else _shortened(text)


def format_counts(counts: Mapping[StepStatus, int]) -> Text:
    """Returns colored counts such as `1 failed, 3 completed`."""
    parts = [Text(f"{counts[status]} {status}", style) for status, style in STATUS_STYLES.items() if counts[status]]
    return Text(", ").join(parts)


def format_run_count(count: int) -> str:
    """Returns a count such as `1 run` or `1,234 runs`."""
    return f"{count:,} run{'s' * (count != 1)}"
