"""Progress under a claim: stored at once or with the next extension, and found by the next attempt."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.backends import Bench
from support.claims import (
    SHORT_LEASE,
    DeclinedError,
    Worker,
    asyncio_only,
    blocking_only,
    claim_of_the_work,
    extend_now,
    fake_clock,
    no_heartbeat_threads,
    outcomes,
    take_over,
)
from support.records import begun, stored
from support.servers import wait_until

from squidstep_redis import (
    Outcome,
    PayloadError,
    RunDeletedError,
    StaleStepRunError,
    StepBusyError,
    StepRunStore,
)


class TestAtOnce:
    def test_next_attempt_continues_where_the_first_one_failed(self, worker: Worker, others: StepRunStore) -> None:
        pages: list[int] = []
        with worker.claim() as claim:
            assert claim.progress is None
            claim.checkpoint({"page": 1})
            assert stored(others).progress == {"page": 1}
            claim.checkpoint({"page": 2})
            claim.fail(DeclinedError())

        with worker.claim() as claim:
            pages.append(claim.progress["page"])
            claim.checkpoint({"page": 3})
            pages.append(claim.progress["page"])  # still what this attempt has found
            claim.complete({})

        assert pages == [2, 2]
        with worker.claim() as claim:
            assert (claim.decision, claim.progress) == ("skip", None)

    def test_work_of_run_step_finds_and_stores_it(self, worker: Worker, others: StepRunStore) -> None:
        failing = begun(others.begin_step("run", "pay", {}))
        others.checkpoint_step(failing, {"page": 5})
        others.fail_step(failing, {})

        def work(input: dict[str, Any]) -> dict[str, Any]:
            return {"from": (claim_of_the_work().progress or {})["page"]}

        assert worker.execute(work) == {"from": 5}
        assert stored(others).progress is None

    def test_claim_without_a_lease_stores_lazy_checkpoints_at_once(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(lease=None) as claim:
            claim.checkpoint({"page": 1}, lazy=True)
            assert stored(others).progress == {"page": 1}
            claim.complete({})

    @pytest.mark.parametrize("lazy", [False, True])
    def test_bad_progress_leaves_the_claim_held(self, worker: Worker, others: StepRunStore, lazy: bool) -> None:
        with worker.claim() as claim:
            claim.checkpoint({"page": 1})
            with pytest.raises(PayloadError, match="progress"):
                claim.checkpoint({"page": object()}, lazy=lazy)
            assert stored(others).progress == {"page": 1}
            claim.complete({})
        assert outcomes(others) == [Outcome.COMPLETED]

    @pytest.mark.parametrize("lazy", [False, True])
    def test_ended_claim_is_stale(self, worker: Worker, others: StepRunStore, lazy: bool) -> None:
        with worker.claim() as claim:
            claim.complete({})
            with pytest.raises(StaleStepRunError, match="Nothing was sent"):
                claim.checkpoint({"page": 1}, lazy=lazy)


class TestLazy:
    @pytest.mark.parametrize("bench", ["blocking", "asyncio"], indirect=True)
    def test_next_extension_carries_the_latest(self, worker: Worker, others: StepRunStore) -> None:
        with fake_clock() as clock, no_heartbeat_threads(), worker.claim(lease=30) as claim:
            claim.checkpoint({"page": 1}, lazy=True)
            claim.checkpoint({"page": 2}, lazy=True)
            assert stored(others).progress is None

            extend_now(worker, claim.claim, clock)
            assert stored(others).progress == {"page": 2}

            others.checkpoint_step(stored(others).id, {"page": "from elsewhere"})
            extend_now(worker, claim.claim, clock)  # which carries nothing
            assert stored(others).progress == {"page": "from elsewhere"}
            claim.complete({})

    def test_heartbeat_stores_it_in_time(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(lease=SHORT_LEASE) as claim:
            claim.checkpoint({"page": 1}, lazy=True)
            worker.wait(lambda: stored(others).progress == {"page": 1})
            claim.complete({})

    def test_later_checkpoint_at_once_wins(self, worker: Worker, others: StepRunStore) -> None:
        with fake_clock() as clock, no_heartbeat_threads(), worker.claim(lease=30) as claim:
            claim.checkpoint({"page": 1}, lazy=True)
            claim.checkpoint({"page": 2})
            extend_now(worker, claim.claim, clock)

            assert stored(others).progress == {"page": 2}
            claim.complete({})

    @pytest.mark.parametrize("ending", ["fail", "release"])
    def test_it_is_stored_before_the_attempt_ends(self, worker: Worker, others: StepRunStore, ending: str) -> None:
        with worker.claim() as claim:
            claim.checkpoint({"page": 1}, lazy=True)
            claim.release() if ending == "release" else claim.fail({})

        assert stored(others).progress == {"page": 1}

    def test_it_is_stored_before_an_exception_is_recorded(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim: Any = claim_of_the_work()
            claim._lazy.latest = claim._calls.extend_claim(claim.step_run, 30, progress={"page": 1})
            raise DeclinedError

        with pytest.raises(DeclinedError):
            worker.execute(work)

        assert stored(others).progress == {"page": 1}
        assert outcomes(others) == [Outcome.FAILED]

    @blocking_only
    def test_it_is_stored_if_the_block_is_interrupted(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim: Any = claim_of_the_work()
            claim.checkpoint({"page": 1}, lazy=True)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            worker.execute(work)

        wait_until(lambda: outcomes(others) == [Outcome.FAILED])
        assert stored(others).progress == {"page": 1}

    def test_completion_does_not_send_it(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            claim.checkpoint({"page": 1}, lazy=True)
            claim.complete({})

        assert stored(others).progress is None


class TestLostClaim:
    def test_checkpoint_finds_the_loss(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            winner = take_over(others, lease=60)
            for lazy in (False, True):
                with pytest.raises(StaleStepRunError, match="taken over"):
                    claim.checkpoint({"page": 1}, lazy=lazy)
                assert claim.lost.is_set()
        assert stored(others) == winner
        assert stored(others).progress is None

    @blocking_only
    def test_run_step_is_busy_after_it(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            take_over(others, lease=60, owner="winner")
            claim: Any = claim_of_the_work()
            claim.checkpoint({"page": 1})
            return {}

        with pytest.raises(StepBusyError, match="held by winner"):
            worker.execute(work)

    @blocking_only
    def test_run_step_returns_the_output_of_the_winner(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            others.complete_step(take_over(others, lease=60), {"by": "winner"})
            claim: Any = claim_of_the_work()
            claim.checkpoint({"page": 1})
            return {"by": "zombie"}

        assert worker.execute(work) == {"by": "winner"}

    def test_deleted_run_is_reported(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            others.delete_run("run")
            with pytest.raises(RunDeletedError):
                claim.checkpoint({"page": 1})
        assert claim.lost.is_set()


@asyncio_only
def test_asyncio_work_is_cancelled_and_its_lazy_checkpoint_stored(bench: Bench, others: StepRunStore) -> None:

    async def scenario(store: Any) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            claim: Any = claim_of_the_work()
            await claim.checkpoint({"page": 1}, lazy=True)
            await asyncio.sleep(60)
            return {}

        task = asyncio.create_task(store.run_step("run", "pay", work, {}))
        while others.get_step_run("run", "pay") is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    store: Any = bench.store()
    assert bench.runner is not None
    bench.runner.run(scenario(store.store))
    assert stored(others).progress == {"page": 1}
    assert outcomes(others) == [Outcome.FAILED]
