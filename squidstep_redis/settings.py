"""What the two stores share: their settings, and how an operation becomes a method. Nothing here waits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ClassVar, Final, Generic, Self, TypeVar

from squidstep_redis.doctor.checks import Client
from squidstep_redis.doctor.examine import client_facts, template_connection
from squidstep_redis.errors import InvalidArgumentError, UnsupportedClientError, described
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol import call as wire
from squidstep_redis.protocol.arguments import Seconds
from squidstep_redis.protocol.codec import Codec
from squidstep_redis.transport.connection import BaseDirectConnections
from squidstep_redis.transport.events import EventEmitter, Listener
from squidstep_redis.transport.retry import RetryPolicy

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])
L = TypeVar("L", bound=Listener)
T = TypeVar("T")

DEFAULT_PREFIX: Final = "squidstep"
DEFAULT_MAX_PAYLOAD_BYTES: Final = 4 * 1024 * 1024

DEFAULT_TIMEOUT: Final = 10.0
DEFAULT_WAIT_TIMEOUT: Final = 1.0

# Of the time-out of a call, what a store's own client waits: a call that gets no answer is sent twice.
_ANSWER_SHARE: Final = 0.3
_CONNECT_SHARE: Final = 0.15


class BaseStore(ABC, Generic[C]):
    """Decides, atomically, which delivery of a step executes, and keeps each step's input, output and failure.

    Every operation is one round trip. A store keeps no state of its own: make as many as you like, share one
    between threads or tasks, and use it after a fork.

    Attributes:
        client: the redis-py client.
        calls: makes any operation as data, for `batch` and `queue`; same names, same arguments.
    """

    client: C
    calls: Calls
    _client_types: ClassVar[tuple[type, ...]]
    _connections_type: ClassVar[type[BaseDirectConnections]]
    _connections: Any  # the blocking one of a blocking store, else the other

    def __init__(
        self,
        client: C,
        *,
        prefix: str = DEFAULT_PREFIX,
        codec: Codec | None = None,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        run_ttl: Seconds | None = None,
        timeout: Seconds = DEFAULT_TIMEOUT,
        wait_replicas: int = 0,
        wait_aof: bool = False,
        wait_timeout: Seconds = DEFAULT_WAIT_TIMEOUT,
    ) -> None:
        """Makes a store on a client of yours, which stays yours to close; nothing is sent.

        Args:
            client: a pooled `Redis`, also one that decodes responses or comes from Sentinel's `master_for`, or a
                `RedisCluster`.
            prefix: of all keys, up to 128 bytes, no braces.
            codec: how payloads become bytes; None: `MsgpackCodec()`.
            max_payload_bytes: what a payload may take, encoded.
            run_ttl: seconds after its last write at which a run that this store starts expires; see `expire_run`. A run
                keeps the one that it was started with: give the same to every store.
            timeout: seconds for a call, in all. What may pass (a lost connection, a server that is loading, …) is sent
                again until then, as long as the client's own time-outs and retries leave the time for one more.
            wait_replicas: of how many replicas each transition waits to hear that they have it (WAIT).
            wait_aof: whether each transition waits until the server's AOF is on its disk (WAITAOF: Redis 7.2,
                Valkey). Both cost no round trip, but the time it takes.
            wait_timeout: seconds for which to wait; after them, NotReplicatedError.

        Raises:
            InvalidArgumentError: a setting is refused; UnsupportedClientError for the client.
        """
        self._check_client(client)
        self.client = client
        self._untyped_client: Any = client  # redis-py leaves parts of its types unknown
        self._connections = self._connections_type(client)
        self.calls = Calls(prefix, codec, max_payload_bytes, run_ttl)
        options = self._connection_options()
        limit = arguments.seconds("timeout", timeout, arguments.MAX_TIMEOUT)
        self._retry_policy = RetryPolicy.of(limit, options, is_cluster=not hasattr(client, "connection_pool"))
        self._durability = _durability(wait_replicas, wait_aof, wait_timeout, options.get("socket_timeout"))
        self._longest_read: float = options.get("socket_timeout") or 60
        self._owns_client = False
        self._events = EventEmitter(prefix)

    def on_event(self, listener: L) -> L:
        """Has a function told of every decision of this store, after the call; usable as a decorator.

        It is called in the thread or task of the call, so it must be quick. What it raises is logged, and goes no
        further. The same events go to the log: logger `squidstep_redis`, at INFO what an operator wants to know of
        (takeovers, refusals, failures, errors), at DEBUG the rest. See `squidstep_redis.metrics` for Prometheus.

        Args:
            listener: is given an `Event`.
        """
        self._events.listeners.append(listener)
        return listener

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        prefix: str = DEFAULT_PREFIX,
        codec: Codec | None = None,
        max_payload_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES,
        run_ttl: Seconds | None = None,
        timeout: Seconds = DEFAULT_TIMEOUT,
        wait_replicas: int = 0,
        wait_aof: bool = False,
        wait_timeout: Seconds = DEFAULT_WAIT_TIMEOUT,
        **options: Any,
    ) -> Self:
        """Makes a store with a client of its own: RESP2, no retries but the store's, time-outs to fit its `timeout`.

        Args:
            url: such as `redis://localhost:6379/0`; see redis-py's `Redis.from_url`.
            prefix: as in the constructor, like all up to `options`.
            codec: see there.
            max_payload_bytes: see there.
            run_ttl: see there.
            timeout: see there; the client waits 0.3 of it for a reply, and 0.15 for a connection.
            wait_replicas: see there.
            wait_aof: see there.
            wait_timeout: see there.
            options: for redis-py's `Redis.from_url`, over what is said above. Without `max_connections` the store keeps
                up to 16 connections for a second after use: the fastest way to the server.
        """
        limit = arguments.seconds("timeout", timeout, arguments.MAX_TIMEOUT)
        # RESP2, because with RESP3 a reply left over by an interrupted command may be handed to the next one. No
        # retries of its own: the store re-sends by its deadline, and knows then what may have been written.
        ours: dict[str, Any] = {
            "protocol": 2,
            "socket_timeout": _ANSWER_SHARE * limit,
            "socket_connect_timeout": _CONNECT_SHARE * limit,
        }
        store = cls(
            cls._connect(url, {**ours, **options}),
            prefix=prefix,
            codec=codec,
            max_payload_bytes=max_payload_bytes,
            run_ttl=run_ttl,
            timeout=limit,
            wait_replicas=wait_replicas,
            wait_aof=wait_aof,
            wait_timeout=wait_timeout,
        )
        store._owns_client = True
        if "max_connections" not in options:  # a pool that somebody has measured has none to spare
            store._connections = cls._connections_type(store.client, keep_idle=True)
        return store

    def queue(self, pipeline: Any, call: wire.Call[T]) -> wire.Queued[T]:
        """Appends an operation to a pipeline or transaction of your own, so that both commit together.

        Args:
            pipeline: of a redis-py client of the same server, not yet executed.
            call: made by `store.calls`.

        Returns:
            What reads the operation's reply: `queued.result(pipeline.execute())`.

        Raises:
            UnsupportedClientError: the pipeline would run the command at once, or decode payloads.
        """
        return wire.queue(pipeline, call)

    def _connection_options(self) -> dict[str, Any]:
        connection = template_connection(self.client)
        return {name: getattr(connection, name) for name in ("socket_timeout", "socket_connect_timeout", "retry")}

    def _client_facts(self, lease: Seconds | None, job_timeout: Seconds | None) -> Client:
        """What the doctor is to know of the client and the store."""
        durability, longest = self._durability, arguments.MAX_TTL
        return client_facts(
            self.client,
            timeout=self._retry_policy.timeout,
            wait_replicas=durability.replicas if durability else 0,
            wait_aof=durability is not None and durability.aof,
            wait_timeout=durability.timeout_ms / 1_000 if durability else 0,
            lease=None if lease is None else arguments.seconds("lease", lease, longest),
            job_timeout=None if job_timeout is None else arguments.seconds("job_timeout", job_timeout, longest),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.client!r}, prefix={self.calls.prefix!r})"

    @classmethod
    @abstractmethod
    def _connect(cls, url: str, options: dict[str, Any]) -> C:
        """Makes the store's own client."""

    @classmethod
    def _check_client(cls, client: object) -> None:
        if not isinstance(client, cls._client_types) or hasattr(client, "execute"):  # a pipeline is a Redis, too
            names = " or ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in cls._client_types)
            raise UnsupportedClientError("client", f"must be a {names}, not {described(client)}")
        if getattr(client, "single_connection_client", False) or getattr(client, "connection", None) is not None:
            raise UnsupportedClientError(
                "client", "has a single connection, which threads and forked processes would share: use a pooled client"
            )


def _durability(
    replicas: int, aof: object, wait_timeout: Seconds, socket_timeout: float | None
) -> wire.Durability | None:
    replicas = arguments.integer("wait_replicas", replicas, arguments.MAX_REPLICAS, least=0)
    if not isinstance(aof, bool):
        raise InvalidArgumentError("wait_aof", f"must be a bool, not {described(aof)}")
    seconds = arguments.seconds("wait_timeout", wait_timeout, arguments.MAX_TIMEOUT)
    if not replicas and not aof:
        return None
    if socket_timeout is not None and seconds >= socket_timeout:
        raise InvalidArgumentError(
            "wait_timeout", f"must be less than the client's socket_timeout of {socket_timeout:g} s, not {seconds:g} s"
        )
    return wire.Durability(replicas, aof, round(seconds * 1_000))


def documented(method: F, make: Callable[..., Any], store: str) -> F:
    """Gives a store's method the name, signature and docstring of the operation that it sends."""
    wraps(make)(method)
    own = signature(make)
    answered = str(own.return_annotation).partition("[")[2].removesuffix("]")
    method.__qualname__ = f"{store}.{make.__name__}"
    method.__annotations__ = {**make.__annotations__, "return": answered}
    method.__dict__["__signature__"] = own.replace(return_annotation=answered)
    return method
