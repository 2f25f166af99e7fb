"""Takes connections out of the pool of a user's client."""

from __future__ import annotations

import time
from math import inf
from queue import Empty
from typing import Any, Final, cast

import redis
from redis.connection import BlockingConnectionPool, ConnectionPool
from redis.exceptions import ConnectionError

PURPOSE: Final = () if tuple(map(int, redis.__version__.split(".")[:2])) >= (5, 3) else ("EVALSHA",)
"""What `get_connection` of a pool expects."""


def take(pool: Any, deadline: float) -> Any:
    """Takes a connection out of a pool: an idle one, whatever its state is, or a new one that is not connected.

    A pool's own `get_connection` waits as long as the pool is set to, whatever the call's timeout is. It connects, and
    if that is interrupted, the connection goes back half set up: possibly without credentials, or on another database.

    Args:
        pool: the pool. If its `get_connection` is not redis-py's, that is called.
        deadline: when the call's timeout ends, by the monotonic clock.
    """
    if behaves_as(pool, ConnectionPool):
        pool._checkpid()
        with pool._lock:
            idle: list[Any] = pool._available_connections
            connection = idle.pop() if idle else pool.make_connection()
            pool._in_use_connections.add(connection)
        return connection
    if behaves_as(pool, BlockingConnectionPool):
        pool._checkpid()
        try:
            connection = pool.pool.get(timeout=time_left(pool, deadline))
        except Empty:
            raise ConnectionError("No connection available.") from None
        if connection is None:
            try:
                connection = pool.make_connection()
            finally:
                if connection is None:
                    pool.pool.put_nowait(None)  # otherwise the pool would lose a place
        return connection
    return pool.get_connection(*PURPOSE)


def behaves_as(pool: Any, kind: Any) -> bool:
    """Whether a pool gets its connections as this class of redis-py's does."""
    actual = cast("Any", type(pool))
    return "get_connection" not in vars(pool) and actual.get_connection is kind.get_connection


def time_left(pool: Any, deadline: float) -> float | None:
    """Returns for how many seconds to wait for a connection of a blocking pool; None: without a limit."""
    left = max(0.0, deadline - time.monotonic())
    own: float | None = pool.timeout
    return own if left == inf else left if own is None else min(own, left)
