"""`squidstep demo`: real work under real faults, and a check that does not rest on the store's word.

The parent process is the queue: it delivers steps to worker processes, a fifth of them twice, kills one worker inside
a step and delivers again what was not acknowledged. Workers ask the store whether they may execute. Apart from the
store, they tell the parent of each effect that they begin and end.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
import random
import secrets
import signal
import sys
import sysconfig
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count, islice, pairwise, zip_longest
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import click
import redis
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from squidstep_redis import Outcome, SquidstepError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer, ServerStartError

LEASE: Final = 1.0
SEED: Final = 20  # which deliveries come twice, and when, is the same each time
MAX_BYTES: Final = 4 * 1024 * 1024  # of a file: no step may come near its lease
SKIPPED: Final = ("__pycache__", "site-packages")
HELD_BACK: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Payload = dict[str, Any]
Key = tuple[str, str]


# The work: for each file three steps, in this order. Each is given what is known so far.


def _digest(data: bytes) -> Payload:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _compress(data: bytes) -> Payload:
    return {"compressed": len(zlib.compress(data))}


def _count(data: bytes) -> Payload:
    return {"lines": data.count(b"\n"), "words": len(data.split())}


EFFECTS: Final[dict[str, Callable[[bytes], Payload]]] = {"digest": _digest, "compress": _compress, "count": _count}
_NEXT: Final = dict(pairwise(EFFECTS))


def _execute(step: str, input: Payload) -> Payload:
    return EFFECTS[step](Path(input["path"]).read_bytes())


def _successor(step: str, input: Payload, output: Payload) -> dict[str, Payload]:
    return {_NEXT[step]: {**input, **output}} if step in _NEXT else {}


def sequential(path: Path) -> list[tuple[str, Payload, Payload]]:
    """What the store must hold in the end: step, input and output of each step of a file's run."""
    input: Payload = {"path": str(path)}
    steps: list[tuple[str, Payload, Payload]] = []
    for step in EFFECTS:
        steps.append((step, input, _execute(step, input)))
        input = {**input, **steps[-1][2]}
    return steps


def find_files(root: Path, limit: int, suffix: str = "") -> dict[str, Path]:
    """The first files under a directory, or the one file, by run id: the path from there, in sorted order."""
    root = root.absolute()
    found = [root] if root.is_file() else _walk(root, suffix)
    named = ((path.relative_to(root.parent if root.is_file() else root).as_posix(), path) for path in found)
    return dict(islice(((name, path) for name, path in named if _is_usable(name, path)), limit))


def _walk(root: Path, suffix: str) -> Iterator[Path]:
    for directory, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(names) if name.endswith(suffix))


def _is_usable(run_id: str, path: Path) -> bool:
    with suppress(OSError, UnicodeEncodeError):  # a run id is text, and file names need not be
        is_plain = path.is_file() and not path.is_symlink() and os.access(path, os.R_OK)
        return is_plain and path.stat().st_size <= MAX_BYTES and len(run_id.encode()) <= 512
    return False


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the parent alone
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
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
            output = _execute(step_run.step, step_run.input)
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
        self.begun: Counter[Key] = Counter()
        self.ended: Counter[Key] = Counter()
        self.counts: Counter[str] = Counter()
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
        # With these signals held back, no Ctrl-C meets the worker half imported, or this process half through the
        # start. The tracker that multiprocessing starts along with the first worker would let them in: it goes before.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        # The mask is for the worker, which inherits it. It holds back this thread alone: another may take the signal.
        arrived: list[int] = []
        handlers = {number: signal.getsignal(number) for number in HELD_BACK}
        for number in HELD_BACK:
            if callable(handlers[number]):
                signal.signal(number, lambda number, _frame: arrived.append(number))
        try:
            spawn = get_context("spawn")
            ours, theirs = spawn.Pipe()
            name = f"worker-{len(self.workers) + 1}"
            process = spawn.Process(target=work, args=(theirs, name, self._settings), daemon=True)
            process.start()
            theirs.close()  # or the worker's end would not end the connection
            self.workers.append(Worker(name, process, ours))
        finally:
            for number, handler in handlers.items():
                if callable(handler):
                    signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for number in arrived:
                signal.raise_signal(number)

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
            self.ended[delivery.key] += 1
            return
        worker.delivery, worker.state = None, "idle"
        self._idle.append(worker)
        if delivery is None:  # it has just started
            return
        if kind == "failed":
            raise click.ClickException(f"{worker.owner}, {delivery.step} of {delivery.run_id}: {value}")
        self.counts[kind] += 1
        if kind == "busy":
            self._delay(delivery, value)
            return
        self._enqueue(delivery.run_id, value)
        if not delivery.duplicate and delivery.key in self._late:
            self._delay(delivery._replace(duplicate=True), self._late[delivery.key])

    def _see_begin(self, worker: Worker, delivery: Delivery, attempt: int) -> None:
        self.begun[delivery.key] += 1
        if attempt > 1:
            self.counts["takeovers"] += 1
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


# The check, and what is shown.


def check(store: StepRunStore, broker: Broker) -> list[str]:
    """Holds the store, and what the workers told, against a plain sequential computation.

    Returns:
        What is wrong: nothing, if all is well.
    """
    problems: list[str] = []
    for run_id, path in broker.files.items():
        try:
            expected = sequential(path)
            stored = [(step_run.step, step_run.input, step_run.output) for step_run in store.get_run(run_id)]
            order, outputs = store.completed_steps(run_id), store.completed_outputs(run_id)
        except (OSError, SquidstepError) as error:
            problems.append(f"{run_id}: {error}")
            continue
        for is_, should_be in zip_longest(stored, expected):
            if is_ != should_be:
                problems.append(f"{run_id}: stored is {is_}, a sequential computation gives {should_be}")
        if (order, outputs) != (list(EFFECTS), [output for _, _, output in expected]):
            problems.append(f"{run_id}: completed, in this order, are {order} with {outputs}")
        for step in EFFECTS:
            seen = (broker.begun[run_id, step], broker.ended[run_id, step])
            if seen != (2 if (run_id, step) == broker.victim else 1, 1):
                problems.append(f"{run_id}: {step} was begun {seen[0]} times and ended {seen[1]} times")
    attempts = store.attempts(*broker.victim)
    owners = [attempt.owner for attempt in attempts]
    if [attempt.outcome for attempt in attempts] != [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]:
        problems.append(f"the attempts at the killed step are {attempts}")
    elif broker.killed is None or owners[0] != broker.killed.owner or owners[1] == owners[0]:
        problems.append(f"the killed step was not taken over from {broker.killed}: {attempts}")
    if broker.counts["takeovers"] != 1:
        problems.append(f"there were {broker.counts['takeovers']} takeovers, not 1")
    if broker.counts["skipped"] != broker.duplicates:
        problems.append(f"{broker.duplicates} steps were delivered twice, {broker.counts['skipped']} were skipped")
    return problems


def figures(store: StepRunStore, broker: Broker, problems: list[str], seconds: float) -> dict[str, Any]:
    """The result, as `--json` prints it."""
    attempts = [{"owner": attempt.owner, "outcome": attempt.outcome} for attempt in store.attempts(*broker.victim)]
    return {
        "ok": not problems,
        "files": len(broker.files),
        "steps": broker.steps,
        "steps_executed": broker.counts["completed"],
        "effects_begun": broker.begun.total(),
        "effects_ended": broker.ended.total(),
        "duplicates": broker.duplicates,
        "duplicates_skipped": broker.counts["skipped"],
        "told_to_wait": broker.counts["busy"],
        "takeovers": broker.counts["takeovers"],
        "workers_killed": int(broker.killed is not None),
        "killed_step": {"run_id": broker.victim[0], "step": broker.victim[1], "attempts": attempts},
        "steps_per_second": round(broker.counts["completed"] / broker.seconds, 1),
        "work_seconds": round(broker.seconds, 3),
        "elapsed_seconds": round(seconds, 3),
        "problems": problems,
    }


def _screen(broker: Broker) -> RenderableType:
    """How far it is, while it runs."""
    counts, bar, rows = broker.counts, Table.grid(padding=(0, 2)), Table.grid(padding=(0, 2))
    bar.add_row(ProgressBar(broker.steps, counts["completed"], width=30), f"{counts['completed']} of {broker.steps}")
    rows.add_column(no_wrap=True)
    rows.add_column(no_wrap=True, overflow="ellipsis")
    rows.add_row("steps done", bar)
    rows.add_row("duplicates skipped", f"{counts['skipped']} of {broker.duplicates}")
    rows.add_row("takeovers", str(counts["takeovers"]))
    for worker in list(broker.workers):
        rows.add_row(worker.owner, Text(worker.state, style="red" if worker is broker.killed else ""))
    return rows


def _summary(result: dict[str, Any]) -> RenderableType:
    killed = result["killed_step"]
    attempts = (f"{n}: {attempt['outcome']}, {attempt['owner']}" for n, attempt in enumerate(killed["attempts"], 1))
    rows = {
        "files": result["files"],
        "steps executed": f"{result['steps_executed']} of {result['steps']}",
        "duplicates skipped": f"{result['duplicates_skipped']} of {result['duplicates']}",
        "takeovers": result["takeovers"],
        "workers killed": result["workers_killed"],
        "the killed step": "\n".join((f"{killed['step']} of {killed['run_id']}", *attempts)),
        "steps per second": f"{result['steps_per_second']:.0f}",
        "elapsed": f"{result['elapsed_seconds']:.1f} s, of which the work took {result['work_seconds']:.1f} s",
        "check": "every output agrees, nothing lost, nothing twice" if result["ok"] else "FAILED",
    }
    table = Table(box=SIMPLE_HEAD, show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


@click.command("demo")
@click.argument("path", required=False, type=click.Path(exists=True, readable=True, path_type=Path))
@click.option("--files", default=300, show_default=True, type=click.IntRange(1), help="How many files at most.")
@click.option("--workers", default=4, show_default=True, type=click.IntRange(2, 64), help="How many processes work.")
@click.option("--url", help="A server of yours. Without: an embedded Valkey, for this run alone.")
@click.option("--keep", is_flag=True, help="Keep the keys on the server of yours.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(path: Path | None, files: int, workers: int, url: str | None, keep: bool, as_json: bool) -> None:
    """Does real work under real faults, and checks the result.

    Each file under PATH (by default the .py files of Python's standard library) is a run of three steps: its digest,
    its compressed size, its lines and words. A fifth of the deliveries comes twice. One worker is killed inside a
    step; when its lease ends, another takes over. Exits with 0 only if nothing was lost, nothing was executed twice
    save the killed step, and every output agrees with a plain sequential computation.

    Left out are symbolic links, hidden directories, and files that are unreadable or over 4 MiB.
    """
    if keep and url is None:
        raise click.UsageError("--keep needs --url: an embedded server's keys end with it")
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    found = find_files(root, files, ".py" if path is None else "")
    if not found:
        raise click.BadParameter(f"there is no file to work on in {root}", param_hint="PATH")
    console = Console(stderr=as_json, highlight=False)
    console.quiet = as_json and not console.is_terminal
    try:
        result = _run(found, workers, url, keep, console)
    except ImportError as error:
        raise click.ClickException("no server to start: pip install 'squidstep_redis[demo]', or give --url") from error
    except (ServerStartError, redis.RedisError, SquidstepError, ValueError) as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        console.print(_summary(result))
        for problem in result["problems"][:10]:
            console.out(problem, style="red")
    sys.exit(0 if result["ok"] else 1)


def _run(files: dict[str, Path], workers: int, url: str | None, keep: bool, console: Console) -> dict[str, Any]:
    prefix = f"squidstep-demo-{secrets.token_hex(4)}"
    started = time.monotonic()
    with ExitStack() as stack:
        # Should this process be killed, a server of the user's forgets the runs by itself.
        settings: Payload = {"prefix": prefix, "run_ttl": None if keep else 3_600}
        settings["url"] = url or stack.enter_context(EmbeddedServer()).url
        store = stack.enter_context(StepRunStore.from_url(**settings))
        client: Any = store.client  # redis-py leaves parts of its types unknown
        client.ping()
        if url and not keep:
            stack.callback(lambda: [client.unlink(key) for key in client.scan_iter(f"{prefix}:*", 1_000)])
        broker = Broker(settings, files, console.out)
        where = f"your server, prefix {prefix}" if url else "an embedded Valkey"
        console.out(f"{len(files)} files, {broker.steps} steps, {workers} workers, {where}")
        with Live(get_renderable=lambda: _screen(broker), console=console, refresh_per_second=10, transient=True):
            broker.run(workers)
        with console.status("checking every output"):
            problems = check(store, broker)
        return figures(store, broker, problems, time.monotonic() - started)
