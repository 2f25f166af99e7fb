"""Checks the soak's history during the soak: each generation of runs as soon as no worker makes calls on it.

The audit is a separate process. It reads the workers' logs, and reads each generation from the store when it is over.
At the end it reads all runs again, because every acknowledged completion must have survived all later faults.
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

from .crew import GENERATION, PREFIX, STEPS, Request, exit_with_parent, reply_of
from .history import Findings, Op, Order, check, find_lost

PAUSE: Final = 0.05  # seconds between two reads of the logs


@dataclass
class Verdict:
    """The result of a soak.

    Attributes:
        findings: the findings of the checker.
        errors: errors that no call may raise.
        counts: the number of events of each kind.
        busy: the processor time of the checks, in seconds.
    """

    findings: Findings = field(default_factory=Findings)
    errors: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    busy: float = 0.0


class WorkerLog:
    """Reads one worker's log as it grows.

    Attributes:
        floors: the generation of each actor, which makes no call on earlier ones.
        sent: the calls without a reply so far, by their number.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._rest = b""
        self.floors: dict[int, float] = {}
        self.sent: dict[int, tuple[float, list[Any]]] = {}

    @property
    def is_closed(self) -> bool:
        return self._file.closed

    def read(self) -> Iterator[list[Any]]:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            try:
                event, *rest = json.loads(line)
            except ValueError:
                continue  # empty, or truncated by a kill
            if event == "started":
                self.floors = dict.fromkeys(range(rest[1]), rest[0])
            elif event == "generation":
                self.floors[rest[0]] = rest[1]
            elif event == "killed":
                self.floors.clear()
                self._file.close()
                return
            else:
                yield [event, *rest]


@dataclass
class Generation:
    """The history of the runs of one generation."""

    ops: list[Op] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)

    def add(
        self, requests: list[list[Any]], sent: float, received: float, replies: list[Any], resent: bool = False
    ) -> None:
        for (kind, run, step, claim, *given), reply in zip(requests, replies, strict=True):
            if reply == ["unwritten"] or (kind == "order" and reply is None):
                continue
            if kind == "order" and reply[:1] != ["error"]:
                self.orders.append(Order(run, sent, received, tuple(reply)))
                continue
            known = (math.inf, None) if reply is None else (received, tuple(reply))
            self.ops.append(Op(kind, run, step, claim, sent, *known, *given, resent))


class Audit:
    """Reads the logs, checks the generations and counts the events."""

    def __init__(self, logs: Path, store: StepRunStore) -> None:
        self.verdict = Verdict()
        self._logs = logs
        self._store = store
        self._worker_logs: dict[Path, WorkerLog] = {}
        self._generations: dict[int, Generation] = defaultdict(Generation)
        self._acknowledged: dict[str, list[Op]] = {}  # the completions of each run

    def advance(self) -> None:
        """Reads new log lines and checks the generations that are over."""
        now = int(time.time() / GENERATION)
        for path in self._logs.iterdir():
            if path not in self._worker_logs:
                self._worker_logs[path] = WorkerLog(path)
        for log in self._worker_logs.values():
            if not log.is_closed:
                self._read(log)
        floor = min([now, *(floor for log in self._worker_logs.values() for floor in log.floors.values())])
        for number in sorted(self._generations):
            if number < floor:
                self._check(number)

    def finish(self) -> None:
        """Reads all runs again: no acknowledged completion may have been lost in the meantime."""
        runs = list(self._acknowledged)
        for first in range(0, len(runs), 50):
            part = runs[first : first + 50]
            reading = self._read_runs(part)
            acknowledged = [op for run in part for op in self._acknowledged[run]]
            self.verdict.findings.lost += find_lost([*acknowledged, *reading.ops], reading.orders)
            self.verdict.counts["completions found at the end"] += len({(op.run, op.step) for op in acknowledged})

    def _read(self, log: WorkerLog) -> None:
        for event, *rest in log.read():
            if event == "error":
                self.verdict.errors += rest
            elif event == "cancelled":
                self.verdict.counts["tasks cancelled"] += 1
            elif event == "sent":
                number, when, requests = rest
                log.sent[number] = when, requests
            else:
                number, received, replies, resent = rest
                sent, requests = log.sent.pop(number)
                self._generation(requests).add(requests, sent, received, replies, resent)
        if log.is_closed:
            self._record_unanswered(log)

    def _generation(self, requests: list[list[Any]]) -> Generation:
        return self._generations[_number(requests)]

    def _record_unanswered(self, log: WorkerLog) -> None:
        """Records the calls of a killed worker that got no reply."""
        for sent, requests in log.sent.values():
            self._generation(requests).add(requests, sent, math.inf, [None] * len(requests))
        log.sent.clear()

    def _check(self, number: int) -> None:
        began = time.process_time()
        generation = self._generations.pop(number)
        reading = self._read_runs(sorted({op.run for op in generation.ops}))
        self._count(generation)
        self.verdict.findings.add(check(generation.ops + reading.ops, generation.orders + reading.orders))
        for op in generation.ops:
            if op.kind == "complete" and op.reply == ("done",):
                self._acknowledged.setdefault(op.run, []).append(op)
        self.verdict.busy += time.process_time() - began

    def _read_runs(self, runs: list[str]) -> Generation:
        """Reads everything that the store has of the runs; retries while the server is away."""
        requests = [
            request
            for run in runs
            for request in (
                *(
                    Request(self._store.calls.get_step_run(run, f"step-{step}"), "read", run, f"step-{step}")
                    for step in range(STEPS)
                ),
                Request(self._store.calls.completed_steps(run), "order", run),
            )
        ]
        deadline = time.monotonic() + 30
        while True:
            sent = time.time()
            try:
                results = self._store.batch([request.call for request in requests])
                for error in results:
                    if isinstance(error, ServerError):
                        raise error
            except ServerError:
                if time.monotonic() > deadline:
                    raise
                continue
            reading = Generation()
            reading.add(
                [list(request[1:]) for request in requests],
                sent,
                time.time(),
                [reply_of(*each) for each in zip(requests, results, strict=True)],
            )
            return reading

    def _count(self, generation: Generation) -> None:
        counts = self.verdict.counts
        ends: dict[str, Op] = {}
        granted: dict[tuple[str, str, int], str] = {}
        counts["operations"] += len(generation.orders)
        for op in generation.ops:
            if op.reply is None:
                counts["replies never received"] += 1
                continue
            counts["operations"] += 1
            counts["sent more than once"] += op.resent
            word = op.reply[0]
            counts[f"{op.kind}: {word}"] += 1
            if word == "execute":
                granted[op.run, op.step, op.reply[1]] = op.claim
            elif op.kind in ("fail", "final", "release"):
                ends[op.claim] = op
            counts["zombies rejected"] += word == "stale" and op.kind != "expire" and op.reply[3] != op.claim
        for run, step, attempt in granted:
            before = granted.get((run, step, attempt - 1))
            counts["takeovers"] += attempt > 1 and before not in ends


def _number(requests: list[list[Any]]) -> int:
    return int(requests[0][1].split("-")[1])


def audit(logs: Path, url: str, lua: str | None, parent: Connection) -> None:
    """Runs the audit's process. It sends problems at once; after a message from `parent`, it sends its verdict."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()  # it would retry its calls for longer
    if lua is not None:
        scripts.directory = lambda: Path(lua)
    with StepRunStore.from_url(url, prefix=PREFIX) as store:
        audit = Audit(logs, store)
        reported = 0
        while True:
            is_over = parent.poll(PAUSE)
            audit.advance()
            problems = audit.verdict.findings.problems + audit.verdict.errors
            if is_over:
                if not problems:
                    audit.finish()
                parent.recv()
                parent.send(audit.verdict)
                return
            if len(problems) > reported:
                reported = len(problems)
                parent.send(problems)
