"""How things are measured: in turns, as ratios, by medians.

The machine's speed drifts, and other work on it comes and goes. So the sides of a comparison take short turns, A B A B,
for as long as the pace allows, and what counts is the median of the ratios of neighbouring turns: a disturbance hits
one turn, or both sides alike. The middle half of the ratios is told beside it, as a measure of what noise was left.
"""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Work = Callable[[int], Any]  # does so many operations


class Side(NamedTuple):
    """A side of a comparison whose operations come in lots: batches, whole workflows."""

    work: Work
    lot: int


MIN_ROUNDS = 5


class MissingError(Exception):
    """What a row needs is not on this machine; says how to get it."""


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        seconds: for one comparison, all sides together.
        turn: seconds of one side's turn.
        scale: part of the full number of runs, processes and steps.
    """

    seconds: float
    turn: float
    scale: float

    def of(self, count: int, least: int = 1) -> int:
        """So many, or as few as this pace allows."""
        return max(least, int(count * self.scale))


FULL = Pace(seconds=6, turn=0.04, scale=1)
QUICK = Pace(seconds=0.4, turn=0.02, scale=0.02)


class Spread(NamedTuple):
    """A median, and between what bounds the middle half lies."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high)


class Turns:
    """What came of the turns.

    Attributes:
        seconds: for each side, seconds per operation, round by round.
        cpu: likewise, of this process's processors: what other work on the machine hardly changes.
    """

    def __init__(self, sides: Iterable[str]) -> None:
        self.seconds: dict[str, list[float]] = {side: [] for side in sides}
        self.cpu: dict[str, list[float]] = {side: [] for side in sides}

    def take(self, side: str, work: Work, count: int) -> None:
        """Lets a side have its turn."""
        cpu, start = time.process_time(), time.perf_counter()
        work(count)
        self.seconds[side].append((time.perf_counter() - start) / count)
        self.cpu[side].append((time.process_time() - cpu) / count)

    def rate(self, side: str) -> float:
        """Operations per second."""
        return 1 / statistics.median(self.seconds[side])

    def times(self, side: str, other: str) -> Spread:
        """How many times the rate of `other` the rate of `side` is."""
        return Spread.of([b / a for a, b in zip(self.seconds[side], self.seconds[other], strict=True)])

    def rates(self, side: str, other: str, unit: str) -> str:
        """Both rates, to be told beside their ratio."""
        return f"{figure(self.rate(side))} against {figure(self.rate(other))} {unit}/s"

    def client_cpu(self, side: str, other: str) -> str:
        """What an operation of both costs this process, to be told beside their ratio."""
        mine, theirs = (1_000_000 * statistics.median(self.cpu[name]) for name in (side, other))
        return f"the client's CPU {figure(mine)} against {figure(theirs)} µs"


def take_turns(pace: Pace, sides: Mapping[str, Work | Side]) -> Turns:
    """Lets the sides take turns; each does in its turn as much as it takes to fill it."""
    works = {name: side.work if isinstance(side, Side) else side for name, side in sides.items()}
    counts = {
        name: _calibrated(works[name], side.lot if isinstance(side, Side) else 1, pace.turn)
        for name, side in sides.items()
    }
    turns = Turns(sides)
    end = time.monotonic() + pace.seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.monotonic() < end:
        for name, work in works.items():
            turns.take(name, work, counts[name])
        rounds += 1
    return turns


def _calibrated(work: Work, lot: int, turn: float) -> int:
    """How many operations fill a turn, in whole lots. Warms up, too."""
    work(lot)
    lots = 1
    while True:
        start = time.perf_counter()
        work(lots * lot)
        taken = time.perf_counter() - start
        if taken >= turn / 4:
            return lot * max(1, round(lots * turn / taken))
        lots *= 2


class Budget(NamedTuple):
    """What section 6 of the design allows."""

    limit: float
    most: bool

    @classmethod
    def at_least(cls, limit: float) -> Budget:
        return cls(limit, most=False)

    @classmethod
    def at_most(cls, limit: float) -> Budget:
        return cls(limit, most=True)

    def met_by(self, value: float) -> bool:
        return (operator.le if self.most else operator.ge)(value, self.limit)

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.limit:,g}"


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        what: is measured.
        value: what was measured; None: it could not be, and `note` says why.
        unit: "x" for a ratio.
        budget: None: it has none.
        note: what helps to understand the value.
        bars: rates by name, for the plot.
    """

    what: str
    value: float | Spread | None
    unit: str = "x"
    budget: Budget | None = None
    note: str = ""
    failed: bool = False
    bars: Mapping[str, float] | None = None

    @property
    def median(self) -> float | None:
        return self.value.median if isinstance(self.value, Spread) else self.value

    @property
    def verdict(self) -> str:
        if self.median is None:
            return "FAILED" if self.failed else "missing"
        if self.budget is None:
            return ""
        return "met" if self.budget.met_by(self.median) else "MISSED"

    @property
    def measured(self) -> str:
        if self.median is None:
            return "-"
        text = f"{figure(self.median)} {self.unit}"
        if isinstance(self.value, Spread):
            text += f" ({figure(self.value.low)}-{figure(self.value.high)})"
        return text

    def as_json(self) -> dict[str, Any]:
        spread = self.value if isinstance(self.value, Spread) else None
        return {
            "what": self.what,
            "measured": self.median,
            "middle_half": [spread.low, spread.high] if spread else None,
            "unit": self.unit,
            "budget": str(self.budget) if self.budget else None,
            "verdict": self.verdict,
            "note": self.note,
            "bars": self.bars,
        }


def figure(value: float) -> str:
    """A number with three digits that count."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
