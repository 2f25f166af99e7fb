"""Defers SIGALRM during work that must not be interrupted.

Timeouts based on SIGALRM, such as RQ's, raise an exception between any two instructions of the main thread: between a
command and its reply, or between a claim and the line that records it. While deferred, the signal is recorded, and its
handler is called afterwards. Masking the signal would not help: another thread could receive it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, Self

_ALARM: Final = getattr(signal, "SIGALRM", None)  # Windows has none


class DeferredSigalrm:
    """A `with` block in which SIGALRM calls no handler; its handler is called at the end if the signal arrived.

    It does nothing without a Python handler, or outside the main thread, where no handler is called. It then costs a
    microsecond, and otherwise seven.
    """

    __slots__ = ("_caught", "_handler")

    def __enter__(self) -> Self:
        self._handler: Callable[[int, FrameType | None], Any] | None = None
        self._caught: tuple[int, FrameType | None] | None = None
        if _ALARM is not None and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(_ALARM)
            if callable(handler):
                self._handler = handler
                signal.signal(_ALARM, self._catch)
        return self

    def __exit__(self, *exc_info: object) -> None:
        handler = self._handler
        if handler is None or _ALARM is None:
            return
        if signal.getsignal(_ALARM) == self._catch:  # otherwise another handler was set in the block: it stays
            signal.signal(_ALARM, handler)
        if self._caught is not None:
            caught, self._caught = self._caught, None
            handler(*caught)

    def sleep(self, seconds: float) -> None:
        """Sleeps; meanwhile, the signal calls its handler."""
        self.__exit__()
        try:
            time.sleep(seconds)
        finally:
            self.__enter__()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = (number, frame)


def defer_sigalrm() -> DeferredSigalrm:
    """Returns a `with` block in which SIGALRM calls no handler; see `DeferredSigalrm`."""
    return DeferredSigalrm()
