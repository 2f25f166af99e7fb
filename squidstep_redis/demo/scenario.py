"""The parent's side of a demo: starts, kills and replaces workers, and counts their events."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeVar

import click

from squidstep_redis import StepRunStore
from squidstep_redis.demo.work import STEPS, Step, sequential
from squidstep_redis.demo.worker import Event, Pipes, set_up_worker

POLL_INTERVAL: Final = 0.05  # seconds
SILENCE_LIMIT: Final = 60.0  # seconds without an event from any worker
MAX_REPLACED: Final = 10

T = TypeVar("T")
Key = tuple[str, str]  # a run id and a step
Fault = Literal["worker", "work-horse", "worker and work-horse", "worker without work-horse"]
"""Which processes are killed inside a step. The last one leaves RQ's work-horse running without its worker."""

_KILLED: Final[dict[Fault, str]] = {
    "worker": "{worker} was killed inside {step}; its claim stays until the lease expires",
    "work-horse": "work-horse {pid} of {worker} was killed inside {step}",
    "worker and work-horse": "{worker} and its work-horse {pid} were killed inside {step}",
    "worker without work-horse": "{worker} was killed inside {step}; its work-horse {pid} continues",
}


@dataclass
class DemoContext:
    """The environment of a scenario.

    Attributes:
        files: The files to work on, by run id.
        url: The server's URL.
        store: The parent's own store on that server.
        print_line: Prints a line.
        show_progress: Replaces the progress line.
    """

    files: dict[str, Path]
    url: str
    store: StepRunStore
    print_line: Callable[[str], object]
    show_progress: Callable[[str], object]


@dataclass(eq=False)
class WorkerProcess:
    """A worker, as the parent sees it."""

    index: int
    process: ForkProcess
    was_killed: bool = False

    def __str__(self) -> str:
        return f"worker-{self.index + 1} (pid {self.process.pid})"


class Scenario(ABC):
    """Delivers steps to workers, kills some of them, and counts their events, independently of the store.

    Attributes:
        kill_plan: The processes to kill in the first attempt of a step, by step.
        kills: The event after which the processes were killed, by step of the kill plan.
        started: The number of times that workers started the work of a step, by step.
        finished: The number of times that workers finished the work of a step, by step.
        counts: The number of events by kind, and the numbers of `takeovers` and `duplicates`.
        seconds: The duration of the work, without the start of the workers.
        gate: The end of a pipe on which a stalled process may wait. Closing it lets the process continue.
    """

    title: ClassVar[str] = "workers"
    size: ClassVar[int] = 4  # workers at a time

    def __init__(self, context: DemoContext, kill_plan: dict[Key, Fault]) -> None:
        self.context = context
        self.kill_plan = kill_plan
        self.run_ids = list(context.files)
        self.kills: dict[Key, Event] = {}
        self.started: Counter[Key] = Counter()
        self.finished: Counter[Key] = Counter()
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self.workers: list[WorkerProcess] = []
        self._running: list[WorkerProcess] = []
        self._ready = 0
        self._last_event_at = time.monotonic()
        self._events, events = Pipe(duplex=False)
        lifeline, self._lifeline = Pipe(duplex=False)
        gate, self.gate = Pipe(duplex=False)
        self._pipes = Pipes(events, lifeline, gate)

    def run(self) -> None:
        """Starts the workers, delivers everything, waits until everything is acknowledged, and stops the workers."""
        try:
            for _ in range(self.size):
                self._start_worker()
            while self._ready < self.size:  # otherwise the first worker would do most of the work
                self._listen()
            started = time.monotonic()
            self._deliver_all()
            while self._listen() or not self._is_done():
                pass
            self.seconds = time.monotonic() - started
        finally:
            self._stop()

    @abstractmethod
    def _worker_main(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        """Returns the worker's main function and its arguments."""

    @abstractmethod
    def _deliver_all(self) -> None:
        """Makes the first deliveries."""

    @abstractmethod
    def _is_done(self) -> bool:
        """Returns whether everything is acknowledged. Called while no events arrive; may make delayed deliveries."""

    @abstractmethod
    def _on_event(self, worker: WorkerProcess, event: Event, key: Key) -> None:
        """Handles an event after it was counted."""

    @abstractmethod
    def _on_exit(self, worker: WorkerProcess) -> None:
        """Redelivers what a dead worker has not acknowledged, unless the queue does that."""

    def expected(self, path: Path) -> list[Step]:
        """Returns the steps that the store must have for a file."""
        return sequential(path)

    @abstractmethod
    def find_problems(self) -> Iterator[str]:
        """Yields problems that the checks of all scenarios do not find."""

    def _start_worker(self) -> None:
        main, args = self._worker_main()
        index = len(self.workers)
        # Signals are blocked until the worker has its own handlers, and is in the parent's list. No other thread of the
        # parent receives signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            process = get_context("fork").Process(target=self._run_worker, args=(index, main, args))
            process.start()
            self.workers.append(WorkerProcess(index, process))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._running.append(self.workers[-1])

    def _run_worker(self, index: int, main: Callable[..., None], args: tuple[Any, ...]) -> None:
        # Only the parent may have these open, so that the workers read EOF when it exits.
        for end in (self._events, self._lifeline, self.gate):
            end.close()
        set_up_worker(index, self._pipes)
        main(*args)

    def _kill(self, worker: WorkerProcess, event: Event, key: Key, fault: Fault) -> None:
        self.kills[key] = event
        if fault != "work-horse":
            worker.was_killed = True
            worker.process.kill()
            worker.process.join()  # first, because a live worker would react to the death of its work-horse
        if fault in ("work-horse", "worker and work-horse"):
            os.kill(event.pid, signal.SIGKILL)
        self.context.print_line(_KILLED[fault].format(worker=worker, step=describe(key), pid=event.pid))
        if worker.was_killed:
            self._reap(worker)

    def _reap(self, worker: WorkerProcess) -> None:
        worker.process.join()
        self._running.remove(worker)
        if not worker.was_killed:
            self.context.print_line(f"{worker} exited by itself with exit code {worker.process.exitcode}")
        if len(self.workers) >= self.size + MAX_REPLACED:
            raise click.ClickException(f"{MAX_REPLACED} workers were replaced, and {worker} also exited")
        self._start_worker()
        self._on_exit(worker)

    def _stop(self) -> None:
        # Workers are killed, because they have no more work, or the demo was interrupted. Closing the lifeline also
        # makes forked processes exit, even if their worker is dead. The event pipe ends when the last one has exited.
        self._lifeline.close()
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
        self._pipes.events.close()
        deadline = time.monotonic() + 5
        with suppress(EOFError):
            while self._events.poll(max(0.0, deadline - time.monotonic())):
                self._events.recv()

    def _listen(self) -> bool:
        """Handles the next event, if any, and returns whether there was one."""
        if self._events.poll(POLL_INTERVAL):
            self._last_event_at = time.monotonic()
            self._handle(self._events.recv())
            return True
        for worker in list(self._running):  # not before the last event of a dead worker has been handled
            if not worker.process.is_alive():
                self._reap(worker)
        if time.monotonic() - self._last_event_at > SILENCE_LIMIT:
            raise click.ClickException(f"no worker has sent an event for {SILENCE_LIMIT} s; all workers were stopped")
        return False

    def _handle(self, event: Event) -> None:
        worker = self.workers[event.worker]
        if event.kind == "ready":
            self._ready += 1
            return
        key = (self.run_ids[event.file], event.step)
        self.counts[event.kind] += 1
        if event.kind == "finished":
            self.finished[key] += 1
        elif event.kind == "started":
            self.started[key] += 1
            if event.attempt > 1:
                self.counts["takeovers"] += 1
                work_horse = "" if event.pid == worker.process.pid else f"work-horse {event.pid} of "
                self.context.print_line(f"{work_horse}{worker} took over {describe(key)} as attempt {event.attempt}")
            elif key in self.kill_plan and key not in self.kills:
                self._kill(worker, event, key, self.kill_plan[key])
        self._on_event(worker, event, key)
        if self.counts.total() % 10 == 0:
            steps = len(self.run_ids) * len(STEPS)
            self.context.show_progress(
                f"{self.counts['completed']} of {steps} steps completed, {self.counts['skipped']} skipped"
            )


def describe(key: Key) -> str:
    """Returns the name of a step of a run in messages."""
    return f"{key[1]} of {key[0]}"


def pick_duplicates(items: list[T]) -> list[T]:
    """Returns a fifth of the items, the same in each run."""
    return random.Random(20).sample(items, math.ceil(len(items) / 5))
