"""`run_step` while another worker holds the step: it raises, or it waits for the result."""

from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from support.backends import Bench
from support.claims import (
    Worker,
    after_reply,
    asyncio_only,
    blocking_only,
    charge,
    decline,
    fakeredis_only,
    is_busy,
    outcomes,
)
from support.records import begun

from squidstep_redis import (
    AsyncStepRunStore,
    InvalidArgumentError,
    Outcome,
    StepBusyError,
    StepExhaustedError,
    StepRunStore,
)


class TestBusy:
    def test_step_held_by_another_worker_is_busy(self, bench: Bench, store: StepRunStore) -> None:
        holder = begun(store.begin_step("run", "pay", {}, lease=60, owner="worker-1"))
        before = bench.dump()

        with pytest.raises(StepBusyError, match=r"held by worker-1 \(attempt 1; its lease expires in") as caught:
            store.run_step("run", "pay", charge, {})

        assert caught.value.current == holder
        assert caught.value.retry_in is not None
        assert 50 < caught.value.retry_in <= 60
        assert bench.dump() == before

    def test_claim_without_a_lease_has_no_retry_time(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))

        with pytest.raises(
            StepBusyError, match=r"held by another worker \(attempt 1\). Nothing was executed"
        ) as caught:
            store.run_step("run", "pay", charge, {})

        assert caught.value.retry_in is None

    @fakeredis_only
    @blocking_only
    def test_errors_survive_pickling(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))

        for error in (StepBusyError(step_run, 7.5), StepExhaustedError(step_run)):
            copy = pickle.loads(pickle.dumps(error))
            assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))

    @pytest.mark.timeout(30)  # a failure would wait forever
    @pytest.mark.parametrize(
        ("on_busy", "error", "problem"),
        [
            ("raise", StepBusyError, "step 'pay': held by"),
            ("wait", InvalidArgumentError, "never end: this code itself is executing step 'pay' of run 'run'"),
        ],
    )
    def test_work_that_runs_its_own_step_does_not_wait(
        self, worker: Worker, others: StepRunStore, on_busy: Any, error: type[Exception], problem: str
    ) -> None:
        store = worker.plain_store

        def notify(_: dict[str, Any]) -> Any:
            return store.run_step("run", "pay", charge, {}, on_busy=on_busy)

        def pay(_: dict[str, Any]) -> Any:
            return store.run_step("run", "notify", notify, {})

        with pytest.raises(error, match=problem):
            worker.store.run_step("run", "pay", pay, {})

        assert outcomes(others) == outcomes(others, "notify") == [Outcome.FAILED]

    @asyncio_only
    def test_task_started_by_the_work_may_wait_for_it(self, worker: Worker) -> None:
        store: AsyncStepRunStore = worker.plain_store
        found_busy = asyncio.Event()
        after_reply(worker, is_busy, found_busy.set)

        async def main() -> list[dict[str, Any]]:
            waiting: list[asyncio.Task[dict[str, Any]]] = []

            async def work(input: dict[str, Any]) -> dict[str, Any]:
                waiting.append(asyncio.create_task(store.run_step("run", "pay", decline, {}, on_busy="wait")))
                await found_busy.wait()
                return charge(input)

            return [await store.run_step("run", "pay", work, {"amount": 1}), await waiting[0]]

        assert cast("asyncio.Runner", worker.runner).run(main()) == [{"charged": 1}] * 2


class TestWaiting:
    def test_waiter_returns_the_winners_output(self, worker: Worker, others: StepRunStore) -> None:
        holder = begun(others.begin_step("run", "pay", {}, lease=60))
        after_reply(worker, is_busy, lambda: others.complete_step(holder, {"by": "holder"}))

        assert worker.execute(decline, on_busy="wait") == {"by": "holder"}

    @pytest.mark.parametrize("lease", [60, None])
    def test_waiter_executes_when_the_holder_fails(
        self, worker: Worker, others: StepRunStore, lease: float | None
    ) -> None:
        holder = begun(others.begin_step("run", "pay", {}, lease=lease))
        after_reply(worker, is_busy, lambda: others.fail_step(holder, {"reason": "declined"}))

        assert worker.execute(charge, on_busy="wait") == {"charged": 1}
        assert outcomes(others) == [Outcome.FAILED, Outcome.COMPLETED]

    def test_waiter_executes_when_the_holder_releases(self, worker: Worker, others: StepRunStore) -> None:
        holder = begun(others.begin_step("run", "pay", {"amount": 2}, lease=60))
        after_reply(worker, is_busy, lambda: others.release_step(holder))

        assert worker.execute(charge, on_busy="wait", max_attempts=1) == {"charged": 2}

    def test_waiter_takes_over_when_the_lease_expires(self, worker: Worker, others: StepRunStore) -> None:
        begun(others.begin_step("run", "pay", {}, lease=0.1))

        assert worker.execute(charge, on_busy="wait") == {"charged": 1}
        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]

    def test_one_of_eight_concurrent_deliveries_executes(self, bench: Bench, worker: Worker) -> None:
        given: list[dict[str, Any]] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            given.append(input)
            return {"position": len(given)}

        if worker.runner is None:
            with ThreadPoolExecutor(8) as pool:
                deliveries = [pool.submit(worker.execute, work, on_busy="wait") for _ in range(8)]
                outputs = [delivery.result() for delivery in deliveries]
        else:

            async def main() -> list[dict[str, Any]]:
                store: AsyncStepRunStore = worker.plain_store
                deliveries = (store.run_step("run", "pay", work, {"amount": 1}, on_busy="wait") for _ in range(8))
                return await asyncio.gather(*deliveries)

            outputs = worker.runner.run(main())

        assert outputs == [{"position": 1}] * 8
        assert given == [{"amount": 1}]
