"""An asyncio store borrows connections of a user's pool: it loses none of them, no matter how its tasks end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis.asyncio
from support.backends import Backend
from support.proxy import Proxy
from support.servers import collect_abandoned_connections

from squidstep_redis import AsyncStepRunStore, StepRunStore, WaitTimeoutError
from squidstep_redis.transport.aio_connection import drop_all

pytestmark = [
    pytest.mark.servers("valkey"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def clean_up(backend: Backend) -> Iterator[None]:
    """Collects what loops leave open that end with pending tasks."""
    yield
    collect_abandoned_connections()
    backend.flush()


@pytest.fixture(params=[redis.asyncio.ConnectionPool, redis.asyncio.BlockingConnectionPool])
def small(request: pytest.FixtureRequest, backend: Backend) -> Iterator[AsyncStepRunStore]:
    """A store on a client with a single connection."""
    pool = request.param.from_url(str(backend.url), max_connections=1)
    store = AsyncStepRunStore(redis.asyncio.Redis(connection_pool=pool), timeout=2)
    yield store
    drop_all(store.client)


@pytest.fixture
def awaited(backend: Backend) -> None:
    """Another worker executes step "awaited" of run "run"."""
    with StepRunStore.from_url(str(backend.url)) as store:
        store.begin_step("run", "awaited", {}, lease=60)


@pytest.mark.parametrize("end", [Proxy.disconnect, Proxy.reset])
def test_connection_that_was_closed_while_idle_is_opened_again(backend: Backend, end: Callable[[Proxy], None]) -> None:
    async def main() -> None:
        async with redis.asyncio.Redis(port=proxy.port) as client:
            store = AsyncStepRunStore(client)
            await store.get_run("run")
            end(proxy)
            await asyncio.sleep(0.1)

            assert (await store.begin_step("run", "pay", {})).decision == "execute"

    with Proxy.to(backend.raw) as proxy:
        asyncio.run(main())


@pytest.mark.parametrize("is_collected", [False, True])
def test_next_loop_takes_back_what_a_closed_one_borrowed(
    small: AsyncStepRunStore, awaited: None, is_collected: bool
) -> None:
    async def leave_pending() -> asyncio.Task[Any]:
        task = asyncio.ensure_future(small.wait_for_step("run", "awaited", 30))
        await asyncio.sleep(0.2)
        return task

    loop = asyncio.new_event_loop()
    pending: list[Any] = [loop.run_until_complete(leave_pending())]
    loop.close()
    if is_collected:
        pending.clear()
        gc.collect()

    assert asyncio.run(small.begin_step("run", "pay", {})).decision == "execute"


def test_forked_child_does_not_miss_what_its_parent_borrowed(small: AsyncStepRunStore, awaited: None) -> None:
    async def main() -> int:
        waiting = asyncio.ensure_future(small.wait_for_step("run", "awaited", 1))
        await asyncio.sleep(0.2)
        if not (pid := os.fork()):
            begun = None
            with contextlib.suppress(BaseException):
                asyncio.events._set_running_loop(None)
                begun = asyncio.run(small.begin_step("run", "pay", {})).decision
            os._exit(begun != "execute")
        with contextlib.suppress(WaitTimeoutError):
            await waiting
        return os.waitpid(pid, 0)[1]

    assert asyncio.run(main()) == 0


def test_waiter_is_woken_if_the_one_before_it_is_cancelled(backend: Backend) -> None:
    async def main() -> float:
        any_redis: Any = redis.asyncio
        pool = any_redis.BlockingConnectionPool.from_url(str(backend.url), max_connections=1)
        store = AsyncStepRunStore(redis.asyncio.Redis(connection_pool=pool), timeout=5)
        connection = await pool.get_connection()
        first, second = (asyncio.create_task(store.begin_step("run", step, {})) for step in ("pay", "ship"))
        await asyncio.sleep(0.05)
        await pool.release(connection)  # wakes the first one
        first.cancel()
        began = time.monotonic()
        await second
        await pool.disconnect()
        return time.monotonic() - began

    assert asyncio.run(main()) < 1
