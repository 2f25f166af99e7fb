"""Jobs that RQ runs more than once: completed steps return their stored results, and no step takes effect twice."""

from __future__ import annotations

import pytest
import rq
from rq import Retry
from support import rq_jobs
from support.rq_harness import RQ_MARKS, RQ_VERSION, SINCE, THE_JOB, Harness

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS


def test_finished_job_returns_the_stored_result(harness: Harness) -> None:
    harness.start()
    job = harness.enqueue(rq_jobs.charge_at_once, 7)
    harness.wait_finished(job)
    harness.queue.enqueue_job(job)
    harness.wait_finished(job, times=2)

    assert harness.results(job) == [{"charged": 7}] * 2
    assert harness.effects() == {"charge": 1}


def test_failed_job_makes_another_attempt(harness: Harness) -> None:
    harness.start()
    job = harness.enqueue(rq_jobs.stumble, 7, 1)
    assert "LookupError: no such card" in harness.wait_failed(job)
    job.requeue()
    harness.wait_finished(job)

    assert job.return_value() == {"charged": 7}
    assert harness.outcomes(job, "charge") == ["failed", "completed"]
    assert harness.effects() == {"charge": 1}


def test_job_makes_no_attempts_beyond_max_attempts(harness: Harness) -> None:
    harness.start()
    job = harness.enqueue(rq_jobs.stumble, 7, 9, retry=Retry(max=1))
    harness.until(lambda: harness.outcomes(job, "charge") == ["failed"] * 2)
    harness.wait_failed(job)
    rq.requeue_job(job.id, connection=harness.connection)
    harness.until(lambda: "StepExhaustedError" in harness.wait_failed(job))

    assert harness.outcomes(job, "charge") == ["failed"] * 2
    assert harness.effects() == {}


@pytest.mark.parametrize("as_new", [False, True], ids=["same job", "new job"])
def test_job_enqueued_while_it_runs_is_rescheduled(harness: Harness, as_new: bool) -> None:
    harness.start()
    harness.start()
    job = harness.enqueue(rq_jobs.charge, 7, job_id=THE_JOB)
    first = harness.reached("charging")
    if as_new:
        harness.enqueue(rq_jobs.charge, 7, job_id=THE_JOB)
    else:
        harness.queue.enqueue_job(job)
    harness.until(lambda: harness.is_scheduled(job))
    first.resume()
    harness.until(lambda: harness.results(job))
    harness.run_scheduled_now(job)

    harness.wait_finished(job, times=2)
    assert harness.results(job) == [{"charged": 7}] * 2
    assert harness.outcomes(job, "charge") == ["completed"]
    assert harness.effects() == {"charge": 1}


def test_job_enqueued_while_it_runs_can_wait(harness: Harness) -> None:
    harness.start()
    harness.start()
    job = harness.enqueue(rq_jobs.charge_or_wait, 7)
    first = harness.reached("charging")
    harness.queue.enqueue_job(job)
    harness.until(lambda: harness.connection.zcard(harness.queue.started_job_registry.key) == 2)
    first.resume()

    harness.wait_finished(job, times=2)
    assert harness.results(job) == [{"charged": 7}] * 2
    assert harness.outcomes(job, "charge") == ["completed"]
    assert harness.effects() == {"charge": 1}


def test_job_enqueued_twice_takes_effect_once(harness: Harness) -> None:
    job, _ = (harness.enqueue(rq_jobs.charge_at_once, 7, job_id=THE_JOB) for _ in range(2))
    harness.start()

    harness.wait_finished(job, times=2)
    assert harness.results(job) == [{"charged": 7}] * 2
    assert harness.effects() == {"charge": 1}


@pytest.mark.skipif(SINCE["Repeat"] > RQ_VERSION, reason="this RQ has no Repeat")
def test_each_repeat_is_a_separate_run(harness: Harness) -> None:
    harness.start()
    job = harness.enqueue(rq_jobs.charge_at_once, 7, repeat=rq.Repeat(times=2))
    harness.wait_finished(job, times=3)
    assert harness.effects() == {"charge": 3}
    job.refresh()
    harness.queue.enqueue_job(job)  # the last repeat, once more
    harness.wait_finished(job, times=4)

    assert harness.effects() == {"charge": 3}
    for run_id in (f"{job.id}#2", f"{job.id}#1", f"{job.id}#0"):
        assert harness.store.completed_steps(run_id) == ["charge"]
    assert harness.store.get_run(job.id) == []
