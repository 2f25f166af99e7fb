"""Polls for a reply for a moment, before the thread or the event loop sleeps until it arrives.

Putting a thread to sleep and waking it takes longer than a server on the same machine, or close to it, needs for a
call. But a thread that polls takes time from others. So it polls only if no other thread of this process waits for a
reply. It lets others run between two polls, and detects whether they did. Each time that polling does not pay off, four
times as many of the next calls sleep at once.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from time import thread_time
from typing import Any, Final

from squidstep_redis.steady import steady_time as time

SECONDS: Final = 0.00015
"""How long to poll at most."""

_MAX_MISSES: Final = 8  # then one call in 256 polls: 0.6 µs for each, if the server is far away
_MAX_LOST: Final = 0.00001  # seconds; a poll takes less than one microsecond

let_others_run: Callable[[], object] = getattr(os, "sched_yield", int)
"""Runs another thread or process that waits for this CPU."""


callers: Final[set[int]] = set()
"""The threads of this process that wait for a reply. An interrupted thread may stay here until its next call."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=callers.clear)


def spare_cpus() -> int:
    """Returns how many CPUs this process may use in addition to the one that it runs on."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cpus - 1


class Spin:
    """Decides whether polling pays off, from the calls on one server's connections so far.

    Threads may share it: a lost update only decides whether one more call polls.
    """

    __slots__ = ("_misses", "_to_skip")

    # With a single CPU, polling would keep the server from running.
    _is_possible = hasattr(select, "poll") and spare_cpus() > 0

    def __init__(self) -> None:
        self._misses = 0
        self._to_skip = 0

    def begin(self) -> float | None:
        """Returns what to pass to `end`; None if this call is not to poll. The thread must be in `callers`."""
        if self._to_skip:
            self._to_skip -= 1
            return None
        return _time_lost() if self._is_possible and len(callers) < 2 else None

    def end(self, begun: float, *, in_time: bool) -> None:
        """Records whether polling has paid off.

        It has not if the thread lost time because others needed the CPU or the interpreter's lock.

        Args:
            begun: what `begin` returned in the same thread.
            in_time: whether the reply arrived while it was polled for.
        """
        if in_time and _time_lost() - begun < _MAX_LOST:
            self._misses = max(0, self._misses - 1)
        else:
            self._misses = min(_MAX_MISSES, self._misses + 2)
            self._to_skip = 2**self._misses - 1

    def wait(self, sock: Any) -> None:
        """Polls a socket until it has something to read, or the time is over.

        Args:
            sock: the socket. A TLS or gevent socket is not polled.
        """
        if type(sock) is not socket.socket or (begun := self.begin()) is None:
            return
        descriptor = sock.fileno()
        if descriptor < 0:  # another thread has closed it; reading will raise the error
            return
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        until = time.monotonic() + SECONDS
        while not (in_time := poll.poll(0)) and time.monotonic() < until:
            let_others_run()
        self.end(begun, in_time=bool(in_time))


def _time_lost() -> float:
    """Returns a clock that advances only while the thread does not run."""
    return time.monotonic() - thread_time()
