"""One asyncio store in several event loops, threads and processes, and heartbeats that do not die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import redis.asyncio
from support.asyncio_stores import either_kind, make_store, opened
from support.claims import heartbeat_of_loop, until
from support.servers import wait_until

from squidstep_redis import AsyncClaim, AsyncStepRunStore, StepRunStore, StepStatus
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.servers("valkey")

LEASE = 0.6


async def extended(claim: AsyncClaim, times: int = 2) -> None:
    """Waits until the heartbeat has extended the claim."""
    for _ in range(times):
        due = claim.next_extension_at
        await until(lambda: claim.next_extension_at > due)  # noqa: B023 -- called at once
    assert not claim.lost.is_set()


async def hold(store: AsyncStepRunStore, step: str) -> None:
    """Holds a claim until it was extended, and completes it."""
    async with store.claim_step("run", step, {}, lease=LEASE) as claim:
        await extended(claim)
        await claim.complete({})


def connected_clients(observer: StepRunStore) -> int:
    return observer.client.info("clients")["connected_clients"]


class TestLoops:
    @either_kind
    def test_loops_in_threads_each_have_a_heartbeat(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        store = make_store(server.url, kind)
        all_are_here = threading.Barrier(3)

        async def main(number: int) -> None:
            if number == 0:
                await store.step_statuses("run")  # the first loop keeps the pool, so it has to close the client
            await asyncio.to_thread(all_are_here.wait, 30)
            async with store.claim_step("run", f"step-{number}", {}, lease=LEASE) as claim:
                await asyncio.to_thread(all_are_here.wait, 30)
                await extended(claim)
                await claim.complete({})
            await store.close()
            await asyncio.to_thread(all_are_here.wait, 30)
            if number == 0:
                await store.client.aclose()

        with ThreadPoolExecutor(3) as threads:
            for ended in [threads.submit(asyncio.run, main(number)) for number in range(3)]:
                ended.result()

        assert set(observer.step_statuses("run").values()) == {StepStatus.COMPLETED}

    def test_contended_pool_serves_loops_in_threads(self, server: EmbeddedServer, observer: StepRunStore) -> None:
        store = make_store(server.url, "user's pool")
        first_is_done, others_are_done = threading.Event(), threading.Event()

        async def main(number: int) -> None:
            for turn in range(5):
                steps = [f"{number}-{turn}-{index}" for index in range(20)]
                await asyncio.gather(*(store.begin_step("run", step, {}) for step in steps))
            await store.close()

        async def first() -> None:
            await main(0)
            first_is_done.set()
            await asyncio.to_thread(others_are_done.wait, 30)
            await main(1)
            await store.client.aclose()

        with ThreadPoolExecutor(5) as threads:
            keeps_pool = threads.submit(asyncio.run, first())
            assert first_is_done.wait(30)
            for ended in [threads.submit(asyncio.run, main(number)) for number in range(2, 6)]:
                ended.result()
            others_are_done.set()
            keeps_pool.result()

        assert len(observer.step_statuses("run")) == 600

    @either_kind
    def test_contended_store_serves_one_loop_after_another(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        store = make_store(server.url, kind)

        async def main(number: int) -> None:
            steps = [f"{number}-{index}" for index in range(30)]
            await asyncio.gather(*(store.begin_step("run", step, {}) for step in steps))
            await store.client.aclose()

        for number in range(3):
            asyncio.run(main(number))

        assert len(observer.step_statuses("run")) == 90

    def test_connections_are_closed_with_their_loop(self, server: EmbeddedServer, observer: StepRunStore) -> None:
        store = make_store(server.url, "own client")
        before = connected_clients(observer)

        for number in range(5):
            asyncio.run(hold(store, f"step-{number}"))

        wait_until(lambda: connected_clients(observer) == before)


class TestEagerTasks:
    """An eager task factory runs a task until its first `await` before `create_task` returns."""

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has no eager tasks")
    @either_kind
    def test_later_claims_have_a_heartbeat(self, server: EmbeddedServer, observer: StepRunStore, kind: str) -> None:
        async def main() -> None:
            asyncio.get_running_loop().set_task_factory(cast("Any", asyncio).eager_task_factory)
            async with opened(server.url, kind) as store:
                for number in range(3):
                    await hold(store, f"step-{number}")

        asyncio.run(main())

    def test_heartbeat_outlives_a_batch_without_awaits(self, server: EmbeddedServer, observer: StepRunStore) -> None:
        class EagerTask(asyncio.Future[Any]):
            """A task that has ended when its factory returns it."""

        def run_at_once(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any) -> Any:
            try:
                work.send(None)
            except StopIteration as end:
                task = EagerTask(loop=loop)
                task.set_result(end.value)
                return task
            raise AssertionError("an `await` that was not expected")

        async def main() -> None:
            async with opened(server.url, "own client") as store:
                send_batch = store._transport.send_batch

                async def reply_at_once(calls: Any) -> Any:
                    return results.pop()

                async with store.claim_step("run", "pay", {}, lease=LEASE) as claim:
                    results = [[await store.extend_claim(claim.step_run, LEASE)]]
                    store._transport.send_batch = reply_at_once
                    asyncio.get_running_loop().set_task_factory(run_at_once)
                    await extended(claim, 1)
                    asyncio.get_running_loop().set_task_factory(None)
                    store._transport.send_batch = send_batch
                    heartbeat_of_loop(store)._side.close()
                    await extended(claim, 1)
                    await claim.complete({})

        asyncio.run(main())


@either_kind
class TestHeartbeat:
    @pytest.mark.parametrize("how", ["in flight", "before its first step"])
    def test_claim_is_extended_after_all_tasks_were_cancelled(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str, how: str
    ) -> None:
        async def main() -> None:
            async with opened(server.url, kind) as store, store.claim_step("run", "pay", {}, lease=LEASE) as claim:
                heartbeat = heartbeat_of_loop(store)
                own = asyncio.current_task()
                for _ in range(3):
                    if how == "in flight":
                        server.pause()
                        await until(lambda: heartbeat.is_sending)
                        await asyncio.sleep(0.01)
                    else:
                        await until(lambda: heartbeat._timer is not None)
                        heartbeat._timer.cancel()
                        heartbeat._on_timer()
                        if not heartbeat.is_sending:
                            heartbeat._start([claim])
                    while others := asyncio.all_tasks() - {own}:
                        for task in others:
                            task.cancel()
                        await asyncio.wait(others)
                    server.resume()
                await extended(claim)
                await claim.complete({})

        asyncio.run(main())

        assert observer.step_statuses("run") == {"pay": StepStatus.COMPLETED}

    def test_paused_server_does_not_end_the_heartbeat(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def main() -> None:
            async with opened(server.url, kind) as store, store.claim_step("run", "pay", {}, lease=LEASE) as claim:
                await extended(claim, 1)
                server.pause()
                await asyncio.sleep(2.5)
                server.resume()
                await extended(claim)
                await claim.complete({})

        asyncio.run(main())


def test_exhausted_pool_does_not_delay_the_heartbeat(server: EmbeddedServer, observer: StepRunStore) -> None:
    async def main() -> None:
        client = redis.asyncio.Redis(
            connection_pool=redis.asyncio.BlockingConnectionPool.from_url(
                server.url, max_connections=2, timeout=60, socket_timeout=None
            )
        )
        async with client, AsyncStepRunStore(client) as store:
            async with store.claim_step("run", "pay", {}, lease=LEASE) as claim:
                waiters = [asyncio.create_task(client.blpop("nothing", 0)) for _ in range(2)]
                await asyncio.sleep(0.1)
                await extended(claim, 3)
                assert observer.begin_step("run", "pay", {}).busy
                for waiter in waiters:
                    waiter.cancel()
                await asyncio.wait(waiters)
                await claim.complete({})
            await client.connection_pool.disconnect()

    asyncio.run(main())


def test_exhausted_pool_does_not_delay_giving_claims_back(server: EmbeddedServer, observer: StepRunStore) -> None:
    async def main() -> None:
        client = redis.asyncio.Redis.from_url(server.url, max_connections=2, socket_timeout=None)
        waiters: list[asyncio.Task[Any]] = []

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            waiters.extend(asyncio.create_task(cast("Any", client.blpop("nothing", 0))) for _ in range(2))
            await asyncio.sleep(0.1)
            raise asyncio.CancelledError

        async with client, AsyncStepRunStore(client) as store:
            with pytest.raises(asyncio.CancelledError):
                await store.run_step("run", "pay", work, {}, lease=60)
            assert observer.step_statuses("run") == {"pay": StepStatus.FAILED}
            for waiter in waiters:
                waiter.cancel()
            await asyncio.wait(waiters)

    asyncio.run(main())


@pytest.mark.parametrize("ending", ["complete", "fail"])
def test_exhausted_pool_does_not_delay_the_end_of_a_claim(
    server: EmbeddedServer, observer: StepRunStore, ending: str
) -> None:
    async def main() -> None:
        client = redis.asyncio.Redis.from_url(server.url, max_connections=2, socket_timeout=None)
        async with client, AsyncStepRunStore(client, timeout=60) as store:
            async with store.claim_step("run", "pay", {}, lease=60) as claim:
                waiters = [asyncio.create_task(cast("Any", client.blpop("nothing", 0))) for _ in range(2)]
                await asyncio.sleep(0.1)
                async with asyncio.timeout(20):
                    await (claim.complete if ending == "complete" else claim.fail)({})
            for waiter in waiters:
                waiter.cancel()
            await asyncio.wait(waiters)

    asyncio.run(main())

    expected = StepStatus.COMPLETED if ending == "complete" else StepStatus.FAILED
    assert observer.step_statuses("run") == {"pay": expected}


def run_in_child(act: Callable[[], object]) -> int:
    """Forks a child that runs the function and then exits; returns its process id."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@either_kind
class TestForkedChildren:
    def test_child_does_not_extend_the_claims_of_its_parent(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        store = make_store(server.url, kind)

        async def hold_in_child() -> None:
            async with store.claim_step("run", "child", {}, lease=LEASE) as claim:
                while observer.client.get("end") is None:
                    await asyncio.sleep(0.05)
                await claim.complete({})

        async def hold_in_parent() -> None:
            async with store.claim_step("run", "parent", {}, lease=LEASE) as claim:
                await extended(claim, 1)
                run_in_child(lambda: asyncio.run(hold_in_child()))
                await until(lambda: "child" in observer.step_statuses("run"))
                os.kill(os.getpid(), signal.SIGKILL)

        parent = run_in_child(lambda: asyncio.run(hold_in_parent()))
        os.waitpid(parent, 0)

        wait_until(lambda: observer.begin_step("run", "parent", {}, lease=60).decision == "execute")
        assert observer.begin_step("run", "child", {}).busy
        observer.client.set("end", 1)
        wait_until(lambda: observer.step_statuses("run")["child"] is StepStatus.COMPLETED)

    def test_child_that_leaves_the_block_of_its_parent_changes_nothing(
        self, server: EmbeddedServer, observer: StepRunStore, kind: str
    ) -> None:
        async def main() -> None:
            async with opened(server.url, kind) as store:
                child = None
                try:
                    async with store.claim_step("run", "pay", {}, lease=LEASE) as claim:
                        await extended(claim, 1)
                        child = os.fork()
                        if child == 0:
                            raise SystemExit
                        _, status = os.waitpid(child, 0)
                        assert os.waitstatus_to_exitcode(status) == 0
                        await extended(claim)
                        await claim.complete({})
                except SystemExit:
                    os._exit(0)
                finally:
                    if child == 0:
                        os._exit(1)

        asyncio.run(main())

        assert observer.step_statuses("run") == {"pay": StepStatus.COMPLETED}
