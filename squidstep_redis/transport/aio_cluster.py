"""The connections of the asyncio transport to the nodes of a cluster, found by the slot of a key.

As in `cluster.py`, the cluster client knows the nodes and the slots, and owns the connections. It learns the slots with
the first call, in the event loop of that call.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from typing import Any

from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AskError, ConnectionError, DataError, MovedError

from squidstep_redis.protocol.call import Call, Command
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.aio_connection import AsyncConnections, OwnConnections, drop, is_foreign
from squidstep_redis.transport.aio_hooked import HookedClient
from squidstep_redis.transport.aio_pool import connect, is_quiet, round_trip_on
from squidstep_redis.transport.aio_tasks import result_of
from squidstep_redis.transport.client import has_plain_stream
from squidstep_redis.transport.cluster import KEY, LAST_REFRESH, PRIMARY, Topology, grouped
from squidstep_redis.transport.retry import RoundTripError, as_redis_error
from squidstep_redis.transport.stream import Read


class ClusterConnections(AsyncConnections):
    """The nodes of a user's cluster client."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._topology = Topology(client)
        self._nodes: dict[str, _NodeConnections | _BorrowedNode] = {}
        self._learning: asyncio.Task[Exception | None] | None = None
        self._turns: dict[int, asyncio.AbstractEventLoop] = {}  # by process

    async def send(
        self, commands: Sequence[Command], read: Read, deadline: float = inf, *, blocks: bool = False
    ) -> list[Any]:
        """Sends commands to the node of the first key."""
        if self._client._initialize:
            await self._initialize(deadline)
        return await self._to(self._topology.node_of(commands[0][KEY])).send(commands, read, deadline, blocks=blocks)

    async def execute(self, command: Command, call: Call[Any], deadline: float) -> Any:
        if self._client._initialize:
            await self._initialize(deadline)
        return await self._to(self._topology.node_of(call.keys[0])).execute(command, call, deadline)

    async def node_of(self, key: bytes, deadline: float) -> AsyncConnections:
        """Returns the connections to the node of a key."""
        await self._initialize(deadline)
        return self._to(self._topology.node_of(key))

    async def route(self, calls: Sequence[Call[Any]], deadline: float) -> list[tuple[AsyncConnections, Sequence[int]]]:
        """Groups calls by their nodes. A call that no node serves fails when it is sent; the others do not fail."""
        await self._initialize(deadline)
        return grouped(calls, lambda key: self._to(self._topology.node_of(key)), _Unserved)

    async def servers(self, deadline: float) -> dict[str, AsyncConnections]:
        """Returns the connections to all primaries."""
        await self._initialize(deadline)
        return {node.name: self._to(node) for node in self._client.get_primaries()}

    async def redirect(self, error: AskError) -> AsyncConnections | None:
        """Follows MOVED and ASK."""
        host, port = self._topology.locate(error)
        manager = self._client.nodes_manager
        try:
            if isinstance(error, MovedError):
                if not self._topology.is_known(error):
                    if hasattr(manager, "move_slot"):
                        await manager.move_slot(error)
                    else:  # before redis-py 8
                        manager._moved_exception = error
                        manager.get_node_from_slot(error.slot_id)  # applies it
                return None
            node = manager.get_node(host, port)
            if node is None:  # a node that serves no slot yet
                node = ClusterNode(host, port, PRIMARY, **manager.connection_kwargs)
                manager.set_nodes(manager.nodes_cache, {node.name: node})
        except DataError as failure:  # redis-py accepts no port 0; blocking, it fails to connect to it
            raise RoundTripError(ConnectionError(str(failure)), sent=False) from failure
        except Exception as failure:
            raise RoundTripError(as_redis_error(failure), sent=False) from failure
        return self._to(node)

    async def refresh(self, since: float, deadline: float) -> None:
        """Lets the client ask the nodes for the slots, one after another."""
        if self._topology.refreshed_at <= since:
            with suppress(RoundTripError):  # the next attempt shows what is reachable
                await self._learn(deadline)

    def _to(self, node: Any) -> AsyncConnections:
        known = self._nodes.get(node.name)
        if known is None or known.node is not node:
            kind = _NodeConnections if has_plain_stream(node.connection_class) else _BorrowedNode
            known = self._nodes[node.name] = kind(self._topology, node)
        return known

    async def _initialize(self, deadline: float) -> None:
        """Lets the client learn the slots, unless it knows them."""
        if self._client._initialize and (error := await self._learn(deadline)) is not None:
            raise RoundTripError(error, sent=False) from error

    async def _learn(self, deadline: float) -> Exception | None:
        """Lets the client learn the slots, once for all tasks that wait for it, and whichever of them is cancelled.

        Returns:
            The error if the client could not learn them.

        Raises:
            RoundTripError: it has taken longer than the call may wait, and continues.
        """
        loop = asyncio.get_running_loop()
        task = self._learning
        if task is None or task.done() or task.get_loop() is not loop:
            task = self._learning = loop.create_task(self._ask_nodes(), name="squidstep-topology")
        return await result_of(task, None if deadline == inf else max(deadline - time.monotonic(), LAST_REFRESH))

    async def _ask_nodes(self) -> Exception | None:
        manager = self._client.nodes_manager
        began, loop = time.monotonic(), asyncio.get_running_loop()
        open_before: set[Any] | None = None
        try:
            await self._take_turn()
            if self._topology.refreshed_at > began and not self._client._initialize:
                return None
            for node in _nodes_of(manager):
                _remove_foreign(node)
            open_before = {connection for connection in _free_of(manager) if connection.is_connected}
            if self._client._initialize:
                await self._client.initialize()
            else:
                await manager.initialize(**self._topology.ask_failed_last(manager))
        except Exception as error:  # noqa: BLE001 -- errors that are not redis-py's are raised
            return as_redis_error(error)
        finally:
            if open_before is not None:
                # If a provider of credentials raises, redis-py keeps a connection without them, and asks another node.
                for connection in _free_of(manager) - open_before:
                    if not is_foreign(connection, loop):
                        drop(connection)
            self._turns.pop(os.getpid(), None)
        self._topology.refreshed_at = time.monotonic()
        return None

    async def _take_turn(self) -> None:
        """Waits until no other event loop learns the slots: redis-py's locks support only a single loop."""
        loop = asyncio.get_running_loop()
        while (other := self._turns.setdefault(os.getpid(), loop)) is not loop and other.is_running():
            await asyncio.sleep(0.01)
        self._turns[os.getpid()] = loop


class _NodeConnections(OwnConnections):
    """Connections to one node, which are closed when the client closes its own. They use RESP2.

    Attributes:
        node: the node.
    """

    def __init__(self, topology: Topology, node: Any) -> None:
        super().__init__(topology.client)
        self._topology = topology
        self.node = node
        closer = self._template()  # never connected
        closer.disconnect = self._on_disconnect
        node._connections.append(closer)
        node.max_connections += 1

    async def send(
        self, commands: Sequence[Command], read: Read, deadline: float = inf, *, blocks: bool = False
    ) -> list[Any]:
        try:
            return await super().send(commands, read, deadline, blocks=blocks)
        except RoundTripError:
            self._topology.failed = self.node.name
            raise

    async def execute(self, command: Command, call: Call[Any], deadline: float) -> Any:
        try:
            return await super().execute(command, call, deadline)
        except RoundTripError:
            self._topology.failed = self.node.name
            raise

    def _make_connection(self) -> Any:
        kwargs = {
            name: value for name, value in self.node.connection_kwargs.items() if "maint_notifications" not in name
        }
        return self.node.connection_class(**{**kwargs, "protocol": 2, "retry": Retry(NoBackoff(), 0)})

    async def _on_disconnect(self, *_: Any, **__: Any) -> None:
        self.retire()


def _nodes_of(manager: Any) -> list[Any]:
    return [*manager.startup_nodes.values(), *manager.nodes_cache.values()]


def _free_of(manager: Any) -> set[Any]:
    return {
        connection for node in _nodes_of(manager) for connection in list(node._free)
    }  # another thread may change it


def _remove_foreign(node: Any) -> None:
    """Removes idle connections of another event loop, until the next one is not such a connection."""
    loop = asyncio.get_running_loop()
    while node._free and is_foreign(node._free[0], loop):
        connection = node._free.popleft()
        drop(connection)
        with suppress(ValueError):  # redis-py has removed it
            node._connections.remove(connection)


class _BorrowedNode(AsyncConnections):
    """Connections borrowed from the node, which redis-py writes and reads, because their class is not its own.

    Attributes:
        node: the node.
    """

    def __init__(self, topology: Topology, node: Any) -> None:
        self._topology = topology
        self.node = node

    async def send(
        self, commands: Sequence[Command], read: Read, deadline: float = inf, *, blocks: bool = False
    ) -> list[Any]:
        """Sends commands on a connection of the node."""
        _remove_foreign(self.node)
        connection: Any = None
        try:
            try:
                connection = self.node.acquire_connection()
                await connection.connect()
            except Exception as error:
                raise RoundTripError(as_redis_error(error), sent=False) from error
            results, is_demoted = await round_trip_on(connection, commands, read, deadline)
        except BaseException as error:
            if connection is not None:
                drop(connection)
            if isinstance(error, RoundTripError):
                self._topology.failed = self.node.name
            raise
        else:
            if is_demoted:
                drop(connection)
            return results
        finally:
            if connection is not None:
                self.node._free.append(connection)

    def close(self) -> None:
        """Leaves the connections to the client."""


class _Unserved(AsyncConnections):
    """What a call is sent to if no known node serves its slot."""

    def __init__(self, error: RoundTripError) -> None:
        self._error = error

    async def send(
        self, commands: Sequence[Command], read: Read, deadline: float = inf, *, blocks: bool = False
    ) -> list[Any]:
        """Raises the error."""
        raise self._error


class HookedCluster(ClusterConnections):
    """A cluster client whose `execute_command` has to see every single call."""

    execute = AsyncConnections.execute

    def __init__(self, client: Any) -> None:
        super().__init__(client)
        self._hooked = HookedClient(client)

    async def send(
        self, commands: Sequence[Command], read: Read, deadline: float = inf, *, blocks: bool = False
    ) -> list[Any]:
        """Sends commands through `execute_command`."""
        if self._client._initialize:
            await self._initialize(deadline)
        node = self._topology.node_of(commands[0][KEY])
        if has_plain_stream(node.connection_class):
            await self._connect(node, deadline)
        return await self._hooked.send(commands, read, deadline, blocks=blocks)

    async def _connect(self, node: Any, deadline: float) -> None:
        """Sets up the connection of a node that the client takes next: redis-py packs a command before it connects."""
        _remove_foreign(node)
        if node._free and is_quiet(node._free[0]):
            return
        try:
            connection = node.acquire_connection()
        except Exception as error:
            raise RoundTripError(as_redis_error(error), sent=False) from error
        try:
            drop(connection)
            await connect(connection, deadline)
        except BaseException as error:
            drop(connection)
            if isinstance(error, RoundTripError):
                self._topology.failed = node.name
            raise
        finally:
            node._free.appendleft(connection)
