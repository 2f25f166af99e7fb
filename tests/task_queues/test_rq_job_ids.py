"""Job ids that do not stand for one execution: ids that the caller chose, and jobs that rq-scheduler repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rq import Queue, Retry
from rq.job import Job, JobStatus
from rq.utils import utcparse
from support import rq_jobs, rq_retry_jobs
from support.rq_harness import RQ_MARKS, Harness, assert_contains, result_of, traceback_of

from squidstep_redis import StepRunStore

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS

each_mark = pytest.mark.parametrize(
    "meta", [{"interval": 60}, {"interval": 60, "repeat": 5}, {"cron_string": "* * * * *", "use_local_timezone": False}]
)


class TestChosenIds:
    @pytest.mark.parametrize("job_id", ["nightly", "2ed6657d-e927-568b-95e1-2665a8aea6a2"], ids=["text", "UUID 5"])
    def test_each_enqueue_is_a_separate_run(self, harness: Harness, queue: Queue, job_id: str) -> None:
        for night in (1, 2, 3):
            assert result_of(queue.enqueue(rq_jobs.charge_at_once, night, job_id=job_id)) == {"charged": night}
        assert harness.effects() == {"charge": 3}

    def test_redelivery_belongs_to_the_same_run(self, harness: Harness, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.without_decorator, 7, job_id="nightly")
        again = Job.fetch(job.id, connection=queue.connection)
        assert result_of(queue.enqueue_job(again)) == ["parcel of 7", "{'charged': 7}"]
        assert harness.effects() == {"reserve": 1, "charge": 1}
        (run,) = StepRunStore(queue.connection).runs().runs
        assert run.run_id == f"nightly@{job.created_at:%Y-%m-%dT%H:%M:%S.%fZ}"

    def test_run_id_decides_if_there_is_one(self, harness: Harness, queue: Queue) -> None:
        for _ in range(2):
            assert result_of(queue.enqueue(rq_jobs.charge_order, 7, job_id="nightly")) == "7 eu"
        assert harness.effects() == {"charge 7 eu": 1}

    def test_worker_continues_the_run_after_a_failure(self, harness: Harness) -> None:
        harness.start()
        job = harness.enqueue(rq_jobs.stumble, 7, 1, job_id="nightly", retry=Retry(max=1))
        harness.wait_finished(job)
        (run,) = harness.store.runs().runs
        assert [attempt.outcome for attempt in harness.store.attempts(run.run_id, "charge")] == ["failed", "completed"]


def tick(queue: Queue, job: Job) -> None:
    """Enqueues a job as rq-scheduler does."""
    fetched = Job.fetch(job.id, connection=queue.connection)
    queue.enqueue_job(fetched)


class TestJobsThatRqSchedulerRepeats:
    @each_mark
    @pytest.mark.parametrize("function", [rq_jobs.charge_at_once, rq_jobs.ship_at_once])
    def test_each_tick_is_a_separate_run(
        self, harness: Harness, meta: dict[str, Any], function: Callable[..., Any]
    ) -> None:
        harness.start()
        job = harness.enqueue(function, 7, meta=meta)
        harness.wait_finished(job)
        for ticks in (2, 3):
            tick(harness.queue, job)
            harness.wait_finished(job, times=ticks)
        assert harness.effects().total() == 3

    def test_returned_retry_continues_its_tick(self, harness: Harness) -> None:
        harness.start()
        job = harness.enqueue(rq_retry_jobs.report_twice, meta={"interval": 60})
        harness.wait_finished(job)
        assert harness.effects() == {"collect": 1, "report": 2}
        tick(harness.queue, job)
        harness.wait_finished(job, times=2)
        assert harness.effects() == {"collect": 2, "report": 4}
        runs = [run.run_id for run in harness.store.runs().runs]
        assert [harness.store.completed_steps(run_id) for run_id in runs] == [["collect", "report"]] * 2
        assert Job.fetch(job.id, connection=harness.connection).meta == {"interval": 60}

    @pytest.mark.skipif(
        utcparse("2027-01-01T00:00:00.000000Z").tzinfo is None,
        reason="this RQ fails if a job is read again while it runs",
    )
    def test_refreshed_job_continues_its_tick(self, harness: Harness) -> None:
        """RQ then reads another time of its start than the worker set."""
        harness.start()
        job = harness.enqueue(rq_retry_jobs.report_refreshed, meta={"interval": 60})
        harness.wait_finished(job)
        assert harness.effects() == {"collect": 1, "report": 2}
        assert len(harness.store.runs().runs) == 1

    def test_retry_is_rejected_without_a_run_id(self, harness: Harness, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.charge_at_once, 7, meta={"interval": 60}, retry=Retry(max=1))
        assert_contains(traceback_of(job), "InvalidArgumentError: run_id: ", "rq-scheduler", job.id)
        assert harness.effects() == {}
        assert result_of(queue.enqueue(rq_jobs.charge_order, 7, meta={"interval": 60}, retry=Retry(max=1))) == "7 eu"

    def test_failed_tick_does_not_keep_the_next_one(self, harness: Harness) -> None:
        harness.start()
        job = harness.enqueue(rq_jobs.charge_or_fail, "permanent", meta={"interval": 60})
        harness.wait_failed(job)
        tick(harness.queue, job)
        harness.until(lambda: harness.effects() == {"charge": 2})
        harness.until(lambda: job.get_status() == JobStatus.FAILED and harness.is_at_rest(job))
