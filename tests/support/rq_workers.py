"""Real RQ workers in processes of their own, and a desk at which their jobs report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, Self

import redis
import rq
import rq.worker
from rq.job import Job, JobStatus
from rq.results import Result

from squidstep_redis import StepRunStore
from squidstep_redis.rq import release_killed_work_horse

DEADLINE: Final = 30.0
RQ_VERSION: Final = tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("rq"))[:3])

# The workers fork from a process of one thread, which has imported already what takes time.
_processes: Any = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["__main__", "asyncio", "rq", "squidstep_redis.rq"])


class Impatient:
    """Lets others notice within seconds that it was killed, where RQ takes a minute more."""

    def get_heartbeat_ttl(self: Any, *_args: Any, **_options: Any) -> int:
        return self.job_monitoring_interval + 3


class ImpatientWorker(Impatient, rq.Worker):
    pass


WORKERS: Final[dict[str, Any]] = {"Worker": ImpatientWorker, "SimpleWorker": rq.SimpleWorker}

if hasattr(rq.worker, "SpawnWorker"):

    class ImpatientSpawnWorker(Impatient, rq.worker.SpawnWorker):
        pass

    WORKERS["SpawnWorker"] = ImpatientSpawnWorker


def _work(kind: str, url: str, queue: str, log: Path, environment: Mapping[str, str], options: dict[str, Any]) -> None:
    os.setsid()  # by which all that it forks is found again
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    multiprocessing.set_start_method("fork", force=True)  # not that of this process, for RQ's scheduler
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(sys.path))  # a horse that is spawned has no other
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    how = {name: options.pop(name) for name in ("with_scheduler", "burst")}
    WORKERS[kind]([queue], connection=redis.Redis.from_url(url), **options).work(**how)


def _end_with(parent: Any) -> None:
    """Leaves nothing of a worker alive when the test was killed itself."""
    parent.join()
    _kill_sessions({os.getsid(0)})


def _kill_sessions(sessions: Collection[int]) -> None:
    while pids := [pid for pid, session in _sessions().items() if session in sessions]:
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # this process last
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _sessions() -> dict[int, int]:
    """The session of each process that is alive."""
    found: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if state != "Z":
                found[int(path.parent.name)] = int(session)
    return found


class WorkerProcess:
    """A worker, its scheduler and its work-horses."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self._sessions: list[int] = []
        self.wanted = True
        self.start()

    def start(self) -> None:
        self._process = self._start()
        self._sessions.append(self._process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """Kills the worker alone, by SIGKILL: its work-horse and its scheduler live on."""
        self.wanted = False
        self._process.kill()
        self._process.join(DEADLINE)

    def kill_all(self) -> None:
        """Leaves nothing of it alive."""
        self.wanted = False
        _kill_sessions(self._sessions)
        self._process.kill()  # it may not have come to make a session
        self._process.join(DEADLINE)
        self._process.close()


class Visitor:
    """A job that reported, and waits."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(DEADLINE)
        with connection.makefile("rb") as lines:
            pid, self.what = lines.readline().decode().split(maxsplit=1)
        self.what = self.what.strip()
        self.pid = int(pid)

    def go(self) -> None:
        """Lets it go on."""
        self._connection.sendall(b"!")

    def kill(self) -> None:
        """Kills its process, by SIGKILL, and waits until it is dead."""
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            assert self._connection.recv(1) == b""

    def close(self) -> None:
        self._connection.close()


class Site:
    """A queue, its workers, and the test's side of what the jobs in `rq_jobs` do.

    Attributes:
        connection: to the server, for RQ.
        queue: what the workers listen to.
        store: what the steps are kept in.
    """

    def __init__(self, url: str, directory: Path) -> None:
        self.url = url
        self.connection = redis.Redis.from_url(url)
        self.queue = rq.Queue("steps", connection=self.connection)
        self.store = StepRunStore.from_url(url)
        self._directory = directory
        self._effects = directory / "effects"
        self._desk = socket.create_server(("127.0.0.1", 0))
        self._desk.settimeout(0.05)
        self._visitors: list[Visitor] = []
        self._waiting: list[Visitor] = []
        self._workers: list[WorkerProcess] = []
        self.environment = {
            "RQ_JOBS_DESK": str(self._desk.getsockname()[1]),
            "RQ_JOBS_EFFECTS": str(self._effects),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for worker in self._workers:
            worker.kill_all()
        for visitor in self._visitors:
            visitor.close()
        self._desk.close()
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
        job_monitoring_interval: int = 1,
    ) -> WorkerProcess:
        """Starts a worker. `until` and `visitor` start it anew if it quits, as supervisors do."""
        log = self._directory / f"worker-{len(self._workers)}.log"
        options: dict[str, Any] = {
            "with_scheduler": with_scheduler,
            "burst": burst,
            "worker_ttl": worker_ttl,
            "job_monitoring_interval": job_monitoring_interval,
            "maintenance_interval": 1,
            "work_horse_killed_handler": release_killed_work_horse if release_killed else None,
        }

        def start() -> Any:
            arguments = (kind, self.url, self.queue.name, log, self.environment, options)
            process = _processes.Process(target=_work, args=arguments)
            process.start()
            return process

        self._workers.append(WorkerProcess(start))
        self._workers[-1].wanted = not burst
        return self._workers[-1]

    def until(self, condition: Callable[[], object], timeout: float = DEADLINE) -> None:
        """Waits until the condition holds, and starts anew the workers that quit meanwhile."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{condition} did not hold within {timeout} seconds"
            self._supervise()
            time.sleep(0.01)

    def visitor(self, what: str) -> Visitor:
        """The next job that reports this."""
        found: list[Visitor] = []

        def came() -> bool:
            with contextlib.suppress(TimeoutError):
                self._waiting.append(Visitor(self._desk.accept()[0]))
                self._visitors.append(self._waiting[-1])
            found.extend(visitor for visitor in self._waiting if visitor.what == what)
            return bool(found)

        came.__name__ = f"a visitor {what!r}"
        self.until(came)
        self._waiting.remove(found[0])
        return found[0]

    def _supervise(self) -> None:
        for worker in self._workers:
            if worker.wanted and not worker.is_alive():
                worker.start()

    def effects(self) -> Counter[str]:
        """What took effect, and how often."""
        with contextlib.suppress(FileNotFoundError):
            return Counter(self._effects.read_text().splitlines())
        return Counter()

    # What RQ knows

    def enqueue(self, function: Callable[..., Any], *args: Any, **options: Any) -> Job:
        return self.queue.enqueue(function, *args, **options)

    def is_scheduled(self, job: Job) -> bool:
        # RQ 2 writes the one before the other.
        in_registry = self.connection.zscore(self.queue.scheduled_job_registry.key, job.id) is not None
        return in_registry and job.get_status() == JobStatus.SCHEDULED

    def hurry(self, job: Job) -> None:
        """Brings forward to now what is scheduled for later."""
        self.connection.zadd(self.queue.scheduled_job_registry.key, {job.id: 1}, xx=True)

    def is_at_rest(self, job: Job) -> bool:
        """Whether no run of the job is under way or to come."""
        with self.connection.pipeline() as pipeline:
            pipeline.lrange(self.queue.key, 0, -1)
            pipeline.lrange(self.queue.intermediate_queue_key, 0, -1)
            pipeline.zrange(self.queue.scheduled_job_registry.key, 0, -1)
            pipeline.zrange(self.queue.started_job_registry.key, 0, -1)
            *ids, started = pipeline.execute()
        known = {id.decode() for found in ids for id in found} | {entry.decode().split(":")[0] for entry in started}
        return job.id not in known

    def finished(self, job: Job, times: int = 1) -> None:
        """Waits until so many runs of the job have ended well, and it is at rest as FINISHED."""
        self.until(lambda: len(self.answers(job)) >= times and self.is_at_rest(job))
        assert job.get_status() == JobStatus.FINISHED
        assert len(self.answers(job)) == times

    def failed(self, job: Job) -> str:
        """Waits until the job is at rest as FAILED; answers the traceback."""
        self.until(lambda: job.get_status() == JobStatus.FAILED and self.is_at_rest(job))
        result = job.latest_result()
        assert result is not None
        return str(result.exc_string)

    def answers(self, job: Job) -> list[Any]:
        """What the runs that ended well answered."""
        return [result.return_value for result in job.results() if result.type == Result.Type.SUCCESSFUL]

    def outcomes(self, job: Job, step: str) -> list[str]:
        """How the attempts at a step of the job's own run ended."""
        return [str(attempt.outcome) for attempt in self.store.attempts(job.id, step)]
