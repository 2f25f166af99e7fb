"""Job functions that return RQ's own Retry: as without the decorator, the job runs again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import rq
from rq import Queue, Retry
from rq.job import JobStatus
from support import rq_retry_jobs
from support.rq_harness import KINDS_OF_WORKER, RQ_MARKS, THE_JOB, Harness, result_of

from squidstep_redis import StepRunStore
from squidstep_redis.rq import configure

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS

each_function = pytest.mark.parametrize(
    "function", [rq_retry_jobs.fetch, rq_retry_jobs.fetch_asyncio, rq_retry_jobs.fetch_in_run]
)


@each_function
@pytest.mark.parametrize("kind", KINDS_OF_WORKER)
def test_returned_retry_runs_the_job_again(harness: Harness, function: Callable[..., Any], kind: str) -> None:
    harness.start(kind)
    job = harness.enqueue(function, 2, 5, 0)
    harness.until(lambda: job.get_status() == JobStatus.FINISHED and harness.is_at_rest(job))

    assert job.return_value() == "the page"
    assert harness.effects()["fetch"] == 3
    assert harness.effects()["prepare"] == (function is rq_retry_jobs.fetch_in_run)
    assert harness.outcomes(job, "fetch") == ["released", "released", "completed"]  # more than max_attempts


@each_function
def test_delay_of_a_returned_retry_is_kept(harness: Harness, function: Callable[..., Any]) -> None:
    before = time.time()
    harness.start()
    job = harness.enqueue(function, 1, 5, 600)
    harness.until(lambda: harness.is_scheduled(job))
    at = harness.connection.zscore(harness.queue.scheduled_job_registry.key, job.id)
    assert isinstance(at, float)
    assert 599 <= at - before <= 601 + time.time() - before
    step_run = harness.store.get_step_run(job.id, "fetch")
    assert step_run is not None
    assert step_run.status == "pending"

    harness.run_scheduled_now(job)
    harness.wait_finished(job)
    assert job.return_value() == "the page"


def test_maximum_of_a_returned_retry_fails_the_job(harness: Harness) -> None:
    harness.start()
    job = harness.enqueue(rq_retry_jobs.fetch, 2, 1, 0)
    harness.until(lambda: job.get_status() == JobStatus.FAILED and harness.is_at_rest(job))
    assert harness.outcomes(job, "fetch") == ["released", "released"]

    rq.requeue_job(job.id, connection=harness.connection)
    harness.wait_finished(job)
    assert job.return_value() == "the page"


def test_busy_steps_use_none_of_the_returned_retries(harness: Harness) -> None:
    held, _ = harness.store.begin_step(THE_JOB, "fetch", {"most": 1}, lease=600)
    harness.start()
    job = harness.enqueue(rq_retry_jobs.fetch_after_a_wait, 1, job_id=THE_JOB)
    for looks in (1, 2, 3):
        harness.until(lambda looks=looks: harness.looks(job) >= looks and harness.is_scheduled(job))
        harness.run_scheduled_now(job)
    harness.store.expire_claim(held)
    harness.until(lambda: job.get_status() == JobStatus.FINISHED and harness.is_at_rest(job))

    assert job.return_value() == "the page"
    assert harness.outcomes(job, "fetch") == ["lease_expired", "released", "completed"]


def test_returned_retry_of_a_lost_claim_is_discarded(harness: Harness, queue: Queue) -> None:
    assert result_of(queue.enqueue(rq_retry_jobs.fetch_too_late)) == "the winner's page"


def test_retry_is_returned_outside_a_job(harness: Harness) -> None:
    configure(harness.url)
    for executed in (1, 2):
        assert isinstance(rq_retry_jobs.fetch_page(7), Retry)
        assert harness.effects() == {"fetch": executed}
    with StepRunStore.from_url(harness.url) as store:
        assert [attempt.outcome for attempt in store.attempts("page-7", "fetch")] == ["released", "released"]
