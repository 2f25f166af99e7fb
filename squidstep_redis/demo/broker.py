"""The queue of `squidstep demo`: it delivers steps to worker processes, some twice, and kills one inside a step."""

from __future__ import annotations

import heapq
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import click
import redis

from squidstep_redis import SquidstepError, StepRunStore
from squidstep_redis.demo.process import signals_held_back, take_signals
from squidstep_redis.demo.work import EFFECTS, SEED, Key, Payload, Tally, execute

LEASE: Final = 1.0

_NEXT: Final = dict(pairwise(EFFECTS))


def _successor(step: str, input: Payload, output: Payload) -> dict[str, Payload]:
    return {_NEXT[step]: {**input, **output}} if step in _NEXT else {}


# A worker: a process that takes one delivery at a time.


class Delivery(NamedTuple):
    """What a worker is handed: perhaps twice, perhaps late."""

    run_id: str
    step: str
    input: Payload
    duplicate: bool = False

    @property
    def key(self) -> Key:
        """Which step it is."""
        return self.run_id, self.step


class Report(NamedTuple):
    """What a worker tells the parent."""

    kind: Literal["ready", "began", "ended", "completed", "skipped", "busy", "failed"]
    value: Any = None


def work(connection: Connection[Report, tuple[Delivery, bool]], name: str, settings: Payload) -> None:
    """A worker's life: until it is killed, or the parent closes its end of the connection, or is gone."""
    take_signals()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError), StepRunStore.from_url(**settings) as store:
        connection.send(Report("ready"))
        while True:
            delivery, stall = connection.recv()
            for report in _handle(store, f"{name} pid {os.getpid()}", delivery):
                connection.send(report)
                if stall and report.kind == "began":
                    connection.poll(None)  # inside the step, until it is killed; or until the parent is gone


def _handle(store: StepRunStore, owner: str, delivery: Delivery) -> Iterator[Report]:
    """What any worker does with a delivery, and tells of it."""
    try:
        begun = store.begin_step(delivery.run_id, delivery.step, delivery.input, lease=LEASE, owner=owner)
        step_run, decision = begun
        if decision == "execute":
            yield Report("began", step_run.attempt)
            output = execute(step_run.step, step_run.input)
            yield Report("ended")
            successor = _successor(step_run.step, step_run.input, output)
            store.complete_step(step_run, output, schedule=successor)
            yield Report("completed", successor)
        elif step_run.output is None:
            yield Report("busy", begun.retry_in or 0.0)
        else:
            yield Report("skipped", _successor(step_run.step, step_run.input, step_run.output))
    except (OSError, SquidstepError, redis.RedisError) as error:
        yield Report("failed", f"{type(error).__name__}: {error}")


# The parent: the queue, and the hand that kills.


@dataclass(eq=False)
class Worker:
    """A worker process, as the parent sees it."""

    name: str
    process: SpawnProcess
    connection: Connection[Any, Report]
    state: str = "starting"
    delivery: Delivery | None = None

    @property
    def owner(self) -> str:
        """As the store knows it."""
        return f"{self.name} pid {self.process.pid}"


class Broker:
    """Delivers at least once: some steps twice, and again what a killed worker did not acknowledge."""

    def __init__(self, settings: Payload, files: dict[str, Path], say: Callable[[str], None]) -> None:
        self._settings = settings  # of each worker's store
        self._say = say
        self.files = files
        steps = [(run_id, step) for run_id in files for step in EFFECTS]
        dice = random.Random(SEED)  # noqa: S311 -- to be the same each time
        twice = dice.sample(steps, math.ceil(len(steps) / 5))
        self._late = {key: dice.uniform(0.05, 0.5) for key in twice[::2]}
        self._at_once = set(twice[1::2])
        self.steps, self.duplicates = len(steps), len(twice)
        self.victim = (list(files)[len(files) // 3], "compress")
        self.killed: Worker | None = None
        self.workers: list[Worker] = []
        self._idle: deque[Worker] = deque()
        self._ready: deque[tuple[Delivery, ...]] = deque()  # those of a tuple are delivered at the same time
        self._delayed: list[tuple[float, int, Delivery]] = []
        self._nth = count()  # breaks ties, for deliveries cannot be compared
        self.tally = Tally()
        self._enqueued: set[Key] = set()
        self.seconds = 0.0

    def run(self, workers: int) -> None:
        """Starts the workers, delivers until all is acknowledged, and ends them."""
        try:
            for _ in range(workers):
                self._start_worker()
            while len(self._idle) < workers:  # or the first would have done much of it before the last comes
                self._listen()
            started = time.monotonic()
            for run_id, path in reversed(self.files.items()):
                self._enqueue(run_id, {"digest": {"path": str(path)}})
            while self._ready or self._delayed or any(worker.delivery for worker in self.workers):
                self._deliver()
                self._listen()
            self.seconds = time.monotonic() - started
        finally:
            self._stop_workers()

    def _start_worker(self) -> None:
        with signals_held_back() as spawn:
            ours, theirs = spawn.Pipe()
            name = f"worker-{len(self.workers) + 1}"
            process = spawn.Process(target=work, args=(theirs, name, self._settings), daemon=True)
            process.start()
            theirs.close()  # or the worker's end would not end the connection
            self.workers.append(Worker(name, process, ours))

    def _stop_workers(self) -> None:
        # By force: either all is acknowledged and they wait, or all is given up and what they do is not wanted.
        for worker in self.workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()

    def _enqueue(self, run_id: str, steps: dict[str, Payload]) -> None:
        for step, input in steps.items():
            key = (run_id, step)
            if key not in self._enqueued:  # whoever skips a completed step names its successor as well
                self._enqueued.add(key)
                delivery = Delivery(run_id, step, input)
                twin = (delivery._replace(duplicate=True),) if key in self._at_once else ()
                self._ready.appendleft((delivery, *twin))

    def _delay(self, delivery: Delivery, seconds: float) -> None:
        heapq.heappush(self._delayed, (time.monotonic() + seconds, next(self._nth), delivery))

    def _deliver(self) -> None:
        while self._delayed and self._delayed[0][0] <= time.monotonic():
            self._ready.appendleft((heapq.heappop(self._delayed)[2],))
        while self._ready and len(self._idle) >= len(self._ready[0]):
            for delivery in self._ready.popleft():
                worker = self._idle.popleft()
                worker.delivery = delivery
                worker.state = f"{delivery.step} of {delivery.run_id}"
                with suppress(OSError):  # it is dead: the connection's end will say so
                    worker.connection.send((delivery, delivery.key == self.victim and self.killed is None))

    def _listen(self) -> None:
        open_ones = [worker for worker in self.workers if not worker.connection.closed]
        pause = max(0.0, self._delayed[0][0] - time.monotonic()) if self._delayed else None
        told = wait([worker.connection for worker in open_ones], pause)
        for worker in (worker for worker in open_ones if worker.connection in told):
            try:
                report = worker.connection.recv()
            except (EOFError, OSError):
                self._bury(worker)
            else:
                self._hear(worker, report)

    def _hear(self, worker: Worker, report: Report) -> None:
        kind, value = report
        delivery = worker.delivery
        if kind == "began" and delivery is not None:
            self._see_begin(worker, delivery, value)
            return
        if kind == "ended" and delivery is not None:
            self.tally.ended[delivery.key] += 1
            return
        worker.delivery, worker.state = None, "idle"
        self._idle.append(worker)
        if delivery is None:  # it has just started
            return
        if kind == "failed":
            raise click.ClickException(f"{worker.owner}, {delivery.step} of {delivery.run_id}: {value}")
        self.tally.counts[kind] += 1
        if kind == "busy":
            self._delay(delivery, value)
            return
        self._enqueue(delivery.run_id, value)
        if not delivery.duplicate and delivery.key in self._late:
            self._delay(delivery._replace(duplicate=True), self._late[delivery.key])

    def _see_begin(self, worker: Worker, delivery: Delivery, attempt: int) -> None:
        self.tally.begun[delivery.key] += 1
        if attempt > 1:
            self.tally.counts["takeovers"] += 1
            self._say(f"{worker.owner} took over {worker.state}, as attempt {attempt}")
        elif delivery.key == self.victim and self.killed is None:
            self.killed = worker
            worker.process.kill()
            self._say(f"{worker.owner} was killed inside {worker.state} and holds its claim")

    def _bury(self, worker: Worker) -> None:
        worker.connection.close()
        worker.process.join()
        if worker is not self.killed or worker.delivery is None:
            raise click.ClickException(f"{worker.owner} ended by itself, with exit code {worker.process.exitcode}")
        self._ready.appendleft((worker.delivery,))
        worker.delivery, worker.state = None, f"killed inside {worker.state}"
        self._start_worker()
