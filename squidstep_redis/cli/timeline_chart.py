"""The timeline of a run, and how a terminal shows it: one line per attempt."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple

from rich.text import Text

from squidstep_redis import Attempt, Outcome
from squidstep_redis.cli.formatting import fit, format_duration, widest
from squidstep_redis.escaping import escaped

# The glyphs distinguish the attempts on a terminal without colors.
_GLYPHS_AND_STYLES: Final = {
    Outcome.COMPLETED: ("█", "green"),
    Outcome.RUNNING: ("▒", "cyan"),
    Outcome.RELEASED: ("░", "yellow"),
    Outcome.FAILED: ("▓", "red"),
    Outcome.LEASE_EXPIRED: ("┄", "magenta"),
}


class Bar(NamedTuple):
    """One attempt of a step. `attempt` is None for a step without attempts."""

    step: str
    attempt: Attempt | None

    def seconds(self, now: datetime) -> float:
        """Returns the duration of the attempt, until `now` if it is running."""
        if self.attempt is None:
            return 0.0
        return ((self.attempt.ended_at or now) - self.attempt.started_at).total_seconds()

    def summary(self, now: datetime) -> str:
        """Returns the attempt's duration and outcome, such as `57 ms failed`."""
        if self.attempt is None:
            return "pending"
        return f"{format_duration(self.seconds(now))} {self.attempt.outcome.replace('_', ' ')}"


class Timeline:
    """The attempts of a run on one time axis.

    Attributes:
        start: The start of the first attempt.
        seconds: The time from `start` to the end of the last attempt, or to `now` if one is running.
    """

    def __init__(self, run: str, bars: list[Bar], now: datetime | None = None) -> None:
        self.run = run
        self.bars = bars
        self.now = now or datetime.now(UTC)
        attempts = [bar.attempt for bar in bars if bar.attempt is not None]
        self.start = min((attempt.started_at for attempt in attempts), default=self.now)
        end = max((attempt.ended_at or self.now for attempt in attempts), default=self.now)
        self.seconds = max((end - self.start).total_seconds(), 0.001)

    def position(self, bar: Bar) -> tuple[float, float]:
        """Returns the start and the length of a bar as fractions of the axis."""
        if bar.attempt is None:
            return 0.0, 0.0
        since = (bar.attempt.started_at - self.start).total_seconds()
        return since / self.seconds, min(bar.seconds(self.now), self.seconds) / self.seconds

    @property
    def heading(self) -> str:
        """The run's id, start and duration."""
        return f"{escaped(self.run)}  {self.start:%Y-%m-%d %H:%M:%S} UTC, {format_duration(self.seconds)}"

    def labels(self) -> Iterator[str]:
        """Yields a label for each bar: the step for its first attempt, and `attempt 2` and so on below it."""
        previous = None
        for bar in self.bars:
            is_first = bar.step != previous
            previous = bar.step
            yield bar.step if is_first or bar.attempt is None else f"  attempt {bar.attempt.number}"

    def render(self, width: int) -> Iterator[Text]:
        """Yields the lines for a terminal of `width` columns."""
        labels = list(self.labels())
        summaries = [bar.summary(self.now) for bar in self.bars]
        left = widest(labels, max(width // 4, 8))
        axis = max(width - left - max(map(len, summaries)) - 4, 10)
        yield Text(self.heading, style="bold")
        middle, end = format_duration(self.seconds / 2), format_duration(self.seconds)
        scale = f"0{middle.center(axis - 2 * len(end))}".ljust(axis - len(end)) + end
        yield Text(f"{'':{left}}  {scale}", style="dim")
        for bar, label, summary in zip(self.bars, labels, summaries, strict=True):
            glyph, style = (" ", "dim") if bar.attempt is None else _GLYPHS_AND_STYLES[bar.attempt.outcome]
            start, length = self.position(bar)
            cells = max(round(length * axis), 1)
            first = min(round(start * axis), axis - cells)
            blocks = f"{' ' * first}{glyph * cells}{' ' * (axis - first - cells)}"
            yield Text.assemble(f"{fit(label, left)}  ", (f"{blocks}  {summary}", style))
