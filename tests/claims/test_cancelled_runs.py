"""Cancelled runs: work that has begun is notified, may continue, and is cancelled if a setting asks for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.backends import Bench
from support.claims import (
    SHORT_LEASE,
    Worker,
    asyncio_only,
    charge,
    claim_of_the_work,
    extend_now,
    fake_clock,
    no_heartbeat_threads,
    outcomes,
    until,
)
from support.records import begun, stored
from support.servers import wait_until

from squidstep_redis import Outcome, RunCancelledError, SquidstepError, StepRunStore, StepStatus


class TestBegin:
    def test_step_of_a_cancelled_run_is_not_executed(self, worker: Worker, others: StepRunStore) -> None:
        others.schedule_step("run", "pay", {"amount": 1})
        others.cancel_run("run", "wrong address")

        for on_busy in ("raise", "wait"):
            with pytest.raises(RunCancelledError, match=r"cancelled \(wrong address\)") as caught:
                worker.execute(charge, on_busy=on_busy)
            assert isinstance(caught.value, SquidstepError)
            assert (caught.value.run_id, caught.value.step, caught.value.reason) == ("run", "pay", "wrong address")
        assert stored(others).status is StepStatus.PENDING
        others.resume_run("run")
        assert worker.execute(charge) == {"charged": 1}

    def test_completed_step_returns_its_output(self, worker: Worker, others: StepRunStore) -> None:
        worker.execute(charge)
        others.cancel_run("run")

        assert worker.execute(charge) == {"charged": 1}


class TestWorkThatHasBegun:
    def test_heartbeat_signals_it_and_the_result_is_stored(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            assert claim.cancellation is None
            others.cancel_run("run", "wrong address")
            wait_until(claim.cancelled.is_set)
            assert not claim.lost.is_set()
            assert claim.cancellation is not None
            return {"reason": claim.cancellation.reason}

        assert worker.execute(work, lease=SHORT_LEASE) == {"reason": "wrong address"}
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_work_can_raise_the_cancellation(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            others.cancel_run("run")
            wait_until(claim.cancelled.is_set)
            assert claim.cancellation is not None
            raise claim.cancellation

        with pytest.raises(RunCancelledError):
            worker.execute(work, lease=SHORT_LEASE, permanent=Exception)

        failed = stored(others)
        assert failed.last_error is not None
        assert failed.last_error["type"].endswith("RunCancelledError")
        assert not failed.final

    def test_checkpoint_signals_it(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(lease=None) as claim:
            others.cancel_run("run", "stop")
            claim.checkpoint({"page": 1})
            assert claim.cancelled.is_set()
            assert claim.cancellation.reason == "stop"
            claim.complete({})
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_extension_with_progress_signals_it(self, worker: Worker, others: StepRunStore) -> None:
        with fake_clock() as clock, no_heartbeat_threads(), worker.claim(lease=30) as claim:
            others.cancel_run("run")
            claim.checkpoint({"page": 1}, lazy=True)
            extend_now(worker, claim.claim, clock)

            assert claim.cancelled.is_set()
            claim.release()
        assert stored(others).progress == {"page": 1}


@asyncio_only
class TestCancelWithRun:
    def scenario(self, bench: Bench, work: Any, **options: Any) -> Any:
        """Cancels the run while `work` executes, and returns what `run_step` returns or raises."""
        store: Any = bench.store()

        async def run() -> Any:
            task = asyncio.create_task(store.store.run_step("run", "pay", work, {}, lease=SHORT_LEASE, **options))
            return (await asyncio.gather(task, return_exceptions=True))[0]

        assert bench.runner is not None
        return bench.runner.run(run())

    def test_work_is_cancelled_and_recorded_as_failed(self, bench: Bench, others: StepRunStore) -> None:
        stopped: list[BaseException] = []

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            others.cancel_run("run", "wrong address")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError as error:
                stopped.append(error)
                raise
            return {}

        result = self.scenario(bench, work, cancel_with_run=True, permanent=Exception)

        assert isinstance(result, RunCancelledError)
        assert result.reason == "wrong address"
        assert len(stopped) == 1
        failed = stored(others)
        assert failed.last_error is not None
        assert (failed.status, failed.final) == (StepStatus.FAILED, False)
        assert failed.last_error["type"].endswith("RunCancelledError")
        others.resume_run("run")
        assert begun(others.begin_step("run", "pay", {})).attempt == 2

    def test_work_continues_without_cancel_with_run(self, bench: Bench, others: StepRunStore) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            claim: Any = claim_of_the_work()
            others.cancel_run("run")
            await until(claim.cancelled.is_set)
            return {"done": True}

        assert self.scenario(bench, work) == {"done": True}

    def test_work_that_ignores_the_cancellation_is_completed(self, bench: Bench, others: StepRunStore) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            others.cancel_run("run")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return {"done": True}
            return {}

        assert self.scenario(bench, work, cancel_with_run=True) == {"done": True}
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_checkpoint_raises_the_cancellation(self, bench: Bench, others: StepRunStore) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            claim: Any = claim_of_the_work()
            others.cancel_run("run")
            await claim.checkpoint({"page": 1})
            return {}

        assert isinstance(self.scenario(bench, work, cancel_with_run=True), RunCancelledError)
        assert stored(others).progress == {"page": 1}
        assert outcomes(others) == [Outcome.FAILED]

    def test_other_cancellations_are_still_raised(self, bench: Bench, others: StepRunStore) -> None:
        store: Any = bench.store()

        async def run() -> None:
            claims: list[Any] = []

            async def work(input: dict[str, Any]) -> dict[str, Any]:
                claims.append(claim_of_the_work())
                others.cancel_run("run")
                try:
                    await asyncio.sleep(60)
                finally:
                    task.cancel("from outside")
                return {}

            task = asyncio.create_task(
                store.store.run_step("run", "pay", work, {}, lease=SHORT_LEASE, cancel_with_run=True)
            )
            await asyncio.wait([task])
            assert task.cancelled()
            # A task that is cancelled while it records its failure does not wait for that.
            await until(lambda: outcomes(others) == [Outcome.FAILED])

        assert bench.runner is not None
        bench.runner.run(run())
