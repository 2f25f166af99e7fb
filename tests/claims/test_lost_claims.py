"""Lost claims: another worker takes over, this one is notified, and its late result is discarded."""

from __future__ import annotations

from typing import Any

import pytest
from support.backends import Bench
from support.claims import (
    SHORT_LEASE,
    DeclinedError,
    Worker,
    after_reply,
    claim_of_the_work,
    is_busy,
    outcomes,
    take_over,
)
from support.records import stored
from support.servers import wait_until

from squidstep_redis import (
    Outcome,
    RunDeletedError,
    StaleStepRunError,
    StepBusyError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
    StepStatus,
)


class TestLossDuringRunStep:
    def test_winners_output_is_returned(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            winner = take_over(others, lease=60)
            wait_until(claim.lost.is_set)
            others.complete_step(winner, {"by": "winner"})
            return {"by": "zombie"}

        assert worker.execute(work, lease=SHORT_LEASE) == {"by": "winner"}
        assert others.completed_outputs("run") == [{"by": "winner"}]
        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]

    def test_step_is_busy_while_the_winner_executes(self, worker: Worker, others: StepRunStore) -> None:
        winners: list[StepRun] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            winners.append(take_over(others, lease=60, owner="winner"))
            wait_until(claim.lost.is_set)
            return {"by": "zombie"}

        with pytest.raises(StepBusyError, match=r"held by winner \(attempt 2\)") as caught:
            worker.execute(work, lease=SHORT_LEASE)

        assert caught.value.current == winners[0] == stored(others)

    def test_delivery_waits_for_the_winners_output(self, worker: Worker, others: StepRunStore) -> None:
        winners: list[StepRun] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            winners.append(take_over(others, lease=60))
            wait_until(claim.lost.is_set)
            return {"by": "zombie"}

        after_reply(worker, is_busy, lambda: others.complete_step(winners[0], {"by": "winner"}))

        assert worker.execute(work, lease=SHORT_LEASE, on_busy="wait") == {"by": "winner"}
        assert len(winners) == 1

    def test_exception_of_the_work_leaves_the_winner_unchanged(self, worker: Worker, others: StepRunStore) -> None:
        winners: list[StepRun] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            winners.append(take_over(others, lease=60))
            wait_until(claim.lost.is_set)
            raise DeclinedError

        with pytest.raises(DeclinedError):
            worker.execute(work, lease=SHORT_LEASE)

        assert stored(others) == winners[0]

    @pytest.mark.parametrize("noticed", [True, False])
    def test_step_that_failed_meanwhile_is_stale(self, worker: Worker, others: StepRunStore, noticed: bool) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            others.fail_step(take_over(others) if noticed else claim.step_run.id, {"reason": "operator"})
            wait_until(lambda: not noticed or claim.lost.is_set())
            return {}

        with pytest.raises(StaleStepRunError) as caught:
            worker.execute(work, lease=SHORT_LEASE if noticed else None, on_busy="wait")

        assert caught.value.current == stored(others)
        assert stored(others).last_error == {"reason": "operator"}

    def test_step_that_was_released_meanwhile_is_stale(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            others.release_step(stored(others).id)
            return {}

        with pytest.raises(StaleStepRunError):
            worker.execute(work, on_busy="wait")

        assert stored(others).status is StepStatus.PENDING

    def test_output_set_by_an_operator_is_returned(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            others.complete_step(stored(others).id, {"by": "operator"})
            return {"by": "worker"}

        assert worker.execute(work) == {"by": "operator"}

    @pytest.mark.parametrize("noticed", [True, False])
    def test_deleted_run_is_reported(self, worker: Worker, others: StepRunStore, noticed: bool) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            others.delete_run("run")
            wait_until(lambda: not noticed or claim.lost.is_set())
            return {}

        with pytest.raises(RunDeletedError):
            worker.execute(work, lease=SHORT_LEASE if noticed else None)

        assert others.get_run("run") == []

    def test_run_deleted_after_the_takeover_is_not_found(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            take_over(others, lease=60)
            wait_until(claim.lost.is_set)
            others.delete_run("run")
            return {}

        with pytest.raises(StepRunNotFoundError):
            worker.execute(work, lease=SHORT_LEASE)

    def test_run_whose_keys_vanished_is_not_found(self, bench: Bench, worker: Worker) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            bench.backend.raw.delete(*bench.keys("run")[:2])
            return {}

        with pytest.raises(StepRunNotFoundError):
            worker.execute(work)

        assert not bench.backend.raw.exists(*bench.keys("run")[:2])


class TestLossInABlock:
    def test_completion_returns_the_winners_step_run(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(lease=SHORT_LEASE) as claim:
            winner = take_over(others, lease=60)
            worker.wait(claim.lost.is_set)
            completed = others.complete_step(winner, {"by": "winner"})

            assert claim.complete({"by": "zombie"}) == completed

        assert claim.output == {"by": "winner"}

    def test_completion_is_stale_while_the_winner_executes(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(lease=SHORT_LEASE) as claim:
            take_over(others, lease=60)
            worker.wait(claim.lost.is_set)
            with pytest.raises(StaleStepRunError) as caught:
                claim.complete({"by": "zombie"})

        assert caught.value.current == stored(others)
        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.RUNNING]

    def test_completion_detects_a_loss_before_the_heartbeat_does(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(lease=60) as claim:
            take_over(others, lease=60)
            assert not claim.lost.is_set()
            with pytest.raises(StaleStepRunError):
                claim.complete({"by": "zombie"})
            assert claim.lost.is_set()

    def test_completed_claim_is_not_reported_as_lost(self, worker: Worker) -> None:
        with worker.claim(lease=SHORT_LEASE) as claim, worker.claim("ship", lease=SHORT_LEASE) as other:
            claim.complete({})
            worker.wait_for_extension(other)
            other.complete({})

        assert (claim.lost.is_set(), other.lost.is_set()) == (False, False)
