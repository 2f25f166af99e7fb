"""The timeline of a run: its attempts on one time axis. The command line and the web page draw it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple

from squidstep_redis import Attempt, Outcome
from squidstep_redis.durations import format_duration
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import format_time

# Seconds between two ticks of the axis.
_STEPS: Final = (
    *(10**power * digit for power in (-3, -2, -1, 0) for digit in (1, 2, 5)),
    *(10, 15, 30, 60, 120, 300, 600, 900, 1_800, 3_600, 7_200, 14_400, 21_600, 43_200),
    *(86_400 * days for days in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)),
)


class Bar(NamedTuple):
    """One attempt of a step.

    Attributes:
        step: The step.
        attempt: The attempt; None for a step without attempts.
        lease_ends_at: When the lease of a running attempt ends; None without a lease, or if it is not running.
    """

    step: str
    attempt: Attempt | None
    lease_ends_at: datetime | None = None

    def end(self, now: datetime) -> datetime:
        """Returns when the attempt ended. If its lease has expired, that is its end, because its worker may be dead."""
        if self.attempt is None:
            return now
        return self.attempt.ended_at or min(self.lease_ends_at or now, now)

    def outcome(self, now: datetime) -> Outcome | None:
        """Returns the outcome of the attempt. If a running attempt's lease has expired, that is its outcome."""
        if self.attempt is None:
            return None
        has_lapsed = self.lease_ends_at is not None and self.lease_ends_at <= now
        return Outcome.LEASE_EXPIRED if has_lapsed else self.attempt.outcome

    def seconds(self, now: datetime) -> float:
        """Returns the duration of the attempt, until `now` if it is running."""
        return 0.0 if self.attempt is None else (self.end(now) - self.attempt.started_at).total_seconds()

    def summary(self, now: datetime) -> str:
        """Returns the attempt's duration and outcome, such as `57 ms failed`."""
        outcome = self.outcome(now)
        return "pending" if outcome is None else f"{format_duration(self.seconds(now))} {outcome.replace('_', ' ')}"


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
        begun = [(bar.attempt.started_at, bar.end(self.now)) for bar in bars if bar.attempt is not None]
        self.start = min((start for start, _ in begun), default=self.now)
        end = max((end for _, end in begun), default=self.now)
        self.seconds = max((end - self.start).total_seconds(), 0.001)

    def position(self, bar: Bar) -> tuple[float, float]:
        """Returns the start and the length of a bar as fractions of the axis."""
        if bar.attempt is None:
            return 0.0, 0.0
        since = (bar.attempt.started_at - self.start).total_seconds()
        return since / self.seconds, min(bar.seconds(self.now), self.seconds) / self.seconds

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Returns up to `most` + 1 ticks of the axis: the position of each as a fraction of it, and its label."""
        step = next((each for each in _STEPS if self.seconds / each <= most), self.seconds)
        count = int(self.seconds / step + 1e-9)
        return [
            (min(step * number / self.seconds, 1.0), format_duration(step * number) if number else "0")
            for number in range(count + 1)
        ]

    @property
    def heading(self) -> str:
        """The run's id, start and duration."""
        return f"{escaped(self.run)}  began {format_time(self.start)} UTC, took {format_duration(self.seconds)}"

    def labels(self) -> Iterator[str]:
        """Yields a label for each bar: the step for its first attempt, and `attempt 2` and so on below it."""
        previous = None
        for bar in self.bars:
            is_first = bar.step != previous
            previous = bar.step
            yield bar.step if is_first or bar.attempt is None else f"  attempt {bar.attempt.number}"
