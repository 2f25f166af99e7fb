"""Asyncio blocks that are left by cancellations: every call that ends the claim is sent, and nothing else changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from typing import Any

import anyio
import pytest
from support.asyncio_stores import either_kind, forever, opened, wait_for_status
from support.claims import interrupted_seconds
from support.records import begun, stored

from squidstep_redis import AsyncStepRunStore, RunCancelledError, StepRunStore, StepStatus
from squidstep_redis.claims.unfinished import INTERRUPTED_SECONDS
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.servers("valkey")


@either_kind
class TestLazyCheckpoint:
    """It is sent before the failure, which must be sent nevertheless."""

    async def work(self, store: AsyncStepRunStore, entered: asyncio.Event) -> None:
        async with store.claim_step("run", "pay", {}) as claim:
            await claim.checkpoint({"done": 1}, lazy=True)
            entered.set()
            await forever({})

    def test_cancelled_scope_stores_it_and_the_failure(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def main() -> None:
            async with opened(server.url, kind) as store:
                entered = asyncio.Event()
                async with anyio.create_task_group() as group:
                    group.start_soon(self.work, store, entered)
                    await entered.wait()
                    group.cancel_scope.cancel()

        asyncio.run(main())

        wait_for_status(observer, "pay", StepStatus.FAILED)
        assert stored(observer).progress == {"done": 1}

    def test_checkpoint_and_failure_share_a_second(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def main() -> float:
            async with opened(server.url, kind) as store:
                entered = asyncio.Event()
                task = asyncio.create_task(self.work(store, entered))
                await entered.wait()
                server.pause()
                began = time.monotonic()
                task.cancel()
                await asyncio.wait([task], timeout=10)
                seconds = time.monotonic() - began
                server.resume()
                return seconds

        with interrupted_seconds(2):
            assert asyncio.run(main()) < 3.9  # and not 2 seconds for each

        wait_for_status(observer, "pay", StepStatus.FAILED)
        assert stored(observer).progress == {"done": 1}


class TestSecondOfInterruptedBlocks:
    """An unreachable server delays the end of an interrupted block by about a second. Other tests wait for longer."""

    @pytest.fixture(autouse=True)
    def as_it_is(self, server: EmbeddedServer) -> Iterator[None]:
        with interrupted_seconds(INTERRUPTED_SECONDS):
            yield
        server.resume()

    def test_blocking_block_is_left_after_a_second(self, server: EmbeddedServer, observer: StepRunStore) -> None:
        def interrupt() -> None:
            with store.claim_step("run", "pay", {}):
                server.pause()
                raise KeyboardInterrupt

        with StepRunStore.from_url(server.url, timeout=60) as store:
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                interrupt()
            seconds = time.monotonic() - began
            server.resume()

        assert 0.9 < seconds < 5
        wait_for_status(observer, "pay", StepStatus.FAILED)

    @either_kind
    def test_asyncio_block_is_left_after_a_second(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def interrupt(store: AsyncStepRunStore) -> None:
            async with store.claim_step("run", "pay", {}):
                server.pause()
                raise asyncio.CancelledError

        async def main() -> float:
            async with opened(server.url, kind) as store:
                began = time.monotonic()
                with pytest.raises(asyncio.CancelledError):
                    await interrupt(store)
                seconds = time.monotonic() - began
                server.resume()
                return seconds

        assert 0.9 < asyncio.run(main()) < 5
        wait_for_status(observer, "pay", StepStatus.FAILED)


class TestCancelledByTheClaim:
    """A claim that cancels its own task takes back its cancellation, and no other."""

    def run(self, server: EmbeddedServer, main: Coroutine[Any, Any, Any]) -> Any:
        try:
            return asyncio.run(main)
        finally:
            server.resume()

    def test_timeout_while_the_block_is_left_is_a_timeout(self, server: EmbeddedServer, observer: StepRunStore) -> None:
        async def work(store: AsyncStepRunStore) -> None:
            async with asyncio.timeout(60) as scope:
                async with store.claim_step("run", "pay", {}, lease=1.5, cancel_with_run=True):
                    observer.cancel_run("run")
                    try:
                        await forever({})
                    finally:
                        server.pause()
                        scope.reschedule(asyncio.get_running_loop().time() + 0.2)

        async def main() -> None:
            async with opened(server.url, "own client") as store:
                with pytest.raises(TimeoutError):
                    await work(store)
                task = asyncio.current_task()
                assert task is not None
                assert not task.cancelling()
                server.resume()

        self.run(server, main())

    def test_earlier_cancellations_that_were_swallowed_do_not_count(
        self, server: EmbeddedServer, observer: StepRunStore
    ) -> None:
        async def lose_the_claim(input: dict[str, Any]) -> dict[str, Any]:
            observer.expire_claim(stored(observer))
            observer.complete_step(begun(observer.begin_step("run", "pay", {})), {"by": "the winner"})
            return await forever({})

        async def cancel_the_run(input: dict[str, Any]) -> dict[str, Any]:
            observer.cancel_run("run")
            return await forever({})

        async def main() -> None:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.sleep(0)
            async with opened(server.url, "own client") as store:
                lost = store.run_step("run", "pay", lose_the_claim, {}, lease=1.5, cancel_when_lost=True)
                assert await lost == {"by": "the winner"}
                with pytest.raises(RunCancelledError):
                    await store.run_step("run", "ship", cancel_the_run, {}, lease=1.5, cancel_with_run=True)
            assert task.cancelling() == 1

        self.run(server, main())


def test_coroutine_closed_after_its_loop_raises_nothing(server: EmbeddedServer) -> None:
    async def work() -> None:
        async with store.claim_step("run", "pay", {}, lease=0.6):
            await forever({})

    async def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0.5)  # so that the heartbeat has opened its connection
        return task

    store = AsyncStepRunStore.from_url(server.url)
    loop = asyncio.new_event_loop()
    working = work()
    pending = loop.run_until_complete(start(working))
    loop.close()

    working.close()

    assert not pending.done()
    asyncio.run(store.close())
    setattr(pending, "_log_destroy_pending", False)  # noqa: B010 -- it is private, and this task never ends
