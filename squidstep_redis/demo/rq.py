"""`squidstep demo rq`: the same work as RQ jobs, whose workers are killed and replaced.

RQ redelivers the job of a dead work-horse or worker, even while the work-horse of a dead worker is still running.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Final

import click
from redis import Redis
from rq import Queue, Retry, Worker
from rq.job import Job, JobStatus

from squidstep_redis import StepBusyError, current_claim
from squidstep_redis.demo.command import demo_options, run_demo
from squidstep_redis.demo.scenario import DemoContext, Fault, Key, Scenario, WorkerProcess, describe, pick_duplicates
from squidstep_redis.demo.work import STEPS, Payload, Step, execute, sequential
from squidstep_redis.demo.worker import Event, parent
from squidstep_redis.rq import configure, current_run, release_killed_work_horse, steps

LEASE: Final = 2.0
ABANDONED_AFTER: Final = 2  # seconds without a heartbeat of its worker, after which RQ considers a job abandoned
QUEUE: Final = "demo"
# More than the number of faults: on a busy machine, RQ also considers jobs of live workers abandoned.
RETRIES: Final = 10


@click.command("demo rq")
@demo_options(files=60)
def command(**options: Any) -> None:
    """Does the same work as RQ jobs, whose workers are killed.

    Each file under PATH (by default the .py files of Python's standard library) is a job of three steps: its digest,
    its compressed size, its lines and words. A work-horse is killed inside a step, then a worker together with its
    work-horse, and a worker alone, whose work-horse continues while RQ redelivers the job. A fifth of the jobs are
    enqueued twice. The exit code is 0 only if each job finished, nothing was lost, nothing was executed twice except
    the killed steps, and every output equals that of a sequential computation.

    RQ's intervals are shortened: it considers a job abandoned after seconds instead of minutes. Write "./rq" for a
    file or directory named "rq".
    """
    run_demo(RqScenario, **options)


@steps(run_id="{run_id}", lease=LEASE)
def work_on(file: int, run_id: str, path: str, kill_plan: dict[str, Fault]) -> Payload:
    """The job: the three steps of one file.

    Args:
        file: The file's index.
        run_id: The file's run, which `steps` uses.
        path: The file's path.
        kill_plan: The processes to kill in the first attempt of a step, by step.
    """
    del run_id
    parent.send_event("delivered", file)
    known: Payload = {"path": path}
    for step in STEPS:
        executed: list[str] = []
        try:
            function = partial(_execute, executed, file, step, kill_plan.get(step))
            known = {**known, **current_run().call(step, function, known)}
        except StepBusyError:
            parent.send_event("busy", file, step)
            raise
        parent.send_event("completed" if executed else "skipped", file, step)
    del known["path"]
    return known


def _execute(executed: list[str], file: int, step: str, fault: Fault | None, known: Payload) -> Payload:
    claim = current_claim()
    attempt = claim.step_run.attempt if claim is not None else 0
    parent.send_event("started", file, step, attempt=attempt)
    if fault is not None and attempt == 1:
        parent.stall(at_gate=fault == "worker without work-horse")
    output = execute(step, known)
    executed.append(step)
    parent.send_event("finished", file, step)
    return output


class _ShortTimeoutWorker(Worker):
    """RQ's worker, except that its jobs are considered abandoned after seconds instead of minutes."""

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:  # noqa: ARG002 -- RQ's signature
        return ABANDONED_AFTER


def run_rq(url: str) -> None:
    """Runs RQ's worker and scheduler."""
    logging.disable()  # the parent reports what happens
    # RQ 2 starts its scheduler with the default start method. Only a forked scheduler exits with the parent.
    multiprocessing.set_start_method("fork", force=True)
    configure(url)
    client: Any = Redis  # redis-py leaves parts of its types unknown
    worker = _ShortTimeoutWorker(
        [QUEUE],
        name=f"{QUEUE}-worker-{parent.worker + 1}",
        connection=client.from_url(url),
        maintenance_interval=1,
        worker_ttl=16,  # RQ looks for abandoned jobs after it has waited for a job for 15 s less than this
        job_monitoring_interval=1,
        work_horse_killed_handler=release_killed_work_horse,
    )
    parent.send_event("ready")
    worker.work(with_scheduler=True)


class RqScenario(Scenario):
    """Enqueues jobs, some of them twice."""

    title: ClassVar[str] = f"workers of RQ {version('rq')}"
    size: ClassVar[int] = 2

    def __init__(self, context: DemoContext) -> None:
        names = list(context.files)
        faults: dict[Key, Fault] = {
            (names[len(names) // 4], "compress"): "work-horse",
            (names[len(names) // 2], "count"): "worker without work-horse",
            (names[len(names) * 3 // 4], "digest"): "worker and work-horse",
        }
        super().__init__(context, faults)
        self._client: Any = context.store.client  # redis-py leaves parts of its types unknown, and so does RQ
        self.queue: Any = Queue(QUEUE, connection=self._client)
        self.jobs = {name: f"{QUEUE}-{number}" for number, name in enumerate(names)}
        # Killed jobs have no duplicates: these would find a step busy, as redelivered jobs do.
        without_fault = [name for name in names if name not in {name for name, _ in faults}]
        self._twice = set(pick_duplicates(without_fault))
        self.counts["duplicates"] = len(self._twice)

    def _worker_main(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return run_rq, (self.context.url,)

    def _deliver_all(self) -> None:
        for number, (name, path) in enumerate(self.context.files.items()):
            kill_plan = {step: fault for (run_id, step), fault in self.kill_plan.items() if run_id == name}
            for _ in range(2 if name in self._twice else 1):
                self.queue.enqueue_call(
                    work_on,
                    args=(number, name, str(path), kill_plan),
                    job_id=self.jobs[name],
                    retry=Retry(max=RETRIES),
                    result_ttl=-1,
                    failure_ttl=-1,
                )

    def _is_done(self) -> bool:
        with self._client.pipeline() as pipeline:  # a transaction, because a job can move from one of these to another
            pipeline.llen(self.queue.key)
            pipeline.llen(self.queue.intermediate_queue_key)
            pipeline.zcard(self.queue.started_job_registry.key)
            pipeline.zcard(self.queue.scheduled_job_registry.key)
            return not any(pipeline.execute())

    def _on_event(self, worker: WorkerProcess, event: Event, key: Key) -> None:
        if self.kill_plan.get(key) != "worker without work-horse" or key not in self.kills:
            return
        work_horse = f"work-horse {self.kills[key].pid}"
        if event.kind == "busy" and not self.gate.closed:
            self.context.print_line(f"{describe(key)} was redelivered to {worker} while {work_horse} is running it")
            self.gate.close()
        elif event.kind == "completed":
            self.context.print_line(f"{work_horse}, whose worker is dead, completed {describe(key)}")

    def _on_exit(self, worker: WorkerProcess) -> None:
        """Does nothing, because RQ itself redelivers the job."""

    def expected(self, path: Path) -> list[Step]:
        """Returns the steps that the store must have for a file: inputs by parameter, outputs as `result`."""
        return [(name, {"known": input}, {"result": output}) for name, input, output in sequential(path)]

    def find_problems(self) -> Iterator[str]:
        """Yields a problem unless RQ finished each job with the right result, and delivered it often enough."""
        for name, id in self.jobs.items():
            with suppress(OSError):  # `check` reports unreadable files
                outputs = [output for _, _, output in sequential(self.context.files[name])]
                expected = {key: value for output in outputs for key, value in output.items()}
                job = self.queue.fetch_job(id)
                if job is None:
                    yield f"{name}: its job does not exist"
                elif (status := job.get_status()) != JobStatus.FINISHED or job.return_value() != expected:
                    yield f"{name}: its job is {status.value} with {job.return_value()}"
        enqueued, killed = len(self.jobs) + self.counts["duplicates"], len(self.kill_plan)
        if (delivered := self.counts["delivered"]) < enqueued + killed:
            yield f"{enqueued} jobs were enqueued, {killed} were killed, but only {delivered} were delivered"
