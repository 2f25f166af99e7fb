"""The connections of the blocking transport to a cluster: those of its nodes, found by the slot of a key.

The cluster client of redis-py knows the nodes and the slots. What it knows is updated here after a redirect and after
a failure. Its nodes' pools have the addresses and credentials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from inspect import signature
from math import inf
from threading import RLock
from typing import Any, Final, TypeVar, cast
from weakref import ref

from redis.cluster import ClusterNode
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, SlotNotCoveredError

from squidstep_redis.protocol.call import Call, Command
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.client import has_plain_stream
from squidstep_redis.transport.connection import Connections, Halves, HookedClient, OwnConnections, PooledConnections
from squidstep_redis.transport.helper import Helper
from squidstep_redis.transport.pool import open_one
from squidstep_redis.transport.retry import RoundTripError, as_redis_error
from squidstep_redis.transport.stream import Read

try:
    from redis.event import AfterSlotsCacheRefreshEvent as _SlotsRefreshed
except ImportError:  # before redis-py 8
    _SlotsRefreshed = None

N = TypeVar("N")

KEY: Final = 3
"""Where the first key is in EVALSHA and EVAL."""

PRIMARY: Final = "primary"  # redis-py's name for the type of a node

LAST_REFRESH: Final = 0.2
"""Seconds that nodes have to reply when a call's timeout has ended."""

_LOCKS: Final = ("_lock", "_initialization_lock")
_LEARNED: Final = {"nodes_cache", "slots_cache", "startup_nodes", "default_node", "_epoch", "_moved_exception"}


class Topology:
    """What a cluster client knows about its nodes; no I/O.

    Attributes:
        client: the cluster client.
        failed: the name of the node that failed last: it is asked last for the topology.
        refreshed_at: when the client learned all nodes, on the monotonic clock.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.failed: str | None = None
        self.refreshed_at = float("-inf")

    def node_of(self, key: bytes) -> Any:
        """Returns the node of a key's slot; raises RoundTripError if no known node serves it."""
        slot = key_slot(key)
        nodes = self.client.nodes_manager.slots_cache.get(slot)
        if not nodes:
            raise RoundTripError(SlotNotCoveredError(f"no node of the cluster serves slot {slot}"), sent=False)
        return nodes[0]

    def locate(self, redirect: AskError) -> tuple[str, int]:
        """Completes the address of a redirect, and returns it."""
        manager, error = self.client.nodes_manager, cast("Any", redirect)
        # A node that does not know its own host name omits it: the host remains the same.
        nodes = manager.slots_cache.get(error.slot_id)
        host: str = error.host or (nodes[0].host if nodes else "")
        error.host, error.port = address = manager.remap_host_port(host, error.port)
        return address

    def is_known(self, redirect: MovedError) -> bool:
        """Whether the client already knows where a slot has moved, as another call has learned it."""
        moved: Any = redirect
        nodes = self.client.nodes_manager.slots_cache.get(moved.slot_id)
        if nodes is None:  # redis-py expects a list
            self.client.nodes_manager.slots_cache[moved.slot_id] = []
        return bool(nodes) and (nodes[0].host, int(nodes[0].port)) == (moved.host, moved.port)

    def ask_failed_last(self, manager: Any) -> Mapping[str, Any]:
        """Makes the node that failed last the last one to be asked; returns options for `manager.initialize`."""
        name, self.failed = self.failed, None
        if name is None or name not in manager.startup_nodes:
            return {}
        if "last_failed_node_name" in signature(manager.initialize).parameters:  # since redis-py 8
            return {"last_failed_node_name": name}
        others = {other: node for other, node in manager.startup_nodes.items() if other != name}
        manager.startup_nodes = {**others, name: manager.startup_nodes[name]}
        return {}


def grouped(
    calls: Sequence[Call[Any]], node_of: Callable[[bytes], N], unserved: Callable[[RoundTripError], N]
) -> list[tuple[N, Sequence[int]]]:
    """Groups calls by their nodes: pairs of a node and the indexes of its calls.

    Args:
        calls: the calls.
        node_of: returns the node of a key.
        unserved: returns what stands for the node of a key that no node serves.
    """
    groups: dict[int, tuple[N, list[int]]] = {}
    indexes_of: dict[bytes, list[int]] = {}  # the calls of one run have one key
    for index, call in enumerate(calls):
        key = call.keys[0]
        indexes = indexes_of.get(key)
        if indexes is None:
            try:
                node = node_of(key)
            except RoundTripError as error:
                node = unserved(error)
            _, indexes = groups.setdefault(id(node), (node, []))
            indexes_of[key] = indexes
        indexes.append(index)
    return list(groups.values())


class ClusterConnections(Connections):
    """The nodes of a user's cluster client."""

    def __init__(self, client: Any, default_timeout: float | None = None, *, is_limited: bool = True) -> None:
        """Opens nothing yet.

        Args:
            client: the cluster client.
            default_timeout: seconds to wait for a connection and for a reply, if the client has no limit.
            is_limited: whether the client's `max_connections`, if it has any, limits the connections.
        """
        self._client = client
        self._default_timeout = default_timeout
        self._borrows = is_limited and client.nodes_manager.connection_kwargs.get("max_connections") is not None
        self._topology = Topology(client)
        self._nodes: dict[str, _OwnNode | _BorrowedNode] = {}
        self._learning: Helper | None = None

    def send(self, commands: Sequence[Command], read: Read, deadline: float = inf) -> list[Any]:
        """Sends commands to the node of the first key."""
        return self._to(self._topology.node_of(commands[0][KEY])).send(commands, read, deadline)

    def node_of(self, key: bytes) -> Connections:
        """Returns the connections to the node of a key."""
        return self._to(self._topology.node_of(key))

    def route(self, calls: Sequence[Call[Any]]) -> list[tuple[Connections, Sequence[int]]]:
        """Groups calls by their nodes. A call that no node serves fails when it is sent; the others do not fail."""
        return grouped(calls, self.node_of, _Unserved)

    def servers(self) -> dict[str, Connections]:
        """Returns the connections to all primaries."""
        return {node.name: self._to(node) for node in list(self._client.get_primaries())}

    def redirect(self, error: AskError) -> Connections | None:
        """Follows MOVED and ASK."""
        host, port = self._topology.locate(error)
        manager = self._client.nodes_manager
        try:
            if isinstance(error, MovedError):
                if not self._topology.is_known(error):
                    if hasattr(manager, "move_slot"):
                        manager.move_slot(error)
                    else:  # before redis-py 8
                        manager.update_moved_exception(error)
                        manager.get_node_from_slot(error.slot_id)  # applies it
                return None
            node = manager.get_node(host, port)
            if node is None:  # a node that serves no slot yet
                node = ClusterNode(host, port, PRIMARY)
                manager.nodes_cache[node.name] = node
        except Exception as failure:
            raise RoundTripError(as_redis_error(failure), sent=False) from failure
        return self._to(node)

    def refresh(self, since: float, deadline: float) -> None:
        """Lets the client ask the nodes for the slots, one after another: if they hang, it may outlast the call."""
        if self._topology.refreshed_at > since:
            return
        helper = self._learning
        if helper is None or not helper.is_running:
            helper = self._learning = Helper("squidstep-topology", self._learn)
        helper.wait(max(deadline, time.monotonic() + LAST_REFRESH))
        if helper.error is not None:
            raise helper.error

    def _learn(self) -> None:
        """Lets a copy of what the client knows learn the slots, and the client then learn all of it at once.

        The copy has locks of its own: in a process that is forked meanwhile, the client's would remain locked.
        """
        manager = self._client.nodes_manager
        copied = copy(manager)
        known, learned = cast("dict[str, Any]", vars(manager)), cast("dict[str, Any]", vars(copied))
        learned.update({name: RLock() for name in _LOCKS if name in learned})
        copied.startup_nodes = {name: _AskedNode(node) for name, node in dict(manager.startup_nodes).items()}
        try:
            copied.initialize(**self._topology.ask_failed_last(copied))
        except Exception as error:  # noqa: BLE001 -- errors that are not redis-py's are raised
            as_redis_error(error)  # the next attempt shows what is reachable
            return
        nodes: dict[str, Any] = copied.startup_nodes
        copied.startup_nodes = {name: getattr(node, "asked", node) for name, node in nodes.items()}
        known.update({name: learned[name] for name in _LEARNED if name in learned})
        self._topology.refreshed_at = time.monotonic()
        if _SlotsRefreshed is not None:  # for the client's subscriptions, which saw the old slots of the copy
            with suppress(Exception):
                manager._event_dispatcher.dispatch(_SlotsRefreshed())

    def close(self) -> None:
        for node in list(self._nodes.values()):
            node.close()

    def _to(self, node: Any) -> Connections:
        known = self._nodes.get(node.name)
        if known is None or known.client is not node.redis_connection:
            known = self._nodes[node.name] = self._open(node.name, self._client.get_redis_connection(node))
        return known

    def _open(self, name: str, client: Any) -> _OwnNode | _BorrowedNode:
        pool = client.connection_pool
        if self._borrows or not has_plain_stream(pool.connection_class):
            return _BorrowedNode(self._topology, name, client, pool)
        own = _OwnNode(self._topology, name, client, client, self._default_timeout)
        attributes = cast("dict[str, Any]", vars(pool))
        disconnect = attributes.setdefault("disconnect", _Disconnect(pool))  # another store may do the same
        if isinstance(disconnect, _Disconnect):
            disconnect.add(own)
        return own


class _AskedNode:
    """A node while redis-py asks it for the slots. Its client has an open connection whenever redis-py reads it.

    If a provider of credentials raises, redis-py itself leaves a connection without credentials in the node's pool, and
    asks the next node.

    Attributes:
        asked: the node.
    """

    def __init__(self, asked: Any) -> None:
        self.asked = asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self.asked, name)

    @property
    def redis_connection(self) -> Any:
        """The node's client; None if it has none yet."""
        client = self.asked.redis_connection
        if client is not None:
            open_one(client.connection_pool, inf)
        return client

    @redis_connection.setter
    def redis_connection(self, client: Any) -> None:
        self.asked.redis_connection = client
        open_one(client.connection_pool, inf)


class _Node(Connections):
    """Notes that a node has failed.

    Attributes:
        client: the node's client, which owns the pool.
    """

    def __init__(self, topology: Topology, name: str, client: Any, *args: Any) -> None:
        super().__init__(*args)
        self._topology = topology
        self._name = name
        self.client = client

    def send(self, commands: Sequence[Command], read: Read, deadline: float = inf) -> list[Any]:
        try:
            return super().send(commands, read, deadline)
        except RoundTripError:
            self._topology.failed = self._name
            raise

    def in_halves(self, commands: Sequence[Command], read: Read, deadline: float) -> Halves:
        try:
            return (yield from super().in_halves(commands, read, deadline))
        except RoundTripError:
            self._topology.failed = self._name
            raise


class _OwnNode(_Node, OwnConnections):
    """Connections to one node, which are closed when the client closes its own. They use RESP2."""


class _BorrowedNode(_Node, PooledConnections):
    """The pool of one node: it has a limit, or redis-py does not write and read its connections itself."""


class _Disconnect:
    """A pool's `disconnect`, which also closes what stores have opened beside it."""

    def __init__(self, pool: Any) -> None:
        self._disconnect = pool.disconnect
        self._beside: dict[int, ref[Connections]] = {}

    def add(self, connections: Connections) -> None:
        key = id(connections)
        self._beside[key] = ref(connections, lambda _: self._beside.pop(key, None))

    def __call__(self, *args: Any, **options: Any) -> Any:
        for reference in list(self._beside.values()):
            connections = reference()
            if connections is not None:
                connections.close()
        return self._disconnect(*args, **options)


class _Unserved(Connections):
    """What a call is sent to if no known node serves its slot."""

    def __init__(self, error: RoundTripError) -> None:
        self._error = error

    def send(self, commands: Sequence[Command], read: Read, deadline: float = inf) -> list[Any]:
        """Raises the error."""
        raise self._error


class HookedCluster(ClusterConnections):
    """A cluster client whose `execute_command` has to see every single call."""

    def __init__(self, client: Any) -> None:
        super().__init__(client)
        self._hooked = HookedClient(client)

    def send(self, commands: Sequence[Command], read: Read, deadline: float = inf) -> list[Any]:
        """Sends commands through `execute_command`."""
        return self._hooked.send(commands, read, deadline)
