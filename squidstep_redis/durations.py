"""Durations and moments as text, for messages and for the command line."""

from __future__ import annotations

from datetime import datetime
from typing import Final

_UNITS: Final = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def format_duration(seconds: float) -> str:
    """Returns a duration such as `1.25 s` or `3 h 20 min`."""
    if seconds < 0.9995:
        return f"{max(0.0, seconds) * 1_000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    index = next(index for index, (size, _) in enumerate(_UNITS) if seconds >= size)
    (size, name), (smaller_size, smaller_name) = _UNITS[index : index + 2]
    rest = int(seconds % size // smaller_size)
    return f"{int(seconds // size)} {name}" + (f" {rest} {smaller_name}" if rest else "")


def format_moment(moment: datetime, now: datetime) -> str:
    """Returns a moment with its distance from `now`: `2026-11-27 08:20:01 UTC (3 min ago)`, or `(in 20 s)`."""
    seconds = (moment - now).total_seconds()
    distance = f"in {format_duration(seconds)}" if seconds > 0 else f"{format_duration(-seconds)} ago"
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC ({distance})"
