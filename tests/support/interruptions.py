"""Helpers for tests of interrupted calls: signals whose handlers raise."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


class SignalingClient:
    """A client that raises SIGUSR1 in its first call: before it sends the command, or after the reply."""

    def __init__(self, client: Any, moment: str) -> None:
        self.client = client
        self.moment = moment

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self._signal("before")
        reply = self.client.execute_command(*args, **options)
        self._signal("after")
        return reply

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def _signal(self, moment: str) -> None:
        if moment == self.moment:
            self.moment = ""
            signal.raise_signal(signal.SIGUSR1)


@contextlib.contextmanager
def sigusr1_raises(error: BaseException) -> Iterator[threading.Event]:
    """In the block, SIGUSR1 raises the error; the event is set once it has."""
    raised = threading.Event()

    def raise_it(number: int, frame: object) -> None:
        raised.set()
        raise error

    before = signal.signal(signal.SIGUSR1, raise_it)
    try:
        yield raised
    finally:
        signal.signal(signal.SIGUSR1, before)


class AlarmError(Exception):
    """The exception of a timeout that is implemented with SIGALRM."""


@contextlib.contextmanager
def sigalrm_raises() -> Iterator[list[int]]:
    """In the block, each SIGALRM raises `AlarmError`, and is added to the list."""
    raised: list[int] = []

    def raise_it(number: int, frame: object) -> None:
        raised.append(number)
        raise AlarmError

    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        yield raised
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class OutsideError(BaseException):
    """An exception that another thread sets."""


def raise_in(thread: threading.Thread) -> None:
    """Raises OutsideError in a thread, wherever it is."""
    if thread.is_alive():  # a new thread may have the id of one that ended
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(OutsideError))


def clear_unraised_exceptions() -> None:
    """Clears exceptions that were set in threads that ended before they raised them.

    While there is one, Python 3.11 never gets beyond the first line of a function that is traced or profiled.
    """
    with contextlib.suppress(OutsideError):
        raise_in(threading.current_thread())
        while True:  # until it is raised, which makes the interpreter look for others
            pass


@contextlib.contextmanager
def at_line(line: int, files: tuple[str, ...], act: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """In the block, `act` is called at the n-th line of these files; yields whether it was."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if not any(part in frame.f_code.co_filename for part in files):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                act()
        return trace

    sys.settrace(trace)
    try:
        yield lambda: left <= 0
    finally:
        sys.settrace(None)


@contextlib.contextmanager
def at_call(number: int, modules: tuple[str, ...], act: Callable[[], object]) -> Iterator[list[str]]:
    """In the block, `act` is called at the n-th place where the interpreter looks for signals, in these packages.

    It looks at the start of a function of Python, and after a call of one that is not. Yields the place, once there.
    """
    left, place = number, list[str]()

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event in ("call", "c_return") and str(frame.f_globals.get("__name__")).partition(".")[0] in modules:
            left -= 1
            if left < 0:
                sys.setprofile(None)
                place.append(f"{event} in {frame.f_code.co_qualname}, line {frame.f_lineno}")
                act()

    sys.setprofile(look)
    try:
        yield place
    finally:
        sys.setprofile(None)
