"""Asyncio tasks share the opening of a connection: it is bounded, may be interrupted, and leaves nothing open."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest
import redis
import redis.asyncio
from faults.topologies import SERVICE, Sentinels
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.retry import Retry
from redis.sentinel import Sentinel
from support.backends import Backend
from support.internals import retry_for
from support.proxy import Proxy
from support.servers import EmbeddedCluster, collect_abandoned_connections, find_binary, wait_until

from squidstep_redis import AsyncStepRunStore, NotSentError, OutcomeUnknownError, StepRunStore, WaitTimeoutError
from squidstep_redis.transport.client import idle_of

from .conftest import HookedAsyncRedis, HookedRedis

pytestmark = [
    pytest.mark.servers("valkey"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


any_redis: Any = redis.asyncio  # parts of its types are unknown


@pytest.fixture(autouse=True)
def collect_garbage() -> Iterator[None]:
    """Collects what clients of a loop that has ended leave open, so that no later test is blamed for it."""
    yield
    collect_abandoned_connections()


@pytest.fixture
def url(backend: Backend) -> str:
    return str(backend.url)


@pytest.fixture
def name(tmp_path: Path, backend: Backend) -> Any:
    yield tmp_path.name
    backend.flush()


def connected(backend: Backend, name: str) -> int:
    return sum(client["name"] == name for client in backend.raw.client_list())


async def cancel_helpers(call: asyncio.Task[Any]) -> int:
    """Cancels all tasks but this one and the one of a call, as some programs do; returns how many there were."""
    cancelled: set[asyncio.Task[Any]] = set()
    for _ in range(200):
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {call, asyncio.current_task()} - cancelled:
            task.cancel()
            cancelled.add(task)
    return len(cancelled)


def test_call_continues_if_its_connecting_is_cancelled(url: str, name: str) -> None:
    async def main() -> None:
        async with AsyncStepRunStore.from_url(url, prefix=name) as store:
            call = asyncio.create_task(store.begin_step("run", "pay", {}))

            assert await cancel_helpers(call)
            assert (await call).decision == "execute"

    asyncio.run(main())


def test_cluster_calls_continue_if_their_helpers_are_cancelled() -> None:
    async def main(url: str) -> None:
        async with any_redis.RedisCluster.from_url(url) as client:
            store = AsyncStepRunStore(client)
            for _ in range(2):  # the first one asks the nodes for the slots
                call = asyncio.create_task(store.batch([store.calls.get_run(f"run-{n}") for n in range(20)]))

                assert await cancel_helpers(call)
                assert len(await call) == 20

    with EmbeddedCluster(binary=find_binary("valkey")) as cluster:
        asyncio.run(main(cluster.url))


def test_store_closed_while_it_connects_leaves_no_connection(backend: Backend, url: str, name: str) -> None:
    async def main() -> None:
        for turns in range(25):
            store = AsyncStepRunStore.from_url(url, prefix=name, client_name=name)
            call = asyncio.create_task(store.get_run("run"))
            for _ in range(turns):
                await asyncio.sleep(0)
            await store.close()
            assert await call == []
            await store.close()

        await asyncio.to_thread(wait_until, lambda: not connected(backend, name), 5)

    asyncio.run(main())


def test_store_closed_while_a_call_blocks_leaves_no_connection(backend: Backend, url: str, name: str) -> None:
    async def main() -> None:
        store = AsyncStepRunStore.from_url(url, prefix=name, client_name=name)
        await store.begin_step("run", "pay", {}, lease=60)
        waiting = asyncio.create_task(store.wait_for_step("run", "pay", 0.7))
        await asyncio.sleep(0.3)
        await store.close()
        with pytest.raises(WaitTimeoutError):
            await waiting
        await store.close()

        await asyncio.to_thread(wait_until, lambda: not connected(backend, name), 5)

    asyncio.run(main())


@pytest.mark.parametrize("options", [{}, {"max_connections": 2}])
def test_store_closes_its_connections_in_a_cancelled_scope(backend: Backend, url: str, name: str, options: Any) -> None:
    async def main() -> None:
        with anyio.CancelScope() as scope:
            async with AsyncStepRunStore.from_url(url, prefix=name, client_name=name, **options) as store:
                await store.get_run("run")
                scope.cancel()

        await asyncio.to_thread(wait_until, lambda: not connected(backend, name), 5)

    asyncio.run(main())


@pytest.mark.parametrize("options", [{}, {"max_connections": 2}])
def test_store_may_be_closed_in_a_later_loop(backend: Backend, url: str, name: str, options: Any) -> None:
    store = AsyncStepRunStore.from_url(url, prefix=name, client_name=name, **options)
    asyncio.run(store.get_run("run"))

    asyncio.run(store.close())

    wait_until(lambda: not connected(backend, name), 5)


@pytest.mark.parametrize("own_connections", [False, True])
def test_sentinel_client_works_in_one_loop_after_another(tmp_path: Path, own_connections: bool) -> None:
    """Its own connections to the sentinels belong to the first loop."""
    with Sentinels(find_binary("valkey"), tmp_path) as sentinels:
        client = any_redis.Sentinel(sentinels.addresses).master_for(SERVICE)
        store = AsyncStepRunStore(client, own_connections=own_connections)
        for number in range(4):
            assert asyncio.run(store.begin_step("run", f"step-{number}", {})).decision == "execute"


@pytest.mark.parametrize("own_connections", [False, True])
def test_sentinel_client_works_in_several_loops_at_once(tmp_path: Path, own_connections: bool) -> None:
    """redis-py's connections to the sentinels are used in one of them only."""
    used: set[tuple[int, int]] = set()

    class Recording(redis.asyncio.Connection):
        async def connect(self) -> None:
            used.add((id(self), threading.get_ident()))
            alive.append(self)
            await super().connect()

    alive: list[Any] = []
    with Sentinels(find_binary("valkey"), tmp_path) as sentinels, ThreadPoolExecutor(6) as threads:
        finder = any_redis.Sentinel(sentinels.addresses)
        for client in finder.sentinels:
            client.connection_pool.connection_class = Recording
        store = AsyncStepRunStore(finder.master_for(SERVICE), own_connections=own_connections)
        gate = threading.Barrier(6)

        async def begin(number: int) -> str:
            gate.wait()
            result = await store.begin_step("run", f"step-{number}", {})
            gate.wait()  # no loop is closed before all have begun: the next one would take over from it
            return result.decision

        assert list(threads.map(lambda number: asyncio.run(begin(number)), range(6))) == ["execute"] * 6

    assert len({connection for connection, _ in used}) == len(used)


needs_awaited_credentials = pytest.mark.skipif(
    not hasattr(CredentialProvider, "get_credentials_async"), reason="redis-py 5.0 asks for credentials without waiting"
)


class HangingCredentials(CredentialProvider):
    def get_credentials(self) -> tuple[str, str]:
        raise NotImplementedError

    async def get_credentials_async(self) -> tuple[str, str]:
        await asyncio.sleep(60)
        return "default", ""


@needs_awaited_credentials
@pytest.mark.parametrize("kind", ["pool", "own connections", "hooked", "hooked, blocking pool"])
def test_hanging_credential_provider_does_not_extend_the_timeout(url: str, kind: str) -> None:
    async def main() -> float:
        pool_type: Any = any_redis.BlockingConnectionPool if "blocking" in kind else any_redis.ConnectionPool
        pool = pool_type.from_url(
            url, credential_provider=HangingCredentials(), socket_timeout=0.3, socket_connect_timeout=0.3
        )
        client_type: Any = HookedAsyncRedis if "hooked" in kind else any_redis.Redis
        async with client_type(connection_pool=pool) as client:
            store = AsyncStepRunStore(client, own_connections=kind == "own connections", timeout=0.5)
            began = time.monotonic()
            with pytest.raises(NotSentError, match="in time" if "hooked" in kind else "Timeout connecting"):
                await store.get_run("run")
            return time.monotonic() - began

    assert asyncio.run(main()) < 3


class CancelledCredentials(CredentialProvider):
    """Waits for a token that several callers share, and whose task was cancelled."""

    token: Any = None

    def get_credentials(self) -> tuple[str, str]:
        raise NotImplementedError

    async def get_credentials_async(self) -> tuple[str, str]:
        return await self.token


@needs_awaited_credentials
@pytest.mark.parametrize("size", [10, 100_000], ids=["small", "large"])
@pytest.mark.parametrize("own_connections", [True, False])
def test_cancelled_credentials_cancel_no_call(url: str, own_connections: bool, size: int) -> None:
    async def main() -> None:
        credentials = CancelledCredentials()
        credentials.token = asyncio.get_running_loop().create_future()
        credentials.token.cancel()
        async with any_redis.Redis.from_url(url, credential_provider=credentials) as client:
            store = AsyncStepRunStore(client, own_connections=own_connections, timeout=0.2)
            task = asyncio.create_task(store.begin_step("run", "pay", {"text": "x" * size}))
            await asyncio.wait([task])
            assert not task.cancelled()
            with pytest.raises(NotSentError, match="CancelledError|interrupted"):
                await task

    asyncio.run(main())


class SlowCredentials(CredentialProvider):
    """Waits for the event, and then returns the credentials of the default user."""

    def __init__(self) -> None:
        self.has_credentials = threading.Event()

    def get_credentials(self) -> tuple[str, str]:
        self.has_credentials.wait(30)
        return "default", ""


@pytest.mark.parametrize("kind", ["own", "plain", "hooked"])
def test_slow_credential_provider_does_not_extend_a_blocking_call(url: str, kind: str) -> None:
    credentials = SlowCredentials()
    options: Any = {"socket_timeout": 0.3, "socket_connect_timeout": 0.3, "credential_provider": credentials}
    with (HookedRedis if kind == "hooked" else redis.Redis).from_url(url, **options) as client:
        store = StepRunStore(client, own_connections=kind == "own", timeout=0.5)
        began = time.monotonic()
        with pytest.raises(NotSentError, match="Timeout connecting"):
            store.get_run("run")
        took = time.monotonic() - began
        credentials.has_credentials.set()
        retry_for(store, 30)
        assert store.get_run("run") == []

    assert took < 15


@pytest.mark.parametrize("own_connections", [False, True])
def test_silent_sentinels_do_not_extend_a_blocking_call(own_connections: bool) -> None:
    """redis-py asks one after another, and waits 8 seconds for each."""
    with contextlib.ExitStack() as opened:
        sentinels = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        addresses = [("127.0.0.1", each.getsockname()[1]) for each in sentinels]
        once: Any = {"retry": Retry(NoBackoff(), 0)}
        options: Any = {"socket_timeout": 0.3, "socket_connect_timeout": 0.3, **once}
        client = Sentinel(addresses, sentinel_kwargs={"socket_timeout": 8, **once}, **options).master_for(SERVICE)
        store = StepRunStore(client, own_connections=own_connections, timeout=0.5)
        began = time.monotonic()
        with pytest.raises(NotSentError, match="Timeout connecting"):
            store.get_run("run")
        assert time.monotonic() - began < 15


class FailingCredentials(CredentialProvider):
    """Fails as often as it is told, and then returns the credentials of the default user."""

    def __init__(self, error: BaseException, failures: float) -> None:
        self.error = error
        self.failures = failures

    def get_credentials(self) -> tuple[str, str]:
        self.failures -= 1
        if self.failures >= 0:
            raise self.error.with_traceback(None)  # otherwise, it keeps the frames of all calls of all tests
        return "default", ""

    async def get_credentials_async(self) -> tuple[str, str]:
        return self.get_credentials()


PROVIDER_ERRORS = [OSError("the token server is away"), RuntimeError("no token"), KeyError("token")]


@pytest.mark.parametrize("own_connections", [False, True])
@pytest.mark.parametrize("error", PROVIDER_ERRORS, ids=lambda error: type(error).__name__)
class TestFailingCredentials:
    """What a provider raises means that there is no connection: nothing was sent."""

    def test_blocking_call_is_retried_until_its_timeout(
        self, url: str, own_connections: bool, error: Exception
    ) -> None:
        with redis.Redis.from_url(url, credential_provider=FailingCredentials(error, math.inf)) as client:
            store = StepRunStore(client, own_connections=own_connections, timeout=0.2)
            with pytest.raises(NotSentError, match=rf"get_credentials failed with {type(error).__name__}") as caught:
                store.begin_step("run", "pay", {})
        assert error in chain_of(caught.value)
        with redis.Redis.from_url(url, credential_provider=FailingCredentials(error, 2)) as client:
            assert (
                StepRunStore(client, own_connections=own_connections).begin_step(f"{uuid4()}", "pay", {}).decision
                == "execute"
            )

    def test_asyncio_call_is_retried_until_its_timeout(self, url: str, own_connections: bool, error: Exception) -> None:
        async def main() -> None:
            async with any_redis.Redis.from_url(url, credential_provider=FailingCredentials(error, math.inf)) as client:
                store = AsyncStepRunStore(client, own_connections=own_connections, timeout=0.2)
                with pytest.raises(NotSentError, match="nothing was sent") as caught:
                    await store.begin_step("run", "pay", {})
                assert error in chain_of(caught.value)
            async with any_redis.Redis.from_url(url, credential_provider=FailingCredentials(error, 2)) as client:
                store = AsyncStepRunStore(client, own_connections=own_connections)
                assert (await store.begin_step(f"{uuid4()}", "pay", {})).decision == "execute"

        asyncio.run(main())


@pytest.mark.parametrize("own_connections", [False, True])
@pytest.mark.parametrize("error", [GeneratorExit, asyncio.CancelledError])
def test_provider_that_is_cancelled_has_failed(
    backend: Backend, own_connections: bool, error: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """It interrupts only the thread that waits for it, which prints nothing."""
    credentials = FailingCredentials(error("secret"), math.inf)
    options: Any = {"credential_provider": credentials, "socket_timeout": 5, "socket_connect_timeout": 5}
    with Proxy.to(backend.raw) as proxy, redis.Redis(port=proxy.port, **options) as client:
        store = StepRunStore(client, own_connections=own_connections, timeout=0.1)
        with pytest.raises(NotSentError, match=f"Connecting failed with {error.__name__}"):
            store.begin_step("run", "pay", {})
    assert "secret" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("pool", ["plain", "blocking"])
@pytest.mark.parametrize("error", PROVIDER_ERRORS, ids=lambda error: type(error).__name__)
class TestHookedClientConnectsAgain:
    """Its idle connection was lost, and its provider of credentials fails."""

    def test_blocking_call_is_retried_until_its_timeout(self, url: str, pool: str, error: Exception) -> None:
        credentials = FailingCredentials(error, 0)
        kind = redis.ConnectionPool if pool == "plain" else redis.BlockingConnectionPool
        with HookedRedis(connection_pool=kind.from_url(url, credential_provider=credentials)) as client:
            store = StepRunStore(client, timeout=0.2)
            store.get_run("run")
            lose_connections(client)
            credentials.failures = math.inf
            for _ in range(3):
                with pytest.raises(NotSentError, match=type(error).__name__) as caught:
                    store.get_run("run")
                assert "token server" not in str(caught.value)
            credentials.failures = 2
            retry_for(store, 30)
            assert store.get_run("run") == []
            client.connection_pool.disconnect()

    def test_asyncio_call_is_retried_until_its_timeout(self, url: str, pool: str, error: Exception) -> None:
        async def main() -> None:
            credentials = FailingCredentials(error, 0)
            kind: Any = redis.asyncio.ConnectionPool if pool == "plain" else redis.asyncio.BlockingConnectionPool
            client: Any = HookedAsyncRedis(connection_pool=kind.from_url(url, credential_provider=credentials))
            store = AsyncStepRunStore(client, timeout=0.2)
            await store.get_run("run")
            await client.connection_pool.disconnect()
            credentials.failures = math.inf
            with pytest.raises(NotSentError, match=type(error).__name__) as caught:
                await store.get_run("run")
            assert "token server" not in str(caught.value)
            credentials.failures = 2
            retry_for(store, 30)
            assert await store.get_run("run") == []
            await client.connection_pool.disconnect()

        asyncio.run(main())


def lose_connections(client: Any) -> None:
    for connection in idle_of(client.connection_pool):
        connection._sock.shutdown(socket.SHUT_RDWR)


def chain_of(error: BaseException) -> list[BaseException]:
    earlier = error.__cause__ or error.__context__
    return [error, *(chain_of(earlier) if earlier is not None else [])]


def test_refusal_of_one_call_says_nothing_about_the_next() -> None:
    """A server that is loading refuses the first call, executes the second, and is gone before it replies."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = b""
        while received.count(b"EVALSHA") < 2 and (data := await reader.read(65_536)):
            writer.write(b"+OK\r\n" * data.count(b"SETINFO"))
            received += data
        server[0].close()
        writer.write(b"-LOADING Redis is loading the dataset in memory\r\n")
        await writer.drain()
        writer.close()

    async def main() -> None:
        server.append(await asyncio.start_server(serve, "127.0.0.1", 0))
        port = server[0].sockets[0].getsockname()[1]
        async with AsyncStepRunStore.from_url(f"redis://127.0.0.1:{port}", timeout=0.5) as store:
            calls = [store.begin_step("run", step, {}) for step in ("pay", "ship")]
            _, second = await asyncio.gather(*calls, return_exceptions=True)

        assert isinstance(second, OutcomeUnknownError)

    server: list[asyncio.Server] = []
    asyncio.run(main())
