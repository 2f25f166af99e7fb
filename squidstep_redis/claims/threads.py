"""Threads and events whose callers never hold a lock.

An exception from outside may arrive between any two instructions of the code that calls a store: raised by a signal
handler, or set with `PyThreadState_SetAsyncExc`. The signal handler may also call the store itself. A lock that the
interrupted code holds is then never released, or the thread that holds it waits for it. `threading.Event` and
`threading.Condition` hold such a lock in each of their methods, and they are written in Python.

So callers use only operations that the interpreter completes once they have begun: operations of a dict or deque, and
`release` of a plain lock that serves as a binary semaphore. Only the background thread itself waits for such a lock.
"""

from __future__ import annotations

import _thread
import math
import os
import threading
from abc import ABC, abstractmethod
from typing import ClassVar, Final

from squidstep_redis.steady import steady_time as time

_MAX_FAILURES: Final = 100  # without a pause, because the next claim may be due
_CLOSE_SECONDS: Final = 0.2  # that `close` waits for an idle thread to end


class BackgroundThread(ABC):
    """A daemon thread that runs while there is work, and ends after IDLE seconds without work.

    Attributes:
        is_closing: whether the thread ends as soon as there is no work.
        waits_until: when the thread looks for work by itself, on the monotonic clock; inf while it works.
    """

    NAME: ClassVar[str]
    IDLE: ClassVar[float]

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._running = threading.Lock()  # held by the thread as long as it runs; no thread waits for it
        self._wakeup = threading.Lock()  # a binary semaphore: released to wake the thread
        self._wakeup.acquire()
        self._failures = 0  # one after another
        self.is_closing = False
        self.waits_until = math.inf

    @property
    def is_running(self) -> bool:
        """Whether the thread runs."""
        return self._running.locked()

    @abstractmethod
    def work(self) -> float | None:
        """Does the work that is due; returns when more is due (monotonic clock), or None. Called in the thread."""

    @abstractmethod
    def has_work(self) -> bool:
        """Whether there is something to do, now or later."""

    def on_end(self) -> None:  # noqa: B027 -- optional
        """Called in the thread when it ends."""

    def start(self) -> None:
        """Starts the thread unless it runs.

        `Thread.start` holds locks and waits. So a plain thread, which nothing interrupts, calls it. In Python 3.11, an
        exception that is set for the calling thread can reach the thread that it is starting. So the plain thread
        executes no Python code: it only starts the thread that does.
        """
        if not self.is_running and self._pid == os.getpid():
            start_thread = _thread.start_new_thread
            start_thread(start_thread, (self._start, ()))

    def wake(self) -> None:
        """Makes the thread look for work now."""
        _release(self._wakeup)

    def close(self) -> None:
        """Ends the thread as soon as there is no work, and waits a moment for it."""
        self.is_closing = True
        self.wake()
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self.is_running and self._pid == os.getpid() and time.monotonic() < deadline:
            if self.has_work():
                break
            time.sleep(0.001)

    def _start(self) -> None:
        if self._running.acquire(blocking=False):  # otherwise, another caller has started it
            try:
                threading.Thread(target=self._run, name=self.NAME, daemon=True).start()
            except RuntimeError:  # the interpreter is shutting down
                self._running.release()

    def _run(self) -> None:
        try:
            while True:
                try:
                    self._run_despite_errors()
                    return
                except BaseException:  # noqa: BLE001, S112 -- it came between two rounds of the loop inside
                    continue
        finally:
            self._running.release()
            if self.has_work():  # added since, by a caller that saw the thread running
                self.start()

    def _run_despite_errors(self) -> None:
        """Runs until there is no work. Nothing may end the thread earlier: neither an error nor another thread."""
        while True:
            try:
                if self._failures:
                    time.sleep(0.001 if self._failures < _MAX_FAILURES else 1.0)
                self._loop()
                return
            except BaseException:  # noqa: BLE001 -- the thread must continue
                self._failures += 1

    def _loop(self) -> None:
        idle_since = time.monotonic()
        while True:
            self.waits_until = math.inf  # from here on, adding work wakes this thread
            due, now = self.work(), time.monotonic()
            self._failures = 0
            if due is not None:
                idle_since = now
            elif self.is_closing or now >= idle_since + self.IDLE:
                self.on_end()
                return
            # At most IDLE: ending the last claim does not wake this thread. It would make short steps slower.
            self.waits_until = min(math.inf if due is None else due, idle_since + self.IDLE)
            self._wakeup.acquire(timeout=max(0.0, self.waits_until - now))


class LockFreeEvent(threading.Event):
    """An event whose methods may be interrupted at any point: `set` never blocks, even if a waiter was interrupted."""

    def __init__(self) -> None:
        self._flag = False
        self._waiters: dict[int, threading.Lock] = {}

    def is_set(self) -> bool:
        """Whether the event is set."""
        return self._flag

    def set(self) -> None:
        """Sets the event, and wakes all threads that wait for it."""
        self._flag = True
        for waiter in self._waiters.copy().values():
            _release(waiter)

    def clear(self) -> None:
        """Resets the event."""
        self._flag = False

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the event is set.

        Args:
            timeout: seconds to wait at most; None: no limit.

        Returns:
            Whether it is set.
        """
        if self._flag:
            return True
        waiter = threading.Lock()
        waiter.acquire()
        try:
            self._waiters[id(waiter)] = waiter
            if not self._flag:  # otherwise, `set` may have missed this waiter
                waiter.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
        finally:
            self._waiters.pop(id(waiter), None)
        return self._flag


def _release(semaphore: threading.Lock) -> None:
    try:
        semaphore.release()
    except RuntimeError:  # it was released before, and no thread has acquired it since
        return
