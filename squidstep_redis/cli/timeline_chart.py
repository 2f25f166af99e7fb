"""A timeline as a terminal shows it: one line per attempt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.text import Text

from squidstep_redis import Outcome
from squidstep_redis.cli.formatting import fit, widest
from squidstep_redis.timelines import Timeline

# The glyphs distinguish the attempts on a terminal without colors.
_GLYPHS_AND_STYLES: Final = {
    Outcome.COMPLETED: ("█", "green"),
    Outcome.RUNNING: ("▒", "cyan"),
    Outcome.RELEASED: ("░", "yellow"),
    Outcome.FAILED: ("▓", "red"),
    Outcome.LEASE_EXPIRED: ("┄", "magenta"),
}


def render_timeline(timeline: Timeline, width: int) -> Iterator[Text]:
    """Yields the lines of a timeline for a terminal of `width` columns."""
    labels = list(timeline.labels())
    summaries = [bar.summary(timeline.now) for bar in timeline.bars]
    left = widest(labels, max(width // 4, 8))
    axis = max(width - left - max(map(len, summaries)) - 4, 10)
    yield Text(timeline.heading, style="bold")
    yield Text(f"{'':{left}}  {_scale(timeline, axis)}", style="dim")
    for bar, label, summary in zip(timeline.bars, labels, summaries, strict=True):
        outcome = bar.outcome(timeline.now)
        glyph, style = (" ", "dim") if outcome is None else _GLYPHS_AND_STYLES[outcome]
        start, length = timeline.position(bar)
        cells = max(round(length * axis), 1)
        first = min(round(start * axis), axis - cells)
        blocks = f"{' ' * first}{glyph * cells}{' ' * (axis - first - cells)}"
        yield Text.assemble(f"{fit(label, left)}  ", (f"{blocks}  {summary}", style))


def _scale(timeline: Timeline, axis: int) -> str:
    """Returns the labels of the ticks: each begins at its tick; the last one may end there."""
    line = ""
    for position, label in timeline.ticks(max(axis // 12, 1)):
        at = min(round(position * axis), axis - len(label))
        if at > len(line) or not line:
            line = line.ljust(at) + label
    return line
