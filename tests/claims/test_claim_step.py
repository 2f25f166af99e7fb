"""`claim_step`: a claim as a `with` block that completes, fails or releases the step."""

from __future__ import annotations

import asyncio
import contextvars
import math
from datetime import timedelta
from typing import Any, cast

import pytest
from support.backends import Bench
from support.claims import DeclinedError, Worker, asyncio_only, blocking_only, end, outcomes, take_over
from support.records import begun, stored

from squidstep_redis import (
    InvalidArgumentError,
    Outcome,
    PayloadError,
    StaleStepRunError,
    StepBusyError,
    StepExhaustedError,
    StepRun,
    StepRunStore,
    StepStatus,
)


class TestClaimStep:
    def test_claim_sends_nothing_before_its_block(self, bench: Bench, worker: Worker) -> None:
        claim = worker.claim()

        assert claim.decision is None
        with pytest.raises(InvalidArgumentError, match="has no step run before its `with` block is entered"):
            _ = claim.step_run
        assert bench.dump() == {}

    def test_completed_claim_is_skipped_from_then_on(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(owner="worker-1") as claim:
            assert (claim.decision, claim.input, claim.output) == ("execute", {"amount": 1}, None)
            assert (claim.step_run, claim.step_run.owner) == (stored(others), "worker-1")
            completed = claim.complete({"items": (1, 2)}, schedule={"ship": {"parcels": 2}})

        assert (completed.status, completed.output) == (StepStatus.COMPLETED, {"items": [1, 2]})
        assert completed == claim.step_run == stored(others)
        assert stored(others, step="ship").input == {"parcels": 2}
        with worker.claim() as again:
            assert (again.decision, again.output) == ("skip", {"items": [1, 2]})
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_claim_is_failed_in_its_block(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            failed = claim.fail({"reason": "declined"})

        assert failed == stored(others)
        assert failed.last_error == {"reason": "declined"}

    def test_released_claim_uses_up_no_attempt(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(max_attempts=1) as claim:
            released = claim.release()
        assert released == stored(others)
        assert released.status is StepStatus.PENDING

        with worker.claim(max_attempts=1) as claim:
            assert (claim.decision, claim.step_run.attempt) == ("execute", 2)
            claim.fail(DeclinedError("no funds"))
        with pytest.raises(StepExhaustedError), worker.claim(max_attempts=1):
            pass

    def test_block_that_ends_without_a_result_is_a_failure(self, worker: Worker, others: StepRunStore) -> None:
        with pytest.raises(InvalidArgumentError, match="ended without complete.* recorded as failed"), worker.claim():
            pass

        assert stored(others).status is StepStatus.FAILED
        assert "ended without complete" in cast("Any", stored(others).last_error)["message"]

    @pytest.mark.parametrize(
        "error", [DeclinedError("no"), SystemExit(1), KeyboardInterrupt()], ids=lambda e: type(e).__name__
    )
    def test_exception_that_leaves_the_block_is_recorded(
        self, worker: Worker, others: StepRunStore, error: BaseException
    ) -> None:
        with pytest.raises(type(error)) as caught, worker.claim():
            raise error

        assert caught.value is error
        assert stored(others).status is StepStatus.FAILED
        assert cast("Any", stored(others).last_error)["type"].endswith(type(error).__name__)

    @pytest.mark.parametrize("ending", ["complete", "fail", "release"])
    def test_exception_after_the_claim_ended_changes_nothing(
        self, worker: Worker, others: StepRunStore, ending: str
    ) -> None:
        ended: list[StepRun] = []

        def end_and_raise(claim: Any) -> None:
            ended.append(end(claim, ending))
            raise DeclinedError

        with pytest.raises(DeclinedError), worker.claim() as claim:
            end_and_raise(claim)

        assert stored(others) == ended[0]

    def test_output_that_cannot_be_encoded_leaves_the_claim_held(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            with pytest.raises(PayloadError):
                claim.complete({"receipt": object()})
            assert stored(others).status is StepStatus.RUNNING
            assert claim.complete({"receipt": 7}).output == {"receipt": 7}

    def test_block_is_not_entered_while_the_step_is_busy(self, worker: Worker, others: StepRunStore) -> None:
        begun(others.begin_step("run", "pay", {}, lease=60))

        with pytest.raises(StepBusyError), worker.claim():
            pytest.fail("the block was entered")

    def test_claim_serves_one_block_at_a_time(self, worker: Worker, others: StepRunStore) -> None:
        claim = worker.claim()
        with claim:
            with pytest.raises(InvalidArgumentError, match="claim: is already in a `with` block"), claim:
                pytest.fail("the block was entered")
            claim.complete({"receipt": 7})
        with claim:
            assert (claim.decision, claim.output) == ("skip", {"receipt": 7})
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_lease_left_is_at_most_the_lease(self, worker: Worker) -> None:
        with worker.claim(lease=None) as claim:
            assert claim.lease_left == math.inf
            claim.complete({})
        with worker.claim("ship", lease=timedelta(minutes=1)) as claim:
            assert 50 < claim.lease_left <= 60
            claim.complete({})

    def test_repr_shows_the_step_run_and_the_decision(self, worker: Worker) -> None:
        with worker.claim(owner="worker-1") as claim:
            step_run = "<StepRun 'run' 'pay' running attempt=1, owner='worker-1', claimed>"
            assert repr(claim.claim) == f"<{type(claim.claim).__name__} {step_run} execute>"
            claim.complete({})

    def test_claim_knows_whether_its_block_ended_it(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            assert not claim.ended
            claim.complete({})
            assert claim.ended

        with worker.claim("ship") as claim:
            take_over(others, "ship")
            with pytest.raises(StaleStepRunError):
                claim.complete({})
            assert not claim.ended

    @blocking_only
    def test_block_may_be_left_in_another_context(self, worker: Worker, others: StepRunStore) -> None:
        """Frameworks run the setup and teardown half of a generator in two copies of their context."""
        claim = worker.claim().claim
        contextvars.copy_context().run(claim.__enter__)
        claim.complete({"receipt": 7})

        contextvars.copy_context().run(claim.__exit__, None, None, None)

        assert stored(others).status is StepStatus.COMPLETED

    @asyncio_only
    def test_block_may_be_left_in_another_task(self, worker: Worker, others: StepRunStore) -> None:
        """Frameworks run the setup and teardown half of an asyncio fixture in two tasks."""

        async def main() -> None:
            claim = worker.plain_store.claim_step("run", "pay", {})
            await asyncio.create_task(claim.__aenter__())
            await claim.complete({"receipt": 7})
            await asyncio.create_task(claim.__aexit__(None, None, None))

        cast("asyncio.Runner", worker.runner).run(main())

        assert stored(others).status is StepStatus.COMPLETED
