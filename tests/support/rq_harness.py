"""A queue with real workers, and control over the checkpoints and effects of its jobs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import pytest
import redis
import rq
from rq.job import Job, JobStatus
from rq.results import Result
from rq.scheduler import RQScheduler

from squidstep_redis import StepRunStore
from squidstep_redis.claims.request import default_owner
from squidstep_redis.rq import release_killed_work_horse
from support.processes import is_alive
from support.rq_workers import DEADLINE, WorkerProcess, start_process

HOST: Final = default_owner().rpartition(":")[0]
RQ_VERSION: Final = tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("rq"))[:3])
# SpawnWorker came with 2.2, but works with redis-py 8 only from 2.11.
SINCE: Final = {"SpawnWorker": (2, 11), "Repeat": (2, 3)}

# Job ids as RQ generates them, so that the run id is the job id.
THE_JOB: Final = "5f0c4f0e-7d5c-4c39-9d6a-3d1f0f6f2a01"
ANOTHER_JOB: Final = "5f0c4f0e-7d5c-4c39-9d6a-3d1f0f6f2a02"

RQ_MARKS: Final = [pytest.mark.usefixtures("fresh_stores")]
LEAVES_LOOPS_OPEN: Final = RQ_VERSION < (3,)  # that of a coroutine function; its warnings must not reach a later test
if LEAVES_LOOPS_OPEN:
    RQ_MARKS.append(pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning"))
    RQ_MARKS.append(pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"))

KINDS_OF_WORKER: Final = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            SINCE.get(kind, ()) > RQ_VERSION, reason=f"this RQ has no {kind} that works with this redis-py"
        ),
    )
    for kind in ("Worker", "SimpleWorker", "SpawnWorker")
]


def assert_contains(text: str, *parts: str) -> None:
    """Asserts that the text has each of the parts."""
    for part in parts:
        assert part in text


def traceback_of(job: Job) -> str:
    """Returns the traceback of a job that has failed."""
    assert job.get_status() == JobStatus.FAILED
    result = job.latest_result()
    assert result is not None
    return str(result.exc_string)


def result_of(job: Job) -> Any:
    """Returns the result of a job that has finished."""
    assert job.get_status() == JobStatus.FINISHED, traceback_of(job)
    return job.return_value()


class PausedJob:
    """A job that has reached a checkpoint and waits there.

    Attributes:
        checkpoint: the name of the checkpoint.
        pid: the process of the job.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(DEADLINE)
        with connection.makefile("rb") as lines:
            pid, checkpoint = lines.readline().decode().split(maxsplit=1)
        self.checkpoint = checkpoint.strip()
        self.pid = int(pid)

    def resume(self) -> None:
        """Lets the job continue."""
        self._connection.sendall(b"!")

    def kill(self) -> None:
        """Kills the job's process, by SIGKILL, and waits until it is dead."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait_dead()

    def wait_dead(self) -> None:
        """Waits until the job's process is dead."""
        deadline = time.monotonic() + DEADLINE
        while is_alive(self.pid):
            assert time.monotonic() < deadline, f"process {self.pid} did not end within {DEADLINE} seconds"
            time.sleep(0.005)

    def close(self) -> None:
        self._connection.close()


class Harness:
    """A queue with real workers, and control over the jobs in `rq_jobs`.

    Attributes:
        url: of the server.
        connection: a client for RQ.
        queue: the queue of the workers.
        store: the store of the steps.
        environment: the variables that the jobs need.
    """

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self.connection = redis.Redis.from_url(url)
        self.queue = rq.Queue("steps", connection=self.connection)
        self.store = StepRunStore.from_url(url)
        self._directory = directory
        self._effects = directory / "effects"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.02)
        self._jobs: list[PausedJob] = []
        self._unclaimed: list[PausedJob] = []
        self._workers: list[WorkerProcess] = []
        self.environment = {
            "RQ_JOBS_PORT": str(self._listener.getsockname()[1]),
            "RQ_JOBS_EFFECTS": str(self._effects),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for worker in self._workers:
            worker.kill_all()
        for job in self._jobs:
            job.close()
        self._listener.close()
        self.store.close()
        self.connection.close()
        for log in sorted(self._directory.glob("worker-*.log")):
            print(f"--- {log.name}\n{log.read_text()[-10_000:]}")  # noqa: T201 -- pytest shows it where a test fails

    def start(
        self,
        kind: str = "Worker",
        *,
        with_scheduler: bool = True,
        burst: bool = False,
        release_killed: bool = False,
        worker_ttl: int = 16,
        job_monitoring_interval: int = 30,
    ) -> WorkerProcess:
        """Starts a worker. `until` and `reached` restart it if it quits, as a supervisor does."""
        log = self._directory / f"worker-{len(self._workers)}.log"
        options: dict[str, Any] = {
            "with_scheduler": with_scheduler,
            "burst": burst,
            "worker_ttl": worker_ttl,
            "job_monitoring_interval": job_monitoring_interval,
            "work_horse_killed_handler": release_killed_work_horse if release_killed else None,
        }
        self._workers.append(
            WorkerProcess(
                lambda: start_process(kind, self.url, self.queue.name, log, self.environment, options),
                supervised=not burst,
            )
        )
        return self._workers[-1]

    def until(self, condition: Callable[[], object], timeout: float = DEADLINE) -> None:
        """Waits until the condition holds, and restarts the workers that quit meanwhile."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{condition} did not hold within {timeout} seconds"
            for worker in self._workers:
                if worker.supervised and not worker.is_alive():
                    worker.start()
            time.sleep(0.01)

    def reached(self, checkpoint: str) -> PausedJob:
        """Waits for the next job that reaches this checkpoint."""
        found: list[PausedJob] = []

        def is_reached() -> bool:
            with contextlib.suppress(TimeoutError):
                self._unclaimed.append(PausedJob(self._listener.accept()[0]))
                self._jobs.append(self._unclaimed[-1])
            found.extend(job for job in self._unclaimed if job.checkpoint == checkpoint)
            return bool(found)

        is_reached.__name__ = f"a job at checkpoint {checkpoint!r}"
        self.until(is_reached)
        self._unclaimed.remove(found[0])
        return found[0]

    def effects(self) -> Counter[str]:
        """Returns how often each effect has happened."""
        with contextlib.suppress(FileNotFoundError):
            return Counter(self._effects.read_text().splitlines())
        return Counter()

    # The passing of time

    def expire_leases(self) -> None:
        """Expires the leases of all claims."""
        for claim in self.store.live_claims():
            self.store.expire_claim(claim)

    def run_scheduled_now(self, job: Job) -> None:
        """Reschedules a scheduled job to now."""
        self.connection.zadd(self.queue.scheduled_job_registry.key, {job.id: 1}, xx=True)

    def redeliver_abandoned(self) -> None:
        """Runs RQ's cleanup as if no worker had sent a heartbeat for two minutes."""
        self.queue.started_job_registry.cleanup(timestamp=time.time() + 120)

    def expire_scheduler_lock(self) -> None:
        """Expires the lock of a dead scheduler, which would otherwise last for a minute."""
        self.connection.delete(RQScheduler.get_locking_key(self.queue.name))

    # The state of RQ and of the store

    def enqueue(self, function: Callable[..., Any], *args: Any, **options: Any) -> Job:
        return self.queue.enqueue(function, *args, **options)

    def is_scheduled(self, job: Job) -> bool:
        # RQ 2 does not write both in one transaction.
        in_registry = self.connection.zscore(self.queue.scheduled_job_registry.key, job.id) is not None
        return in_registry and job.get_status() == JobStatus.SCHEDULED

    def looks(self, job: Job) -> int:
        """Returns how often the job has found its step claimed by the same other worker."""
        meta: dict[str, Any] = job.get_meta(refresh=True)
        return int(meta.get("squidstep_redis", {}).get("looks", 0))

    def is_at_rest(self, job: Job) -> bool:
        """Returns whether no run of the job is running, queued or scheduled."""
        with self.connection.pipeline() as pipeline:
            pipeline.lrange(self.queue.key, 0, -1)
            pipeline.lrange(self.queue.intermediate_queue_key, 0, -1)
            pipeline.zrange(self.queue.scheduled_job_registry.key, 0, -1)
            pipeline.zrange(self.queue.started_job_registry.key, 0, -1)
            *ids, started = pipeline.execute()
        known = {id.decode() for found in ids for id in found} | {entry.decode().split(":")[0] for entry in started}
        return job.id not in known

    def wait_finished(self, job: Job, times: int = 1) -> None:
        """Waits until the job has succeeded this many times, and is at rest as FINISHED."""
        self.until(lambda: len(self.results(job)) >= times and self.is_at_rest(job))
        assert job.get_status() == JobStatus.FINISHED
        assert len(self.results(job)) == times

    def wait_failed(self, job: Job) -> str:
        """Waits until the job is at rest as FAILED, and returns the traceback."""
        self.until(lambda: job.get_status() == JobStatus.FAILED and self.is_at_rest(job))
        return traceback_of(job)

    def results(self, job: Job) -> list[Any]:
        """Returns the results of the job's successful runs."""
        return [result.return_value for result in job.results() if result.type == Result.Type.SUCCESSFUL]

    def outcomes(self, job: Job, step: str) -> list[str]:
        """Returns the outcomes of the attempts at a step, in the job's own run."""
        return [str(attempt.outcome) for attempt in self.store.attempts(job.id, step)]

    def job_ids(self) -> set[str]:
        """Returns the ids of all jobs that RQ knows."""
        return {key.decode().rpartition(":")[2] for key in self.connection.scan_iter("rq:job:*", _type="hash")}
