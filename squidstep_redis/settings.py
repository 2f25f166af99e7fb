"""The settings of a store: their defaults, their checks, and the objects made from them."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypedDict

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Seconds
from squidstep_redis.protocol.codec import Codec, PlacedCodec
from squidstep_redis.protocol.fingerprints import Fingerprint
from squidstep_redis.transport.batch import Durability
from squidstep_redis.transport.client import ClientFacts

DEFAULT_PREFIX: Final = "squidstep"
DEFAULT_MAX_PAYLOAD_BYTES: Final = 4 * 1024 * 1024
DEFAULT_TIMEOUT: Final = 10.0
DEFAULT_WAIT_TIMEOUT: Final = 1.0

# The fractions of a store's timeout that its own client waits for a reply and for a connection: they leave time to send
# a call without a reply a second time.
_REPLY_SHARE: Final = 0.3
_CONNECT_SHARE: Final = 0.15


class StoreSettings(TypedDict, total=False):
    """The settings of a store, all optional.

    Attributes:
        prefix: prefix of all keys: up to 128 bytes, without braces. Default: "squidstep".
        codec: encodes payloads; see also `squidstep_redis.codecs`. Default: None, which is `MsgpackCodec()`.
        max_payload_bytes: largest encoded payload, in bytes. Default: 4 MiB.
        run_ttl: seconds, or a timedelta, after its last write at which a run that this store creates expires; see
            `expire_run`. The value is fixed when the run is created. Default: None, runs do not expire.
        fingerprint: what the fingerprint of an input is made of. True: the whole input; a function of the input: what
            it returns. A delivery with a different fingerprint is refused with InputMismatchError. An operation can
            override this. Default: None, inputs have no fingerprints.
        timeout: seconds, or a timedelta, for one call, including retries. Transient errors (a lost connection, a server
            that is loading) are retried until then. The last attempt begins at the deadline, so a call can take one
            attempt longer.
            Default: 10.
        wait_replicas: number of replicas that must confirm each transition (WAIT). Default: 0.
        wait_aof: whether each transition waits until the server's AOF is on disk (WAITAOF: Redis 7.2, Valkey). Neither
            costs a round trip, but both add latency. Default: False.
        wait_timeout: seconds, or a timedelta, to wait for replicas and AOF; then NotReplicatedError is raised.
            Default: 1.
        own_connections: whether the store opens its own connections, with the client's address, credentials and
            timeouts, instead of borrowing from the client's pool. They are faster: the blocking store skips the pool's
            checks, and the asyncio store sends the calls of all tasks on one connection per event loop. The pool's
            `max_connections` does not limit them, and `close` of the store closes them. They use RESP2, and
            follow no maintenance notifications. Not available for a cluster's client: a store always opens its own
            connections to each node. A blocking store borrows from the nodes' pools if these have `max_connections`.
            Default: True for `from_url` without `max_connections`, False for a store on your client.
    """

    prefix: str
    codec: Codec | PlacedCodec | None
    max_payload_bytes: int
    run_ttl: Seconds | None
    fingerprint: Fingerprint | None
    timeout: Seconds
    wait_replicas: int
    wait_aof: bool
    wait_timeout: Seconds
    own_connections: bool


SETTINGS: Final = frozenset(StoreSettings.__annotations__)


class CheckedSettings(NamedTuple):
    """Settings of a store that have been checked.

    Attributes:
        calls: makes the store's calls.
        timeout: seconds for one call, including retries.
        durability: what transitions wait for; None: nothing.
        own_connections: whether the store opens its own connections.
    """

    calls: Calls
    timeout: float
    durability: Durability | None
    own_connections: bool


def check_settings(settings: StoreSettings, client: ClientFacts) -> CheckedSettings:
    """Checks the settings of a store.

    Args:
        settings: as given by the caller.
        client: what is known of the client.

    Raises:
        InvalidArgumentError: a setting was rejected.
        TypeError: there is no such setting.
    """
    if unknown := settings.keys() - SETTINGS:
        raise TypeError(f"unknown settings {sorted(unknown)}; known settings: {', '.join(sorted(SETTINGS))}")
    calls = Calls(
        settings.get("prefix", DEFAULT_PREFIX),
        settings.get("codec"),
        settings.get("max_payload_bytes", DEFAULT_MAX_PAYLOAD_BYTES),
        settings.get("run_ttl"),
        settings.get("fingerprint"),
    )
    timeout = arguments.seconds("timeout", settings.get("timeout", DEFAULT_TIMEOUT), arguments.MAX_TIMEOUT)
    own_connections = _flag(settings, "own_connections")
    if own_connections and client.is_cluster:
        raise InvalidArgumentError("own_connections", "is not available for a cluster's client")
    return CheckedSettings(calls, timeout, _durability(settings, client.socket_timeout), own_connections)


def _durability(settings: StoreSettings, socket_timeout: float | None) -> Durability | None:
    replicas = arguments.integer("wait_replicas", settings.get("wait_replicas", 0), arguments.MAX_REPLICAS, minimum=0)
    aof = _flag(settings, "wait_aof")
    wait_timeout = settings.get("wait_timeout", DEFAULT_WAIT_TIMEOUT)
    seconds = arguments.seconds("wait_timeout", wait_timeout, arguments.MAX_TIMEOUT)
    if not replicas and not aof:
        return None
    if socket_timeout is not None and seconds >= socket_timeout:
        raise InvalidArgumentError(
            "wait_timeout", f"must be less than the client's socket_timeout of {socket_timeout:g} s, not {seconds:g} s"
        )
    return Durability(replicas, aof, round(seconds * 1_000))


def _flag(settings: StoreSettings, name: Literal["wait_aof", "own_connections"]) -> bool:
    flag: object = settings.get(name, False)
    if not isinstance(flag, bool):
        raise InvalidArgumentError(name, f"must be a bool, not {described(flag)}")
    return flag


def client_timeouts(timeout: object) -> dict[str, float]:
    """Returns the socket timeouts, in seconds, of a client that is made for a store with this timeout."""
    limit = arguments.seconds("timeout", timeout, arguments.MAX_TIMEOUT)
    return {"socket_timeout": _REPLY_SHARE * limit, "socket_connect_timeout": _CONNECT_SHARE * limit}
