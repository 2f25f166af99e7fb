"""One store in several event loops, threads and processes."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import random
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from support.backends import Backend
from support.internals import idle_connections
from support.interruptions import at_line
from support.proxy import Proxy
from support.records import begun
from support.servers import collect_abandoned_connections, wait_until

from squidstep_redis import AsyncStepRunStore, ServerError, StepRunStore
from transport.conftest import HookedAsyncRedis

pytestmark = [pytest.mark.servers("valkey"), pytest.mark.filterwarnings("ignore::ResourceWarning")]

STORES = ["own", "user's"]


@pytest.fixture(autouse=True)
def collect_garbage() -> Iterator[None]:
    """Collects what clients of a loop that has ended leave open, so that no later test is blamed for it."""
    yield
    collect_abandoned_connections()


@pytest.fixture
def proxy(backend: Backend) -> Iterator[Proxy]:
    with Proxy.to(backend.raw) as proxy:
        yield proxy


@pytest.fixture
def name(tmp_path: Path, backend: Backend) -> Iterator[str]:
    yield tmp_path.name
    backend.flush()


def asyncio_store(kind: str, proxy: Proxy, name: str) -> AsyncStepRunStore:
    url = f"redis://127.0.0.1:{proxy.port}"
    if kind == "own":
        return AsyncStepRunStore.from_url(url, prefix=name, client_name=name)
    return AsyncStepRunStore(redis.asyncio.Redis.from_url(url, client_name=name), prefix=name)


def connected(backend: Backend, name: str) -> int:
    return sum(client["name"] == name for client in backend.raw.client_list())


async def use(store: AsyncStepRunStore, who: str, count: int) -> list[Any]:
    """Makes calls, singly and at once; returns what is wrong with them."""
    wrong: list[Any] = []
    for number in range(count):
        try:
            single = await store.begin_step(f"{who}-{number}", "pay", {"n": number})
            at_once = await asyncio.gather(
                *[store.begin_step(f"{who}-{number}", f"step-{n}", {"n": n}) for n in range(5)]
            )
            found = [begun(result).input["n"] for result in (single, *at_once)]
            if found != [number, *range(5)]:
                wrong.append((number, found))
        except Exception as error:
            wrong.append(f"{number}: {error!r} {traceback.format_exc(limit=-2)}")
        await asyncio.sleep(random.uniform(0, 0.002))
    return wrong


def in_child(work: Callable[[], list[Any]]) -> tuple[int, int]:
    """Forks; returns the child's id, and a descriptor from which to read what is wrong."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, read
    status = 1
    with contextlib.suppress(BaseException):
        wrong = work()
        os.write(write, repr(wrong)[:60_000].encode())
        status = bool(wrong)
    os._exit(status)


def check_child(child: tuple[int, int]) -> None:
    pid, read = child
    with os.fdopen(read, "rb") as pipe:
        report = pipe.read().decode()
    assert (os.waitpid(pid, 0)[1], report) == (0, "[]")


UNCLOSED = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # loops end with open connections: that is the subject


@UNCLOSED
@pytest.mark.parametrize("kind", STORES)
class TestEventLoops:
    def test_store_works_in_one_loop_after_another(self, backend: Backend, proxy: Proxy, name: str, kind: str) -> None:
        store = asyncio_store(kind, proxy, name)
        for number in range(30):
            assert asyncio.run(use(store, f"loop-{number}", 2)) == []
        if kind == "own":  # those of ended loops are closed
            wait_until(lambda: connected(backend, name) <= 2)
            assert idle_connections(store) <= 1

    def test_connections_of_a_closed_loop_are_closed_in_the_next(
        self, backend: Backend, proxy: Proxy, name: str, kind: str
    ) -> None:
        """The loops were closed without `shutdown_asyncgens`, and something still refers to them."""
        store = asyncio_store(kind, proxy, name)
        loops = [asyncio.new_event_loop() for _ in range(4)]
        for number, loop in enumerate(loops):
            assert loop.run_until_complete(use(store, f"loop-{number}", 1)) == []
            loop.close()

        if kind == "own":
            wait_until(lambda: connected(backend, name) <= 1)
        assert asyncio.run(use(store, "last", 1)) == []

    def test_loop_that_ends_in_mid_call_leaves_the_store_usable(
        self, backend: Backend, proxy: Proxy, name: str, kind: str
    ) -> None:
        store = asyncio_store(kind, proxy, name)

        left: list[asyncio.Future[Any]] = []

        async def leave() -> None:
            left.extend(asyncio.ensure_future(store.begin_step("left", f"step-{number}", {})) for number in range(5))
            await asyncio.sleep(random.uniform(0, 0.002))

        for number in range(10):
            asyncio.run(leave())
            assert asyncio.run(use(store, f"loop-{number}", 1)) == []

    def test_store_works_in_two_threads_with_loops(self, proxy: Proxy, name: str, kind: str) -> None:
        store = asyncio_store(kind, proxy, name)
        wrong: list[Any] = []

        def work(who: str) -> None:
            for number in range(4):
                wrong.extend(asyncio.run(use(store, f"{who}-{number}", 15)))

        threads = [threading.Thread(target=work, args=(who,)) for who in ("one", "two", "three")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_closing_in_one_loop_leaves_the_other_its_connection(self, proxy: Proxy, name: str, kind: str) -> None:
        store = asyncio_store(kind, proxy, name)
        ready, closed, wrong = threading.Event(), threading.Event(), list[Any]()

        async def long() -> None:
            wrong.extend(await use(store, "long", 1))
            ready.set()
            while not closed.is_set():
                wrong.extend(await use(store, f"long-{random.random()}", 1))
            wrong.extend(await use(store, "after", 1))

        async def short() -> None:
            wrong.extend(await use(store, "short", 1))
            store._transport.close()

        thread = threading.Thread(target=lambda: asyncio.run(long()))
        thread.start()
        ready.wait(10)
        asyncio.run(short())
        closed.set()
        thread.join()
        assert wrong == []

    def test_cancelling_all_tasks_leaves_the_store_usable(self, proxy: Proxy, name: str, kind: str) -> None:
        store = asyncio_store(kind, proxy, name)

        async def main() -> None:
            for number in range(20):
                tasks = [asyncio.ensure_future(store.begin_step(f"c-{number}", f"{n}", {})) for n in range(5)]
                for _ in range(number):
                    await asyncio.sleep(0)
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert not [r for r in results if isinstance(r, Exception) and not isinstance(r, ServerError)]
                assert await use(store, f"run-{number}", 1) == []

        asyncio.run(main())


def call_beside_another_loop(store: AsyncStepRunStore, line: int, loops: list[asyncio.AbstractEventLoop]) -> bool:
    """Makes a call; at its n-th line, another thread's loop makes one, and continues; returns whether there was one.

    Args:
        store: what both loops use.
        line: the number of the line.
        loops: keeps closed loops, which a store has to forget.
    """
    pool: Any = store.client.connection_pool
    has_called, is_over = threading.Event(), threading.Event()
    others: list[Future[None]] = []
    owners: list[set[asyncio.AbstractEventLoop]] = []

    async def call(step: str) -> None:
        loops.append(asyncio.get_running_loop())
        await store.begin_step("run", f"{step}-{line}", {})

    async def other() -> None:
        try:
            await call("other")
        finally:
            has_called.set()
        await asyncio.to_thread(is_over.wait, 30)

    def start() -> None:
        others.append(thread.submit(asyncio.run, other()))
        assert has_called.wait(30)
        owners.append({connection._reader._loop for connection in pool._available_connections})

    async def first() -> bool:
        with at_line(line, ("/transport/aio", "/weakref.py"), start) as was_reached:
            await call("first")
        owners.append({connection._reader._loop for connection in pool._available_connections})
        return was_reached()

    with ThreadPoolExecutor(1) as thread:
        try:
            was_reached = asyncio.run(first())
        finally:
            is_over.set()
        for each in others:
            each.result()
    assert owners[0] in (set(), owners[-1])  # the first loop that gets the pool keeps it
    return was_reached


@UNCLOSED
@pytest.mark.parametrize("kind", STORES)
def test_loop_of_another_thread_may_start_at_any_line(proxy: Proxy, name: str, kind: str) -> None:
    store, loops = asyncio_store(kind, proxy, name), list[asyncio.AbstractEventLoop]()
    line, misses = 0, 0
    while misses < 3:
        line += random.randint(1, 3)
        if kind == "user's":
            store = asyncio_store(kind, proxy, name)
        was_reached = call_beside_another_loop(store, line, loops)
        misses = 0 if was_reached else misses + 1
    assert line > 50


@UNCLOSED
def test_connections_of_a_closed_loop_do_not_fail_calls(proxy: Proxy, name: str) -> None:
    store = AsyncStepRunStore(HookedAsyncRedis.from_url(f"redis://127.0.0.1:{proxy.port}"), prefix=name)

    async def demote() -> None:
        for number in range(4):
            proxy.replace_replies(b"-READONLY You can't write against a read only replica.\r\n")
            assert begun(await store.begin_step("demoted", f"step-{number}", {})).attempt == 1

    assert asyncio.run(use(store, "run", 1)) == []
    asyncio.run(demote())


@UNCLOSED
@pytest.mark.parametrize("kind", STORES)
class TestForks:
    @pytest.mark.parametrize("used_before", [False, True], ids=["unused", "used"])
    def test_asyncio_store_works_in_parent_and_children(
        self, backend: Backend, proxy: Proxy, name: str, kind: str, used_before: bool
    ) -> None:
        store = asyncio_store(kind, proxy, name)
        if used_before:
            assert asyncio.run(use(store, "before", 1)) == []
        children = [in_child(lambda n=n: asyncio.run(use(store, f"child-{n}", 20))) for n in range(3)]
        assert asyncio.run(use(store, "parent", 20)) == []
        for child in children:
            check_child(child)
        assert asyncio.run(use(store, "after", 2)) == []

    def test_fork_within_a_running_loop_shares_no_connection(self, proxy: Proxy, name: str, kind: str) -> None:
        store = asyncio_store(kind, proxy, name)

        def work(results: Any) -> None:
            asyncio.events._set_running_loop(None)
            results.put(asyncio.run(use(store, "child", 20)))

        async def main() -> list[Any]:
            wrong = await use(store, "before", 1)
            context = multiprocessing.get_context("fork")
            results = context.Queue()
            process = context.Process(target=work, args=(results,))
            process.start()
            wrong += await use(store, "parent", 20)
            wrong += await asyncio.to_thread(results.get, True, 25)
            process.join()
            return wrong + await use(store, "after", 3)

        assert asyncio.run(main()) == []

    @pytest.mark.parametrize("used_before", [False, True], ids=["unused", "used"])
    def test_blocking_store_works_in_parent_and_children(
        self, backend: Backend, proxy: Proxy, name: str, kind: str, used_before: bool
    ) -> None:
        url = f"redis://127.0.0.1:{proxy.port}"
        if kind == "own":
            store = StepRunStore.from_url(url, prefix=name, client_name=name)
        else:
            store = StepRunStore(redis.Redis.from_url(url, client_name=name), prefix=name)

        def work(who: str) -> list[Any]:
            claims = [begun(store.begin_step(f"{who}-{n}", "pay", {"n": n})) for n in range(50)]
            return [claim for n, claim in enumerate(claims) if claim.input != {"n": n}]

        if used_before:
            assert work("before") == []
        children = [in_child(lambda n=n: work(f"child-{n}")) for n in range(3)]
        assert work("parent") == []
        for child in children:
            check_child(child)
        assert work("after") == []
        wait_until(lambda: connected(backend, name) == 1)
        store.client.close()
        store.close() if kind == "own" else None


def test_child_of_an_unused_store_keeps_one_connection(backend: Backend, proxy: Proxy, name: str) -> None:
    """A store is made at import and first used after the fork, as with gunicorn's --preload."""
    store = StepRunStore.from_url(f"redis://127.0.0.1:{proxy.port}", prefix=name, client_name=name)

    def work() -> list[Any]:
        for number in range(10):
            store.begin_step("run", f"step-{number}", {})
        pool: Any = store.client.connection_pool
        found = (idle_connections(store), connected(backend, name), len(pool._in_use_connections))
        return [] if found == (1, 1, 0) else [found]

    check_child(in_child(work))
    store.close()


def test_stores_in_a_child_share_the_connections_of_a_pool(backend: Backend, proxy: Proxy, name: str) -> None:
    client: Any = redis.asyncio.Redis.from_url(f"redis://127.0.0.1:{proxy.port}", client_name=name)
    stores = [AsyncStepRunStore(client, prefix=name) for _ in range(3)]

    async def main() -> list[Any]:
        for store in stores:
            await store.get_run("run")
        found = (len(client.connection_pool._available_connections), connected(backend, name))
        return [] if found == (1, 1) else [found]

    check_child(in_child(lambda: asyncio.run(main())))


@UNCLOSED
def test_lock_held_in_a_closed_loop_delays_no_call(proxy: Proxy, name: str) -> None:
    """Nothing has waited for the lock: it does not know its loop."""
    pool: Any = redis.asyncio.BlockingConnectionPool
    client: Any = redis.asyncio.Redis(connection_pool=pool.from_url(f"redis://127.0.0.1:{proxy.port}"))
    store = AsyncStepRunStore(client, prefix=name)

    async def hold() -> None:
        async with client.connection_pool._condition:
            await asyncio.Future()

    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(use(store, "first", 1)) == []
    holder = loop.create_task(hold())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert asyncio.run(use(store, "second", 1)) == []
    assert not holder.done()
    del holder
