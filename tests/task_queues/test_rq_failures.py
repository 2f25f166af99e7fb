"""Jobs whose step fails permanently, or is to be retried later."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from rq import Retry
from support import rq_jobs
from support.rq_harness import RQ_MARKS, THE_JOB, Harness, assert_contains

from squidstep_redis import InvalidArgumentError
from squidstep_redis.rq import step, steps

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS

each_function = pytest.mark.parametrize(
    "function", [rq_jobs.charge_or_fail, rq_jobs.charge_or_fail_asyncio, rq_jobs.ship_or_fail]
)


@each_function
@pytest.mark.parametrize("error", ["permanent", "lookup"])
def test_a_permanent_failure_is_executed_once(harness: Harness, function: Callable[..., Any], error: str) -> None:
    job = harness.enqueue(function, error, job_id=THE_JOB, retry=Retry(max=2))
    harness.start()

    traceback = harness.wait_failed(job)
    assert_contains(traceback, "StepFailedError", "failed permanently in attempt 1")
    assert harness.effects() == {"charge": 1}
    assert harness.outcomes(job, "charge") == ["failed"]


def test_a_result_that_cannot_be_stored_is_not_computed_again(harness: Harness) -> None:
    job = harness.enqueue(rq_jobs.charge_set, 7, job_id=THE_JOB, retry=Retry(max=2))
    harness.start()

    assert_contains(harness.wait_failed(job), "StepFailedError", "output['result']")
    assert harness.effects() == {"charge": 1}


@each_function
def test_retry_later_reschedules_without_using_retries(harness: Harness, function: Callable[..., Any]) -> None:
    before = time.time()
    job = harness.enqueue(function, "later", job_id=THE_JOB, retry=Retry(max=1))
    harness.start()
    harness.until(lambda: harness.is_scheduled(job))
    at = harness.connection.zscore(harness.queue.scheduled_job_registry.key, job.id)
    assert isinstance(at, float)
    assert 599 <= at - before <= 600 + 60 + (time.time() - before) + 1

    harness.run_scheduled_now(job)  # too early: the step is not claimed, and the job is rescheduled
    harness.until(lambda: harness.is_scheduled(job))
    assert harness.outcomes(job, "charge") == ["failed"]
    harness.store.retry_step(THE_JOB, "charge")
    harness.run_scheduled_now(job)
    harness.wait_finished(job)
    job.refresh()
    assert (job.return_value(), job.retries_left) == ({"charged": 7}, 1)
    assert harness.effects() == {"charge": 2}


def test_a_delayed_step_reschedules_the_retry_of_its_job(harness: Harness) -> None:
    """RQ retries a job at once; the backoff of its step then delays it."""
    job = harness.enqueue(rq_jobs.charge_or_fail, "other", job_id=THE_JOB, retry=Retry(max=1))
    harness.start()
    harness.until(lambda: harness.is_scheduled(job))
    job.refresh()
    assert job.retries_left == 0
    assert harness.outcomes(job, "charge") == ["failed"]
    step_run = harness.store.get_step_run(THE_JOB, "charge")
    assert step_run is not None
    assert step_run.retry_at is not None


@pytest.mark.parametrize("decorator", [lambda **options: step("charge", **options), steps])
@pytest.mark.parametrize("options", [{"permanent": 1}, {"backoff": 60}], ids=["permanent", "backoff"])
def test_decorators_reject_invalid_settings(decorator: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{next(iter(options))}: "):
        decorator(**options)


def test_a_job_of_a_cancelled_run_is_not_executed(harness: Harness) -> None:
    harness.store.schedule_step(THE_JOB, "other", {})
    harness.store.cancel_run(THE_JOB, "wrong address")
    job = harness.enqueue(rq_jobs.charge_or_fail, "none", job_id=THE_JOB, retry=Retry(max=1))
    harness.start()

    assert_contains(harness.wait_failed(job), "RunCancelledError", "wrong address")
    assert not harness.effects()
    assert not harness.is_scheduled(job)
