"""The heartbeat: extends all claims of a client in one batch, and no claim that has ended."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from support.backends import Bench
from support.claims import (
    SHORT_LEASE,
    Worker,
    around_batches,
    asyncio_only,
    blocking_only,
    claim_of_the_work,
    end,
    fakeredis_only,
    granted_claim,
    has_heartbeat,
    heartbeat_threads,
    outcomes,
    real_server,
    take_over,
    until,
)
from support.proxy import Proxy
from support.records import stored
from support.servers import wait_until

from squidstep_redis import (
    AsyncStepRunStore,
    Call,
    Outcome,
    StepRunStore,
    StepStatus,
    current_claim,
)
from squidstep_redis.claims.aio_heartbeat import AsyncHeartbeat


def batch_sizes(worker: Worker) -> list[int]:
    """The sizes of the batches that the heartbeat sends from now on."""
    sizes: list[int] = []
    around_batches(worker, after=sizes.append)
    return sizes


class TestHeartbeat:
    @pytest.mark.slow
    @pytest.mark.servers("fakeredis", "valkey")
    def test_claim_lives_longer_than_its_lease(self, worker: Worker, others: StepRunStore) -> None:
        lease = 3.0  # much longer than a stall of a loaded machine

        def work(input: dict[str, Any]) -> dict[str, Any]:
            first_end = cast("datetime", stored(others).lease_ends_at)

            def has_outlived_its_lease() -> bool:
                assert others.begin_step("run", "pay", {}).busy
                return cast("datetime", stored(others).lease_ends_at) > first_end + timedelta(seconds=lease)

            wait_until(has_outlived_its_lease, timeout=30)
            claim = claim_of_the_work()
            assert (claim.lost.is_set(), 0 < claim.lease_left <= lease) == (False, True)
            return {}

        worker.execute(work, lease=lease)

        assert outcomes(others) == [Outcome.COMPLETED]

    @fakeredis_only
    def test_only_a_claim_with_a_lease_has_a_heartbeat(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(lease=None) as claim:
            assert stored(others).lease_ends_at is None
            time.sleep(0.05)  # a thread that starts by mistake needs some time
            assert not has_heartbeat(worker)
            claim.complete({})
        with worker.claim("ship", lease=60) as claim:
            wait_until(lambda: has_heartbeat(worker))
            claim.complete({})

    @pytest.mark.slow
    @fakeredis_only
    def test_claims_begun_at_different_times_share_one_batch(self, worker: Worker) -> None:
        sizes = batch_sizes(worker)
        with contextlib.ExitStack() as blocks:
            claims = []
            for step in ("pay", "ship", "mail"):
                claims.append(blocks.enter_context(worker.claim(step, lease=0.6)))
                worker.wait(lambda: claims[-1].lease_left < 0.53)

            worker.wait(lambda: sizes[-3:] == [3, 3, 3])

            converged = sizes[sizes.index(3) :]
            assert set(converged) == {3}
            for claim in claims:
                claim.complete({})

    @real_server
    def test_500_claims_are_extended_in_one_round_trip(
        self, proxied: tuple[Worker, Proxy], others: StepRunStore
    ) -> None:
        worker, proxy = proxied
        sizes = batch_sizes(worker)
        steps = [f"step-{number}" for number in range(500)]
        with contextlib.ExitStack() as blocks:
            claims = [blocks.enter_context(worker.claim(step, lease=3)) for step in steps]
            worker.wait(lambda: sizes[-1:] == [500])
            before = stored(others, step="step-0").lease_ends_at
            proxy.clear()

            with proxy.batches(5, 5):  # scripts, each for 100 claims of the run
                worker.wait(lambda: sizes[-2:] == [500, 500] and proxy.names().count("EVALSHA") == 10)

            assert proxy.round_trips == 2
            assert cast("Any", stored(others, step="step-0").lease_ends_at) > before
            assert not any(claim.lost.is_set() for claim in claims)
            for claim in claims:
                claim.complete({})
        assert set(others.step_statuses("run").values()) == {StepStatus.COMPLETED}

    @pytest.mark.slow
    @pytest.mark.parametrize("ending", ["complete", "fail", "release"])
    def test_claim_that_ends_does_not_affect_other_claims(
        self, worker: Worker, others: StepRunStore, ending: str
    ) -> None:
        with worker.claim("ship", lease=SHORT_LEASE) as held, worker.claim(lease=SHORT_LEASE) as ended:
            end(ended, ending)

            worker.wait_for_extension(held)
            worker.wait_for_extension(held)

            assert (held.lost.is_set(), ended.lost.is_set()) == (False, False)
            held.complete({})

    @fakeredis_only
    def test_claim_ending_during_batch_build_can_still_be_extended(self, worker: Worker) -> None:
        with worker.claim(lease=SHORT_LEASE) as claim:
            claim.complete({})

            assert isinstance(claim.extension(), Call)

    @pytest.mark.slow
    def test_lost_claim_does_not_affect_other_claims(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim("ship", lease=SHORT_LEASE) as held, worker.claim(lease=SHORT_LEASE) as lost:
            take_over(others)

            worker.wait(lost.lost.is_set)
            worker.wait_for_extension(held)

            assert not held.lost.is_set()
            held.complete({})

    @fakeredis_only
    @pytest.mark.slow
    def test_failed_extension_is_retried(self, worker: Worker, others: StepRunStore) -> None:
        errors = [redis.ConnectionError("down"), redis.ResponseError("no"), OSError("no")]

        def fail() -> None:
            if errors:
                raise errors.pop()

        around_batches(worker, before=fail)
        with worker.claim(lease=3) as claim:
            worker.wait_for_extension(claim)

            assert (errors, claim.lost.is_set()) == ([], False)
            assert others.begin_step("run", "pay", {}).busy
            claim.complete({})

    @pytest.mark.slow
    def test_unreferenced_claim_is_no_longer_extended(self, bench: Bench, worker: Worker, others: StepRunStore) -> None:
        block = worker.claim(lease=SHORT_LEASE)
        block.__enter__()
        worker.wait_for_extension(block)
        claim = weakref.ref(block.claim)

        del block
        wait_until(lambda: (gc.collect() and claim() is None) or claim() is None)

        worker.wait(lambda: others.begin_step("run", "pay", {}, lease=60).decision == "execute")
        assert current_claim() is None
        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.RUNNING]


@fakeredis_only
@blocking_only
class TestThread:
    """The blocking heartbeat is a thread that ends when it has had no claim for a while."""

    @pytest.mark.slow
    def test_thread_ends_after_a_while_without_claims(self, worker: Worker, others: StepRunStore) -> None:
        for _ in range(2):
            with worker.claim(lease=SHORT_LEASE) as claim:
                worker.wait_for_extension(claim)
                assert has_heartbeat(worker)
                claim.release()
            wait_until(lambda: not has_heartbeat(worker))

    @pytest.mark.slow
    def test_thread_ends_even_after_a_long_lease(self, worker: Worker) -> None:
        with worker.claim("ship", lease=3_600) as long:
            with worker.claim(lease=SHORT_LEASE) as short:
                worker.wait_for_extension(short)
                short.complete({})
            wait_until(
                lambda: time.monotonic() > short.next_extension_at + 0.05
            )  # from then on only the long one is due
            long.complete({})

        wait_until(lambda: not has_heartbeat(worker))

    def test_threads_with_one_client_share_one_heartbeat(self, worker: Worker, others: StepRunStore) -> None:
        barrier = threading.Barrier(5)

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            due = claim.next_extension_at
            wait_until(lambda: claim.next_extension_at > due)
            barrier.wait(30)
            wait_until(lambda: len(heartbeat_threads()) == 1)  # one of another test may be ending
            barrier.wait(30)
            return {"step": claim.step_run.step}

        with ThreadPoolExecutor(5) as pool:
            outputs = list(pool.map(lambda step: worker.execute(work, step, lease=SHORT_LEASE), "abcde"))

        assert outputs == [{"step": step} for step in "abcde"]


@pytest.mark.parametrize("begins", ["before", "meanwhile"])
def test_batch_without_reply_delays_no_shorter_lease_on_asyncio(begins: str) -> None:
    """One batch is sent at a time, so the shortest lease limits those of the longer ones, too."""
    closed = threading.Event()

    async def hang(calls: list[Call[Any]]) -> Any:
        await asyncio.Event().wait()

    async def main() -> None:
        side: Any = SimpleNamespace(transport=SimpleNamespace(send_batch=hang), close=closed.set)
        side.acquire = side.release = lambda: None
        heartbeat = AsyncHeartbeat(side)
        claims: list[Any] = [granted_claim(3_600), granted_claim(3)]
        for claim in claims:
            claim.extension = lambda: None
        heartbeat._schedule.add(claims[0])
        if begins == "before":
            heartbeat._schedule.add(claims[1])
        heartbeat._start(claims[:1])
        if begins == "meanwhile":
            await asyncio.sleep(0)
            heartbeat.add(claims[1])
        await until(closed.is_set)
        for claim in claims:
            heartbeat.discard(claim)
        await heartbeat.stop()

    asyncio.run(main())


@real_server  # redis-py keeps a cluster client with its first event loop
@asyncio_only
class TestEventLoop:
    """The asyncio heartbeat uses timers of the event loop."""

    def test_client_may_serve_one_event_loop_after_another(self, bench: Bench) -> None:
        store = AsyncStepRunStore(cast("Any", bench.backend.connect_asyncio()), prefix=bench.prefix)

        async def main(step: str) -> None:
            async with store.claim_step("run", step, {}, lease=SHORT_LEASE) as claim:
                due = claim.next_extension_at
                await until(lambda: claim.next_extension_at > due)
                await claim.complete({})
            await store.client.aclose()

        asyncio.run(main("pay"))
        asyncio.run(main("ship"))

    def test_closing_the_store_ends_an_extension_in_flight(self, bench: Bench) -> None:
        path = bench.backend.raw.connection_pool.connection_kwargs["path"]

        async def main() -> None:
            in_flight = asyncio.Event()

            async def hang(calls: list[Call[Any]]) -> Any:
                in_flight.set()
                await asyncio.Event().wait()

            async with AsyncStepRunStore.from_url(f"unix://{path}", prefix=bench.prefix) as store:
                cast("Any", store)._transport.send_batch = hang
                async with store.claim_step("run", "pay", {}, lease=SHORT_LEASE) as claim:
                    await in_flight.wait()
                    await claim.complete({})
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())

    def test_extension_cancelled_by_close_is_sent_again(self, bench: Bench) -> None:
        path = bench.backend.raw.connection_pool.connection_kwargs["path"]

        async def main() -> None:
            in_flight = asyncio.Event()
            async with AsyncStepRunStore.from_url(f"unix://{path}", prefix=bench.prefix) as store:
                transport = cast("Any", store)._transport
                send_batch = transport.send_batch

                async def hang_once(calls: list[Call[Any]]) -> Any:
                    transport.send_batch = send_batch
                    in_flight.set()
                    await asyncio.Event().wait()

                transport.send_batch = hang_once
                async with store.claim_step("run", "pay", {}, lease=3) as claim:
                    due = claim.next_extension_at
                    await in_flight.wait()
                    await store.close()
                    await until(lambda: claim.next_extension_at > due)
                    await claim.complete({})

        asyncio.run(main())
