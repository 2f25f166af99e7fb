"""`queue_completion`: a step is completed and the next job enqueued in one transaction."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from rq import Retry
from rq.job import Job
from support import rq_jobs
from support.rq_harness import RQ_MARKS, Harness

from squidstep_redis import InvalidArgumentError, PayloadError
from squidstep_redis.rq import queue_completion

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS


def test_horse_killed_before_the_commit_has_enqueued_nothing(harness: Harness) -> None:
    harness.start(release_killed=True)
    job = harness.enqueue(rq_jobs.order, 7, retry=Retry(max=1))
    harness.reached("before the commit").kill()
    retry = harness.reached("before the commit")
    assert harness.store.step_statuses("order-7") == {"order": "running"}
    assert harness.job_ids() == {job.id}
    retry.resume()
    harness.reached("after the commit").resume()

    harness.wait_finished(job)
    assert job.return_value() == {"ordered": 7}
    check_delivered_once(harness, job, ["lease_expired", "completed"])


def test_horse_killed_after_the_commit_has_enqueued_once(harness: Harness) -> None:
    harness.start(release_killed=True)
    job = harness.enqueue(rq_jobs.order, 7, retry=Retry(max=1))
    harness.reached("before the commit").resume()
    harness.reached("after the commit").kill()

    harness.wait_finished(job)
    assert job.return_value() == {"ordered": 7}
    check_delivered_once(harness, job, ["completed"])


def check_delivered_once(harness: Harness, job: Job, outcomes: list[str]) -> None:
    (next_id,) = harness.job_ids() - {job.id}
    next_job = harness.queue.fetch_job(next_id)
    assert next_job is not None
    harness.wait_finished(next_job)
    assert harness.effects() == {"deliver": 1}
    harness.wait_finished(twice := harness.enqueue(rq_jobs.deliver, 7))

    assert twice.return_value() == next_job.return_value() == "7 is on its way"
    assert harness.effects() == {"deliver": 1}
    assert [str(attempt.outcome) for attempt in harness.store.attempts("order-7", "order")] == outcomes
    assert harness.store.completed_steps("order-7") == ["order", "deliver"]
    assert harness.store.step_statuses("order-7")["bill"] == "pending"


def test_queue_completion_is_rejected_outside_a_step(harness: Harness) -> None:
    with harness.connection.pipeline() as pipeline, pytest.raises(InvalidArgumentError, match="while it runs"):
        queue_completion(pipeline, 7)


def test_unstorable_result_queues_nothing(harness: Harness) -> None:
    def work(_: dict[str, Any]) -> dict[str, Any]:
        with harness.connection.pipeline() as pipeline:
            with pytest.raises(PayloadError, match="result"):
                queue_completion(pipeline, Decimal(1))
            assert len(pipeline) == 0
        return {"went": "on"}

    assert harness.store.run_step("run", "pay", work, {}) == {"went": "on"}
