"""Checks the soak's history while it is made: each generation of runs as soon as no worker has a call to make on it.

A process of its own. It reads what the workers write down, has a look of its own at each generation when it is over,
and at the end at all of them again: what was acknowledged must be there after all that happened since.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from squidstep_redis import ServerError, StepRunStore
from squidstep_redis.protocol import scripts

from .crew import GENERATION, PREFIX, STEPS, Deed, answer_to
from .history import Findings, Op, Order, check, lost

PAUSE: Final = 0.05  # seconds between two looks at the logs


@dataclass
class Verdict:
    """What came of a soak.

    Attributes:
        findings: of the checker.
        errors: what no call should have ended in.
        counts: how often what happened.
        busy: seconds that the checking took, of processor time.
    """

    findings: Findings = field(default_factory=Findings)
    errors: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    busy: float = 0.0


class Diary:
    """One worker's log, read as it grows."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._rest = b""
        self.floors: dict[int, float] = {}  # the generation that each life is at: no earlier one is of interest to it
        self.sent: dict[int, tuple[float, list[Any]]] = {}

    @property
    def is_closed(self) -> bool:
        return self._file.closed

    def read(self) -> Iterator[list[Any]]:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            try:
                what, *rest = json.loads(line)
            except ValueError:
                continue  # empty, or cut off by a kill
            if what == "hired":
                self.floors = dict.fromkeys(range(rest[1]), rest[0])
            elif what == "turn":
                self.floors[rest[0]] = rest[1]
            elif what == "dead":
                self.floors.clear()
                self._file.close()
                return
            else:
                yield [what, *rest]


@dataclass
class Generation:
    """What is known of the runs that began together."""

    ops: list[Op] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)

    def add(
        self, deeds: list[list[Any]], sent: float, answered: float, answers: list[Any], resent: bool = False
    ) -> None:
        for (kind, run, step, claim, value, lease, limit), answer in zip(deeds, answers, strict=True):
            if answer == ["unwritten"] or (kind == "order" and answer is None):
                continue
            if kind == "order" and answer[:1] != ["error"]:
                self.orders.append(Order(run, sent, answered, tuple(answer)))
                continue
            until, told = (math.inf, None) if answer is None else (answered, tuple(answer))
            self.ops.append(Op(kind, run, step, claim, sent, until, told, value, lease, limit, resent))


class Audit:
    """Reads, checks and counts."""

    def __init__(self, logs: Path, store: StepRunStore) -> None:
        self.verdict = Verdict()
        self._logs = logs
        self._store = store
        self._diaries: dict[Path, Diary] = {}
        self._generations: dict[int, Generation] = defaultdict(Generation)
        self._acknowledged: dict[str, list[Op]] = {}  # of each run, its completions

    def go_on(self) -> None:
        """Reads what is new, and checks what is over."""
        now = int(time.time() / GENERATION)
        for path in self._logs.iterdir():
            if path not in self._diaries:
                self._diaries[path] = Diary(path)
        for diary in self._diaries.values():
            if not diary.is_closed:
                self._read(diary)
        floor = min([now, *(floor for diary in self._diaries.values() for floor in diary.floors.values())])
        for number in sorted(self._generations):
            if number < floor:
                self._check(number)

    def end(self) -> None:
        """Looks at all runs once more: nothing that was acknowledged may have been forgotten since."""
        runs = list(self._acknowledged)
        for first in range(0, len(runs), 50):
            part = runs[first : first + 50]
            reading = self._look(part)
            acknowledged = [op for run in part for op in self._acknowledged[run]]
            self.verdict.findings.lost += lost([*acknowledged, *reading.ops], reading.orders)
            self.verdict.counts["completions found at the end"] += len({(op.run, op.step) for op in acknowledged})

    def _read(self, diary: Diary) -> None:
        for what, *rest in diary.read():
            if what == "error":
                self.verdict.errors += rest
            elif what == "sent":
                number, when, deeds = rest
                diary.sent[number] = when, deeds
            else:
                number, answered, answers, resent = rest
                sent, deeds = diary.sent.pop(number)
                self._generation(deeds).add(deeds, sent, answered, answers, resent)
        if diary.is_closed:
            self._give_up(diary, math.inf)

    def _generation(self, deeds: list[list[Any]]) -> Generation:
        return self._generations[_number(deeds)]

    def _give_up(self, diary: Diary, number: float) -> None:
        """What was sent up to that generation, and not answered, never will be."""
        for key, (sent, deeds) in list(diary.sent.items()):
            if _number(deeds) <= number:
                del diary.sent[key]
                self._generation(deeds).add(deeds, sent, math.inf, [None] * len(deeds))

    def _check(self, number: int) -> None:
        began = time.process_time()
        generation = self._generations.pop(number)
        reading = self._look(sorted({op.run for op in generation.ops}))
        self._count(generation)
        self.verdict.findings.add(check(generation.ops + reading.ops, generation.orders + reading.orders))
        for op in generation.ops:
            if op.kind == "complete" and op.answer == ("done",):
                self._acknowledged.setdefault(op.run, []).append(op)
        self.verdict.busy += time.process_time() - began

    def _look(self, runs: list[str]) -> Generation:
        """All that the store has of those runs now: whenever the server can be asked."""
        deeds = [
            deed
            for run in runs
            for deed in (
                *(
                    Deed(self._store.calls.get_step_run(run, f"step-{step}"), "read", run, f"step-{step}")
                    for step in range(STEPS)
                ),
                Deed(self._store.calls.completed_steps(run), "order", run),
            )
        ]
        deadline = time.monotonic() + 30
        while True:
            sent = time.time()
            try:
                results = self._store.batch([deed.call for deed in deeds])
                for error in results:
                    if isinstance(error, ServerError):
                        raise error
            except ServerError:
                if time.monotonic() > deadline:
                    raise
                continue
            reading = Generation()
            reading.add(
                [list(deed[1:]) for deed in deeds],
                sent,
                time.time(),
                [answer_to(*each) for each in zip(deeds, results, strict=True)],
            )
            return reading

    def _count(self, generation: Generation) -> None:
        counts = self.verdict.counts
        ends: dict[str, Op] = {}
        granted: dict[tuple[str, str, int], str] = {}
        counts["operations"] += len(generation.orders)
        for op in generation.ops:
            if op.answer is None:
                counts["replies never received"] += 1
                continue
            counts["operations"] += 1
            counts["sent more than once"] += op.resent
            word = op.answer[0]
            counts[f"{op.kind}: {word}"] += 1
            if word == "execute":
                granted[op.run, op.step, op.answer[1]] = op.claim
            elif op.kind in ("fail", "release"):
                ends[op.claim] = op
            counts["zombies refused"] += word == "stale" and op.kind != "expire" and op.answer[3] != op.claim
        for run, step, attempt in granted:
            before = granted.get((run, step, attempt - 1))
            counts["takeovers"] += attempt > 1 and before not in ends


def _number(deeds: list[list[Any]]) -> int:
    return int(deeds[0][1].split("-")[1])


def audit(logs: Path, url: str, lua: str | None, director: Connection) -> None:
    """The process. It sends on what it finds, at once; told to end, it sends its verdict."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if lua is not None:
        scripts.directory = lambda: Path(lua)
    with StepRunStore.from_url(url, prefix=PREFIX) as store:
        audit = Audit(logs, store)
        told = 0
        while True:
            is_over = director.poll(PAUSE)
            audit.go_on()
            problems = audit.verdict.findings.problems + audit.verdict.errors
            if is_over:
                if not problems:
                    audit.end()
                director.recv()
                director.send(audit.verdict)
                return
            if len(problems) > told:
                told = len(problems)
                director.send(problems)
