"""Redis is killed while jobs run, and comes back with all it has acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rq import Retry
from rq.job import Job, JobStatus
from support import rq_jobs
from support.rq_harness import RQ_MARKS, Harness, PausedJob
from support.rq_workers import WorkerProcess
from support.servers import find_binary

from squidstep_redis.embedded import EmbeddedServer

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS


@pytest.fixture
def rq_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    options = {"appendonly": "yes", "appendfsync": "always"}
    binary, directory = find_binary("valkey"), tmp_path / "server"
    with EmbeddedServer(binary=binary, options=options, port=0, directory=directory) as server:
        yield server


def test_no_step_is_lost_or_repeated(harness: Harness, rq_server: EmbeddedServer) -> None:
    def begin(
        function: Callable[[int], Any], amount: int, checkpoint: str, interval: int
    ) -> tuple[WorkerProcess, Job, PausedJob]:
        worker = harness.start(job_monitoring_interval=interval)
        return worker, harness.enqueue(function, amount, retry=Retry(max=3)), harness.reached(checkpoint)

    # The worker with the short interval sees that Redis is away, and quits while its horse is at work.
    charged = [begin(rq_jobs.charge_and_pause, interval, "charged", interval) for interval in (1, 30)]
    # The first of these jobs fails at its next step, the second fails to report its end to RQ. Both run again.
    shipped = [
        begin(rq_jobs.ship_impatiently, 7, "between", 1),
        begin(rq_jobs.ship_and_pause, 8, "shipped", 1),
    ]

    rq_server.kill()
    for _, _, paused in charged + shipped:
        paused.resume()
    for _, _, paused in shipped:
        paused.wait_dead()
    for worker, _, _ in (charged[0], *shipped):
        worker.wait_dead()
    rq_server.start()
    harness.expire_scheduler_lock()  # the schedulers have died, too
    harness.redeliver_abandoned()
    for checkpoint in ("between", "shipped"):
        harness.reached(checkpoint).resume()

    for amount, (_, job, _) in zip((1, 30), charged, strict=True):
        wait_finished(harness, job)
        assert all(result == {"charged": amount} for result in harness.results(job))
        assert harness.outcomes(job, "charge") == ["completed"]
    for (_, job, _), result in zip(shipped, (["parcel of 7", "parcel of 7, announced"], "parcel of 8"), strict=True):
        wait_finished(harness, job)
        assert harness.results(job) == [result]
        assert harness.outcomes(job, "reserve") == ["completed"]
    assert harness.effects() == {"charge": 2, "reserve": 2, "announce": 1}


def wait_finished(harness: Harness, job: Job) -> None:
    """Waits until all runs of the job have ended: RQ may have redelivered it while its first run went on."""

    def is_finished() -> bool:
        if results := harness.results(job):
            harness.run_scheduled_now(job)
        return bool(results) and harness.is_at_rest(job)

    harness.until(is_finished)
    assert job.get_status() == JobStatus.FINISHED
