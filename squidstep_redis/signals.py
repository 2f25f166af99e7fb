"""Defers SIGALRM during work that must not be interrupted.

Timeouts based on SIGALRM, such as RQ's, raise an exception between any two instructions of the main thread: between a
command and its reply, or between a claim and the line that records it. While deferred, the signal is recorded, and its
handler is called afterwards, at the latest after a quarter of a second: a server that does not reply must not delay a
timeout.
Masking the signal would not help: another thread could receive it.

A process may use another signal for its timeouts, as a child of Celery's prefork pool does: it is deferred, too.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial
from inspect import currentframe
from types import FrameType
from typing import Any, Final, Self, cast

from squidstep_redis.steady import steady_time as time

_ALARM: Final = getattr(signal, "SIGALRM", None)  # Windows has none


_LONGEST: Final = 0.25
"""The longest time, in seconds, for which an alarm is deferred."""

_Handler = Callable[[int, FrameType | None], Any]


class DeferredSigalrm:
    """A `with` block in which SIGALRM calls no handler; its handler is called at the end if the signal arrived.

    It does nothing without a Python handler, or outside the main thread, where no handler is called. It then costs a
    microsecond, and otherwise seven.

    The handlers of other signals may raise at any instruction, even while the block is being entered or left, so that
    it is never left. So the handler that is installed meanwhile checks whether the block's code is still running.
    """

    __slots__ = ("_caught", "_caught_at", "_frame", "_handler", "_has_timer", "_number")

    def __init__(self, number: int | None = _ALARM) -> None:
        """Makes the block.

        Args:
            number: the signal to defer instead of SIGALRM. It is deferred until the end of the block.
        """
        self._number = number
        self._handler: _Handler | None = None

    def __enter__(self) -> Self:
        # A variable for the own frame would be a cycle, which keeps the caller's variables if a handler raises here.
        self.enter(getattr(currentframe(), "f_back", None))
        return self

    def enter(self, frame: FrameType | None) -> None:
        """Enters the block.

        Args:
            frame: the frame that runs the block.
        """
        self._frame: FrameType | None = None
        self._caught: tuple[int, FrameType | None] | None = None
        self._caught_at = 0.0
        self._has_timer = False
        if self._number is not None and threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(self._number)
            if callable(handler) and frame is not None:
                self._install(handler, frame)

    def __exit__(self, *exc_info: object) -> None:
        """Leaves the block. A second call does nothing."""
        handler = self._handler
        if handler is not None:
            self._restore(handler)
            self._frame = None
            self._deliver(handler)

    def sleep(self, seconds: float) -> None:
        """Sleeps; meanwhile, the signal calls its handler."""
        handler, frame = self._handler, self._frame
        self.__exit__()
        try:
            time.sleep(seconds)
        finally:
            if handler is not None and frame is not None:
                self._install(handler, frame)

    def _install(self, handler: _Handler, frame: FrameType) -> None:
        self._handler, self._frame = self._without_left_over(handler), frame
        signal.signal(cast("int", self._number), self._catch)

    def _restore(self, handler: _Handler) -> None:
        number = cast("int", self._number)
        # Another handler that was set in the block stays.
        if self._without_left_over(signal.getsignal(number), self) == self._catch:
            signal.signal(number, handler)

    def _deliver(self, handler: _Handler) -> None:
        caught, self._caught = self._caught, None
        if self._has_timer:
            self._has_timer = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        if caught is not None:
            handler(*caught)

    @staticmethod
    def _without_left_over(handler: Any, but: DeferredSigalrm | None = None) -> Any:
        """Returns a handler, or the handler that it replaced if an exception ended the block that installed it."""
        while True:
            owner = getattr(handler, "__self__", None)
            if not isinstance(owner, DeferredSigalrm) or owner is but or owner._is_active():
                return handler
            handler = owner._handler

    def _is_active(self) -> bool:
        """Whether the code of the block is running: its frame is on the stack."""
        frame = currentframe()
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def _catch(self, number: int, frame: FrameType | None) -> None:
        handler = self._handler
        if handler is None:
            return
        if not self._is_active():  # an exception kept the block from being left
            self._restore(handler)
            self._caught, self._frame = (number, frame), None
            self._deliver(handler)
        elif self._caught is None:
            self._caught, self._caught_at = (number, frame), time.monotonic()
            if number == _ALARM and not signal.getitimer(signal.ITIMER_REAL)[0]:
                self._has_timer = True
                signal.setitimer(signal.ITIMER_REAL, _LONGEST)
        elif time.monotonic() >= self._caught_at + 0.9 * _LONGEST:
            self._deliver(handler)


class _DeferredSignals(DeferredSigalrm):
    """A `with` block in which neither SIGALRM nor another signal calls its handler."""

    __slots__ = ("_other",)

    def __init__(self, number: int) -> None:
        super().__init__()
        self._other = DeferredSigalrm(number)

    def enter(self, frame: FrameType | None) -> None:
        super().enter(frame)
        self._other.enter(frame)

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._other.__exit__()
        finally:
            super().__exit__()

    def sleep(self, seconds: float) -> None:
        other = self._other
        handler, frame = other._handler, other._frame
        try:
            super().sleep(seconds)
        finally:
            if handler is not None and frame is not None:
                other._install(handler, frame)


_also_deferred: int | None = None
"""The signal of this process's timeouts, if it is not SIGALRM."""


def also_defer(number: int | None) -> None:
    """Defers a further signal of this process where SIGALRM is deferred. It is deferred until the end of the block.

    Args:
        number: the signal; None: SIGALRM alone is deferred again.
    """
    global _also_deferred  # noqa: PLW0603 -- the handlers of signals belong to the process, too
    _also_deferred = number


def defer_sigalrm() -> DeferredSigalrm:
    """Returns a `with` block in which SIGALRM calls no handler; see `DeferredSigalrm`."""
    return DeferredSigalrm() if _also_deferred is None else _DeferredSignals(_also_deferred)


def is_raised_by_handler(error: BaseException) -> bool:
    """Returns whether a signal handler raised an exception: its traceback passes through one that is installed."""
    if threading.current_thread() is not threading.main_thread():  # where no handler is called
        return False
    codes = {code for number in signal.valid_signals() if (code := _code_of(signal.getsignal(number))) is not None}
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code in codes:
            return True
        traceback = traceback.tb_next
    return False


def _code_of(handler: Any) -> object:
    while isinstance(handler, partial):
        handler = cast("partial[Any]", handler).func
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = getattr(handler, "__func__", type(handler).__call__)
    return getattr(handler, "__code__", None)
