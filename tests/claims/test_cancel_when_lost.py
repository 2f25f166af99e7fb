"""`cancel_when_lost`: asyncio work is cancelled as soon as its claim is known to be lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, cast

import pytest
from support.backends import Bench
from support.claims import (
    SHORT_LEASE,
    Worker,
    after_reply,
    asyncio_only,
    claim_of_the_work,
    is_busy,
    outcomes,
    take_over,
    until,
)
from support.records import stored

from squidstep_redis import (
    AsyncStepRunStore,
    Outcome,
    RunDeletedError,
    StepBusyError,
    StepRun,
    StepRunStore,
    StepStatus,
)


@asyncio_only
class TestCancelWhenLost:
    @pytest.fixture
    def store(self, worker: Worker) -> AsyncStepRunStore:
        return worker.plain_store

    def run(self, bench: Bench, main: Callable[[], Any]) -> Any:
        """Runs a coroutine function as a task; no cancellation is left over afterwards."""

        async def as_a_task() -> Any:
            result = await main()
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            await asyncio.sleep(0)  # a cancellation left over would be raised here
            return result

        return cast("asyncio.Runner", bench.runner).run(as_a_task())

    @pytest.mark.parametrize("inner", ["await", "task group", "timeout"])
    def test_work_is_cancelled_and_the_winners_output_returned(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore, inner: str
    ) -> None:
        seen: list[str] = []

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            others.complete_step(take_over(others), {"by": "winner"})
            try:
                if inner == "await":
                    await asyncio.Event().wait()
                elif inner == "task group":
                    async with asyncio.TaskGroup() as group:
                        group.create_task(asyncio.Event().wait())
                else:
                    async with asyncio.timeout(60):
                        await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise
            return {}

        result = self.run(
            bench, lambda: store.run_step("run", "pay", work, {}, lease=SHORT_LEASE, cancel_when_lost=True)
        )

        assert (result, seen) == ({"by": "winner"}, ["cancelled"])
        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]

    def test_work_that_suppresses_the_cancellation_returns_the_winners_output(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            others.complete_step(take_over(others), {"by": "winner"})
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return {"by": "zombie"}

        result = self.run(
            bench, lambda: store.run_step("run", "pay", work, {}, lease=SHORT_LEASE, cancel_when_lost=True)
        )

        assert result == {"by": "winner"}

    def test_step_is_busy_while_the_winner_executes(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            take_over(others)
            await asyncio.Event().wait()
            return {}

        async def main() -> None:
            with pytest.raises(StepBusyError):
                await store.run_step("run", "pay", work, {}, lease=SHORT_LEASE, cancel_when_lost=True)

        self.run(bench, main)

        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.RUNNING]

    def test_delivery_waits_for_the_winners_output(
        self, bench: Bench, worker: Worker, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        winners: list[StepRun] = []

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            winners.append(take_over(others))
            await asyncio.Event().wait()
            return {}

        after_reply(worker, is_busy, lambda: others.complete_step(winners[0], {"by": "winner"}))
        options: dict[str, Any] = {"lease": SHORT_LEASE, "cancel_when_lost": True, "on_busy": "wait"}

        assert self.run(bench, lambda: store.run_step("run", "pay", work, {}, **options)) == {"by": "winner"}

    def test_deleted_run_is_reported(self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            others.delete_run("run")
            await asyncio.Event().wait()
            return {}

        async def main() -> None:
            with pytest.raises(RunDeletedError):
                await store.run_step("run", "pay", work, {}, lease=SHORT_LEASE, cancel_when_lost=True)

        self.run(bench, main)

    def test_block_ends_with_the_winners_output(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        async def main() -> Any:
            async with store.claim_step("run", "pay", {}, lease=SHORT_LEASE, cancel_when_lost=True) as claim:
                others.complete_step(take_over(others), {"by": "winner"})
                await asyncio.Event().wait()
            return claim.output

        assert self.run(bench, main) == {"by": "winner"}

    def test_work_continues_without_cancel_when_lost(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        seen: list[str] = []

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            others.complete_step(take_over(others), {"by": "winner"})
            claim = claim_of_the_work()
            await until(claim.lost.is_set)
            await asyncio.sleep(0)
            seen.append("continued")
            return {"by": "zombie"}

        result = self.run(bench, lambda: store.run_step("run", "pay", work, {}, lease=SHORT_LEASE))

        assert (result, seen) == ({"by": "winner"}, ["continued"])

    @pytest.mark.parametrize("cancel_when_lost", [False, True])
    def test_cancellation_by_the_caller_is_raised_and_recorded(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore, cancel_when_lost: bool
    ) -> None:
        async def main() -> None:
            working = asyncio.Event()

            async def work(input: dict[str, Any]) -> dict[str, Any]:
                working.set()
                await asyncio.Event().wait()
                return {}

            delivery = store.run_step("run", "pay", work, {}, lease=SHORT_LEASE, cancel_when_lost=cancel_when_lost)
            task = asyncio.create_task(delivery)
            await working.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()

        self.run(bench, main)

        assert stored(others).status is StepStatus.FAILED
        assert cast("Any", stored(others).last_error)["type"].endswith("CancelledError")

    def test_cancellation_by_the_caller_is_raised_despite_the_loss(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        async def main() -> None:
            winners: list[StepRun] = []

            async def work(input: dict[str, Any]) -> dict[str, Any]:
                winners.append(take_over(others))
                try:
                    await asyncio.Event().wait()
                finally:  # cancelled by the loss; now by the caller, too
                    task.cancel()
                return {}

            task = asyncio.create_task(store.run_step("run", "pay", work, {}, lease=SHORT_LEASE, cancel_when_lost=True))
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (task.cancelled(), task.cancelling()) == (True, 1)
            assert stored(others) == winners[0]

        self.run(bench, main)
