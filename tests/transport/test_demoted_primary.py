"""A primary is demoted behind one address: its connections stay open, and new ones lead to the new primary."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from support.address import Address
from support.backends import Backend, Bench
from support.internals import plain_store
from support.records import begun
from support.servers import find_binary, wait_until

from squidstep_redis import RefusedError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from transport.conftest import Connect

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")

CONNECTIONS = 8
LARGE = {"data": b"x" * 100_000}  # on asyncio, such a payload has a connection of its own


@pytest.fixture(scope="module")
def servers(backend: Backend) -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    options = {"repl-diskless-sync-delay": "0"}
    binary = find_binary(backend.name)
    with (
        EmbeddedServer(binary=binary, port=0, options=options) as old,
        EmbeddedServer(binary=binary, port=0, options=options) as new,
    ):
        yield old, new


@pytest.fixture
def address(servers: tuple[EmbeddedServer, EmbeddedServer]) -> Iterator[Address]:
    """An address that leads to the old primary, which is a primary again after the test."""
    old, new = servers
    with Address(old.port or 0) as address:
        yield address
    with redis.Redis(port=old.port) as admin:
        admin.replicaof("NO", "ONE")
        admin.config_set("replica-serve-stale-data", "yes")
    for server in (old, new):
        with redis.Redis(port=server.port) as admin:
            admin.flushall()


def read_only(old: Any, new: EmbeddedServer) -> None:
    old.replicaof("127.0.0.1", new.port)


def without_primary(old: Any, new: EmbeddedServer) -> None:
    old.config_set("replica-serve-stale-data", "no")
    old.replicaof("127.0.0.1", 1)


DEMOTIONS: dict[str, Callable[[Any, EmbeddedServer], None]] = {"READONLY": read_only, "MASTERDOWN": without_primary}


def open_connections(bench: Bench, store: StepRunStore) -> None:
    """Makes calls at once, so that several connections are open and idle after that."""
    if bench.runner is None:
        ready = threading.Barrier(CONNECTIONS)

        def work(thread: int) -> None:
            for number in range(5):
                ready.wait(10)
                store.schedule_step("run", f"before-{thread}-{number}", LARGE)

        with ThreadPoolExecutor(CONNECTIONS) as threads:
            list(threads.map(work, range(CONNECTIONS)))
        return
    plain = plain_store(store)

    async def work_at_once() -> None:
        for size in ({}, LARGE):
            await asyncio.gather(*[plain.schedule_step("run", f"before-{n}", size) for n in range(CONNECTIONS)])

    bench.runner.run(work_at_once())


def connections(admin: Any, name: str) -> list[Any]:
    return [client for client in admin.client_list() if client["name"] == name]


@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
@pytest.mark.parametrize("demotion", DEMOTIONS)
def test_call_succeeds_on_the_new_primary_and_idle_connections_go(
    bench: Bench,
    connect_to: Connect,
    servers: tuple[EmbeddedServer, EmbeddedServer],
    address: Address,
    kind: str,
    demotion: str,
    batch: bool,
) -> None:
    old, new = servers
    store = connect_to(kind, address.port, client={"client_name": bench.prefix}, timeout=5)
    open_connections(bench, store)
    with redis.Redis(port=old.port, decode_responses=True) as admin:
        assert len(connections(admin, bench.prefix)) > 2
        address.target = new.port or 0
        DEMOTIONS[demotion](admin, new)
        wait_until(lambda: admin.role()[0] in ("slave", b"slave"))

        began = time.monotonic()
        if batch:
            results: list[Any] = store.batch([store.calls.begin_step("after", f"step-{n}", {}) for n in range(3)])
            assert [begun(result).attempt for result in results] == [1, 1, 1]
        else:
            assert begun(store.begin_step("after", "step-0", {})).attempt == 1
        assert time.monotonic() - began < 2  # a connection after the other would take longer
        wait_until(lambda: not connections(admin, bench.prefix), 5)
    for number in range(5):  # the new connection is kept
        assert begun(store.begin_step("later", f"step-{number}", LARGE if number % 2 else {}))
    with StepRunStore.from_url(new.url, prefix=bench.prefix) as reader:
        assert reader.step_statuses("after")["step-0"] == "running"


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_payload_size_does_not_decide_which_connections_go(
    bench: Bench,
    connect_to: Connect,
    servers: tuple[EmbeddedServer, EmbeddedServer],
    address: Address,
    large: bool,
) -> None:
    old, new = servers
    store = connect_to("own", address.port, client={"client_name": bench.prefix}, timeout=5)
    open_connections(bench, store)
    with redis.Redis(port=old.port, decode_responses=True) as admin:
        address.target = new.port or 0
        read_only(admin, new)
        assert begun(store.begin_step("after", "pay", LARGE if large else {}))
        wait_until(lambda: not connections(admin, bench.prefix), 5)


def test_demoted_primary_without_a_successor_raises_refused(
    connect_to: Connect, servers: tuple[EmbeddedServer, EmbeddedServer], address: Address, kind: str
) -> None:
    old, new = servers
    store = connect_to(kind, address.port, timeout=0.3)
    store.schedule_step("run", "before", {})
    with redis.Redis(port=old.port) as admin:
        read_only(admin, new)
    with pytest.raises(RefusedError, match="nothing was written"):
        store.begin_step("run", "pay", {})
    with contextlib.suppress(RefusedError):
        assert store.get_run("run") is not None
