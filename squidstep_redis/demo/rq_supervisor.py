"""The parent of `squidstep demo rq`: it enqueues the jobs, keeps RQ's workers running, and kills some."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.context import SpawnProcess
from typing import Any, Final

import click
import redis
import rq.scheduler
import rq.worker_registration
from rq import Queue, Retry, Worker

from squidstep_redis.demo.process import signals_held_back
from squidstep_redis.demo.rq_worker import Fate, Pipes, Report, work, work_on
from squidstep_redis.demo.stage import FORGOTTEN_AFTER, Stage
from squidstep_redis.demo.work import SEED, Key, Tally

LOOK_EVERY: Final = 0.1  # seconds
PATIENCE: Final = 60.0  # seconds without a word from any worker
MAX_RESTARTS: Final = 10
RETRIES: Final = 10  # more than are killed: on a machine that is too busy, living ones count as abandoned too


@dataclass(eq=False)
class WorkerProcess:
    """A worker, as the parent sees it."""

    name: str
    process: SpawnProcess
    state: str = "starting"
    killed: bool = False
    ended: bool = False

    @property
    def title(self) -> str:
        """As people see it."""
        return f"{self.name} pid {self.process.pid}"


class Supervisor:
    """Starts anew what dies, as supervisors do; and the hand that kills."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._say = stage.say
        client: Any = redis.Redis  # redis-py leaves parts of its types unknown
        self._client: Any = client.from_url(stage.settings["url"])
        self.queue: Any = Queue(stage.prefix, connection=self._client)  # and so does RQ
        self.names = list(stage.files)
        self.jobs = {name: f"{stage.prefix}-{number}" for number, name in enumerate(self.names)}
        self.fates: dict[Key, Fate] = {
            (self.names[len(self.names) // 4], "compress"): "horse",
            (self.names[len(self.names) // 2], "count"): "worker",
            (self.names[len(self.names) * 3 // 4], "digest"): "worker and horse",
        }
        dice = random.Random(SEED)  # noqa: S311 -- to be the same each time
        # None of the victims: a twin, too, would be told to wait while the horse of a dead worker lives on.
        unharmed = [name for name in self.names if name not in {name for name, _ in self.fates}]
        self.twice = set(dice.sample(unharmed, math.ceil(len(unharmed) / 5)))
        self.requeued = set(dice.sample(self.names, math.ceil(len(self.names) / 5)))
        self._to_requeue = {self.jobs[name] for name in self.requeued}
        self.hit: dict[Key, Report] = {}
        self._orphan: Report | None = None
        self.workers: list[WorkerProcess] = []
        self.tally = Tally()
        self.finished = 0
        self.seconds = 0.0
        self._told_at = time.monotonic()
        self._looked_at = 0.0
        self._reports, reports = Pipe(duplex=False)
        line, self._line = Pipe(duplex=False)
        gate, self._gate = Pipe(duplex=False)
        self._theirs = Pipes(reports, line, gate)

    @property
    def restarts(self) -> int:
        """How many workers were started in the place of others."""
        return len(self.workers) - self._stage.workers

    def run(self) -> None:
        """Starts the workers, enqueues all jobs, looks after both until nothing is left to deliver, and ends them."""
        try:
            for _ in range(self._stage.workers):
                self._start_worker()
            while any(worker.state == "starting" for worker in self.workers):  # or the first would do much of it alone
                self._listen(LOOK_EVERY)
            started = time.monotonic()
            for number, name in enumerate(self.names):
                for _ in range(2 if name in self.twice else 1):
                    self._enqueue(number, name)
                self._listen(0)
            while not self._is_done():
                self._listen(LOOK_EVERY)
            self.seconds = time.monotonic() - started
        finally:
            self._end_workers()
            with suppress(redis.RedisError):  # the server may be why it ends
                self._unregister()

    def _enqueue(self, number: int, name: str) -> None:
        fates = {step: fate for (run_id, step), fate in self.fates.items() if run_id == name}
        kept_for = -1 if self._stage.keep else FORGOTTEN_AFTER  # should this process be killed
        self.queue.enqueue_call(
            work_on,
            args=(number, name, str(self._stage.files[name]), fates),
            job_id=self.jobs[name],
            retry=Retry(max=RETRIES),
            ttl=None if self._stage.keep else FORGOTTEN_AFTER,
            result_ttl=kept_for,
            failure_ttl=kept_for,
        )

    def _is_done(self) -> bool:
        """Whether nothing is left to deliver. Requeues what is to be, once it has finished."""
        if time.monotonic() - self._looked_at < LOOK_EVERY:
            return False
        self._looked_at = time.monotonic()
        queue = self.queue
        with self._client.pipeline() as pipeline:  # a transaction: no job is just between two of these
            pipeline.llen(queue.key)
            pipeline.llen(queue.intermediate_queue_key)
            pipeline.zcard(queue.started_job_registry.key)
            pipeline.zcard(queue.scheduled_job_registry.key)
            pipeline.zrange(queue.finished_job_registry.key, 0, -1)
            *left, finished = pipeline.execute()
        self.finished = len(finished)
        again = self._to_requeue & {id.decode() for id in finished}
        for job in filter(None, map(queue.fetch_job, again)):
            queue.enqueue_job(job)
        self._to_requeue -= again
        return not any(left) and not again

    # The processes

    def _start_worker(self) -> None:
        with signals_held_back() as spawn:
            name = f"worker-{len(self.workers) + 1}"
            process = spawn.Process(target=work, args=(name, self.queue.name, self._stage.settings, self._theirs))
            process.start()
            self.workers.append(WorkerProcess(name, process))

    def _bury(self, worker: WorkerProcess) -> None:
        worker.process.join()
        worker.ended = True
        if not worker.killed:
            worker.state = f"ended by itself, with exit code {worker.process.exitcode}"
            self._say(f"{worker.title} {worker.state}")
        if self.restarts >= MAX_RESTARTS:
            raise click.ClickException(f"RQ's workers end again and again; {worker.title} {worker.state}")
        self._start_worker()

    def _end_workers(self) -> None:
        # By force: either nothing is left to do and they wait, or all is given up. With the line end RQ's horses and
        # schedulers too, also those whose worker is gone; with the last of them end the reports.
        self._line.close()
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
        self._theirs.reports.close()
        deadline = time.monotonic() + 5
        with suppress(EOFError):
            while self._reports.poll(max(0.0, deadline - time.monotonic())):
                self._reports.recv()

    def _unregister(self) -> None:
        """Takes the workers and schedulers out of RQ's records: they could not say good-bye."""
        client, queue = self._client, self.queue
        shared = [Worker.redis_workers_keys, *([] if self._stage.keep else [Queue.redis_queues_keys])]
        for key in shared:
            for member in client.sscan_iter(key, f"*{queue.name}*"):
                client.srem(key, member)
        for key in client.scan_iter(f"{Worker.redis_worker_namespace_prefix}{queue.name}*", 1_000):
            client.unlink(key)
        client.unlink(
            rq.worker_registration.WORKERS_BY_QUEUE_KEY % queue.name,
            rq.scheduler.RQScheduler.get_locking_key(queue.name),
            queue.registry_cleaning_key,
        )
        for key in client.scan_iter(rq.scheduler.SCHEDULER_KEY_TEMPLATE % "*", 1_000, _type="HASH"):
            if client.hget(key, "queues") == queue.name.encode():
                client.unlink(key)

    # What they tell

    def _listen(self, seconds: float) -> None:
        if self._reports.poll(seconds):
            self._hear(self._reports.recv())
        for worker in [worker for worker in self.workers if not worker.ended]:
            if not worker.process.is_alive():  # the sentinel would not tell: horses and schedulers inherit it
                self._bury(worker)
        if time.monotonic() - self._told_at > PATIENCE:
            raise click.ClickException(f"no RQ worker has done anything for {PATIENCE:.0f} seconds")

    def _hear(self, report: Report) -> None:
        self._told_at = time.monotonic()
        worker = next(worker for worker in self.workers if worker.name == report.worker)
        if report.kind == "ready":
            worker.state = "idle"
            return
        name = self.names[report.number]
        what = f"{report.step} of {name}"
        if not worker.ended and not worker.killed:
            worker.state = "idle" if report.kind in ("busy", "returned") else what if report.step else name
        if report.kind == "began":
            self.tally.begun[name, report.step] += 1
            self._see_begin(worker, report, (name, report.step), what)
        elif report.kind == "ended":
            self.tally.ended[name, report.step] += 1
        else:
            self.tally.counts[report.kind] += 1
        if self._orphan is not None and report.number == self._orphan.number:
            self._see_orphan(self._orphan, worker, report, what)

    def _see_begin(self, worker: WorkerProcess, report: Report, key: Key, what: str) -> None:
        horse = f"work-horse {report.horse}"
        fate = self.fates.get(key)
        if report.attempt > 1:
            self.tally.counts["takeovers"] += 1
            self._say(f"{horse} of {worker.name} took over {what}, as attempt {report.attempt}")
        elif fate is not None and key not in self.hit:
            self.hit[key] = report
            if fate == "horse":
                self._say(f"{horse} of {worker.title} was killed inside {what}")
            else:
                worker.killed, worker.state = True, f"killed inside {what}"
                worker.process.kill()
                worker.process.join()  # before its horse, whose death it would see
                its = f"its {horse} lives on" if fate == "worker" else f"its {horse} too"
                self._say(f"{worker.title} was killed inside {what}, {its}")
            if fate == "worker":
                self._orphan = report
            else:
                os.kill(report.horse, signal.SIGKILL)

    def _see_orphan(self, orphan: Report, worker: WorkerProcess, report: Report, what: str) -> None:
        horse = f"work-horse {orphan.horse}"
        if report.kind == "busy" and report.step == orphan.step and not self._gate.closed:
            self._say(f"{what} was delivered again, to {worker.name}, which was told to wait for {horse}")
            self._gate.close()  # it may go on
        elif report.kind == "completed" and report.horse == orphan.horse:
            self._say(f"{horse}, whose worker is dead, completed {what}")
            self._orphan = None
