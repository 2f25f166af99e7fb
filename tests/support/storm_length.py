"""How long a storm lasts: a test that interrupts calls at random moments."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class StormLength:
    """The length of a storm.

    Attributes:
        least: seconds that it lasts at least; 0 for its short form.
    """

    least: float

    def seconds(self, short: float) -> float:
        """Returns the seconds of a storm whose short form lasts `short` seconds."""
        return max(short, self.least)

    def rounds(self, short: int) -> Iterator[int]:
        """Yields the numbers of the rounds, from 0: `short` of them, or more until the time is over."""
        end = time.monotonic() + self.least
        for number in itertools.count():
            if number >= short and time.monotonic() >= end:
                return
            yield number
