"""Cancelled asyncio tasks: their claims are given back or recorded as failed, and they end within a second."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any, cast

import anyio
import pytest
import redis
import redis.asyncio
from support.asyncio_stores import either_kind, forever, opened, wait_for_status
from support.claims import DeclinedError, interrupted_seconds, until

from squidstep_redis import AsyncStepRunStore, OutcomeUnknownError, StepRunStore, StepStatus
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.servers("valkey")


async def enter(store: AsyncStepRunStore, **options: Any) -> asyncio.Task[Any]:
    """Starts a task that holds the claim on step "pay" until it is cancelled."""
    entered = asyncio.Event()

    async def work(input: dict[str, Any]) -> dict[str, Any]:
        entered.set()
        return await forever(input)

    task = asyncio.create_task(store.run_step("run", "pay", work, {}, **options))
    await entered.wait()
    return task


@either_kind
class TestScopes:
    """A scope of anyio cancels each `await` of a task again, even those that clean up."""

    async def cancel_work(self, observer: StepRunStore, store: AsyncStepRunStore) -> None:
        """Executes 20 steps at once, and cancels them with one scope."""
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(store.run_step, "run", f"step-{number}", forever, {})
            await until(lambda: len(observer.step_statuses("run")) == 20)
            group.cancel_scope.cancel()

    def test_cancelled_scope_fails_the_claims(self, server: EmbeddedServer, observer: StepRunStore, kind: str) -> None:
        async def main() -> None:
            async with opened(server.url, kind) as store:
                await self.cancel_work(observer, store)
                ended = {StepStatus.FAILED, StepStatus.PENDING}  # the latter of a task that did not know its claim yet
                await until(lambda: set(observer.step_statuses("run").values()) <= ended)

        asyncio.run(main())

    def test_scope_cancelled_at_any_point_leaves_no_running_step(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def cancel_after(store: AsyncStepRunStore, turns: int) -> None:
            with anyio.CancelScope() as scope:

                async def cancel() -> None:
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    scope.cancel()

                cancelling = asyncio.create_task(cancel())
                await store.run_step("run", f"step-{turns}", forever, {})
            await cancelling

        async def main() -> None:
            async with opened(server.url, kind) as store:
                for turns in range(40):
                    await cancel_after(store, turns)

        asyncio.run(main())

        assert StepStatus.RUNNING not in observer.step_statuses("run").values()

    def test_clean_up_continues_while_the_loop_shuts_down(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def main() -> None:
            store = await stack.enter_async_context(opened(server.url, kind))
            await self.cancel_work(observer, store)

        stack = contextlib.AsyncExitStack()
        with asyncio.Runner() as runner:
            runner.run(main())
            tasks = asyncio.all_tasks(runner.get_loop())
            for task in tasks:
                task.cancel()
            runner.get_loop().run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            statuses = observer.step_statuses("run")
            runner.run(stack.aclose())

        assert set(statuses.values()) <= {StepStatus.FAILED, StepStatus.PENDING}  # of a task that did not know it yet


@either_kind
class TestCancelledTwice:
    def test_acquired_claim_is_given_back(self, server: EmbeddedServer, observer: StepRunStore, kind: str) -> None:
        async def main() -> None:
            async with opened(server.url, kind) as store:
                await store.get_run("run")
                server.pause()
                task = asyncio.create_task(store.run_step("run", "pay", forever, {}))
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.wait([task], timeout=10)
                assert task.cancelled()
                server.resume()
                await until(lambda: "pay" in observer.step_statuses("run"))

        asyncio.run(main())

        assert observer.step_statuses("run") == {"pay": StepStatus.PENDING}

    def test_failure_is_recorded(self, server: EmbeddedServer, observer: StepRunStore, kind: str) -> None:
        async def main() -> None:
            async with opened(server.url, kind) as store:
                task = await enter(store)
                server.pause()
                task.cancel()
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.wait([task], timeout=10)
                assert task.cancelled()
                server.resume()

        asyncio.run(main())

        wait_for_status(observer, "pay", StepStatus.FAILED)


@either_kind
class TestServerWithoutReplies:
    @pytest.fixture
    def shorter_second(self) -> Iterator[None]:
        with interrupted_seconds(0.2):
            yield

    @pytest.mark.usefixtures("shorter_second")
    def test_block_is_left_within_a_second(self, server: EmbeddedServer, observer: StepRunStore, kind: str) -> None:
        async def main() -> float:
            async with opened(server.url, kind) as store:
                task = await enter(store)
                server.pause()
                began = time.monotonic()
                task.cancel()
                await asyncio.wait([task], timeout=10)
                seconds = time.monotonic() - began
                server.resume()
                return seconds

        assert asyncio.run(main()) < 10  # and not 30 seconds, as in other tests

        wait_for_status(observer, "pay", StepStatus.FAILED)

    @pytest.mark.usefixtures("shorter_second")
    def test_claim_of_an_unanswered_begin_is_given_back(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def main() -> None:
            async with opened(server.url, kind, timeout=1) as store:
                await store.get_run("run")
                server.pause()
                if kind == "own client":
                    with pytest.raises(OutcomeUnknownError):
                        await store.run_step("run", "pay", forever, {}, lease=None)
                else:  # without a timeout of the socket, only the caller ends the call
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(store.run_step("run", "pay", forever, {}, lease=None), 0.5)
                server.resume()
                await until(lambda: "pay" in observer.step_statuses("run"))
                await until(lambda: observer.step_statuses("run") == {"pay": StepStatus.PENDING})

        asyncio.run(main())

        assert observer.begin_step("run", "pay", {}).decision == "execute"

    def test_failure_after_a_lost_connection_is_recorded(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def decline(input: dict[str, Any]) -> dict[str, Any]:
            admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            raise DeclinedError

        async def main() -> None:
            async with opened(server.url, kind) as store:
                with pytest.raises(DeclinedError):
                    await store.run_step("run", "pay", decline, {}, lease=None)
                step_run = await store.get_step_run("run", "pay")
                assert step_run is not None
                assert step_run.status is StepStatus.FAILED

        with redis.Redis.from_url(server.url) as admin:
            asyncio.run(main())

    @pytest.mark.usefixtures("shorter_second")
    def test_failure_is_recorded_once_the_server_replies(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            server.pause()
            raise asyncio.CancelledError

        async def main() -> None:
            async with opened(server.url, kind, timeout=1) as store:
                with pytest.raises(asyncio.CancelledError) as caught:
                    await store.run_step("run", "pay", work, {})
                assert "could not record this failure: OutcomeUnknownError: fail_step" in caught.value.__notes__[0]
                server.resume()
                await until(lambda: observer.step_statuses("run") == {"pay": StepStatus.FAILED})

        asyncio.run(main())

    def test_closing_the_store_waits_for_the_clean_up(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def main() -> None:
            async with opened(server.url, kind) as store:
                task = await enter(store)
                server.pause()
                task.cancel()
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                asyncio.get_running_loop().call_later(0.2, server.resume)
                await store.close()
                assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())

        assert observer.step_statuses("run") == {"pay": StepStatus.FAILED}


@either_kind
def test_closed_coroutine_leaves_its_block_without_waiting(
    server: EmbeddedServer, observer: StepRunStore, kind: str
) -> None:
    async def main() -> None:
        async with opened(server.url, kind) as store:
            task = await enter(store)
            cast("Any", task.get_coro()).close()
            await until(lambda: observer.step_statuses("run") == {"pay": StepStatus.FAILED})
            task.cancel()
            with contextlib.suppress(RuntimeError):  # its coroutine is closed
                await task

    asyncio.run(main())


def test_cancellation_is_never_swallowed(server: EmbeddedServer, observer: StepRunStore) -> None:
    """redis-py writes with `asyncio.wait_for`, which may forget a cancellation before Python 3.12."""

    async def main() -> None:
        client = redis.asyncio.Redis.from_url(server.url, socket_timeout=5)
        async with client, AsyncStepRunStore(client) as store:
            for turns in range(60):
                task = asyncio.create_task(store.run_step("run", f"step-{turns}", forever, {}))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task], timeout=5)
                assert task.cancelled()

    asyncio.run(main())
