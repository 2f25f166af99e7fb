"""The clock with which the library measures how long something takes.

A library that freezes time for a test replaces the functions of `time` in all modules: a timeout would never end, and a
lease would never be extended. It does not replace attributes of a class.
"""

from __future__ import annotations

import time
from typing import Final


class SteadyTime:
    """The functions of `time` that measure and wait. Modules import it under that name."""

    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)


steady_time: Final = SteadyTime()
