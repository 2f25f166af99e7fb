"""The metrics that `observe` reads from servers: of which servers, and for how long a collection waits for them."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
import weakref
from collections.abc import Iterator

import pytest
import redis
from prometheus_client import CollectorRegistry, generate_latest
from redis.sentinel import Sentinel
from support.address import Address
from support.backends import Backend
from support.records import begun
from support.servers import find_binary, wait_until

from squidstep_redis import AsyncStepRunStore, StepRunStore, metrics
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.metrics import observe
from squidstep_redis.transport.client import addresses_of

GAUGES = ("live_claims", "lapsed_claims", "failed_steps")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture(scope="module")
def ports() -> Iterator[tuple[int, int]]:
    """The ports of two servers."""
    binary = find_binary("valkey")
    with EmbeddedServer(binary=binary, port=0) as one, EmbeddedServer(binary=binary, port=0) as other:
        yield one.port, other.port


def connect(port: int, prefix: str, host: str = "127.0.0.1") -> StepRunStore:
    return StepRunStore.from_url(f"redis://{host}:{port}", prefix=prefix)


def value(registry: CollectorRegistry, name: str, prefix: str) -> float | None:
    return registry.get_sample_value(f"squidstep_{name}", {"prefix": prefix})


def gauges(registry: CollectorRegistry, prefix: str) -> list[float | None]:
    return [value(registry, name, prefix) for name in GAUGES]


def test_gauges_are_sums_over_all_observed_servers(registry: CollectorRegistry, ports: tuple[int, int]) -> None:
    for port in ports:
        with connect(port, "sums") as store:
            observe(store, registry)
            store.begin_step("run", "live", {}, lease=60)
            store.expire_claim(begun(store.begin_step("run", "lapsed", {}, lease=60)))
            store.fail_step(begun(store.begin_step("run", "failed", {})), {})
    assert gauges(registry, "sums") == [2, 2, 2]
    assert value(registry, "executes_total", "sums") == 6


def test_stores_on_one_server_are_counted_once(registry: CollectorRegistry, ports: tuple[int, int]) -> None:
    port, _ = ports
    for host in ("127.0.0.1", "localhost", "127.0.0.1"):
        store = connect(port, "once", host)
        observe(store, registry)
    observe(AsyncStepRunStore.from_url(f"redis://127.0.0.1:{port}", prefix="once"), registry)
    store.begin_step("run", "live", {}, lease=60)
    assert gauges(registry, "once") == [1, 0, 0]


def test_databases_of_one_server_are_counted_apart(registry: CollectorRegistry, ports: tuple[int, int]) -> None:
    for database in ("0", "1"):
        store = StepRunStore.from_url(f"redis://127.0.0.1:{ports[0]}/{database}", prefix="databases")
        observe(store, registry)
        store.begin_step("run", "live", {}, lease=60)
    assert gauges(registry, "databases") == [2, 0, 0]


def test_gauges_are_omitted_if_one_server_is_unreachable(registry: CollectorRegistry, ports: tuple[int, int]) -> None:
    for port in (*ports, 1):
        observe(connect(port, "partial" if port != ports[0] else "whole"), registry)
    assert gauges(registry, "partial") == [None] * 3
    assert gauges(registry, "whole") == [0] * 3


def test_observed_stores_that_are_replaced_are_freed(registry: CollectorRegistry, ports: tuple[int, int]) -> None:
    def observed() -> weakref.ref[StepRunStore]:
        store = connect(ports[0], "replaced")
        observe(store, registry)
        assert gauges(registry, "replaced") == [0] * 3
        return weakref.ref(store)

    *replaced, last = [observed() for _ in range(5)]
    gc.collect()
    assert [store() for store in replaced] == [None] * 4
    assert last() is not None


def test_asyncio_stores_are_counted_in_a_thread_without_a_loop(
    registry: CollectorRegistry, ports: tuple[int, int]
) -> None:
    async def main() -> None:
        async with AsyncStepRunStore.from_url(f"redis://127.0.0.1:{ports[0]}", prefix="asyncio") as store:
            observe(store, registry)
            await store.begin_step("run", "live", {}, lease=60)
            executes = await asyncio.to_thread(value, registry, "executes_total", "asyncio")
            assert (executes, await asyncio.to_thread(gauges, registry, "asyncio")) == (1, [None] * 3)

    asyncio.run(main())


def test_collection_waits_a_second_for_all_unreachable_servers(
    registry: CollectorRegistry, ports: tuple[int, int]
) -> None:
    for number in range(4):
        observe(connect(1, f"gone-{number}"), registry)
        observe(connect(2 + number, f"away-{number}"), registry)
    observe(connect(ports[0], "reachable"), registry)
    began = time.monotonic()
    text = generate_latest(registry).decode()
    assert time.monotonic() - began < 4  # a store retries for ten seconds
    assert 'squidstep_live_claims{prefix="reachable"} 0.0' in text
    assert 'squidstep_live_claims{prefix="gone' not in text


def test_collection_waits_for_one_attempt_of_hanging_servers(registry: CollectorRegistry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        for hanging in (one, other):  # they never reply
            observe(connect(hanging.getsockname()[1], "hanging"), registry)
        began = time.monotonic()
        assert value(registry, "live_claims", "hanging") is None
        assert time.monotonic() - began < 7


def test_collections_of_a_hanging_server_share_a_thread(
    registry: CollectorRegistry, ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def readers() -> int:
        return sum(thread.name == "squidstep-metrics" for thread in threading.enumerate())

    wait_until(lambda: readers() == 0)
    monkeypatch.setattr(metrics, "_COLLECT_SECONDS", 0.2)
    with Address(ports[0]) as address:
        client = redis.Redis(port=address.port, socket_timeout=None, socket_connect_timeout=None)
        observe(StepRunStore(client, prefix="stuck"), registry)
        address.stall()
        for _ in range(3):
            assert gauges(registry, "stuck") == [None] * 3
            assert readers() == 1
        address.resume()
        wait_until(lambda: gauges(registry, "stuck") == [0] * 3)


@pytest.mark.servers("cluster")
def test_clients_of_one_cluster_share_an_address(backend: Backend) -> None:
    with backend.connect() as one, backend.connect() as other:
        assert addresses_of(one) & addresses_of(other)


def test_services_of_different_sentinels_share_no_address() -> None:
    def addresses(service: str, *hosts: str, database: int = 0) -> frozenset[str]:
        sentinel = Sentinel([(host, 26379) for host in hosts])
        return addresses_of(sentinel.master_for(service, db=database))

    assert addresses("orders", "a", "b") & addresses("orders", "b", "c")
    assert not addresses("orders", "a") & addresses("orders", "b")
    assert not addresses("orders", "a") & addresses("mail", "a")
    assert not addresses("orders", "a") & addresses("orders", "a", database=1)
    assert not addresses("orders", "a") & addresses_of(redis.Redis("a", 26379))
