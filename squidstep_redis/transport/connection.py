"""Sends on a client's pooled connections when nothing hooks `execute_command`.

redis-py's `execute_command` accounts for half of the client's CPU time: its retries and metrics are work that the store
does itself or does not need. redis-py still handles the connections: timeouts, health checks, credentials, Sentinel,
reconnecting. If `execute_command` is overridden, instrumented or measured, calls go through it; see
`can_bypass_client`.
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

_hiredis: Any = hiredis  # parts of its types are unknown
pack_command: Callable[[Command], bytes] = _hiredis.pack_command

_CHUNK: Final = 16  # commands per send: the server starts on a chunk while the next one is packed
_MAX_IDLE: Final = 16
_FRESH_SECONDS: Final = 1.0
# Before redis-py 5.3, get_connection requires the name of a command.
_COMMAND_NAME: Final = () if tuple(map(int, redis.__version__.split(".")[:2])) >= (5, 3) else ("EVALSHA",)
_CLIENTS: Final = ("redis.client", "redis.asyncio.client")


class BaseDirectConnections:
    """The pooled connections of a client, used directly.

    If the store made the client, a connection stays idle here for a second after use. redis-py's pool checks before
    each use whether the server has closed a connection, which costs a third of a call. If a connection was closed
    within that second, the call fails and is retried like any other.
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
        """Whether calls may skip `execute_command`. Checked before each call: instrumentation may come at any time.

        False for a cluster's client, which finds the node; for one that caches replies; for one whose methods are not
        redis-py's own, because they are overridden or instrumented; and while redis-py measures its commands for
        OpenTelemetry.
        """
        return (
            self._execute_command is not None
            and self._type.execute_command is self._execute_command
            and "execute_command" not in self._own
            and (get_observability_instance is None or get_observability_instance().get_provider_manager() is None)
        )

    def _pop_idle(self) -> tuple[Any, float] | None:
        if self._idle and self._pid != os.getpid():
            self._idle.clear()  # they belong to the parent
            self._pid = os.getpid()
        try:
            return self._idle.pop()
        except IndexError:
            return None


class DirectConnections(BaseDirectConnections):
    """The connections of a `redis` client."""

    def send(self, *commands: Command, read: Callable[[int, Any], Any] | None = None) -> list[Any]:
        """Sends commands in one write and reads their replies; an error of the server is a reply.

        Args:
            commands: tuples of words.
            read: decodes a reply, given its index and the reply, while the server works on the next ones.

        Returns:
            The replies, decoded if `read` is given.

        Raises:
            redis.ConnectionError: connecting, sending or reading failed; or redis.TimeoutError.
        """
        connection = self._get_connection()
        try:
            connection.send_packed_command(_packed(commands))
            if read is None:
                replies = [_read(connection) for _ in commands]
            else:
                replies = [read(index, _read(connection)) for index in range(len(commands))]
        except BaseException:
            connection.disconnect()  # a reply that is left on it would be read as the reply to the next command
            self._pool.release(connection)
            raise
        if len(self._idle) < self._max_idle:
            self._idle.append((connection, time.monotonic()))
        else:
            self._pool.release(connection)
        return replies

    def _get_connection(self) -> Any:
        idle = self._pop_idle()
        if idle is not None:
            connection, since = idle
            if time.monotonic() - since < _FRESH_SECONDS:
                return connection
            self._pool.release(connection)
        return self._pool.get_connection(*_COMMAND_NAME)


class AsyncDirectConnections(BaseDirectConnections):
    """The connections of a `redis.asyncio` client."""

    async def send(self, *commands: Command, read: Callable[[int, Any], Any] | None = None) -> list[Any]:
        """Sends commands in one write and reads their replies; an error of the server is a reply.

        Args:
            commands: tuples of words.
            read: decodes a reply, given its index and the reply, while the server works on the next ones.

        Returns:
            The replies, decoded if `read` is given.

        Raises:
            redis.ConnectionError: connecting, sending or reading failed; or redis.TimeoutError.
        """
        connection = await self._get_connection()
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

    async def _get_connection(self) -> Any:
        idle = self._pop_idle()
        if idle is not None:
            connection, since = idle
            if time.monotonic() - since < _FRESH_SECONDS:
                return connection
            await self._pool.release(connection)
        return await self._pool.get_connection(*_COMMAND_NAME)


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
        and all(_is_redis_py_function(getattr(type(client), name)) for name in ("execute_command", "parse_response"))
        and getattr(pool, "cache", None) is None
    )


def _follows_notifications(pool: Any) -> bool:
    """Whether a managed service may make a connection reconnect at any time; the pool handles it on release."""
    return hasattr(pool, "maint_notifications_enabled") and bool(pool.maint_notifications_enabled())


def _is_redis_py_function(function: Any) -> bool:
    # Not by its name or module, which functools.wraps copies.
    return isinstance(function, FunctionType) and function.__globals__["__name__"] in _CLIENTS
