"""RQ workers and work-horses that are killed or stopped: the step still takes effect once.

A killed work-horse cannot release its claim. Another worker takes the step over when the lease has expired, or at once
if the killed horse's worker uses `release_killed_work_horse`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import redis
from rq import Retry
from rq.command import send_stop_job_command
from rq.job import Job, JobStatus
from support import rq_jobs
from support.rq_harness import HOST, KINDS_OF_WORKER, RQ_MARKS, RQ_VERSION, THE_JOB, Harness, assert_contains

from squidstep_redis import StepRunStore
from squidstep_redis.rq import configure, release_killed_work_horse

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS


def test_step_of_killed_horse_is_busy_until_its_lease_expires(harness: Harness) -> None:
    harness.start()
    job = harness.enqueue(rq_jobs.charge, 7, retry=Retry(max=3))
    harness.reached("charging").kill()

    harness.until(lambda: harness.is_scheduled(job))  # RQ ran the job again, and the step was busy
    job.refresh()
    assert job.retries_left == 2  # RQ counts the killed horse, and not the busy step
    harness.expire_leases()
    harness.run_scheduled_now(job)
    harness.reached("charging").resume()

    harness.wait_finished(job)
    assert job.return_value() == {"charged": 7}
    assert harness.outcomes(job, "charge") == ["lease_expired", "completed"]
    assert harness.effects() == {"charge": 1}


def test_lease_of_killed_horse_expires_by_itself(harness: Harness) -> None:
    harness.start()
    job = harness.enqueue(rq_jobs.charge_with_a_short_lease, 7, retry=Retry(max=3))
    harness.reached("charging").kill()
    harness.reached("charging").resume()

    harness.wait_finished(job)
    assert job.return_value() == {"charged": 7}
    assert harness.outcomes(job, "charge") == ["lease_expired", "completed"]
    assert harness.effects() == {"charge": 1}


def test_stopped_job_can_be_requeued_after_its_lease(harness: Harness) -> None:
    harness.start(release_killed=True)  # RQ does not call the handler for a stopped job
    job = harness.enqueue(rq_jobs.charge, 7, retry=Retry(max=3))
    harness.reached("charging")
    send_stop_job_command(harness.connection, job.id)
    harness.until(lambda: job.get_status() == JobStatus.STOPPED and harness.is_at_rest(job))
    assert harness.outcomes(job, "charge") == ["running"]

    job.requeue()
    harness.until(lambda: harness.is_scheduled(job))
    harness.expire_leases()
    harness.run_scheduled_now(job)
    harness.reached("charging").resume()

    harness.wait_finished(job)
    assert job.return_value() == {"charged": 7}
    assert harness.outcomes(job, "charge") == ["lease_expired", "completed"]
    assert harness.effects() == {"charge": 1}


@pytest.mark.parametrize("function", [rq_jobs.ship, rq_jobs.ship_asyncio], ids=["function", "coroutine"])
def test_horse_killed_between_two_steps_leaves_the_first_completed(
    harness: Harness, function: Callable[..., Any]
) -> None:
    harness.start(release_killed=True)
    job = harness.enqueue(function, 7, retry=Retry(max=1))
    harness.reached("between").kill()
    assert harness.store.step_statuses(job.id) == {"reserve": "completed"}
    harness.reached("between").resume()

    harness.wait_finished(job)
    assert job.return_value() == ["parcel of 7", "parcel of 7, announced"]
    assert harness.store.completed_steps(job.id) == ["reserve", "announce"]
    assert harness.outcomes(job, "reserve") == harness.outcomes(job, "announce") == ["completed"]
    assert harness.effects() == {"reserve": 1, "announce": 1}


def test_horse_that_outlives_its_worker_completes_the_step(harness: Harness) -> None:
    worker = harness.start(with_scheduler=False)
    job = harness.enqueue(rq_jobs.charge, 7, retry=Retry(max=3))
    orphan = harness.reached("charging")
    worker.kill()
    harness.redeliver_abandoned()
    harness.start()

    harness.until(lambda: harness.is_scheduled(job))  # the second worker found the step busy
    orphan.resume()
    harness.until(lambda: harness.results(job))
    harness.run_scheduled_now(job)

    harness.wait_finished(job, times=2)
    assert harness.results(job) == [{"charged": 7}] * 2
    assert harness.outcomes(job, "charge") == ["completed"]
    assert harness.effects() == {"charge": 1}


def test_step_of_killed_worker_and_horse_is_executed_again(harness: Harness) -> None:
    worker = harness.start(with_scheduler=False)
    job = harness.enqueue(rq_jobs.charge_with_a_short_lease, 7, retry=Retry(max=3))
    horse = harness.reached("charging")
    worker.kill()
    horse.kill()
    harness.redeliver_abandoned()
    harness.start()
    harness.reached("charging").resume()

    harness.wait_finished(job)
    assert job.return_value() == {"charged": 7}
    assert harness.outcomes(job, "charge") == ["lease_expired", "completed"]
    assert harness.effects() == {"charge": 1}


class TestReleaseKilledWorkHorse:
    def test_releases_the_step_at_once_each_time(self, harness: Harness) -> None:
        worker = harness.start(release_killed=True)
        job = harness.enqueue(rq_jobs.charge, 7, retry=Retry(max=3))
        harness.reached("charging").kill()
        harness.reached("charging").kill()
        if RQ_VERSION <= (2, 1, 0):  # its worker quits when a job's horse is killed for the second time
            worker.wait_dead()
            harness.redeliver_abandoned()
        harness.reached("charging").resume()

        harness.wait_finished(job)
        assert job.return_value() == {"charged": 7}
        assert harness.outcomes(job, "charge") == ["lease_expired", "lease_expired", "completed"]
        assert harness.effects() == {"charge": 1}

    def test_releases_no_claims_of_other_horses(self, harness: Harness) -> None:
        harness.start(release_killed=True)
        job = harness.enqueue(rq_jobs.charge, 1)
        horse = harness.reached("charging")
        harness.start(release_killed=True)
        another = harness.enqueue(rq_jobs.charge, 2)
        another_horse = harness.reached("charging")
        owner = f"{HOST}:{horse.pid} {job.id}"
        another_owner = f"{HOST}:{another_horse.pid} {another.id}"
        assert {claim.owner for claim in harness.store.live_claims()} == {owner, another_owner}
        others = [
            None,
            f"{HOST}:{horse.pid}",
            f"{HOST}:{horse.pid} {another.id}",
            f"{HOST}:{horse.pid}1 {job.id}",
            f"{HOST}:1{horse.pid} {job.id}",
            f"another-{owner}",
            f"{owner}2",
        ]
        for index, name in enumerate(others):
            harness.store.begin_step(f"of another {index}", "pay", {}, lease=600, owner=name)
        harness.store.begin_step("also of the horse", "pay", {}, lease=600, owner=owner)

        horse.kill()
        assert "Work-horse terminated unexpectedly" in harness.wait_failed(job)

        assert {claim.run_id for claim in harness.store.lapsed_claims()} == {job.id, "also of the horse"}
        live = {claim.run_id for claim in harness.store.live_claims()}
        assert live == {another.id, *(f"of another {index}" for index in range(len(others)))}
        another_horse.resume()
        harness.wait_finished(another)
        assert harness.outcomes(another, "charge") == ["completed"]

    def test_logs_an_unreachable_server_and_raises_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        configure("redis://localhost:1", timeout=0.1)
        with caplog.at_level(logging.WARNING):
            release_killed_work_horse(Job(THE_JOB, connection=redis.Redis(port=1)), 7, 9, None)
        (record,) = caplog.records
        assert record.name == "squidstep_redis.rq"
        assert_contains(
            record.getMessage(), "could not release the claims of work-horse 7 of job " + THE_JOB + "; ", "localhost:1."
        )

    def test_logs_an_unexpected_error_and_raises_nothing(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(StepRunStore, "live_claims", lambda *_args, **_options: 1 / 0)
        release_killed_work_horse(Job(THE_JOB, connection=redis.Redis(port=1)), 7, 9, None)
        assert "they expire with their leases: division by zero" in caplog.text

    def test_sends_nothing_without_a_horse(self, caplog: pytest.LogCaptureFixture) -> None:
        release_killed_work_horse(Job(THE_JOB, connection=redis.Redis(port=1)), None, None, None)
        assert caplog.records == []


@pytest.mark.parametrize("kind", KINDS_OF_WORKER)
class TestEveryKindOfWorker:
    def test_claims_in_the_name_of_the_working_process(self, harness: Harness, kind: str) -> None:
        worker = harness.start(kind)
        job = harness.enqueue(rq_jobs.owner)
        harness.wait_finished(job)
        process, id = job.return_value().split()
        host, _, pid = process.rpartition(":")
        assert (host, id) == (HOST, job.id)
        assert (int(pid) == worker.pid) == (kind == "SimpleWorker")

    def test_has_its_own_client_in_each_process(self, harness: Harness, kind: str) -> None:
        harness.start(kind, worker_ttl=420)
        job = harness.enqueue(rq_jobs.clients)
        harness.wait_finished(job)
        found = job.return_value()
        assert found.pop("RQ's timeout") in ((415, None) if kind == "SpawnWorker" else (415,))
        assert found == {
            "is RQ's": False,
            "timeout": 3.0,
            "protocol": 2,
            "the same in this process": True,
            "another one in a fork": True,
        }

    def test_runs_coroutine_functions(self, harness: Harness, kind: str) -> None:
        harness.start(kind)
        job = harness.enqueue(rq_jobs.charge_asyncio, 7)
        harness.wait_finished(job)
        harness.queue.enqueue_job(job)
        harness.wait_finished(job, times=2)
        assert harness.results(job) == [{"charged": 7}] * 2
        assert harness.effects() == {"charge": 1}
