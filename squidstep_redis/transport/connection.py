"""A store's way to its server: packed by hiredis, over a connection that the client's pool lends.

`execute_command` of redis-py takes half as much of the client's time again for the same bytes: it times, retries and
records what the store does by itself or not at all. What belongs to the connection stays as it is: time-outs, health
checks, credentials, Sentinel, reconnecting. Whoever overrides, instruments or measures `execute_command` is asked to
send as before: see `lends`.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from types import FunctionType
from typing import Any, Final

import hiredis
import redis
from redis.exceptions import ResponseError

from squidstep_redis.protocol.call import Command

try:
    from redis.observability.providers import get_observability_instance
except ImportError:  # before redis-py 7.2
    get_observability_instance = None

_hiredis: Any = hiredis  # it leaves parts of its types unknown
pack_command: Callable[[Command], bytes] = _hiredis.pack_command

_CHUNK: Final = 16  # a chunk goes out while the next one is packed: the server begins before the whole batch is there
_MAX_IDLE: Final = 16
_FRESH_SECONDS: Final = 1.0
_PURPOSE: Final = () if tuple(map(int, redis.__version__.split(".")[:2])) >= (5, 3) else ("EVALSHA",)
_CLIENTS: Final = ("redis.client", "redis.asyncio.client")


class BaseDirectConnections:
    """A client, whose connections may be used in its place if nobody misses anything by it.

    Of a client that a store made for itself, connections are kept for a moment after use: to take one from redis-py's
    pool, which looks each time whether the server has closed it, costs a third of a call. So they are looked at again
    only after a second without use; one that was closed within it fails, and the call is sent again, as any other.
    """

    def __init__(self, client: Any, *, keep_idle: bool = False) -> None:
        self._own: dict[str, Any] = vars(client)
        self._type: Any = type(client)
        self._execute_command = self._type.execute_command if _is_plain(client) else None
        self._pool: Any = getattr(client, "connection_pool", None)
        self._max_idle = _MAX_IDLE if keep_idle and not _follows_notifications(self._pool) else 0
        self._idle: deque[tuple[Any, float]] = deque()
        self._pid = os.getpid()

    def can_bypass_client(self) -> bool:
        """Asked before each call, for an instrumentation may come at any time.

        Not lent are the connections of a cluster's client, which finds the node; of one that caches replies; of one
        whose methods are not redis-py's own: overridden, or wrapped by an instrumentation; and none while redis-py
        measures its commands by itself, for OpenTelemetry.
        """
        return (
            self._execute_command is not None
            and self._type.execute_command is self._execute_command
            and "execute_command" not in self._own
            and (get_observability_instance is None or get_observability_instance().get_provider_manager() is None)
        )

    def _last_kept(self) -> tuple[Any, float] | None:
        if self._idle and self._pid != os.getpid():
            self._idle.clear()  # they are the parent's
            self._pid = os.getpid()
        try:
            return self._idle.pop()
        except IndexError:
            return None


class DirectConnections(BaseDirectConnections):
    """A client of redis."""

    def send(self, *commands: Command, read: Callable[[int, Any], Any] | None = None) -> list[Any]:
        """Sends commands at once and reads their replies, of which an error is one, too.

        Args:
            commands: as redis-py takes them, but each word by itself.
            read: what is made of a reply, given its place and the reply, while the server is at the next ones.

        Raises:
            redis.ConnectionError: from connecting, sending or reading, like its TimeoutError.
        """
        connection = self._take()
        try:
            connection.send_packed_command(_packed(commands))
            if read is None:
                replies = [_read(connection) for _ in commands]
            else:
                replies = [read(index, _read(connection)) for index in range(len(commands))]
        except BaseException:
            connection.disconnect()  # what is left on it would answer the next command
            self._pool.release(connection)
            raise
        if len(self._idle) < self._max_idle:
            self._idle.append((connection, time.monotonic()))
        else:
            self._pool.release(connection)
        return replies

    def _take(self) -> Any:
        kept = self._last_kept()
        if kept is not None:
            connection, since = kept
            if time.monotonic() - since < _FRESH_SECONDS:
                return connection
            self._pool.release(connection)
        return self._pool.get_connection(*_PURPOSE)


class AsyncDirectConnections(BaseDirectConnections):
    """A client of redis.asyncio."""

    async def send(self, *commands: Command, read: Callable[[int, Any], Any] | None = None) -> list[Any]:
        """Sends commands at once and reads their replies, of which an error is one, too.

        Args:
            commands: as redis-py takes them, but each word by itself.
            read: what is made of a reply, given its place and the reply, while the server is at the next ones.

        Raises:
            redis.ConnectionError: from connecting, sending or reading, like its TimeoutError.
        """
        connection = await self._take()
        try:
            await connection.send_packed_command(_packed(commands))
            if read is None:
                replies = [await _read_async(connection) for _ in commands]
            else:
                replies = [read(index, await _read_async(connection)) for index in range(len(commands))]
        except BaseException:
            await connection.disconnect(nowait=True)
            await self._pool.release(connection)
            raise
        if len(self._idle) < self._max_idle:
            self._idle.append((connection, time.monotonic()))
        else:
            await self._pool.release(connection)
        return replies

    async def _take(self) -> Any:
        kept = self._last_kept()
        if kept is not None:
            connection, since = kept
            if time.monotonic() - since < _FRESH_SECONDS:
                return connection
            await self._pool.release(connection)
        return await self._pool.get_connection(*_PURPOSE)


def _packed(commands: Sequence[Command]) -> Iterable[bytes]:
    if len(commands) == 1:
        return (pack_command(commands[0]),)
    return _chunks(commands)


def _chunks(commands: Iterable[Command]) -> Iterator[bytes]:
    remaining = iter(commands)
    while chunk := list(islice(remaining, _CHUNK)):
        yield b"".join(map(pack_command, chunk))


def _read(connection: Any) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


async def _read_async(connection: Any) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


def _is_plain(client: object) -> bool:
    pool: Any = getattr(client, "connection_pool", None)
    return (
        pool is not None
        and all(_is_redis_pys(getattr(type(client), name)) for name in ("execute_command", "parse_response"))
        and getattr(pool, "cache", None) is None
    )


def _follows_notifications(pool: Any) -> bool:
    """Whether a managed service may tell a connection, at any time, to move on; a pool sees to it on its return."""
    return hasattr(pool, "maint_notifications_enabled") and bool(pool.maint_notifications_enabled())


def _is_redis_pys(function: Any) -> bool:
    # Not by its name or its module, which a wrapper takes over.
    return isinstance(function, FunctionType) and function.__globals__["__name__"] in _CLIENTS
