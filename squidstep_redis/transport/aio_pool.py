"""The pool of a user's client on asyncio: a connection is borrowed for one round trip."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
import select
from collections.abc import Sequence
from math import inf
from typing import Any, Final, cast
from weakref import ReferenceType, WeakKeyDictionary, ref

from redis.asyncio.connection import BlockingConnectionPool, ConnectionPool
from redis.exceptions import ConnectionError, ResponseError, TimeoutError

from squidstep_redis.protocol.call import Command
from squidstep_redis.server_errors import ReplyMismatchError
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.aio_connection import (
    AsyncConnections,
    OwnConnections,
    abandoned,
    connect_error,
    drop,
    is_foreign,
    seconds_to_connect,
)
from squidstep_redis.transport.aio_tasks import cancellations, raise_swallowed_cancellation
from squidstep_redis.transport.client import has_plain_stream, idle_of
from squidstep_redis.transport.pool import ask, is_known, seconds_to_wait
from squidstep_redis.transport.retry import RoundTripError, as_redis_error, is_demotion, undecided
from squidstep_redis.transport.stream import Packed, Read

_plain: Any = ConnectionPool
_blocking: Any = BlockingConnectionPool
_KNOWN: Final = (_plain.get_connection, _blocking.get_connection)


class PooledConnections(AsyncConnections):
    """The pool of a user's client: a connection is borrowed for one round trip.

    A pool serves one event loop at a time, because its locks belong to a loop. The first loop in which a store uses a
    pool keeps it until the loop is closed. Meanwhile, other loops use their own connections, if the pool's are plain
    streams.
    """

    def __init__(self, client: Any) -> None:
        self._pool = client.connection_pool
        self._others = OwnConnections(client) if has_plain_stream(self._pool.connection_class) else None
        self._usage = _usages.setdefault(self._pool, _Usage())
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
            results, is_demoted = await round_trip_on(connection, commands, read, deadline)
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
        """Takes a connection out of the pool, and connects it unless it is ready."""
        self._remove_foreign()
        try:
            connection = await _take(self._pool, deadline)
            try:
                if is_foreign(connection, asyncio.get_running_loop()):  # another thread gave it back just now
                    drop(connection)
                if not has_plain_stream(cast("type[object]", type(connection))):
                    await self._pool.ensure_connection(connection)
                elif not is_quiet(connection):
                    drop(connection)
                    await connect(connection, deadline)
            except BaseException:
                drop(connection)
                self._release_later(connection)
                raise
        except RoundTripError:
            raise
        except Exception as error:
            raise RoundTripError(as_redis_error(error), sent=False) from error
        return connection

    def _release_later(self, connection: Any) -> None:
        """Gives a connection back to the pool in a separate task, which a cancellation of this task does not reach."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a coroutine is closed after its event loop
            _take_back(self._pool, connection)
            return
        task = _Uncancellable(self._pool.release(connection), loop=loop)
        self._releasing.add(task)
        task.add_done_callback(self._on_released)

    def _on_released(self, task: asyncio.Task[None]) -> None:
        self._releasing.discard(task)
        if not task.cancelled():
            task.exception()  # of a pool that belongs to another event loop

    def _has_pool(self) -> bool:
        """Whether the running event loop may use the pool: the first one may, until it is closed or this is a fork."""
        loop = asyncio.get_running_loop()
        while (owner := self._usage.owner).loop() is not loop:
            if not owner.is_gone():
                return False
            new = _Owner(ref(loop))
            successor = owner.successor.setdefault(0, new)  # atomic: another thread's loop may want it, too
            self._usage.owner = successor
            if successor is new:
                _renew_locks(self._pool, loop, was_used=owner.has_used)
                self._reclaim()
        return True

    def _reclaim(self) -> None:
        """Gives back the connections that tasks of a closed event loop, or of the parent process, have borrowed."""
        is_fork = self._usage.pid != os.getpid()
        loop = asyncio.get_running_loop()
        for connection in list(getattr(self._pool, "_in_use_connections", ())):
            if is_foreign(connection, loop) and (is_fork or connection._reader._loop.is_closed()):
                _take_back(self._pool, connection)

    def _remove_foreign(self) -> None:
        """Removes idle connections of another event loop or process, until the next one belongs to this one."""
        idle: list[Any] = getattr(self._pool, "_available_connections", [])
        if self._usage.pid != os.getpid():
            self._usage.pid = os.getpid()
            abandoned.extend(idle)
            idle.clear()
        loop = asyncio.get_running_loop()
        with contextlib.suppress(IndexError):  # another thread took it
            while idle and is_foreign(idle[-1], loop):
                drop(idle.pop())


class _Owner:
    """The event loop that may use a pool.

    Attributes:
        has_used: whether it may have used the pool: not if no store has used the pool so far.
        successor: at 0, the next owner.
    """

    def __init__(self, loop: ReferenceType[asyncio.AbstractEventLoop] | None) -> None:
        self._loop = loop
        self._pid = os.getpid()
        self.successor: dict[int, _Owner] = {}

    @property
    def has_used(self) -> bool:
        return self._loop is not None or self._pid != os.getpid()

    def loop(self) -> asyncio.AbstractEventLoop | None:
        """Returns the event loop, if it still exists."""
        return None if self._loop is None else self._loop()

    def is_gone(self) -> bool:
        """Whether the loop is closed, or belongs to a parent process."""
        loop = self.loop()
        return loop is None or loop.is_closed() or self._pid != os.getpid()


class _Usage:
    """What all stores on a pool have to agree about, because they share its locks and its connections.

    Attributes:
        owner: the event loop that may use it.
        pid: the process whose connections are idle in it.
    """

    def __init__(self) -> None:
        self.owner = _Owner(None)
        self.pid = os.getpid()


_usages: WeakKeyDictionary[Any, _Usage] = WeakKeyDictionary()
"""How each pool is used. It lives as long as the pool."""


class _Uncancellable(asyncio.Task[None]):
    """A short task that no shutdown routine cancels."""

    def cancel(self, msg: Any | None = None) -> bool:
        """Refuses."""
        return False


def _renew_locks(pool: Any, loop: asyncio.AbstractEventLoop, *, was_used: bool) -> None:
    """Replaces the locks of a pool that belong to another event loop than the one that uses it from now on.

    A lock that is unbound, or bound to this loop, stays: tasks of the client or of another store may be waiting on it.

    Args:
        pool: the pool.
        loop: the event loop.
        was_used: whether a loop that is gone may hold a lock. Without waiters, a lock does not know its loop.
    """
    for name in ("_lock", "_condition"):
        lock = getattr(pool, name, None)
        if isinstance(lock, (asyncio.Lock, asyncio.Condition)):
            bound: Any = getattr(lock, "_loop", None) or getattr(getattr(lock, "_lock", None), "_loop", None)
            is_stale = (was_used and lock.locked()) if bound is None else bound is not loop
            if is_stale:
                setattr(pool, name, type(lock)())


def _take_back(pool: Any, connection: Any) -> None:
    """Gives a connection back to a pool whose event loop has ended: no task waits for it, and nothing is awaited."""
    borrowed: Any = getattr(pool, "_in_use_connections", set[Any]())
    if connection in borrowed:
        borrowed.remove(connection)
        pool._available_connections.append(connection)


async def _take(pool: Any, deadline: float) -> Any:
    """Takes a connection out of a pool: an idle one, in any state, or a new one that is not connected.

    `pool.py` explains why the pool's `get_connection` is not called. If it is not redis-py's own, it is called.
    """
    if not is_known(pool, _KNOWN):
        return await ask(pool)
    if not isinstance(pool, BlockingConnectionPool) or pool.can_get_connection():
        return pool.get_available_connection()
    condition: asyncio.Condition = vars(pool)["_condition"]
    try:
        async with condition:
            try:
                async with asyncio.timeout(seconds_to_wait(pool, deadline)):
                    await condition.wait_for(pool.can_get_connection)
                    return pool.get_available_connection()
            except BaseException:
                condition.notify()  # this task may have been notified, while another one waits, too
                raise
    except builtins.TimeoutError:
        raise ConnectionError("No connection available.") from None


async def connect(connection: Any, deadline: float) -> None:
    """Lets redis-py set up a connection, in bounded time."""
    scope = asyncio.timeout(seconds_to_connect(connection, deadline))
    try:
        async with scope:
            await connection.connect()
    except BaseException as error:
        raise RoundTripError(connect_error(error, scope), sent=False) from error


def is_quiet(connection: Any) -> bool:
    """Whether a connection is open and nothing was left on it. A leftover error could not be recognized."""
    reader = connection._reader
    if reader is None or reader.at_eof() or connection._writer.is_closing():  # the latter after a reset
        return False
    has_data = getattr(getattr(connection._parser, "_reader", None), "has_data", None)
    if reader._buffer or (has_data is not None and has_data()):
        return False
    endpoint = connection._writer.get_extra_info("socket")
    poll = select.poll()
    poll.register(endpoint, select.POLLIN)
    return not poll.poll(0)


async def round_trip_on(
    connection: Any, commands: Sequence[Command], read: Read, deadline: float = inf
) -> tuple[list[Any], bool]:
    """Sends commands on a redis-py connection; returns the results, and whether the server is no longer a primary.

    A plain stream is written and read here, because redis-py sets a timer, and starts a task, for each step.
    """
    timeout: float | None = connection.socket_timeout
    limit = max(deadline, time.monotonic()) + (timeout or inf)
    packed = Packed(commands)
    results: list[Any] = []
    is_demoted = False
    is_plain = has_plain_stream(cast("type[object]", type(connection))) and not connection.health_check_interval
    scope = asyncio.timeout(timeout)
    try:
        async with scope:
            if is_plain:
                if connection._writer.is_closing():
                    raise ConnectionError("Connection closed by server.")
                connection._writer.write(b"".join(packed))
                await connection._writer.drain()
                read_response = connection._parser.read_response
            else:
                await connection.send_packed_command(packed)
                read_response = connection.read_response
            for index in range(len(commands)):
                if index and timeout is not None:  # each reply has its own timeout; together, they have the limit
                    scope.reschedule(asyncio.get_running_loop().time() + min(timeout, limit - time.monotonic()))
                try:
                    reply = await read_response(disable_decoding=True)
                except ResponseError as error:
                    reply = error
                except ConnectionError as error:
                    if not (is_plain and is_demotion(error)):
                        raise
                    reply = error
                is_demoted = is_demoted or (isinstance(reply, Exception) and is_demotion(reply))
                results.append(read(index, reply))
    except ReplyMismatchError:
        raise
    except Exception as error:
        cause = TimeoutError("Timeout reading from socket") if scope.expired() else as_redis_error(error)
        raise RoundTripError(undecided(cause, len(commands)), sent=packed.was_taken) from error
    return results, is_demoted
