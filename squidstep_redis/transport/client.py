"""Facts about a redis-py client that are known without sending anything."""

from __future__ import annotations

from typing import Any, NamedTuple

from squidstep_redis.errors import UnsupportedClientError, described


class ClientFacts(NamedTuple):
    """The settings of a redis-py client that matter to a store.

    Attributes:
        is_cluster: whether it is a cluster client.
        socket_timeout: seconds it waits for a reply; None: no limit.
        connect_timeout: seconds it waits for a connection; None: no limit.
        sends: how many times it sends a command that gets no reply.
        decodes: whether it decodes replies.
        reuses_dirty_connections: whether it may return a reply that is left on a connection to the next command.
    """

    is_cluster: bool
    socket_timeout: float | None
    connect_timeout: float | None
    sends: int
    decodes: bool
    reuses_dirty_connections: bool


def check_client(client: object, types: tuple[type, ...]) -> None:
    """Raises UnsupportedClientError unless the client is of one of these types and has a connection pool."""
    if not isinstance(client, types) or hasattr(client, "execute"):  # a pipeline is also a Redis
        names = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in types)
        raise UnsupportedClientError("client", f"must be a {names}, not {described(client)}")
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
    return ClientFacts(
        is_cluster=is_cluster,
        socket_timeout=connection.socket_timeout,
        connect_timeout=connection.socket_connect_timeout,
        sends=1 + getattr(retry, "_retries", getattr(client, "cluster_error_retry_attempts", 0)),
        decodes=connection.encoder.decode_responses,
        reuses_dirty_connections=bool(does_not_check) and not type(connection).__module__.startswith("redis.asyncio"),
    )


def _pool_of(client: Any) -> Any:
    """Returns the pool of a client, or of one node of a cluster."""
    if hasattr(client, "connection_pool"):
        return client.connection_pool
    node = next(iter({**client.nodes_manager.startup_nodes, **client.nodes_manager.nodes_cache}.values()))
    # asyncio's node is its own pool.
    return node if hasattr(node, "connection_class") else client.get_redis_connection(node).connection_pool
