"""One heartbeat for each store: its own settings, its own connection, and a thread that ends with the store."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import redis
from support.backends import Bench
from support.claims import (
    SHORT_LEASE,
    Worker,
    around_batches,
    blocking_only,
    fakeredis_only,
    heartbeat_threads,
    outcomes,
    real_server,
    until_extended,
)
from support.proxy import Proxy
from support.records import begun
from support.servers import find_binary, wait_until

from squidstep_redis import Event, Outcome, StepRunStore
from squidstep_redis.claims.heartbeat import heartbeat_of
from squidstep_redis.embedded import EmbeddedServer

pytestmark = blocking_only


class TestStoresOnOneClient:
    def test_events_of_extensions_go_to_their_own_store(self, bench: Bench) -> None:
        with contextlib.closing(bench.backend.connect()) as client:
            stores = {name: StepRunStore(client, prefix=f"{bench.prefix}-{name}") for name in ("a", "b")}
            events: dict[str, list[Event]] = {name: [] for name in stores}
            with contextlib.ExitStack() as blocks:
                claims = [
                    blocks.enter_context(store.claim_step(name, "pay", {}, lease=SHORT_LEASE))
                    for name, store in stores.items()
                ]
                for name, store in stores.items():
                    store.on_event(events[name].append)
                until_extended(*claims)
                for claim in claims:
                    claim.release()

        for name, found in events.items():
            assert {(event.run_id, event.prefix) for event in found} == {(name, f"{bench.prefix}-{name}")}

    def test_store_that_cannot_extend_does_not_affect_the_other(self, bench: Bench) -> None:
        with contextlib.closing(bench.backend.connect()) as client:
            broken, store = (StepRunStore(client, prefix=f"{bench.prefix}-{name}") for name in ("a", "b"))

            def fail() -> None:
                raise redis.ConnectionError("down")

            around_batches(Worker(bench, broken), before=fail)
            with (
                broken.claim_step("run", "pay", {}, lease=SHORT_LEASE) as lost,
                store.claim_step("run", "pay", {}, lease=SHORT_LEASE) as held,
            ):
                if bench.backend.name != "fakeredis":  # where both share the transport of the client
                    until_extended(held)
                lost.release()
                held.release()


@real_server
class TestConnection:
    @pytest.fixture
    def url(self, bench: Bench) -> str:
        return f"unix://{bench.backend.raw.connection_pool.connection_kwargs['path']}"

    @pytest.mark.parametrize("owns_client", [True, False])
    def test_waiters_that_use_up_the_pool_do_not_stop_it(
        self, bench: Bench, others: StepRunStore, url: str, owns_client: bool
    ) -> None:
        options: dict[str, Any] = {"max_connections": 2, "socket_timeout": 4}
        if owns_client:
            store = StepRunStore.from_url(url, prefix=bench.prefix, **options)
        else:
            store = StepRunStore(redis.Redis.from_url(url, **options), prefix=bench.prefix)
        awaited = begun(others.begin_step("run", "awaited", {}, lease=60))

        def wait() -> None:
            with contextlib.suppress(Exception):
                store.wait_for_step("run", "awaited", 60)

        with store.claim_step("run", "pay", {}, lease=SHORT_LEASE) as claim:
            waiters = [threading.Thread(target=wait) for _ in range(2)]
            for waiter in waiters:
                waiter.start()
            wait_until(lambda: self.pool_is_used_up(store))
            until_extended(claim)
            until_extended(claim)
            assert self.pool_is_used_up(store)
            others.complete_step(awaited, {})
            for waiter in waiters:
                waiter.join()
            claim.complete({})

        assert outcomes(others) == [Outcome.COMPLETED]
        store.close()

    def pool_is_used_up(self, store: StepRunStore) -> bool:
        pool: Any = store.client.connection_pool
        return len(pool._in_use_connections) == 2

    def test_connection_closes_with_the_thread(self, bench: Bench, url: str) -> None:
        store = StepRunStore(redis.Redis.from_url(url, client_name=bench.prefix), prefix=bench.prefix)

        def connections() -> int:
            return sum(client["name"] == bench.prefix for client in bench.backend.raw.client_list())

        with store.claim_step("run", "pay", {}, lease=SHORT_LEASE) as claim:
            until_extended(claim)
            assert connections() == 2
            claim.complete({})
        wait_until(lambda: not heartbeat_of(store).is_running)

        assert connections() == 1
        store.client.close()

    def test_1100_claims_share_one_batch_per_beat(self, worker: Worker) -> None:
        sizes: list[int] = []
        around_batches(worker, after=sizes.append)
        calls = [worker.store.claim_step("run", f"step-{number}", {}, lease=6) for number in range(1_100)]
        with contextlib.ExitStack() as blocks:
            for claim in calls:
                blocks.enter_context(claim)
            wait_until(lambda: sizes[-2:] == [1_100, 1_100])
            assert not any(claim.lost.is_set() for claim in calls)
            for claim in calls:
                claim.release()


@fakeredis_only
def test_hooked_client_sees_the_extensions(worker: Worker) -> None:
    seen: list[Any] = []
    client: Any = worker.store.client
    pipeline = client.pipeline

    def recorded(*args: Any, **options: Any) -> Any:
        seen.append(threading.current_thread().name)
        return pipeline(*args, **options)

    with mock.patch.object(client, "pipeline", recorded):
        client.execute_command = client.execute_command  # a hook, as instrumentation sets it
        with worker.claim(lease=SHORT_LEASE) as claim:
            until_extended(claim)
            claim.complete({})

    assert "squidstep-extension" in seen


@fakeredis_only
class TestThread:
    def make_store(self, bench: Bench) -> StepRunStore:
        """Makes a store whose thread does not end by itself during the test."""
        store = bench.store()
        heartbeat: Any = heartbeat_of(store)
        heartbeat.IDLE = 60.0
        return store

    @pytest.mark.slow
    def test_closing_a_store_ends_its_thread(self, bench: Bench) -> None:
        def use_and_close(store: StepRunStore) -> None:
            with store.claim_step("run", "pay", {}) as claim:
                wait_until(lambda: heartbeat_of(store).is_running)
                claim.release()
            store.close()
            wait_until(lambda: not heartbeat_of(store).is_running, timeout=20)

        for _ in range(20):
            use_and_close(self.make_store(bench))

    @pytest.mark.slow
    def test_claims_are_extended_until_they_end_after_closing(self, bench: Bench) -> None:
        store = self.make_store(bench)
        with store.claim_step("run", "pay", {}, lease=SHORT_LEASE) as claim:
            store.close()
            until_extended(claim)
            claim.complete({})
        wait_until(lambda: not heartbeat_of(store).is_running)

        with store.claim_step("run", "ship", {}, lease=SHORT_LEASE) as claim:  # and it can be used again
            until_extended(claim)
            claim.complete({})
        wait_until(lambda: not heartbeat_of(store).is_running)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in finalizers
    def test_thread_survives_exceptions_from_outside(
        self, bench: Bench, raise_in_thread: Callable[[threading.Thread], None]
    ) -> None:
        store = self.make_store(bench)
        with store.claim_step("run", "pay", {}, lease=1) as claim:
            raised = 0
            while raised <= 100:
                for thread in heartbeat_threads():
                    raise_in_thread(thread)
                    raised += 1
                time.sleep(0.003)
            until_extended(claim)
            claim.complete({})
        store.close()


@real_server
@pytest.mark.parametrize("kind", ["own", "user's", "hooked"])
def test_silent_connection_is_replaced_before_the_lease_ends(bench: Bench, kind: str) -> None:
    """Although the client would wait for its reply for much longer than the lease."""
    with Proxy.to(bench.backend.raw) as proxy:
        url, options = f"redis://127.0.0.1:{proxy.port}", {"socket_timeout": 60, "protocol": 2}
        if kind == "own":
            store = StepRunStore.from_url(url, prefix=bench.prefix, **options)
        else:
            client: Any = redis.Redis.from_url(url, **options)
            if kind == "hooked":
                client.execute_command = client.execute_command
            store = StepRunStore(client, prefix=bench.prefix)
        with store.claim_step("run", "pay", {}, lease=3) as claim:
            due = claim.next_extension_at
            proxy.hold_requests(1)
            wait_until(lambda: claim.next_extension_at > due, timeout=20)
            claim.complete({})
        store.close()


@real_server
def test_connection_without_a_timeout_does_not_stop_the_heartbeat(bench: Bench) -> None:
    with EmbeddedServer(binary=find_binary(bench.backend.name), port=0) as server:
        client = redis.Redis.from_url(server.url, socket_timeout=None, protocol=2)
        store = StepRunStore(client, prefix=bench.prefix, timeout=1)
        with Proxy(("127.0.0.1", server.port)) as proxy:
            client.connection_pool.connection_kwargs["port"] = proxy.port
            with store.claim_step("run", "pay", {}, lease=1) as claim:
                proxy.hold_replies(1)
                until_extended(claim)
                claim.complete({})
        store.close()
        client.close()
