"""A store on the user's client shares its pool: the user's own commands work as before."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import redis
import redis.asyncio
from support.backends import Backend, Bench

from squidstep_redis import AsyncStepRunStore, StepRunStore
from squidstep_redis.transport.pool import borrow

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")


@pytest.fixture(params=[redis.ConnectionPool, redis.BlockingConnectionPool])
def client(request: pytest.FixtureRequest, bench: Bench) -> redis.Redis:
    """Has a single connection, which waits 0.3 seconds for a reply."""
    pool = request.param.from_url(bench.backend.url, max_connections=1, socket_timeout=0.3)
    return redis.Redis(connection_pool=pool)


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
def test_command_on_a_store_opened_connection_has_the_whole_timeout(bench: Bench, client: redis.Redis) -> None:
    with client:
        StepRunStore(client, prefix=bench.prefix).begin_step("run", "pay", {})
        time.sleep(0.3)

        assert client.blpop([f"{bench.prefix}-empty"], timeout=0.1) is None


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
def test_store_reconnects_a_connection_that_the_server_closed(bench: Bench, client: redis.Redis) -> None:
    with client:
        store = StepRunStore(client, prefix=bench.prefix)
        store.begin_step("run", "pay", {})
        bench.backend.raw.client_kill_filter(_id=str(client.client_id()))

        assert store.step_statuses("run") == {"pay": "running"}


class GuardedSet(set[Any]):
    """A set of connections that notes whether the lock of its pool was held at each change."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = pool
        self.was_held: list[bool] = []

    def update(self, *elements: Iterable[Any]) -> None:
        self.note()
        super().update(*elements)

    def difference_update(self, *elements: Iterable[Any]) -> None:
        self.note()
        super().difference_update(*elements)

    def note(self) -> None:
        with ThreadPoolExecutor(1) as another_thread:
            is_free = another_thread.submit(self.take).result()
        self.was_held.append(not is_free)

    def take(self) -> bool:
        is_free: bool = self.pool._lock.acquire(blocking=False)
        if is_free:
            self.pool._lock.release()
        return is_free


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@pytest.mark.parametrize("client", [redis.ConnectionPool], indirect=True)
def test_pool_can_be_disconnected_while_calls_run(bench: Bench, client: redis.Redis) -> None:
    """`disconnect` goes through the connections in use, under the lock of the pool."""
    pool: Any = client.connection_pool
    in_use = pool._in_use_connections = GuardedSet(pool)
    with client:
        store = StepRunStore(client, prefix=bench.prefix)
        for number in range(2):
            store.begin_step("run", f"step-{number}", {})

        assert len(in_use.was_held) >= 4
        assert all(in_use.was_held)


class CollectingLock:
    """A lock of a queue under which the next allocation collects garbage, whose finalizer gives back a connection."""

    def __init__(self, lock: Any, given_back: list[Any], queue: list[Any]) -> None:
        self.release = lock.release
        self._lock, self._given_back, self._queue = lock, given_back, queue

    def acquire(self) -> None:
        self._lock.acquire()
        if self._given_back:
            weakref.finalize(garbage := Garbage(), self._queue.append, self._given_back.pop())
            garbage.itself = garbage
            del garbage
            gc.set_threshold(1)


class Garbage:
    itself: Any


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
def test_connection_given_back_meanwhile_does_not_replace_the_one_taken(bench: Bench) -> None:
    """Before Python 3.12, the garbage collector runs at an allocation, and finalizers end interrupted calls."""
    pool: Any = redis.BlockingConnectionPool.from_url(bench.backend.url, max_connections=3, timeout=1)
    connections = [borrow(pool, time.monotonic() + 1).connection for _ in range(3)]
    queue = pool.pool
    queue.queue.extend(connections[:2])
    queue.mutex = CollectingLock(queue.mutex, connections[2:], queue.queue)
    before = gc.get_threshold()
    try:
        taken: list[Any] = []
        while len(taken) < 3 and queue.queue:
            taken.append(borrow(pool, time.monotonic() + 1).connection)
            gc.set_threshold(*before)
            gc.collect()
    finally:
        gc.set_threshold(*before)
        pool.disconnect()
    assert set(map(id, taken)) == set(map(id, connections))


IN_GREENLETS = """
from gevent import monkey
monkey.patch_all()
import gevent, redis, sys
from squidstep_redis import AsyncStepRunStore, StepRunStore

pool = redis.BlockingConnectionPool.from_url(sys.argv[1], max_connections=1, timeout=10)
store = StepRunStore(redis.Redis(connection_pool=pool), prefix=sys.argv[2])
begun = [gevent.spawn(store.begin_step, "run", f"step-{number}", {}) for number in range(5)]
print([each.get(timeout=30).decision for each in begun])
"""


@pytest.mark.skipif(find_spec("gevent") is None, reason="gevent is not installed")
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
def test_greenlets_share_a_blocking_pool(bench: Bench) -> None:
    """gevent replaces the queue of the pool by one of its own."""
    command = [sys.executable, "-c", IN_GREENLETS, bench.backend.url or "", bench.prefix]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, f"{['execute'] * 5}\n"), ended.stderr


@pytest.mark.parametrize("who", ["store", "client"])
def test_first_use_of_a_store_strands_no_waiting_call(backend: Backend, who: str) -> None:
    """Eight calls share two connections. Six wait, when another store uses the pool for the first time."""

    async def main() -> None:
        any_pool: Any = redis.asyncio.BlockingConnectionPool
        client: Any = redis.asyncio.Redis(
            connection_pool=any_pool.from_url(backend.url, max_connections=2, timeout=5, socket_timeout=5)
        )
        first, second = (AsyncStepRunStore(client, prefix=prefix, timeout=5) for prefix in ("first", "second"))
        call: Any = client.ping if who == "client" else (lambda: first.get_run("run"))
        await call()
        calls = [asyncio.ensure_future(call()) for _ in range(8)]
        for _ in range(2):
            await asyncio.sleep(0)
        await second.get_run("run")
        assert len(await asyncio.gather(*calls)) == 8
        await client.connection_pool.disconnect()

    asyncio.run(main())
