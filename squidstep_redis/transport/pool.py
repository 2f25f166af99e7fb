"""Borrows one connection of a redis-py pool within a call's timeout, and never one whose set-up was interrupted.

A pool's own `get_connection` waits for as long as the pool's settings say, regardless of the call's timeout. It also
keeps a connection whose set-up was interrupted, possibly without credentials or on another database. So a connection
is taken out of the pool first, and set up afterwards. If a pool overrides `get_connection`, that is called instead.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from math import inf
from operator import call, methodcaller
from queue import Empty, LifoQueue
from typing import Any, Final

import redis
from redis.connection import BlockingConnectionPool, ConnectionPool
from redis.exceptions import ConnectionError, RedisError

from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.handshake import end_of_attempt, open_connection
from squidstep_redis.transport.retry import unsent
from squidstep_redis.transport.stream import stream_of

PURPOSE: Final = () if tuple(map(int, redis.__version__.split(".")[:2])) >= (5, 3) else ("EVALSHA",)
_plain: Any = ConnectionPool
_blocking: Any = BlockingConnectionPool
_lifo: Any = LifoQueue
_exhaust: Any = deque
_pop = list[Any].pop
_release = methodcaller("release")
KNOWN: Final = (_plain.get_connection, _blocking.get_connection)
_KNOWN_RELEASES: Final = (_plain.release, _blocking.release)


class Loan:
    """A connection that was taken out of a pool.

    Attributes:
        attempt_ends: when the attempt ends that has opened the connection, by the monotonic clock.
        connection: it is open and set up.
        give_back: gives it back, in one operation of the interpreter. Call `wake` after it. It fails only if an
            exception from outside arrives while it waits for the lock of the pool; `give_back_again` is for that case.
    """

    __slots__ = ("_pool", "_taken", "attempt_ends", "connection", "give_back")

    def __init__(self, pool: Any, taken: list[Any], give_back: Callable[[], object]) -> None:
        self.attempt_ends = inf
        self.connection = taken[0]
        self.give_back = give_back
        self._pool = pool
        self._taken = taken

    def give_back_again(self) -> None:
        """Gives the connection back, unless `give_back` has done so."""
        _way_back(self._pool, self._taken)()

    def leave_to_pool(self) -> None:
        """Lets the pool's own method give the connection back, because the pool must be notified."""
        self.give_back = _each(self._pool.release, self._taken)


def borrow(pool: Any, deadline: float) -> Loan:
    """Takes a connection out of a pool and sets it up, or leaves the pool as it was.

    An exception from outside may arrive at any instruction of Python code. Even then, no lock may stay held, and the
    pool must not lose a connection. So a connection is taken in one operation of the interpreter, and given back in
    one, which is made before. The pool's own methods need several, and the methods of a blocking pool's queue hold a
    lock in Python code.

    Args:
        pool: the pool.
        deadline: how long to wait for a connection, by the monotonic clock.

    Raises:
        RoundTripError: there is no connection, or it could not be set up.
    """
    taken: list[Any] = []  # the connection; None stands for one that a blocking pool has yet to make
    give_back: Callable[[], object] = taken.clear
    try:
        has_known_methods = is_known(pool, KNOWN)
        if has_known_methods:
            pool._checkpid()
        give_back = _way_back(pool, taken)
        if not has_known_methods:
            taken.append(ask(pool))
            return Loan(pool, taken, give_back)
        if isinstance(pool, _blocking):
            _wait_for_place(pool, deadline, taken)
            if taken[0] is None:
                taken[0] = pool.make_connection()
        else:
            _take_or_make(pool, taken)
        loan = Loan(pool, taken, give_back)
        if not _is_ready(loan.connection, deadline):
            loan.connection.disconnect()
            loan.attempt_ends = end_of_attempt(loan.connection, deadline)
            open_connection(loan.connection, loan.attempt_ends)
        return loan
    except BaseException as error:
        try:
            if taken and taken[0] is not None:
                taken[0].disconnect()
        finally:
            if taken and taken[0] is not None:
                taken[0]._sock = None  # even if that was interrupted: no call may use it as ready
            try:
                give_back()
            except BaseException:
                _way_back(pool, taken)()
                raise
            wake(pool)
        failure = unsent(error)
        if failure is not None:
            raise failure from error
        raise


def open_one(pool: Any, deadline: float) -> None:
    """Leaves an open connection in a pool.

    Raises:
        RoundTripError: as for `borrow`.
    """
    loan = borrow(pool, deadline)
    try:
        loan.give_back()
    except BaseException:
        loan.give_back_again()
        raise
    wake(pool)


def _way_back(pool: Any, taken: list[Any]) -> Callable[[], object]:
    """Returns the operation that moves a connection from a list back to its pool. It does nothing for an empty list."""
    if not is_known(pool, KNOWN) or getattr(pool.release, "__func__", None) not in _KNOWN_RELEASES:
        return _each(pool.release, taken)
    if not hasattr(pool, "pool"):
        in_use, available = pool._in_use_connections, pool._available_connections
        return _locked(pool, partial(in_use.difference_update, taken), partial(available.extend, _items(taken)))
    queue = _queue_of(pool)
    return _each(pool.pool.put_nowait, taken) if queue is None else partial(queue.queue.extend, _items(taken))


def _items(items: list[Any]) -> Iterable[Any]:
    """Returns an iterator that takes the last item out of a list, if there is one when it is asked for."""
    return map(_pop, filter(None, (items,)))


def _each(release: Callable[[Any], object], taken: list[Any]) -> Callable[[], object]:
    return partial(_exhaust, map(release, _items(taken)), 0)


def needs_release(pool: Any, connection: Any) -> bool:
    """Whether the pool's own method has to give a connection back, because the pool must be notified."""
    return getattr(connection, "_re_auth_token", None) is not None or getattr(pool, "_in_maintenance", False)


def wake(pool: Any) -> None:
    """Wakes a thread that waits for a connection of a pool, after one was given back."""
    queue = _queue_of(pool)
    if queue is not None:
        _operation(queue.mutex.acquire, queue.mutex.release)()  # a thread that found the queue empty is a waiter by now
        waiters: deque[Any] = queue.not_empty._waiters
        if waiters:
            with suppress(IndexError):  # another thread wakes it
                next(map(_release, map(call, (waiters.popleft,))))


def _queue_of(pool: Any) -> Any:
    """Returns the queue of a blocking pool; None for another pool, or if it is not Python's own queue (gevent's)."""
    queue: Any = getattr(pool, "pool", None)
    return queue if type(queue) is _lifo and hasattr(queue, "mutex") else None


def ask(pool: Any) -> Any:
    """Returns a pool's next connection; for an asyncio pool, a coroutine that returns it."""
    return pool.get_connection(*PURPOSE)


def is_known(pool: Any, known: tuple[Any, ...]) -> bool:
    """Whether a pool's `get_connection` is one of these, and the pool is not about to move its connections."""
    return getattr(pool.get_connection, "__func__", None) in known and not getattr(pool, "_in_maintenance", False)


def seconds_to_wait(pool: Any, deadline: float) -> float | None:
    """Returns how long to wait for a connection of a pool that waits; None: without a limit."""
    left = max(0.0, deadline - time.monotonic())
    own: float | None = pool.timeout
    return own if left == inf else left if own is None else min(own, left)


def _wait_for_place(pool: Any, deadline: float, taken: list[Any]) -> None:
    """Takes an idle connection, or None for a connection yet to be made, and appends it to a list."""
    queue, limit = _queue_of(pool), seconds_to_wait(pool, deadline)
    if queue is None:
        with defer_sigalrm(), suppress(Empty):
            taken.append(pool.pool.get(timeout=limit))
    else:
        until = inf if limit is None else time.monotonic() + limit
        while not _take(queue, taken) and _wait(queue, until):
            pass
    if not taken:
        raise ConnectionError("No connection available.")


def _take(queue: Any, taken: list[Any]) -> bool:
    """Appends the last item of a queue to a list; returns whether there is one."""
    # In one step: before Python 3.12, an allocation may collect garbage, and a finalizer may then give back another.
    take = partial(taken.extend, _items(queue.queue))
    _operation(queue.mutex.acquire, take, queue.mutex.release)()
    return bool(taken)


def _wait(queue: Any, until: float) -> bool:
    """Waits until there may be an item in a queue; returns whether there is time left."""
    waiter = threading.Lock()
    waiter.acquire()
    try:
        queue.not_empty._waiters.append(waiter)
        left = until - time.monotonic()
        if left > 0 and not queue.queue:  # otherwise, `wake` may have missed this waiter
            waiter.acquire(timeout=-1 if left == inf else left)
        return left > 0
    finally:
        with suppress(ValueError):  # it was woken
            queue.not_empty._waiters.remove(waiter)


def _operation(*steps: Callable[[], object]) -> Callable[[], object]:
    """Returns several steps as one operation that nothing interrupts. They must be functions of the interpreter."""
    return partial(_exhaust, map(call, steps), 0)


def _locked(pool: Any, *steps: Callable[[], object]) -> Callable[[], object]:
    """Returns several steps as one operation under the lock of a pool, whose `disconnect` goes through its sets."""
    return _operation(pool._lock.acquire, *steps, pool._lock.release)


def _take_or_make(pool: Any, taken: list[Any]) -> None:
    """Appends an idle connection, or a new one, of a pool that does not wait."""
    taken.extend(_items(pool._available_connections))
    if not taken:
        with pool._lock:
            taken.append(_make_connection(pool))
    _locked(pool, partial(pool._in_use_connections.update, taken))()


def _make_connection(pool: Any) -> Any:
    count = pool._created_connections
    try:
        return pool.make_connection()
    except BaseException:
        pool._created_connections = count
        raise


def _is_ready(connection: Any, deadline: float) -> bool:
    """Whether a connection is open and nothing was left on it. A leftover error could not be recognized."""
    if getattr(connection, "_sock", None) is None:
        return False
    stream = stream_of(connection)
    if stream is None:  # another class of connection decides itself whether it is connected
        open_connection(connection, end_of_attempt(connection, deadline))
    try:
        return not connection.can_read() if stream is None else stream.is_quiet()
    except RedisError:  # the server has closed it
        return False
