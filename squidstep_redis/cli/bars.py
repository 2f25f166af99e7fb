"""A timeline in a terminal: a line for each attempt."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple

from rich.text import Text

from squidstep_redis import Attempt, Outcome
from squidstep_redis.cli.texts import OUTCOME_STYLES, clean, fitted, span, width_of

# Told apart without colours, too.
_GLYPHS: Final = {
    Outcome.COMPLETED: "█",
    Outcome.RUNNING: "▒",
    Outcome.RELEASED: "░",
    Outcome.FAILED: "▓",
    Outcome.LEASE_EXPIRED: "┄",
}


class Bar(NamedTuple):
    """An attempt at a step; None for a step that nobody has begun."""

    step: str
    attempt: Attempt | None

    def seconds(self, now: datetime) -> float:
        """How long it took, or has been going on."""
        if self.attempt is None:
            return 0.0
        return ((self.attempt.ended_at or now) - self.attempt.started_at).total_seconds()

    def told(self, now: datetime) -> str:
        """How long, and how it ended."""
        if self.attempt is None:
            return "pending"
        outcome = "lease expired" if self.attempt.outcome is Outcome.LEASE_EXPIRED else self.attempt.outcome
        return f"{span(self.seconds(now))} {outcome}"


class Timeline:
    """The attempts of a run, on one axis.

    Attributes:
        start: of the first attempt.
        seconds: from there to the end of the last, or until now if one is running.
    """

    def __init__(self, run: str, bars: list[Bar], now: datetime | None = None) -> None:
        self.run = run
        self.bars = bars
        self.now = now or datetime.now(UTC)
        attempts = [bar.attempt for bar in bars if bar.attempt is not None]
        self.start = min((attempt.started_at for attempt in attempts), default=self.now)
        end = max((attempt.ended_at or self.now for attempt in attempts), default=self.now)
        self.seconds = max((end - self.start).total_seconds(), 0.001)

    def place(self, bar: Bar) -> tuple[float, float]:
        """Where it begins and how long it is, as parts of the whole."""
        if bar.attempt is None:
            return 0.0, 0.0
        since = (bar.attempt.started_at - self.start).total_seconds()
        return since / self.seconds, min(bar.seconds(self.now), self.seconds) / self.seconds

    @property
    def heading(self) -> str:
        """The run, when it began and how long it took."""
        return f"{clean(self.run)}  {self.start:%Y-%m-%d %H:%M:%S} UTC, {span(self.seconds)}"

    def names(self) -> Iterator[str]:
        """For each bar its step, and from the second attempt on its number instead."""
        before = None
        for bar in self.bars:
            is_first = bar.step != before
            before = bar.step
            yield bar.step if is_first or bar.attempt is None else f"  attempt {bar.attempt.number}"

    def lines(self, width: int) -> Iterator[Text]:
        """What is shown in so many columns."""
        names = list(self.names())
        told = [bar.told(self.now) for bar in self.bars]
        left = width_of(names, max(width // 4, 8))
        right = max(map(len, told))
        room = max(width - left - right - 4, 10)
        yield Text(self.heading, style="bold")
        middle, end = span(self.seconds / 2), span(self.seconds)
        scale = f"0{middle.center(room - 2 * len(end))}".ljust(room - len(end)) + end
        yield Text(f"{'':{left}}  {scale}", style="dim")
        for bar, name, words in zip(self.bars, names, told, strict=True):
            line = Text(f"{fitted(name, left)}  ")
            if bar.attempt is None:
                line.append(" " * room + f"  {words}", "dim")
            else:
                style = OUTCOME_STYLES[bar.attempt.outcome]
                since, length = self.place(bar)
                cells = max(round(length * room), 1)
                first = min(round(since * room), room - cells)
                line.append(" " * first)
                line.append(_GLYPHS[bar.attempt.outcome] * cells, style)
                line.append(" " * (room - first - cells))
                line.append(f"  {words}", style)
            yield line
