"""`squidstep demo`: workers that pop their deliveries from a list on the server."""

from __future__ import annotations

import heapq
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final

import click
from redis import Redis

from squidstep_redis import StepRunStore
from squidstep_redis.demo.command import RUN_TTL, demo_options, run_demo
from squidstep_redis.demo.scenario import DemoContext, Key, Scenario, WorkerProcess, pick_duplicates
from squidstep_redis.demo.work import STEPS, Payload, execute
from squidstep_redis.demo.worker import Event, parent

LEASE: Final = 2.0

_NEXT: Final = dict(pairwise(STEPS))


@click.command("demo")
@demo_options(files=300)
@click.option(
    "-u",
    "--url",
    help="Use this server, under a separate key prefix that is deleted afterwards, instead of a bundled one.",
)
def command(**options: Any) -> None:
    """Does real work under real faults, and checks the result.

    Each file under PATH (by default the .py files of Python's standard library) is a run of three steps: its digest,
    its compressed size, its lines and words. A fifth of the steps are delivered twice. One worker is killed inside a
    step; when its lease expires, another worker takes over. The exit code is 0 only if nothing was lost, nothing was
    executed twice except the killed step, and every output equals that of a sequential computation.

    Symbolic links, hidden directories, unreadable files and files over 4 MiB are skipped.
    """
    run_demo(PlainScenario, **options)


def execute_deliveries(url: str, prefix: str) -> None:
    """Runs a worker, which executes one delivery at a time."""
    client: Any = Redis  # redis-py leaves parts of its types unknown
    queue = client.from_url(url)
    with StepRunStore.from_url(url, prefix=prefix, run_ttl=RUN_TTL) as store:
        parent.send_event("ready")
        while True:
            if delivery := queue.blpop(_queue_of(prefix), timeout=1):
                _execute(store, *json.loads(delivery[1]))


def _queue_of(prefix: str) -> str:
    return f"{prefix}:demo-queue"


def _execute(store: StepRunStore, run_id: str, step: str, input: Payload, file: int, kill: bool) -> None:
    parent.send_event("delivered", file, step)
    result = store.begin_step(run_id, step, input, lease=LEASE, owner=f"worker-{parent.worker + 1} pid {os.getpid()}")
    step_run, decision = result
    if decision == "skip":
        if step_run.output is None:
            parent.send_event("busy", file, step, retry_in=result.retry_in or 0.0)
        else:
            parent.send_event("skipped", file, step)
        return
    parent.send_event("started", file, step, attempt=step_run.attempt)
    if kill and step_run.attempt == 1:
        parent.stall(at_gate=False)
    try:
        output = execute(step, step_run.input)
    except OSError as error:
        store.fail_step(step_run, error)
        parent.send_event("failed", file, step)
        return
    parent.send_event("finished", file, step)
    successor = {_NEXT[step]: {**step_run.input, **output}} if step in _NEXT else {}
    store.complete_step(step_run, output, schedule=successor)
    parent.send_event("completed", file, step)


class PlainScenario(Scenario):
    """Delivers each step at least once. Some are delivered twice, and those of a killed worker are redelivered."""

    def __init__(self, context: DemoContext) -> None:
        run_ids = list(context.files)
        super().__init__(context, {(run_ids[len(run_ids) // 3], "compress"): "worker"})
        self._queue: Any = context.store.client
        twice = pick_duplicates([(run_id, step) for run_id in run_ids for step in STEPS])
        self.counts["duplicates"] = len(twice)
        self._twice_at_once = set(twice[1::2])
        self._twice_later = set(twice[::2])
        self._delivered: set[Key] = set()
        self._unacknowledged: dict[WorkerProcess, Key] = {}
        self._queued = 0
        self._delayed: list[tuple[float, Key]] = []

    def _worker_main(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return execute_deliveries, (self.context.url, self.context.store.calls.prefix)

    def _deliver_all(self) -> None:
        first = next(iter(STEPS))
        for run_id, path in reversed(self.context.files.items()):
            self.context.store.schedule_step(run_id, first, {"path": str(path)})
            self._deliver_first((run_id, first))

    def _is_done(self) -> bool:
        while self._delayed and self._delayed[0][0] <= time.monotonic():
            self._deliver(heapq.heappop(self._delayed)[1])
        return not (self._queued or self._unacknowledged or self._delayed)

    def _on_event(self, worker: WorkerProcess, event: Event, key: Key) -> None:
        if event.kind == "delivered":
            self._queued -= 1
            self._unacknowledged[worker] = key
        elif event.kind in ("completed", "failed", "skipped", "busy"):
            del self._unacknowledged[worker]
            run_id, step = key
            if event.kind == "busy":
                heapq.heappush(self._delayed, (time.monotonic() + event.retry_in, key))
            elif event.kind != "failed" and step in _NEXT:
                self._deliver_first((run_id, _NEXT[step]))
            if event.kind != "busy" and key in self._twice_later:
                self._twice_later.remove(key)
                self._deliver(key)

    def _on_exit(self, worker: WorkerProcess) -> None:
        if key := self._unacknowledged.pop(worker, None):
            self._deliver(key)

    def find_problems(self) -> Iterator[str]:
        """Yields a problem unless each duplicate was skipped."""
        if self.counts["skipped"] != self.counts["duplicates"]:
            yield f"{self.counts['duplicates']} steps were delivered twice, but {self.counts['skipped']} were skipped"

    def _deliver_first(self, key: Key) -> None:
        if key not in self._delivered:  # the duplicate of its predecessor is also acknowledged
            self._delivered.add(key)
            for _ in range(2 if key in self._twice_at_once else 1):
                self._deliver(key)

    def _deliver(self, key: Key) -> None:
        run_id, step = key
        scheduled = self.context.store.get_step_run(run_id, step)
        delivery = (run_id, step, scheduled and scheduled.input, self.run_ids.index(run_id), key in self.kill_plan)
        # At the front, so that a run is finished before the next one starts.
        self._queue.lpush(_queue_of(self.context.store.calls.prefix), json.dumps(delivery))
        self._queued += 1
