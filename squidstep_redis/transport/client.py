"""Facts about a redis-py client that are known without sending anything."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import FunctionType
from typing import Any, Final, NamedTuple

from squidstep_redis.errors import UnsupportedClientError
from squidstep_redis.protocol.call import Command

try:
    from redis.observability.providers import get_observability_instance
except ImportError:  # before redis-py 7.2
    get_observability_instance = None

_CLIENTS: Final = ("redis.client", "redis.asyncio.client", "redis.cluster", "redis.asyncio.cluster")
_STREAMS: Final = ("redis.connection", "redis.sentinel", "redis.asyncio.connection", "redis.asyncio.sentinel")


class ClientFacts(NamedTuple):
    """The settings of a redis-py client that matter to a store.

    Attributes:
        is_cluster: whether it is a cluster client.
        socket_timeout: seconds it waits for a reply; None: no limit.
        connect_timeout: seconds it waits for a connection; None: no limit.
        sends: how many times it sends a command that gets no reply.
        decodes: whether it decodes replies.
        reuses_dirty_connections: whether it may return a reply that is left on a connection to the next command.
        retry_pauses: the longest total time, in seconds, that it pauses between its attempts to connect or to send.
    """

    is_cluster: bool
    socket_timeout: float | None
    connect_timeout: float | None
    sends: int
    decodes: bool
    reuses_dirty_connections: bool
    retry_pauses: float


def check_client(client: object, types: tuple[type, ...]) -> None:
    """Raises UnsupportedClientError unless the client is of one of these types and has a connection pool."""
    if not isinstance(client, types) or hasattr(client, "execute"):  # a pipeline is also a Redis
        names = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in types)
        # Not its repr: the repr of a URL or a client may show a password.
        advice = "; a URL is for from_url" if isinstance(client, str) else ""
        kind = f"{type(client).__module__}.{type(client).__qualname__}".removeprefix("builtins.")
        raise UnsupportedClientError("client", f"must be a {names}, not {kind}{advice}")
    if getattr(client, "single_connection_client", False) or getattr(client, "connection", None) is not None:
        raise UnsupportedClientError(
            "client", "has a single connection, which threads and forked processes would share: use a pooled client"
        )


def template_connection(client: Any) -> Any:
    """Returns an unconnected connection with the client's settings.

    The defaults of options depend on redis-py's version; a connection has the actual values.
    """
    pool = _pool_of(client)
    return pool.connection_class(**pool.connection_kwargs)


def server_of(client: Any) -> str:
    """Returns the address and the database of a client's server. A client's own `repr` may show its password."""
    if not hasattr(client, "connection_pool"):
        return "a cluster"
    options = client.connection_pool.connection_kwargs
    service = getattr(client.connection_pool, "service_name", None)  # of Sentinel
    if service is not None:
        return f"service {service}, database {options.get('db', 0)}"
    address = options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    return f"{address}, database {options.get('db', 0)}"


def addresses_of(client: Any) -> frozenset[str]:
    """Returns the addresses of a client's server, with its database. Clients of the same server share an address."""
    if not hasattr(client, "connection_pool"):
        return frozenset({*client.nodes_manager.startup_nodes, *client.nodes_manager.nodes_cache})
    sentinels = getattr(client.connection_pool, "sentinel_manager", None)
    if sentinels is not None:
        return frozenset(f"{server_of(client)} of {server_of(sentinel)}" for sentinel in sentinels.sentinels)
    return frozenset({server_of(client).replace("localhost:", "127.0.0.1:")})


def own_connection(client: Any, default_timeout: float | None = None) -> Any:
    """Returns a connection to the client's server for a store's own use, not connected.

    It uses RESP2 and follows no maintenance notifications: on it, the server sends nothing but replies.

    Args:
        client: the client.
        default_timeout: seconds to wait for a connection and for a reply, if the client has no limit; None: no limit.
    """
    pool = client.connection_pool
    kwargs = {name: value for name, value in pool.connection_kwargs.items() if "maint_notifications" not in name}
    connection = pool.connection_class(**{**kwargs, "protocol": 2})
    for name in ("socket_timeout", "socket_connect_timeout"):
        if getattr(connection, name, 0) is None:
            setattr(connection, name, default_timeout)
    return connection


@cache
def has_plain_stream(kind: type) -> bool:
    """Whether connections of this class are streams that redis-py's own methods write and read."""
    names = ("send_packed_command", "read_response", "_connect")
    return all(_module_of(getattr(kind, name, None)) in _STREAMS for name in names)


def client_facts(client: Any) -> ClientFacts:
    """Returns the facts about a client, without sending anything."""
    pool, connection, is_cluster = _pool_of(client), template_connection(client), not hasattr(client, "connection_pool")
    retry = connection.retry
    if is_cluster:
        retry = getattr(client, "retry", None)  # before redis-py 6, a number of attempts
    # Since version 7, redis-py does not check for unread data on a connection that may hold a notification: with RESP3,
    # the default since version 8. On asyncio this is harmless: commands are interrupted by cancellation, which closes
    # the connection.
    does_not_check = getattr(pool, "maint_notifications_enabled", bool)() or getattr(pool, "cache", None) is not None
    sends = 1 + getattr(retry, "_retries", getattr(client, "cluster_error_retry_attempts", 0))
    return ClientFacts(
        is_cluster=is_cluster,
        socket_timeout=connection.socket_timeout,
        connect_timeout=connection.socket_connect_timeout,
        sends=sends,
        decodes=connection.encoder.decode_responses,
        reuses_dirty_connections=bool(does_not_check) and not type(connection).__module__.startswith("redis.asyncio"),
        retry_pauses=sum(_longest_pause(retry, number) for number in range(1, sends)),
    )


def _longest_pause(retry: Any, number: int) -> float:
    """Returns for how many seconds a client pauses, at most, before its n-th retry."""
    backoff = getattr(retry, "_backoff", None)
    base, cap = getattr(backoff, "_base", None), getattr(backoff, "_cap", None)
    if base is not None and cap is not None:  # exponential, with a random part or without
        return float(min(cap, base * 2**number))
    return float(backoff.compute(number)) if backoff is not None else 0.0


def _pool_of(client: Any) -> Any:
    """Returns the pool of a client, or of one node of a cluster."""
    if hasattr(client, "connection_pool"):
        return client.connection_pool
    node = next(iter({**client.nodes_manager.startup_nodes, **client.nodes_manager.nodes_cache}.values()))
    # asyncio's node is its own pool.
    return node if hasattr(node, "connection_class") else client.get_redis_connection(node).connection_pool


class ClientHooks:
    """Whether something hooks a client's `execute_command`, so that commands have to go through it.

    redis-py's `execute_command` adds half of the client's time for the same bytes: it measures, retries and records
    what the store does itself or does not need. So a command bypasses it, unless the client's methods are overridden or
    instrumented, the client caches replies, or redis-py measures its commands for OpenTelemetry.
    """

    def __init__(self, client: Any) -> None:
        self._own: dict[str, Any] = vars(client)
        self._type: Any = type(client)
        self._execute_command = self._type.execute_command if _is_plain(client) else None

    def are_present(self) -> bool:
        """Whether there are hooks. Call this before each command: instrumentation may be installed at any time."""
        return (
            self._execute_command is None
            or self._type.execute_command is not self._execute_command
            or "execute_command" in self._own
            or (
                get_observability_instance is not None
                and get_observability_instance().get_provider_manager() is not None
            )
        )


class ProbedName(str):
    """The name of a command, which records that redis-py packs the command.

    redis-py packs a command once it has a connection, right before it sends it. Until then, nothing was sent. A client
    that re-sends a command by itself packs it again.

    Attributes:
        times_packed: how often the command was packed.
    """

    times_packed = 0

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """Returns the name as redis-py sends it."""
        self.times_packed += 1
        return super().encode(encoding, errors)


def probed(commands: Sequence[Command]) -> tuple[ProbedName, list[tuple[Any, ...]]]:
    """Returns commands for redis-py's methods, and the name of the first, which knows whether they were sent."""
    first = ProbedName(commands[0][0].decode())
    (_, *words), *rest = commands
    return first, [(first, *words), *((name.decode(), *others) for name, *others in rest)]


def pools_of(client: Any) -> list[Any]:
    """Returns the pool of a blocking client; for a cluster client, the pools of its nodes."""
    if hasattr(client, "connection_pool"):
        return [client.connection_pool]
    nodes: list[Any] = getattr(client, "get_nodes", list)()
    return [node.redis_connection.connection_pool for node in nodes if node.redis_connection is not None]


def idle_of(pool: Any) -> list[Any]:
    """Returns the idle connections of a redis-py pool."""
    queue = getattr(pool, "pool", None)  # a blocking pool has None for each connection that was not opened yet
    idle = getattr(pool, "_available_connections", ()) if queue is None else queue.queue
    return [connection for connection in list(idle) if connection is not None]


def _is_plain(client: object) -> bool:
    pool: Any = getattr(client, "connection_pool", None)
    if pool is None:
        manager: Any = getattr(client, "nodes_manager", None)
        names, cache = ("execute_command",), getattr(manager, "_cache", None)
        is_known = manager is not None
    else:
        names, cache = ("execute_command", "parse_response"), getattr(pool, "cache", None)
        is_known = True
    return is_known and cache is None and all(_module_of(getattr(type(client), name)) in _CLIENTS for name in names)


def _module_of(function: object) -> str | None:
    # Not by `__module__`, which a wrapper copies.
    return str(function.__globals__["__name__"]) if isinstance(function, FunctionType) else None
