"""The kit: two stores on one server, fake or real, their clock, and what goes wrong between them."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self
from weakref import WeakKeyDictionary

from redis import Connection, Redis, RedisCluster
from redis import asyncio as redis_asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from squidstep_redis import AsyncStepRunStore, StepRunStore
from squidstep_redis.claims.heartbeat import async_heartbeat_of
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.testing.clock import StepClock
from squidstep_redis.testing.faults import StepFaults, Undisturbed
from squidstep_redis.testing.tap import Line, LoopGuard, tap, tap_asyncio

FAKEREDIS: Final = "fakeredis"
EMBEDDED: Final = "embedded"

# A server that is away shall not hold up a test for ten seconds; one that is slow, as in CI, shall be waited for. And
# redis-py's client of a cluster asks all its nodes again before it sends again.
_TIMEOUT: Final = 2.0
_CLUSTER_TIMEOUT: Final = 5.0
_CLIENT: Final[dict[str, Any]] = {"socket_timeout": 10, "socket_connect_timeout": 10, "protocol": 2}


class StepKit:
    """What the fixtures are made of, for those who test without pytest: a `with` block.

    On a real server all keys have a prefix of the kit's own, and are deleted at the end of the block. On fakeredis the
    server is the kit's own.

        with StepKit() as kit:
            handle(kit.store, {"order": 1})
            kit.clock.advance(30)

    Attributes:
        store: a blocking store.
        async_store: an asyncio store of the same runs. It may be used in one event loop after another, and connects in
            the one that runs; what is open is closed when that loop is shut down.
        clock: moves the time by which both go, see `StepClock`.
        faults: makes something go wrong for both, see `StepFaults`.
        observer: a blocking store of the same runs which no fault strikes: for looking on.
    """

    store: StepRunStore
    async_store: AsyncStepRunStore
    clock: StepClock
    faults: StepFaults
    observer: StepRunStore

    def __init__(self, server: str = FAKEREDIS, **settings: Any) -> None:
        """Prepares a kit; nothing is sent before the block is entered.

        Args:
            server: "fakeredis"; "embedded", for a Valkey of the kit's own; or the URL of a server, of which a cluster
                is recognised.
            settings: of the stores, see `StepRunStore`; all but `prefix`. `timeout` is two seconds if not given, on a
                cluster five.

        Raises:
            TypeError: a `prefix` is given. All that has the kit's prefix is deleted in the end.
        """
        if "prefix" in settings:
            raise TypeError("prefix: is the kit's own, for all that has it is deleted in the end")
        self._server = server
        self._settings: dict[str, Any] = {**settings, "prefix": f"squidstep-test-{secrets.token_hex(6)}"}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def prefix(self) -> str:
        """Of all keys: for stores of your own, on `store.client`."""
        return self._settings["prefix"]

    def _open(self, stack: ExitStack) -> None:
        url = ""
        if self._server == EMBEDDED:
            url = stack.enter_context(EmbeddedServer()).url
        elif self._server != FAKEREDIS:
            url = self._server
        clients = _Clients(url)
        self._settings.setdefault("timeout", _CLUSTER_TIMEOUT if clients.is_cluster else _TIMEOUT)
        self.clock = StepClock(lambda: clients.time(self.observer.client))
        self.faults = StepFaults(self.clock, lambda: self.observer)
        guard = LoopGuard(lambda: clients.close_asyncio(self.async_store.client))

        observing = clients.blocking(Undisturbed(self.clock))
        stack.callback(observing.close)
        self.observer = StepRunStore(observing, **self._settings)
        if url:
            stack.callback(clients.delete, observing, self.prefix)

        client, async_client = clients.blocking(self.faults), clients.asyncio(self.faults, guard)
        stack.callback(client.close)
        stack.callback(guard.close)
        self.store = StepRunStore(client, **self._settings)
        self.async_store = AsyncStepRunStore(async_client, **self._settings)
        for each in (client, async_client):
            _kits[each] = self
            stack.callback(_kits.pop, each)


_kits: WeakKeyDictionary[Any, StepKit] = WeakKeyDictionary()  # by client; each is taken out when its block ends


def observer_of(store: StepRunStore | AsyncStepRunStore) -> StepRunStore:
    """A blocking store which can look at what another has: that of its kit, or itself.

    Raises:
        TypeError: it is an asyncio store of no kit.
    """
    kit = _kits.get(store.client)
    if kit is not None:
        return kit.observer
    if isinstance(store, StepRunStore):
        return store
    raise TypeError(f"store: must be a blocking one, or of a kit, to be looked at without await; not {store!r}")


class _Clients:
    """Makes the clients of one server."""

    def __init__(self, url: str) -> None:
        """`url` is empty for fakeredis."""
        self._url = url
        self._fake = None if url else _fakeredis().FakeServer()
        self.is_cluster = bool(url) and _is_cluster(url)

    def blocking(self, line: Line) -> Any:
        """A blocking client on whose connections `line` listens. One of a cluster connects at once."""
        retry = Retry(NoBackoff(), 0)
        if self.is_cluster:
            cluster: Any = RedisCluster
            return cluster.from_url(self._url, connection_class=tap(Connection, line), retry=retry, **_CLIENT)
        plain: Any = Redis
        if self._url:
            client = plain.from_url(self._url, retry=retry, **_CLIENT)
        else:
            client = _fakeredis().FakeStrictRedis(server=self._fake)
            client.connection_pool.connection_kwargs["retry"] = retry
        client.connection_pool.connection_class = tap(client.connection_pool.connection_class, line)
        return client

    def asyncio(self, line: Line, guard: LoopGuard) -> Any:
        """An asyncio client of the same kind; it connects when it is first used."""
        retry = AsyncRetry(NoBackoff(), 0)
        if self.is_cluster:
            cluster: Any = redis_asyncio.RedisCluster
            client = cluster.from_url(self._url, retry=retry, **_CLIENT)
            client.connection_kwargs["connection_class"] = tapped = tap_asyncio(redis_asyncio.Connection, line, guard)
            for node in client.nodes_manager.startup_nodes.values():
                node.connection_class = tapped
            return client
        plain: Any = redis_asyncio.Redis
        if self._url:
            client = plain.from_url(self._url, retry=retry, **_CLIENT)
        else:
            client = _fakeredis().FakeAsyncRedis(server=self._fake)
            client.connection_pool.connection_kwargs["retry"] = retry
        client.connection_pool.connection_class = tap_asyncio(client.connection_pool.connection_class, line, guard)
        return client

    async def close_asyncio(self, client: Any) -> None:
        """Closes all connections; the client can be used again."""
        await async_heartbeat_of(client).stop()
        if self.is_cluster:
            await client.aclose()
        else:
            await client.connection_pool.disconnect()

    def time(self, client: Any) -> tuple[int, int]:
        """The server's clock: seconds and microseconds."""
        return client.time(target_nodes="random") if self.is_cluster else client.time()

    def delete(self, client: Any, prefix: str) -> None:
        """Deletes all keys of a prefix."""
        for key in client.scan_iter(match=f"{prefix}:*", count=1_000):
            client.unlink(key)


def _is_cluster(url: str) -> bool:
    client: Any = Redis.from_url(url, **_CLIENT)  # pyright: ignore[reportUnknownMemberType]: redis-py leaves it untyped
    with client:
        return bool(client.info("cluster").get("cluster_enabled"))


def _fakeredis() -> Any:
    try:
        import fakeredis  # noqa: PLC0415 -- not needed on a real server
    except ImportError:
        raise ImportError("on fakeredis, a kit needs it: pip install 'squidstep_redis[testing]'") from None
    return fakeredis
