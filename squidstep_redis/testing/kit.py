"""The kit: a blocking and an asyncio store on one server, fake or real, with a test clock and faults."""

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
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.testing.clock import StepClock
from squidstep_redis.testing.faults import StepFaults
from squidstep_redis.testing.interception import Interceptor, LoopGuard, intercepted, intercepted_asyncio

FAKEREDIS: Final = "fakeredis"
EMBEDDED: Final = "embedded"

# In seconds. Short, so that tests of an unreachable server are fast; long enough for a slow CI machine. A cluster needs
# longer, because redis-py's cluster client queries all nodes before it retries.
_TIMEOUT: Final = 2.0
_CLUSTER_TIMEOUT: Final = 5.0
_CLIENT: Final[dict[str, Any]] = {"socket_timeout": 10, "socket_connect_timeout": 10, "protocol": 2}


class StepKit:
    """Two stores, a clock and faults in a `with` block: everything the fixtures provide, without pytest.

    On a real server, all keys have a prefix that is unique to the kit, and are deleted at the end of the block. On
    fakeredis, the kit has its own server.

        with StepKit() as kit:
            handle(kit.store, {"order": 1})
            kit.clock.advance(30)

    Attributes:
        store: a blocking store.
        async_store: an asyncio store of the same runs. It can be used in several event loops one after another: it
            connects in the running loop, and its connections are closed when that loop shuts down.
        clock: the clock of all three stores.
        faults: the faults of `store` and `async_store`.
        observer: a blocking store of the same runs that no fault affects, for assertions.
    """

    store: StepRunStore
    async_store: AsyncStepRunStore
    clock: StepClock
    faults: StepFaults
    observer: StepRunStore

    def __init__(self, server: str = FAKEREDIS, **settings: Any) -> None:
        """Prepares a kit. Nothing is sent before the block is entered.

        Args:
            server: "fakeredis"; "embedded", which starts a Valkey server for the kit; or the URL of a server or of a
                cluster node.
            **settings: the stores' settings, each a keyword argument, see `StoreSettings`; all but `prefix`. The
                default of `timeout` is 2 seconds, on a cluster 5.

        Raises:
            TypeError: `prefix` is given.
        """
        if "prefix" in settings:
            raise TypeError("prefix: cannot be set, because the kit deletes all keys with its prefix at the end")
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
        """The prefix of all keys, for additional stores on `store.client`."""
        return self._settings["prefix"]

    def _open(self, stack: ExitStack) -> None:
        url = "" if self._server == FAKEREDIS else self._server
        if self._server == EMBEDDED:
            url = stack.enter_context(EmbeddedServer()).url
        clients = _Clients(url)
        self._settings.setdefault("timeout", _CLUSTER_TIMEOUT if clients.is_cluster else _TIMEOUT)
        self.clock = StepClock(lambda: clients.time(self.observer.client))
        self.faults, no_faults = (StepFaults(self.clock, lambda: self.observer) for _ in range(2))
        guard = LoopGuard(lambda: clients.close_asyncio(self.async_store))

        observing = clients.blocking(no_faults)
        stack.callback(observing.close)
        self.observer = StepRunStore(observing, **self._settings)
        if url:
            stack.callback(clients.delete, observing, self.prefix)

        client, async_client = clients.blocking(self.faults), clients.asyncio(self.faults, guard)
        stack.callback(client.close)
        stack.callback(guard.close)
        self.store = StepRunStore(client, **self._settings)
        stack.callback(self.store.close)  # else its threads would outlive the block for some seconds
        self.async_store = AsyncStepRunStore(async_client, **self._settings)
        for each in (client, async_client):
            _kits[each] = self
            stack.callback(_kits.pop, each)


_kits: WeakKeyDictionary[Any, StepKit] = WeakKeyDictionary()  # by client; an entry is removed when its block ends


def observer_of(store: StepRunStore | AsyncStepRunStore) -> StepRunStore:
    """Returns a blocking store of the same runs: the observer of the store's kit, or else the store itself.

    Args:
        store: a blocking store, or the asyncio store of a kit.

    Raises:
        TypeError: the store is an asyncio store without a kit.
    """
    kit = _kits.get(store.client)
    if kit is not None:
        return kit.observer
    if isinstance(store, StepRunStore):
        return store
    raise TypeError(f"store: must be a blocking store, or the asyncio store of a StepKit, not {store!r}")


class _Clients:
    """Makes clients of one server, whose URL is empty for fakeredis."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._fake = None if url else _fakeredis().FakeServer()
        self.is_cluster = bool(url) and _is_cluster(url)

    def blocking(self, interceptor: Interceptor) -> Any:
        """Returns a blocking client whose commands the interceptor sees. A cluster client connects immediately."""
        retry = Retry(NoBackoff(), 0)
        if self.is_cluster:
            cluster: Any = RedisCluster
            connection_class = intercepted(Connection, interceptor)
            return cluster.from_url(self._url, connection_class=connection_class, retry=retry, **_CLIENT)
        client = self._single(Redis, "FakeStrictRedis", retry)
        client.connection_pool.connection_class = intercepted(client.connection_pool.connection_class, interceptor)
        return client

    def asyncio(self, interceptor: Interceptor, guard: LoopGuard) -> Any:
        """Returns an asyncio client. It connects on first use, and the guard closes it with its loop."""
        retry = AsyncRetry(NoBackoff(), 0)
        if self.is_cluster:
            cluster: Any = redis_asyncio.RedisCluster
            client = cluster.from_url(self._url, retry=retry, **_CLIENT)
            connection_class = intercepted_asyncio(redis_asyncio.Connection, interceptor, guard)
            client.connection_kwargs["connection_class"] = connection_class
            for node in client.nodes_manager.startup_nodes.values():
                node.connection_class = connection_class
            return client
        client = self._single(redis_asyncio.Redis, "FakeAsyncRedis", retry)
        pool = client.connection_pool
        pool.connection_class = intercepted_asyncio(pool.connection_class, interceptor, guard)
        return client

    def _single(self, kind: Any, fake: str, retry: object) -> Any:
        if self._url:
            return kind.from_url(self._url, retry=retry, **_CLIENT)
        client = getattr(_fakeredis(), fake)(server=self._fake)
        client.connection_pool.connection_kwargs["retry"] = retry
        return client

    async def close_asyncio(self, store: AsyncStepRunStore) -> None:
        """Closes all connections of an asyncio store, which can still be used afterwards."""
        client: Any = store.client
        await store.close()
        await (client.aclose() if self.is_cluster else client.connection_pool.disconnect())

    def time(self, client: Any) -> tuple[int, int]:
        """Returns the server's time, as seconds and microseconds."""
        return client.time(target_nodes="random") if self.is_cluster else client.time()

    def delete(self, client: Any, prefix: str) -> None:
        """Deletes all keys with a prefix."""
        for key in client.scan_iter(match=f"{prefix}:*", count=1_000):
            client.unlink(key)


def _is_cluster(url: str) -> bool:
    client_class: Any = Redis
    with client_class.from_url(url, **_CLIENT) as client:
        return bool(client.info("cluster").get("cluster_enabled"))


def _fakeredis() -> Any:
    try:
        import fakeredis  # noqa: PLC0415 -- not needed on a real server
    except ImportError as missing:
        raise ImportError(
            "a StepKit without a server needs fakeredis: pip install 'squidstep_redis[testing]', or pass it a server"
        ) from missing
    return fakeredis
