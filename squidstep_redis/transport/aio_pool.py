"""The pool of a user's client on asyncio: a connection is borrowed for one exchange."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from math import inf
from typing import Any
from weakref import ref

from redis.exceptions import ResponseError, TimeoutError

from squidstep_redis.errors import ReplyMismatchError
from squidstep_redis.protocol.call import Command
from squidstep_redis.transport.aio_connection import (
    AsyncConnections,
    OwnConnections,
    abandoned,
    cancellations,
    drop,
    is_foreign,
    raise_swallowed_cancellation,
)
from squidstep_redis.transport.client import has_plain_stream, idle_of
from squidstep_redis.transport.pool import Borrower, get_connection
from squidstep_redis.transport.retry import ExchangeError, as_redis_error, is_demotion
from squidstep_redis.transport.stream import Packed, Read


class PooledConnections(AsyncConnections):
    """The pool of a user's client: a connection is borrowed for one exchange.

    A pool serves one event loop at a time, because its locks belong to a loop. The first loop that uses it keeps it
    until it is closed; meanwhile, other loops use connections of their own, if the pool's are plain streams.
    """

    def __init__(self, client: Any) -> None:
        self._pool = client.connection_pool
        self._others = OwnConnections(client) if has_plain_stream(self._pool.connection_class) else None
        self._pid = os.getpid()
        self._owner = _Owner(lambda: None)
        self._releasing: set[asyncio.Task[None]] = set()

    @property
    def is_exhausted(self) -> bool:
        """Whether commands would have to wait for a connection."""
        return not self._pool.can_get_connection()

    async def send(
        self, commands: Sequence[Command], read: Read, deadline: float = inf, *, blocks: bool = False
    ) -> list[Any]:
        """Sends commands on a connection of the pool."""
        if self._others is not None and not self._has_pool():
            return await self._others.send(commands, read, deadline, blocks=blocks)
        before = cancellations()
        connection = await self._borrow(deadline)
        try:
            results, is_demoted = await exchange_on(connection, commands, read, deadline)
            await raise_swallowed_cancellation(before)
        except BaseException:
            drop(connection)
            self._release_later(connection)
            raise
        if is_demoted:
            for idle in (connection, *idle_of(self._pool)):
                drop(idle)
        try:
            await self._pool.release(connection)
        except BaseException as error:
            if connection in getattr(self._pool, "_in_use_connections", ()):
                self._release_later(connection)
            if not isinstance(error, RuntimeError):  # of another event loop; there is a result
                raise
        return results

    def close(self) -> None:
        """Closes the connections that are not the pool's."""
        if self._others is not None:
            self._others.close()

    async def _borrow(self, deadline: float) -> Any:
        self._remove_foreign()
        try:
            connection = await get_connection(_Borrower(self._pool, deadline, self._release_later))
            if _has_left(connection) or is_foreign(connection, asyncio.get_running_loop()):
                await self._reconnect(connection)
        except Exception as error:
            raise ExchangeError(as_redis_error(error), sent=False) from error
        return connection

    async def _reconnect(self, connection: Any) -> None:
        """Reconnects a connection on which a reply was left, or that another thread's event loop gave back just now."""
        try:
            drop(connection)
            await connection.connect()
        except BaseException:
            drop(connection)
            self._release_later(connection)
            raise

    def _release_later(self, connection: Any) -> None:
        """Gives a connection back to the pool in a task of its own, which a cancellation of this one leaves alone."""
        task = _Uncancellable(self._pool.release(connection), loop=asyncio.get_running_loop())
        self._releasing.add(task)
        task.add_done_callback(self._on_released)

    def _on_released(self, task: asyncio.Task[None]) -> None:
        self._releasing.discard(task)
        if not task.cancelled():
            task.exception()  # of a pool that belongs to another event loop

    def _has_pool(self) -> bool:
        """Whether the running event loop may use the pool. The first one may, until it is closed or this is a fork."""
        loop = asyncio.get_running_loop()
        while (owner := self._owner).loop() is not loop:
            if not owner.is_gone():
                return False
            new = _Owner(ref(loop))
            self._owner = owner = owner.successor.setdefault(0, new)  # atomic: another thread's loop may want it, too
            if owner is new:
                _renew_locks(self._pool)
        return True

    def _remove_foreign(self) -> None:
        """Removes idle connections of another event loop or process, until the next one is not such a one."""
        idle: list[Any] = getattr(self._pool, "_available_connections", [])
        if self._pid != os.getpid():
            self._pid = os.getpid()
            abandoned.extend(idle)
            idle.clear()
        loop = asyncio.get_running_loop()
        with contextlib.suppress(IndexError):  # another thread took it
            while idle and is_foreign(idle[-1], loop):
                drop(idle.pop())


class _Owner:
    """The event loop that may use a pool.

    Attributes:
        loop: a weak reference to it.
        successor: at 0, the next owner.
    """

    def __init__(self, loop: Callable[[], asyncio.AbstractEventLoop | None]) -> None:
        self.loop = loop
        self.successor: dict[int, _Owner] = {}
        self._pid = os.getpid()

    def is_gone(self) -> bool:
        """Whether the loop is closed, or belongs to a parent process."""
        loop = self.loop()
        return loop is None or loop.is_closed() or self._pid != os.getpid()


class _Uncancellable(asyncio.Task[None]):
    """A short task that no shutdown routine cancels."""

    def cancel(self, msg: Any | None = None) -> bool:
        """Refuses."""
        return False


def _renew_locks(pool: Any) -> None:
    """Replaces the locks of a pool, which belong to an event loop that is closed, or to that of a parent process."""
    for name in ("_lock", "_condition"):
        lock = getattr(pool, name, None)
        if isinstance(lock, (asyncio.Lock, asyncio.Condition)):
            setattr(pool, name, type(lock)())


def _has_left(connection: Any) -> bool:
    """Whether a reply was left on a connection of redis-py's: if it is an error, no call could tell it from its own."""
    reader = getattr(connection._parser, "_reader", None)
    has_data = getattr(reader, "has_data", None)
    return bool(getattr(connection._reader, "_buffer", None)) or (has_data is not None and has_data())


class _Borrower(Borrower):
    def __init__(self, pool: Any, deadline: float, release_later: Callable[[Any], None]) -> None:
        super().__init__(pool, deadline)
        vars(self)["_release_later"] = release_later

    async def release(self, connection: Any) -> None:
        """Is called by the pool if the connection could not be set up."""
        drop(connection)
        vars(self)["_release_later"](connection)


async def exchange_on(
    connection: Any, commands: Sequence[Command], read: Read, deadline: float = inf
) -> tuple[list[Any], bool]:
    """Sends commands on a connection of redis-py's; returns the results, and whether the server is no primary."""
    limit = max(deadline, time.monotonic()) + (connection.socket_timeout or inf)
    packed = Packed(commands)
    results: list[Any] = []
    is_demoted = False
    try:
        await connection.send_packed_command(packed)
        for index in range(len(commands)):
            if time.monotonic() > limit:  # each reply has its own timeout; together, they have this one
                raise TimeoutError("Timeout reading from socket")
            try:
                reply = await connection.read_response(disable_decoding=True)
            except ResponseError as error:
                reply = error
            is_demoted = is_demoted or (isinstance(reply, ResponseError) and is_demotion(reply))
            results.append(read(index, reply))
    except ReplyMismatchError:
        raise
    except Exception as error:
        raise ExchangeError(as_redis_error(error), sent=packed.was_taken) from error
    return results, is_demoted
