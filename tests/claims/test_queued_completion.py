"""`queue_completion`: a claim is completed within a transaction of the caller."""

from __future__ import annotations

from typing import Any, cast

import pytest
from support.backends import Bench
from support.claims import SHORT_LEASE, Worker, outcomes, take_over
from support.records import stored

from squidstep_redis import (
    AsyncClaim,
    Claim,
    InvalidArgumentError,
    Outcome,
    PayloadError,
    StaleStepRunError,
    StepRunStore,
    StepStatus,
    current_claim,
)


@pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")
class TestQueuedCompletion:
    def test_completion_commits_with_the_other_commands(
        self, bench: Bench, worker: Worker, others: StepRunStore
    ) -> None:
        key = f"{bench.prefix}:own"
        with worker.claim() as claim:
            pipeline = worker.store.client.pipeline(transaction=True)
            pipeline.set(key, "mine")
            queued = claim.queue_completion(pipeline, {"items": (1, 2)}, schedule={"ship": {}})
            assert stored(others).status is StepStatus.RUNNING
            completed = queued.result(worker.finish(pipeline.execute()))

            assert (claim.ended, claim.output) == (True, {"items": [1, 2]})
        assert completed == stored(others)
        assert stored(others, step="ship").status is StepStatus.PENDING
        assert bench.backend.raw.get(key) == b"mine"
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_run_step_returns_the_queued_output(self, worker: Worker, others: StepRunStore) -> None:
        async def work_asyncio(input: dict[str, Any]) -> dict[str, Any]:
            pipeline = worker.plain_store.client.pipeline()
            queued = cast("AsyncClaim", current_claim()).queue_completion(pipeline, {"by": "work"})
            queued.result(await pipeline.execute())
            return {"not": "kept"}

        def work(input: dict[str, Any]) -> dict[str, Any]:
            pipeline = worker.plain_store.client.pipeline()
            queued = cast("Claim", current_claim()).queue_completion(pipeline, {"by": "work"})
            queued.result(pipeline.execute())
            return {"not": "kept"}

        fn = cast("Any", work if worker.runner is None else work_asyncio)
        assert worker.store.run_step("run", "pay", fn, {}) == {"by": "work"}
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_output_that_cannot_be_encoded_queues_nothing(self, worker: Worker) -> None:
        with worker.claim() as claim:
            pipeline = worker.store.client.pipeline()
            with pytest.raises(PayloadError):
                claim.queue_completion(pipeline, {"receipt": object()})
            assert len(pipeline) == 0
            claim.complete({})

    def test_block_whose_transaction_never_ran_is_recorded_as_failed(
        self, worker: Worker, others: StepRunStore
    ) -> None:
        with pytest.raises(InvalidArgumentError, match="ended without complete"), worker.claim() as claim:
            claim.queue_completion(worker.store.client.pipeline(), {"receipt": 7})

        assert outcomes(others) == [Outcome.FAILED]

    def test_completion_of_a_lost_claim_is_stale(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            winner = take_over(others)
            pipeline = worker.store.client.pipeline()
            queued = claim.queue_completion(pipeline, {"by": "zombie"})
            replies = worker.finish(pipeline.execute())
            with pytest.raises(StaleStepRunError) as caught:
                queued.result(replies)
            assert caught.value.current == winner == stored(others)
            with pytest.raises(StaleStepRunError):
                claim.complete({"by": "zombie"})

    @pytest.mark.slow
    def test_extension_before_the_reply_is_read_reports_no_loss(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim("ship", lease=SHORT_LEASE) as other, worker.claim(lease=SHORT_LEASE) as claim:
            pipeline = worker.store.client.pipeline()
            queued = claim.queue_completion(pipeline, {"receipt": 7})
            replies = worker.finish(pipeline.execute())
            worker.wait_for_extension(other)
            worker.wait_for_extension(other)
            queued.result(replies)

            assert (claim.lost.is_set(), claim.ended) == (False, True)
            other.complete({})
