"""A thread beside that of a call, for what the call cannot do by itself in bounded time."""

from __future__ import annotations

import _thread
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Final

from squidstep_redis.steady import steady_time as time

_START_SECONDS: Final = 1.0  # then it is not waited for: perhaps the process can have no more threads
_FIRST_PAUSE: Final = 0.0001
_LAST_PAUSE: Final = 0.005


class Helper:
    """Calls a function once, in a daemon thread.

    An exception from outside that reaches the caller does not reach the function. It finds no lock held, because the
    caller polls. Why nothing interrupts the start is explained in `claims/threads.py`.

    Attributes:
        error: what the function has raised.
    """

    def __init__(self, name: str, function: Callable[[], object]) -> None:
        self.error: Exception | None = None
        self._name = name
        self._function = deque([function])
        self._is_done = False
        self._pid = os.getpid()
        self._began = time.monotonic()
        start_thread = _thread.start_new_thread
        try:
            start_thread(start_thread, (self._start, ()))
        except RuntimeError:  # there can be no more threads
            self._run()

    @property
    def is_running(self) -> bool:
        """Whether it is worth waiting for: the function has not returned, and a thread of this process calls it."""
        is_late = bool(self._function) and time.monotonic() >= self._began + _START_SECONDS
        return not (self._is_done or is_late) and self._pid == os.getpid()

    def wait(self, until: float = inf) -> None:
        """Waits until the function has returned.

        Args:
            until: how long to wait at most, by the monotonic clock.
        """
        pause = _FIRST_PAUSE
        while self.is_running and (left := until - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, _LAST_PAUSE)

    def _start(self) -> None:
        try:
            threading.Thread(target=self._run_alone, name=self._name, daemon=True).start()
        except RuntimeError:
            self._run_alone()

    def _run_alone(self) -> None:
        """Calls the function in a thread in which an exception such as CancelledError ends nothing but the function."""
        with suppress(BaseException):  # otherwise, `threading` prints it, with what the function has in its text
            self._run()

    def _run(self) -> None:
        try:
            self._function.pop()()
        except Exception as error:  # noqa: BLE001 -- the caller raises it
            self.error = error
        finally:
            self._is_done = True
