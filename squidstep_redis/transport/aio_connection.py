"""The connections of the asyncio transport: how bytes get to one server and replies come back.

There are the same three ways as in `connection.py`; two are in `aio_pool.py` and `aio_hooked.py`. `OwnConnections`
multiplexes: in each event loop, all tasks share one connection. What they send within one iteration of the loop shares
a few writes, and the replies are matched in order. The reply to a cancelled call is read and dropped. Large payloads,
and commands that make the server wait, use their own connections, because they would delay all others.

A connection belongs to one event loop of one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from copy import copy
from math import inf
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

from redis.exceptions import (
    AskError,
    ConnectionError,
    RedisClusterException,
    RedisError,
    TimeoutError,
)

from squidstep_redis.protocol.call import Call, Command
from squidstep_redis.server_errors import ReplyMismatchError
from squidstep_redis.signals import is_raised_by_handler
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.aio_tasks import cancellations, raise_swallowed_cancellation, result_of
from squidstep_redis.transport.client import has_plain_stream, idle_of, own_connection
from squidstep_redis.transport.link import Link, close_socket
from squidstep_redis.transport.retry import RoundTripError
from squidstep_redis.transport.stream import Read, chunks, pack_command

_MAX_IDLE: Final = 16
_MAX_SHARED_BYTES: Final = 65_536  # larger payloads use their own connection

abandoned: list[Any] = []
"""What belongs to a parent process. Closing it here would change the parent's event loop, whose selector is shared."""


class AsyncConnections(ABC):
    """Sends commands to one server.

    Attributes:
        loaded: the digests of the scripts that batches have loaded, unless the server has lost them since.
    """

    loaded: frozenset[bytes] = frozenset()

    @property
    def is_exhausted(self) -> bool:
        """Whether commands would have to wait for a connection."""
        return False

    @abstractmethod
    async def send(
        self, commands: Sequence[Command], read: Read, deadline: float = inf, *, blocks: bool = False
    ) -> list[Any]:
        """Sends commands in one write and reads their replies; an error of the server is a reply.

        Args:
            commands: tuples of words.
            read: decodes a reply, given its index and the reply.
            deadline: when the call's timeout ends, by the monotonic clock. Until then, it waits for a pool.
            blocks: whether the server may wait before it replies.

        Returns:
            What `read` returned.

        Raises:
            RoundTripError: connecting, sending or reading failed.
            ReplyMismatchError: raised by `read`.
        """

    async def execute(self, command: Command, call: Call[Any], deadline: float) -> Any:
        """Sends the command of one call, as `send` does; returns what `call.outcome` returns."""
        return (await self.send((command,), lambda _, reply: call.outcome(reply), deadline))[0]

    async def node_of(self, key: bytes, deadline: float) -> AsyncConnections:
        """Returns the connections to the server of a key.

        Raises:
            RoundTripError: the nodes of a cluster could not be learned by the deadline. `route` and `servers` raise the
                same.
        """
        return self

    async def route(self, calls: Sequence[Call[Any]], deadline: float) -> list[tuple[AsyncConnections, Sequence[int]]]:
        """Groups calls by the server of their keys: pairs of the connections to it, and the indexes of its calls."""
        return [(self, range(len(calls)))]

    async def servers(self, deadline: float) -> dict[str, AsyncConnections]:
        """Returns the connections to each server, by its name."""
        return {"": self}

    async def redirect(self, error: AskError) -> AsyncConnections | None:
        """Learns the node of a slot that has moved; or returns the node to which the keys of a slot are moving.

        Raises:
            AskError: the client is not a cluster client.
            RoundTripError: the node could not be learned.
        """
        raise error

    async def refresh(self, since: float, deadline: float) -> None:
        """Learns which node serves each slot, unless that happened after `since`; no error is raised.

        Args:
            since: when the last attempt began, by the monotonic clock.
            deadline: when the call's timeout ends.
        """

    def close(self) -> None:
        """Closes the connections that were opened here in the running event loop."""


class OwnConnections(AsyncConnections):
    """One connection per event loop, shared by its tasks, and further connections for exclusive use."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._pid = os.getpid()
        self._by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, _Links] = WeakKeyDictionary()

    async def send(
        self, commands: Sequence[Command], read: Read, deadline: float = inf, *, blocks: bool = False
    ) -> list[Any]:
        links = self._links()
        data = pack_command(commands[0]) if len(commands) == 1 else b"".join(chunks(commands))
        if blocks or len(data) > _MAX_SHARED_BYTES:
            return await self._send_alone(links, data, len(commands), read, deadline)
        link = links.shared
        if link is None or not link.is_open:
            link = await self._connect_shared(links, deadline)
        if link.is_open and not link.has_room:
            await link.room(len(data), deadline)
        results = _read_all(link, await link.submit(data, len(commands), deadline), read)
        if link.is_demoted:
            links.close_idle()  # they lead to the same server
        return results

    async def execute(self, command: Command, call: Call[Any], deadline: float) -> Any:
        links = self._links()
        link = links.shared
        data = pack_command(command)
        if link is None or not link.has_room or len(data) > _MAX_SHARED_BYTES:
            return await super().execute(command, call, deadline)
        (reply,) = await link.submit(data, 1, deadline)
        try:
            outcome = call.outcome(reply)
        except ReplyMismatchError:
            link.close()  # all replies on it are out of step
            raise
        if link.is_demoted:
            links.close_idle()  # they lead to the same server
        return outcome

    def close(self) -> None:
        if self._pid != os.getpid():
            return
        self._forget_closed_loops()
        with contextlib.suppress(RuntimeError):  # no loop is running if a coroutine is closed after its event loop
            links = self._by_loop.pop(asyncio.get_running_loop(), None)
            if links is not None:
                links.close()

    def retire(self) -> None:
        """Closes the connections of the running event loop as soon as no round trip is in progress on them."""
        links = self._by_loop.pop(asyncio.get_running_loop(), None)
        if links is not None:
            links.is_closed = True
            links.retire()

    def _template(self) -> Any:
        """Returns an unconnected redis-py connection; raises RoundTripError. redis-py reads a file to make it."""
        try:
            return self._make_connection()
        except OSError as error:  # for example, there are too many open files
            if is_raised_by_handler(error):
                raise
            cause = ConnectionError(error.strerror or type(error).__name__)
            raise RoundTripError(cause, sent=False) from error

    def _make_connection(self) -> Any:
        connection = own_connection(self._client)
        pool = getattr(connection, "connection_pool", None)
        if hasattr(pool, "sentinel_manager"):
            connection.connection_pool = _Sentinels(pool)
        return connection

    def _links(self) -> _Links:
        """Returns the connections of the running event loop."""
        loop = asyncio.get_running_loop()
        if self._pid != os.getpid():
            abandoned.append(self._by_loop)
            self._by_loop, self._pid = WeakKeyDictionary(), os.getpid()
        links = self._by_loop.get(loop)
        if links is None:
            self._forget_closed_loops()
            links = self._by_loop[loop] = _Links()
        return links

    def _forget_closed_loops(self) -> None:
        """Closes connections whose event loops were closed before them."""
        for reference in self._by_loop.keyrefs():  # a copy: other threads add theirs
            loop = reference()
            if loop is not None and loop.is_closed():
                links = self._by_loop.pop(loop, None)
                if links is not None:
                    links.close()

    async def _send_alone(self, links: _Links, data: bytes, count: int, read: Read, deadline: float) -> list[Any]:
        link = links.pop_idle()
        before = cancellations()
        if link is None:
            link = await self._open(self._template(), deadline)
        try:
            await raise_swallowed_cancellation(before)
            results = _read_all(link, await link.submit(data, count, deadline), read)
        except BaseException:
            link.close()
            raise
        if link.is_demoted:
            links.retire()
        if len(links.idle) < _MAX_IDLE and link.is_open and not links.is_closed:
            links.idle.append(link)
        else:
            link.close()
        return results

    async def _connect_shared(self, links: _Links, deadline: float) -> Link:
        """Opens the shared connection once for all tasks that need it, so that none interrupts its handshake."""
        if links.connecting is not None and links.connecting.done():
            links.on_connected(links.connecting)  # an exception may have kept the event loop from calling it
            if links.shared is not None and links.shared.is_open:
                return links.shared
        seconds = None  # of a task that was started for this call: it has the same limit
        if links.connecting is None:
            connection = links.template = self._template()
            opening = self._open(connection, deadline)
            links.connecting = asyncio.get_running_loop().create_task(opening, name="squidstep-connect")
            links.connecting.add_done_callback(links.on_connected)
        else:
            seconds = seconds_to_connect(links.template, deadline)
        return await result_of(links.connecting, seconds)

    async def _open(self, connection: Any, deadline: float) -> Link:
        scope = asyncio.timeout(seconds_to_connect(connection, deadline))
        try:
            async with scope:
                await connection.connect()
                return Link(connection)
        except BaseException as error:
            drop(connection)
            raise RoundTripError(connect_error(error, scope), sent=False) from error


class _Links:
    """The connections of one event loop.

    Attributes:
        shared: the connection that tasks share.
        connecting: opens it.
        template: the redis-py connection that it opens. To make one for every task that waits would take too long.
        idle: connections for exclusive use.
        is_closed: whether no further connection is kept here.
    """

    def __init__(self) -> None:
        self.shared: Link | None = None
        self.connecting: asyncio.Task[Link] | None = None
        self.template: Any = None
        self.idle: deque[Link] = deque()
        self.is_closed = False
        # An event loop ends its asynchronous generators before it is closed. So the connections end with it.
        self._guard = self._close_at_shutdown()
        with contextlib.suppress(StopIteration):
            self._guard.__anext__().send(None)

    async def _close_at_shutdown(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._close_all()

    def on_connected(self, task: asyncio.Task[Link]) -> None:
        if self.connecting is not task:  # it was called before
            return
        if not task.cancelled() and task.exception() is None:
            if self.is_closed:
                task.result().close()
            else:
                self.shared = task.result()
        self.connecting = self.template = None

    def pop_idle(self) -> Link | None:
        while self.idle:
            link = self.idle.pop()
            if link.is_open:
                return link
        return None

    def retire(self) -> None:
        """Lets no further round trip begin on these connections: their server is no longer a primary."""
        self.close_idle()
        if self.shared is not None:
            self.shared.retire()

    def close_idle(self) -> None:
        while self.idle:
            self.idle.pop().close()

    def close(self) -> None:
        with contextlib.suppress(StopIteration, RuntimeError):  # its event loop is closed
            self._guard.aclose().send(None)
        self._close_all()

    def _close_all(self) -> None:
        self.is_closed = True
        if self.connecting is not None:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                self.connecting.cancel()
        self.close_idle()
        if self.shared is not None:
            self.shared.close()
        self.shared = None


def _read_all(link: Link, replies: list[Any], read: Read) -> list[Any]:
    try:
        return [read(index, reply) for index, reply in enumerate(replies)]
    except ReplyMismatchError:
        link.close()  # all replies on it are out of step
        raise


class _Sentinels:
    """Sentinel's pool, as one of its connections sees it. It asks the sentinels in the running event loop.

    The connections of the user's `Sentinel` to them may belong to another loop, even to the loop of another thread.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    async def get_master_address(self) -> tuple[str, int]:
        """Returns the address of the master."""
        manager: Any = copy(self._pool.sentinel_manager)
        manager.sentinels = [_like(client) for client in manager.sentinels]
        try:
            return await manager.discover_master(self._pool.service_name)
        finally:
            for client in manager.sentinels:
                drop_all(client)


def _like(client: Any) -> Any:
    """Returns a client with the settings of another client, but with its own connections."""
    pool = client.connection_pool
    return type(client)(connection_pool=type(pool)(connection_class=pool.connection_class, **pool.connection_kwargs))


def seconds_to_connect(connection: Any, deadline: float) -> float | None:
    """Returns how long setting up a redis-py connection may take; None: without a limit.

    A provider of credentials, for example, has no timeout.
    """
    if deadline == inf:
        return None
    timeouts = (getattr(connection, name, None) for name in ("socket_connect_timeout", "socket_timeout"))
    return max(0.0, deadline - time.monotonic()) + sum(seconds or 0.0 for seconds in timeouts)


def connect_error(error: BaseException, scope: asyncio.Timeout) -> Exception:
    """Returns a redis-py error for an exception that was raised while a connection was set up within a scope.

    A provider of credentials may raise anything, also the CancelledError of another task. A cancellation of this task,
    and an exception of a signal handler, is raised as it is.
    """
    is_foreign_cancellation = isinstance(error, asyncio.CancelledError) and not cancellations()
    if not isinstance(error, Exception) and not is_foreign_cancellation:
        raise error
    if scope.expired():
        return TimeoutError("Timeout connecting to server")
    if is_raised_by_handler(error):
        raise error
    if isinstance(error, (RedisError, RedisClusterException)):
        return error
    return ConnectionError(f"connecting failed with {type(error).__name__}")


def drop(connection: Any) -> None:
    """Closes a redis-py connection without awaiting anything, because a cancellation could interrupt that.

    Its transport is closed in the event loop in which it was opened, which may belong to another thread.
    """
    writer = getattr(connection, "_writer", None)
    connection._parser.on_disconnect()
    connection._reader = connection._writer = None
    if isinstance(writer, asyncio.StreamWriter):
        loop: asyncio.AbstractEventLoop = vars(writer)["_loop"]
        with contextlib.suppress(RuntimeError):  # the loop is closed
            if loop.is_closed():
                close_socket(writer.transport)
            elif loop is asyncio.get_running_loop():
                writer.close()
            else:
                loop.call_soon_threadsafe(writer.close)


def drop_all(client: Any) -> None:
    """Closes all connections of a client's pool, including those of other event loops."""
    pool = client.connection_pool
    for connection in (*idle_of(pool), *getattr(pool, "_in_use_connections", ())):
        if has_plain_stream(cast("type[object]", type(connection))):
            drop(connection)


def is_foreign(connection: Any, loop: asyncio.AbstractEventLoop) -> bool:
    """Whether a redis-py connection was opened in another event loop."""
    reader = getattr(connection, "_reader", None)
    return reader is not None and getattr(reader, "_loop", loop) is not loop
