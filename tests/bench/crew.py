"""Client processes that work concurrently, and comparisons of such crews."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import NamedTuple

import redis
from bench.databases import die_with_parent
from bench.measure import Turns, Work
from bench.ours import STEPS_OF_A_RUN, Blocking, Name

processes = multiprocessing.get_context("fork")
ROUNDS = 5

# Connects the process with this number; yields what it can do, by name.
Worker = Callable[[int], contextlib.AbstractContextManager[Mapping[str, Work]]]


def blocking_worker(url: str) -> Worker:
    """Returns a worker with a blocking store, and its yardstick."""

    @contextlib.contextmanager
    def worker(_: int) -> Iterator[Mapping[str, Work]]:
        numbers = itertools.count()

        def names(count: int) -> Iterator[Name]:
            for number in itertools.islice(numbers, count):
                yield f"run-{os.getpid()}-{number // STEPS_OF_A_RUN}", f"step-{number % STEPS_OF_A_RUN}"

        with redis.Redis.from_url(url, protocol=2) as client:
            ours = Blocking(client, names=names)
            yield {"steps": ours.steps, "yardsticks": ours.yardsticks}

    return worker


class Crew:
    """Client processes that work concurrently, and report the duration of each step."""

    def __init__(self, size: int, worker: Worker) -> None:
        self._pipes: list[Connection] = []
        self._members = []
        for number in range(size):
            pipe, end = processes.Pipe()
            member = processes.Process(target=_work_along, args=(worker, number, end), daemon=True)
            member.start()
            end.close()
            self._pipes.append(pipe)
            self._members.append(member)
        for pipe in self._pipes:
            pipe.recv()  # wait until it is ready

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # it failed
                pipe.send(None)  # closing is not enough: members started later have inherited the pipe
        for member in self._members:
            member.join()

    def rate(self, what: str, seconds: float) -> tuple[float, float]:
        """Runs all processes for `seconds`. Returns steps per second, and the 99th percentile of their ms."""
        start = time.monotonic() + 0.1
        for pipe in self._pipes:
            pipe.send((what, start, seconds))
        durations = sorted(itertools.chain.from_iterable(pipe.recv() for pipe in self._pipes))
        return len(durations) / seconds, 1_000 * durations[int(len(durations) * 0.99)]


def _work_along(worker: Worker, number: int, pipe: Connection) -> None:
    die_with_parent()
    with worker(number) as works:
        for work in works.values():
            work(1)
        pipe.send("ready")
        while request := pipe.recv():
            what, start, seconds = request
            work = works[what]
            time.sleep(max(0.0, start - time.monotonic()))
            durations: list[float] = []
            while (now := time.monotonic()) < start + seconds:
                work(1)
                durations.append(time.monotonic() - now)
            pipe.send(durations)


class CrewTurns(NamedTuple):
    """The measurements of crews that took turns.

    Attributes:
        turns: their rates.
        slowest: for each side, the 99th percentile of its steps in ms; the median of all rounds.
    """

    turns: Turns
    slowest: dict[str, float]

    def note(self, side: str, other: str) -> str:
        """Rates and 99th percentiles of two sides as text."""
        slowest = f"{self.slowest[side]:,.1f} against {self.slowest[other]:,.1f}"
        return f"{self.turns.rates(side, other, 'steps')}; 99% of steps within {slowest} ms"


def measure_crews(sides: Mapping[str, tuple[Crew, str]], seconds: float) -> CrewTurns:
    """Measures crews in alternating turns of `seconds`, each with what it has to do."""
    turns = Turns(sides)
    slowest: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, (crew, what) in sides.items():
            rate, milliseconds = crew.rate(what, seconds)
            turns.seconds[side].append(1 / rate)
            slowest[side].append(milliseconds)
    return CrewTurns(turns, {side: statistics.median(values) for side, values in slowest.items()})
