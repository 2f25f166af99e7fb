"""Borrows one connection of a redis-py pool, for no longer than a call may take, and never takes it half set up.

A pool's own `get_connection` waits as long as the pool is set to, regardless of the call's timeout, and keeps a
connection whose set-up was interrupted as it is, possibly without credentials or on another database. So a connection
is taken out of the pool first, and set up afterwards. A pool with a `get_connection` of its own is asked instead.
"""

from __future__ import annotations

from math import inf
from queue import Empty
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
_pop = list[Any].pop
_KNOWN: Final = (_plain.get_connection, _blocking.get_connection)


def borrow(pool: Any, deadline: float) -> Any:
    """Takes a connection out of a pool and sets it up, or leaves the pool as it was.

    Args:
        pool: the pool.
        deadline: how long to wait for a connection, by the monotonic clock.

    Raises:
        RoundTripError: there is no connection, or it could not be set up.
    """
    waits = isinstance(pool, _blocking)
    connection, has_place = None, False
    taken: list[Any] = []
    try:
        if not is_known(pool, _KNOWN):
            return ask(pool)
        pool._checkpid()
        if waits:
            with defer_sigalrm():
                connection, has_place = _wait_for_place(pool, deadline), True
            if connection is None:
                connection = pool.make_connection()
        else:
            # Without the pool's lock, which an exception of a signal handler could leave held: the call that takes the
            # connection is atomic. Only the number of connections needs the lock.
            try:
                taken.extend(map(_pop, (pool._available_connections,)))
                connection = taken[0]
            except IndexError:
                with pool._lock:
                    connection = _make_connection(pool)
            pool._in_use_connections.add(connection)
        if not _is_ready(connection):
            connection.disconnect()
            open_connection(connection)
        return connection
    except BaseException as error:
        if taken:
            connection = taken[0]
        if connection is not None:
            connection.disconnect()
            if not waits:
                pool._in_use_connections.add(connection)
            give_back(pool, connection)
        elif has_place:
            with defer_sigalrm():
                pool.pool.put_nowait(None)
        failure = unsent(error)
        if failure is not None:
            raise failure from error
        raise


def give_back(pool: Any, connection: Any) -> None:
    """Gives a connection back to its pool.

    SIGALRM is deferred if the pool waits: its queue takes a lock in Python code, where an alarm would leave it held.
    """
    if isinstance(pool, _blocking):
        with defer_sigalrm():
            pool.release(connection)
    else:
        pool.release(connection)


def ask(pool: Any) -> Any:
    """Returns a pool's next connection; for an asyncio pool, a coroutine of it."""
    return pool.get_connection(*PURPOSE)


def is_known(pool: Any, known: tuple[Any, ...]) -> bool:
    """Whether a pool's `get_connection` is one of these, and the pool not about to move its connections."""
    return getattr(pool.get_connection, "__func__", None) in known and not getattr(pool, "_in_maintenance", False)


def seconds_to_wait(pool: Any, deadline: float) -> float | None:
    """Returns how long to wait for a connection of a pool that waits; None: without a limit."""
    left = max(0.0, deadline - time.monotonic())
    own: float | None = pool.timeout
    return own if left == inf else left if own is None else min(own, left)


def _wait_for_place(pool: Any, deadline: float) -> Any:
    """Returns an idle connection, or None for one that is to be made."""
    try:
        return pool.pool.get(timeout=seconds_to_wait(pool, deadline))
    except Empty:
        raise ConnectionError("No connection available.") from None


def _make_connection(pool: Any) -> Any:
    count = pool._created_connections
    try:
        return pool.make_connection()
    except BaseException:
        pool._created_connections = count
        raise


def _is_ready(connection: Any) -> bool:
    """Whether a connection is open and nothing was left on it. An error that was left could not be recognized."""
    if getattr(connection, "_sock", None) is None:
        return False
    stream = stream_of(connection)
    if stream is None:  # another class of connection has a say in whether it is connected
        open_connection(connection)
    try:
        return not connection.can_read() if stream is None else stream.is_quiet()
    except RedisError:  # the server has closed it
        return False
