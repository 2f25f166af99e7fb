"""What the two stores share: construction, events, pipelines, and how an operation becomes a method. No I/O."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Self, TypeVar, cast, overload

import redis
from redis.exceptions import RedisError

from squidstep_redis.doctor.checks import Client
from squidstep_redis.errors import InvalidArgumentError
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.pipeline import Queued, queue
from squidstep_redis.settings import DEFAULT_TIMEOUT, SETTINGS, StoreSettings, check_settings, client_timeouts
from squidstep_redis.transport.base import BaseTransport
from squidstep_redis.transport.client import check_client, client_facts, server_of
from squidstep_redis.transport.events import EventEmitter, Listener

if TYPE_CHECKING:
    from typing import Unpack

    from squidstep_redis.operations.calls import Calls
    from squidstep_redis.protocol.arguments import Seconds
    from squidstep_redis.protocol.call import Call

C = TypeVar("C")
F = TypeVar("F", bound=Callable[..., Any])
L = TypeVar("L", bound=Listener)
T = TypeVar("T")
B = TypeVar("B", bound=BaseTransport[Any])


# Without quoting the URL, or redis-py's error about it: either may show a part of the password.
_URL_PROBLEM: Final = (
    "must be redis://user:password@host:port/database, rediss://… or unix://…, and redis-py must know its options. "
    "In a user name or a password, write @ as %40, / as %2F, ? as %3F, and # as %23"
)


def _option_problem(url: str, problem: str) -> str:
    """Returns the problem of an option in a URL, unless that may be a part of the password."""
    return _URL_PROBLEM if "@" in url.partition("?")[2] else problem


class BaseStore(ABC, Generic[C, B]):
    """Decides atomically which delivery of a step executes, and stores each step's input, output and error.

    Most operations are one round trip; the docstrings of the others say how many they need. A store is stateless:
    create any number of them, share one between threads or tasks, and use it after a fork.

    Attributes:
        client: the redis-py client.
        calls: makes any operation as data, for `batch` and `queue`; same names, same arguments.
    """

    client: C
    calls: Calls
    _client_types: ClassVar[tuple[type, ...]]
    _transport_type: type[B]

    def __init__(self, client: C, **settings: Unpack[StoreSettings]) -> None:
        """Makes a store that uses your client, which you close yourself. Nothing is sent.

        Args:
            client: a pooled `Redis` (also one that decodes responses, or from Sentinel's `master_for`), or a
                `RedisCluster`.
            **settings: the store's settings, each a keyword argument; see `StoreSettings`.

        Raises:
            InvalidArgumentError: a setting was rejected; UnsupportedClientError for the client.
        """
        check_client(client, self._client_types)
        facts = client_facts(client)
        checked = check_settings(settings, facts)
        self.client = client
        self.calls = checked.calls
        self._owns_client = False
        self._transport = self._transport_type(
            client,
            facts,
            checked.timeout,
            checked.durability,
            EventEmitter(checked.calls.prefix),
            own_connections=checked.own_connections,
        )

    @classmethod
    @overload
    def from_url(cls, url: str, **settings: Unpack[StoreSettings]) -> Self: ...
    @classmethod
    @overload
    def from_url(cls, url: str, **options: Any) -> Self: ...
    @classmethod
    def from_url(cls, url: str, **options: Any) -> Self:
        """Makes a store with its own client: RESP2, no client retries, and timeouts that fit the store's.

        The client waits 30 % of the store's timeout for a reply and 15 % for a connection. Unless `max_connections`
        is given, the store opens its own connections, which makes calls faster; see `StoreSettings`.

        Args:
            url: such as `redis://localhost:6379/0`; see redis-py's `Redis.from_url` for the forms.
            **options: the store's settings, each a keyword argument, see `StoreSettings`; and options of redis-py's
                `Redis.from_url`, which override the ones above.

        Raises:
            InvalidArgumentError: a setting or the URL was rejected.
        """
        settings: Any = {name: value for name, value in options.items() if name in SETTINGS}
        client_options = {name: value for name, value in options.items() if name not in SETTINGS}
        # RESP2, because with RESP3 redis-py may return the leftover reply of an interrupted command to the next one.
        # No client retries, because the store retries until its deadline and knows what may have been written.
        timeouts = client_timeouts(settings.get("timeout", DEFAULT_TIMEOUT))
        redis_py: Any = redis  # parts of its types are unknown
        try:
            in_url: dict[str, Any] = redis_py.connection.parse_url(url)
        except (ValueError, AttributeError):
            raise InvalidArgumentError("url", _URL_PROBLEM) from None
        client = cls._connect(url, {"protocol": 2, **timeouts, **client_options})
        # Only the pool can enforce a limit of connections.
        settings.setdefault("own_connections", "max_connections" not in {**in_url, **options})
        try:
            store = cls(client, **settings)
        except TypeError as error:
            option = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if option is None or option[1] not in in_url:
                raise
            raise InvalidArgumentError("url", _option_problem(url, f"redis-py knows no option {option[1]!r}")) from None
        except RedisError as error:
            problem = _option_problem(url, f"redis-py rejects an option: {error}")
            raise InvalidArgumentError("url" if "?" in url else "options", problem) from None
        store._owns_client = True
        return store

    def on_event(self, listener: L) -> L:
        """Registers a function that receives every decision of this store. Usable as a decorator.

        It is called after each call, in the thread or task of the call, so it must be fast. An exception that it raises
        is logged and otherwise ignored. The same events go to the logger `squidstep_redis`: those that concern an
        operator (takeovers, refusals, failures, errors) at INFO, and all others at DEBUG. `squidstep_redis.metrics`
        counts them for Prometheus.

        Args:
            listener: a plain function of one `Event`, also on an asyncio store.

        Returns:
            The listener.

        Raises:
            InvalidArgumentError: it cannot be called with one argument, or is a coroutine or generator function.
        """
        from squidstep_redis.functions.checks import check_accepts  # noqa: PLC0415 -- few stores have listeners

        check_accepts("listener", listener, None)
        self._transport.events.listeners.append(listener)
        return listener

    def queue(self, pipeline: Any, call: Call[T]) -> Queued[T]:
        """Appends an operation to your own pipeline or transaction, so that both commit together.

        Args:
            pipeline: a redis-py pipeline on the same server, not yet executed.
            call: made by `store.calls`.

        Returns:
            An object that reads the operation's reply: `queued.result(pipeline.execute())`.

        Raises:
            UnsupportedClientError: the pipeline would run the command immediately, or decode payloads.
        """
        return queue(pipeline, call)

    def _client_facts(self, lease: Seconds | None, job_timeout: Seconds | None) -> Client:
        """Returns the facts that the doctor checks without querying the server."""
        durability, longest = self._transport.durability, arguments.MAX_TTL
        return Client(
            *client_facts(self.client),
            is_hooked=self._transport.is_cluster or self._transport.hooks.are_present(),
            timeout=self._transport.timeout,
            wait_replicas=durability.replicas if durability else 0,
            wait_aof=durability is not None and durability.aof,
            wait_timeout=durability.timeout_ms / 1_000 if durability else 0,
            lease=None if lease is None else arguments.seconds("lease", lease, longest),
            job_timeout=None if job_timeout is None else arguments.seconds("job_timeout", job_timeout, longest),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({server_of(self.client)}, prefix={self.calls.prefix!r})"

    @classmethod
    @abstractmethod
    def _connect(cls, url: str, options: dict[str, Any]) -> C:
        """Makes the store's own client."""


def named_first(method: F) -> F:
    """Checks the name of a step before Python reports the arguments that `@store.step` without parentheses lacks."""

    @wraps(method)
    def check_and_call(self: object, name: Any, **options: Any) -> Any:
        from squidstep_redis.functions.checks import check_step  # noqa: PLC0415 -- only decorators need it

        check_step(name)
        return method(self, name, **options)

    return cast("F", check_and_call)


def as_method(method: F, operation: Callable[..., Any], store: str) -> F:
    """Gives a store's method the name, signature and docstring of the operation that it sends."""
    wraps(operation)(method)
    own = signature(operation)
    context, *rest = own.parameters.values()
    result = str(own.return_annotation).partition("[")[2].removesuffix("]")
    annotations = {name: value for name, value in operation.__annotations__.items() if name != context.name}
    method.__qualname__ = f"{store}.{operation.__name__}"
    method.__annotations__ = {**annotations, "return": result}
    parameters = [context.replace(name="self", annotation=context.empty), *rest]
    method.__dict__["__signature__"] = own.replace(parameters=parameters, return_annotation=result)
    return method
