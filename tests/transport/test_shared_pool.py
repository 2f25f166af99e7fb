"""A store on the user's client shares its pool: the user's own commands work as before."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from queue import LifoQueue
from typing import Any

import pytest
import redis
from support.backends import Bench
from support.internals import take_from

from squidstep_redis import StepRunStore

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


class Interrupted:
    """What an interrupted call leaves behind. When the garbage is collected, it gives its connection back."""

    def __init__(self, queue: LifoQueue[Any]) -> None:
        self.queue = queue
        self.itself = self

    def __del__(self) -> None:
        self.queue.queue.append(object())


def test_garbage_that_is_collected_meanwhile_duplicates_no_connection() -> None:
    queue: LifoQueue[Any] = LifoQueue()
    queue.put(object())
    thresholds = gc.get_threshold()
    try:
        for objects in range(1, 50):  # that are made before Python 3.11 collects
            gc.collect()
            Interrupted(queue)
            gc.set_threshold(objects)
            taken = take_from(queue)
            gc.set_threshold(*thresholds)
            assert taken not in queue.queue
            queue.put(taken)
    finally:
        gc.set_threshold(*thresholds)


class GuardedSet(set[Any]):
    """A set of connections that notes whether the lock of its pool was held at each change."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = pool
        self.was_held: list[bool] = []

    def add(self, element: Any) -> None:
        self.note()
        super().add(element)

    def discard(self, element: Any) -> None:
        self.note()
        super().discard(element)

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


IN_GREENLETS = """
from gevent import monkey
monkey.patch_all()
import gevent, redis, sys
from squidstep_redis import StepRunStore

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
