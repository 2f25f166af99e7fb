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
from squidstep_redis.transport.handshake import open_connection
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


def borrow(pool: Any, deadline: float) -> tuple[Any, Callable[[], object]]:
    """Takes a connection out of a pool and sets it up, or leaves the pool as it was.

    An exception from outside may arrive at any instruction of Python code. Even then, no lock may stay held, and the
    pool must not lose a connection. So a connection is taken in one operation of the interpreter, and given back in
    one. The pool's own methods need several, and the methods of a blocking pool's queue hold a lock in Python code.

    Args:
        pool: the pool.
        deadline: how long to wait for a connection, by the monotonic clock.

    Returns:
        The connection, and the operation that gives it back. Call `wake` after it.

    Raises:
        RoundTripError: there is no connection, or it could not be set up.
    """
    waits = isinstance(pool, _blocking)
    connection = None
    taken: list[Any] = []
    try:
        if not is_known(pool, KNOWN):
            connection = ask(pool)
            return connection, partial(pool.release, connection)
        pool._checkpid()
        if waits:
            _wait_for_place(pool, deadline, taken)
            connection = taken[0]
            if connection is None:
                connection = pool.make_connection()
        else:
            try:
                taken.extend(map(_pop, (pool._available_connections,)))
                connection = taken[0]
            except IndexError:
                with pool._lock:
                    connection = _make_connection(pool)
            _locked(pool, partial(pool._in_use_connections.add, connection))()
        if not _is_ready(connection):
            connection.disconnect()
            open_connection(connection)
        return connection, _way_back(pool, connection)
    except BaseException as error:
        if connection is None and taken:
            connection = taken[0]
        if connection is not None or taken:
            try:
                _close(connection)
            finally:
                if connection is not None:
                    connection._sock = None  # even if that was interrupted: no call may use it as ready
                _way_back(pool, connection)()
                wake(pool)
        failure = unsent(error)
        if failure is not None:
            raise failure from error
        raise


def _close(connection: Any) -> None:
    if connection is not None:
        connection.disconnect()


def _way_back(pool: Any, connection: Any) -> Callable[[], object]:
    """Returns the operation that gives a connection back; None stands for one that a blocking pool has yet to make."""
    if not is_known(pool, KNOWN) or getattr(pool.release, "__func__", None) not in _KNOWN_RELEASES:
        return partial(pool.release, connection)
    if not hasattr(pool, "pool"):
        in_use, available = pool._in_use_connections, pool._available_connections
        return _locked(pool, partial(in_use.discard, connection), partial(available.append, connection))
    queue = _queue_of(pool)
    return partial(pool.pool.put_nowait if queue is None else queue.queue.append, connection)


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
    filled: Iterable[list[Any]] = filter(None, (queue.queue,))
    take = partial(taken.extend, map(_pop, filled))
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


def _make_connection(pool: Any) -> Any:
    count = pool._created_connections
    try:
        return pool.make_connection()
    except BaseException:
        pool._created_connections = count
        raise


def _is_ready(connection: Any) -> bool:
    """Whether a connection is open and nothing was left on it. A leftover error could not be recognized."""
    if getattr(connection, "_sock", None) is None:
        return False
    stream = stream_of(connection)
    if stream is None:  # another class of connection decides itself whether it is connected
        open_connection(connection)
    try:
        return not connection.can_read() if stream is None else stream.is_quiet()
    except RedisError:  # the server has closed it
        return False
