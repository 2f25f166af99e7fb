"""Which connections a store sends on: its own, those of its client's pool, or through the client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio
from support.backends import Backend, Bench
from support.internals import can_bypass_client, check_every_connection, idle_connections, plain_store
from support.interruptions import AlarmError, sigalrm_raises
from support.proxy import Proxy
from support.records import begun
from support.servers import find_binary, wait_until

from squidstep_redis import AsyncStepRunStore, StepRunStore
from squidstep_redis.embedded import EmbeddedServer


class RecordingClient(redis.Redis):
    """A client whose own `execute_command` records the commands."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sent: list[Any] = []

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self.sent.append(args[0])
        return super().execute_command(*args, **options)


@pytest.fixture(params=[redis.Redis, redis.asyncio.Redis])
def kind(request: pytest.FixtureRequest) -> Any:
    """The class of the client."""
    return request.param


def bypasses(client: Any) -> bool:
    store_class: Any = AsyncStepRunStore if isinstance(client, redis.asyncio.Redis) else StepRunStore
    return can_bypass_client(store_class(client))


class TestClientBypass:
    @pytest.mark.parametrize("protocol", [2, 3])
    @pytest.mark.parametrize("decode_responses", [False, True])
    def test_plain_client_is_bypassed(self, kind: Any, protocol: int, decode_responses: bool) -> None:
        assert bypasses(kind(protocol=protocol, decode_responses=decode_responses))

    def test_fakeredis_is_bypassed(self) -> None:
        assert bypasses(fakeredis.FakeRedis())
        assert bypasses(fakeredis.FakeAsyncRedis())

    def test_client_that_overrides_sending_is_not_bypassed(self, kind: Any) -> None:
        for name in ("execute_command", "parse_response"):
            assert not bypasses(type("Own", (kind,), {name: lambda *_: None})())

    def test_client_with_a_patched_method_is_not_bypassed(self, kind: Any) -> None:
        client = kind()
        store = (AsyncStepRunStore if kind is redis.asyncio.Redis else StepRunStore)(client)
        assert can_bypass_client(store)
        client.execute_command = lambda *_: None
        assert not can_bypass_client(store)

    def test_client_of_an_instrumented_class_is_not_bypassed(self, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Instrumentation such as OpenTelemetry's patches the class under the method's own name, at any time."""
        before = (AsyncStepRunStore if kind is redis.asyncio.Redis else StepRunStore)(kind())
        original = kind.execute_command

        @functools.wraps(original)
        def traced(*args: Any, **options: Any) -> Any:
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "execute_command", traced)
            assert not can_bypass_client(before)
            assert not bypasses(kind())
        assert can_bypass_client(before)

    def test_client_that_records_metrics_is_not_bypassed(self, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        providers = pytest.importorskip("redis.observability.providers", reason="redis-py records metrics since 7.2")
        assert bypasses(kind())
        monkeypatch.setattr(providers.get_observability_instance(), "get_provider_manager", object)
        assert not bypasses(kind())


@pytest.mark.servers("valkey")
def test_overridden_execute_command_receives_every_call(backend: Backend, bench: Bench) -> None:
    options = backend.raw.connection_pool.connection_kwargs
    pool: Any = redis.ConnectionPool(connection_class=backend.raw.connection_pool.connection_class, **options)
    with contextlib.closing(RecordingClient(connection_pool=pool)) as client:
        store = StepRunStore(client, prefix=bench.prefix)
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})
        assert [name for name in client.sent if name == "EVALSHA"] == ["EVALSHA"] * 2


@pytest.fixture
def proxy(backend: Backend) -> Iterator[Proxy]:
    with Proxy.to(backend.raw) as proxy:
        yield proxy


def from_url(bench: Bench, proxy: Proxy) -> StepRunStore:
    """Returns a store whose connections have the name of the test."""
    return bench.from_url(f"redis://127.0.0.1:{proxy.port}", client_name=bench.prefix)


def connected(bench: Bench) -> list[str]:
    """Returns the ids of the connections of `from_url`, as the server sees them."""
    return connected_as(bench.backend, bench.prefix)


def connected_as(backend: Backend, name: str) -> list[str]:
    return [client["id"] for client in backend.raw.client_list() if client["name"] == name]


@pytest.mark.servers("valkey")
class TestIdleConnections:
    """A store with its own client keeps connections for its next calls."""

    def test_next_call_reuses_the_connection(self, bench: Bench, proxy: Proxy) -> None:
        with contextlib.closing(from_url(bench, proxy)) as store:
            store.begin_step("run", "first", {})
            (only,) = connected(bench)
            for number in range(20):
                assert begun(store.begin_step("run", f"step-{number}", {}))
            assert connected(bench) == [only]
            pool: Any = store.client.connection_pool
            assert not pool._available_connections  # the client's pool is left alone

    def test_connection_that_the_server_closed_costs_one_resend(self, bench: Bench, proxy: Proxy) -> None:
        with contextlib.closing(bench.from_url(f"redis://127.0.0.1:{proxy.port}")) as store:
            store.begin_step("run", "first", {})
            proxy.cut()
            assert begun(store.begin_step("run", "second", {})).attempt == 1
            proxy.drop()
            assert begun(store.begin_step("run", "third", {})).attempt == 1
            assert store.step_statuses("run") == dict.fromkeys(["first", "second", "third"], "running")

    def test_idle_connection_is_checked_before_its_next_use(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server that closes idle connections causes no failure, not even a retried one."""
        with (
            EmbeddedServer(binary=find_binary("valkey"), port=0) as server,
            redis.Redis.from_url(server.url) as admin,
            contextlib.closing(bench.from_url(server.url)) as store,
        ):
            store.begin_step("run", "first", {})
            admin.client_kill_filter(_type="normal", skipme=True)
            if bench.runner is not None:
                bench.runner.run(asyncio.sleep(0.01))  # lets the event loop notice
            check_every_connection(monkeypatch)
            sent_once = store.calls.begin_step("run", "pay", {})._replace(retryable=False)
            assert begun(store.send(sent_once))

    def test_interrupted_call_leaves_no_reply_behind(self, bench: Bench, proxy: Proxy) -> None:
        """A signal handler raises while the reply is awaited, or a task is cancelled."""
        with contextlib.closing(from_url(bench, proxy)) as store:
            store.begin_step("run", "first", {})
            (before,) = connected(bench)
            held = proxy.hold_replies()
            if bench.runner is None:
                with sigalrm_raises():
                    signal.setitimer(signal.ITIMER_REAL, 0.05)
                    with pytest.raises(AlarmError):
                        store.begin_step("run", "second", {})
            else:
                with pytest.raises(asyncio.TimeoutError):
                    bench.runner.run(asyncio.wait_for(plain_store(store).begin_step("run", "second", {}), 0.05))
            held.set()
            assert begun(store.begin_step("run", "third", {})).step == "third"
            wait_until(lambda: len(connected(bench)) == 1)
            # A blocking connection is discarded with the interrupted call; a shared one drops the reply.
            assert (connected(bench) == [before]) is (bench.runner is not None)

    @pytest.mark.parametrize("limit", [1, 50])
    def test_connections_of_a_limited_pool_are_not_kept(self, bench: Bench, proxy: Proxy, limit: int) -> None:
        url = f"redis://127.0.0.1:{proxy.port}"
        with contextlib.closing(bench.from_url(url, max_connections=limit)) as store:
            store.begin_step("run", "pay", {})
            pool: Any = store.client.connection_pool
            assert not pool._in_use_connections
            assert len(pool._available_connections) == 1

    def test_connections_of_the_users_client_are_not_kept(self, bench: Bench) -> None:
        store = bench.store()
        store.begin_step("run", "pay", {})
        pool: Any = store.client.connection_pool
        assert not pool._in_use_connections

    def test_idle_connection_is_closed_with_the_store(self, bench: Bench, proxy: Proxy) -> None:
        store = from_url(bench, proxy)
        store.begin_step("run", "pay", {})
        assert len(connected(bench)) == 1
        store.close()
        wait_until(lambda: not connected(bench))


@pytest.mark.servers("valkey")
def test_no_two_threads_use_one_idle_connection(backend: Backend, proxy: Proxy, tmp_path: Path) -> None:
    """There are more threads than idle connections may be kept: the others are closed."""
    url = f"redis://127.0.0.1:{proxy.port}"
    store = StepRunStore.from_url(url, prefix=tmp_path.name, client_name=tmp_path.name)
    ready = threading.Barrier(30)

    def work(thread: int) -> int:
        ready.wait(10)
        runs = [begun(store.begin_step(f"run-{thread}", f"step-{number}", {"n": number})) for number in range(30)]
        return sum(
            store.complete_step(claim, {"of": claim.input["n"]}).output == {"of": claim.input["n"]} for claim in runs
        )

    with contextlib.closing(store), ThreadPoolExecutor(30) as threads:
        assert sum(threads.map(work, range(30))) == 900
        assert 0 < idle_connections(store) <= 16
        wait_until(lambda: len(connected_as(backend, tmp_path.name)) == idle_connections(store))


@pytest.mark.servers("valkey")
def test_forked_child_does_not_use_its_parents_connections(proxy: Proxy, tmp_path: Path) -> None:
    store = StepRunStore.from_url(f"redis://127.0.0.1:{proxy.port}", prefix=tmp_path.name)
    with contextlib.closing(store):
        store.begin_step("run", "before", {})
        children: list[int] = []
        for child in range(4):
            if not (pid := os.fork()):
                status = 1
                with contextlib.suppress(BaseException):
                    for number in range(25):
                        claim = begun(store.begin_step(f"child-{child}", f"step-{number}", {"n": number}))
                        store.complete_step(claim, {"n": number})
                    status = 0
                os._exit(status)
            children.append(pid)
        for number in range(25):
            assert begun(store.begin_step("run", f"step-{number}", {"n": number})).input == {"n": number}
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
        for child in range(4):
            assert store.completed_outputs(f"child-{child}") == [{"n": number} for number in range(25)]
