"""The measuring method: interleaved turns, ratios, medians.

The machine's speed drifts, and its other load varies. The sides of a comparison are therefore measured in short,
alternating turns, and the result is the median of the ratios of adjacent turns: a disturbance affects one turn, or both
sides equally. The middle half of the ratios is reported next to the median, as a measure of the remaining noise.
"""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

Work = Callable[[int], Any]  # executes the given number of operations
Summary = tuple[str, Literal["single", "batch", "bytes"]]  # where the README shows a result


class Side(NamedTuple):
    """A side of a comparison that executes its operations in lots: batches, or whole workflows."""

    work: Work
    lot: int


MIN_ROUNDS = 5


class MissingError(Exception):
    """A package or server that a row needs is not installed. The message says how to install it."""


@dataclass(frozen=True)
class Pace:
    """How long to measure.

    Attributes:
        seconds: duration of one comparison, all sides together.
        turn: duration of one side's turn, in seconds.
        scale: fraction of the full number of runs, processes and steps.
    """

    seconds: float
    turn: float
    scale: float

    def of(self, count: int, minimum: int = 1) -> int:
        """Scales a count down to this pace, but not below `minimum`."""
        return max(minimum, int(count * self.scale))


FULL = Pace(seconds=6, turn=0.04, scale=1)
QUICK = Pace(seconds=0.4, turn=0.02, scale=0.02)


class Spread(NamedTuple):
    """A median, and the bounds of the middle half of the values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high)


class Turns:
    """The measurements of all turns.

    Attributes:
        seconds: for each side, seconds per operation, one value per round.
        cpu: for each side, CPU seconds of this process per operation, one value per round. Other load on the machine
            hardly affects it.
    """

    def __init__(self, sides: Iterable[str]) -> None:
        self.seconds: dict[str, list[float]] = {side: [] for side in sides}
        self.cpu: dict[str, list[float]] = {side: [] for side in sides}

    def measure(self, side: str, work: Work, count: int) -> None:
        """Measures one turn of a side."""
        cpu, start = time.process_time(), time.perf_counter()
        work(count)
        self.seconds[side].append((time.perf_counter() - start) / count)
        self.cpu[side].append((time.process_time() - cpu) / count)

    def rate(self, side: str) -> float:
        """Operations per second."""
        return 1 / statistics.median(self.seconds[side])

    def times(self, side: str, other: str) -> Spread:
        """The rate of `side` divided by the rate of `other`."""
        return Spread.of([b / a for a, b in zip(self.seconds[side], self.seconds[other], strict=True)])

    def rates(self, side: str, other: str, unit: str) -> str:
        """Both rates as text, for the note next to their ratio."""
        return f"{figure(self.rate(side))} against {figure(self.rate(other))} {unit}/s"

    def client_cpu(self, side: str, other: str) -> str:
        """The CPU time of one operation of each side as text, for the note next to their ratio."""
        mine, theirs = (1_000_000 * statistics.median(self.cpu[name]) for name in (side, other))
        return f"the client's CPU {figure(mine)} against {figure(theirs)} µs"


def measure_in_turns(pace: Pace, sides: Mapping[str, Work | Side]) -> Turns:
    """Measures the sides in alternating turns. The number of operations per turn is calibrated for each side."""
    works = {name: side.work if isinstance(side, Side) else side for name, side in sides.items()}
    counts = {
        name: _calibrate(works[name], side.lot if isinstance(side, Side) else 1, pace.turn)
        for name, side in sides.items()
    }
    turns = Turns(sides)
    end = time.monotonic() + pace.seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.monotonic() < end:
        for name, work in works.items():
            turns.measure(name, work, counts[name])
        rounds += 1
    return turns


def _calibrate(work: Work, lot: int, turn: float) -> int:
    """Returns the number of operations that fill a turn, in whole lots. Also warms up."""
    work(lot)
    lots = 1
    while True:
        start = time.perf_counter()
        work(lots * lot)
        elapsed = time.perf_counter() - start
        if elapsed >= turn / 4:
            return lot * max(1, round(lots * turn / elapsed))
        lots *= 2


class Budget(NamedTuple):
    """The limit that a result must meet."""

    limit: float
    is_maximum: bool

    @classmethod
    def at_least(cls, limit: float) -> Budget:
        return cls(limit, is_maximum=False)

    @classmethod
    def at_most(cls, limit: float) -> Budget:
        return cls(limit, is_maximum=True)

    def met_by(self, value: float) -> bool:
        return (operator.le if self.is_maximum else operator.ge)(value, self.limit)

    def __str__(self) -> str:
        return f"{'≤' if self.is_maximum else '≥'} {self.limit:,g}"


@dataclass(frozen=True)
class Bars:
    """A panel of the plot.

    Attributes:
        panel: its title.
        ours: our rates, by label.
        others: the other rates, by label, each with the ratio of our rate to it.
    """

    panel: str
    ours: Mapping[str, float]
    others: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        what: the label: what is measured.
        value: the measured value; None if it could not be measured, for the reason in `note`.
        unit: the unit; "x" for a ratio.
        budget: the limit; None if there is none.
        note: absolute figures and other context.
        failed: whether the row raised an exception.
        bars: for the plot; None if the plot does not show this result.
        summary: for the README: the row of its table, and the column "single" or "batch"; or the size of the payloads
            in bytes, and "bytes". None if the README does not show this result.
    """

    what: str
    value: float | Spread | None
    unit: str = "x"
    budget: Budget | None = None
    note: str = ""
    failed: bool = False
    bars: Bars | None = None
    summary: Summary | None = None

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
            "bars": asdict(self.bars) if self.bars else None,
        }


def figure(value: float) -> str:
    """Formats a number with three significant digits."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
