"""Workers of both stores at the same few steps, while they are killed, replies are lost and the server goes away.

Each worker writes down every call before it is sent, and its answer when it came, in a file of its own: what a killed
worker had sent is known. `history.check` says whether a right store can have answered all that.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import redis
import redis.asyncio
from proxy import Proxy

from squidstep_redis import (
    AsyncStepRunStore,
    Call,
    Calls,
    SquidstepError,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
    scripts,
)
from squidstep_redis.embedded import EmbeddedServer

from .history import Op, Order, check

PREFIX: Final = "soak"
RUNS: Final = 3
STEPS: Final = 6
GENERATION: Final = 1.0  # seconds after which new runs begin: completed steps are of no more interest
CALL_BYTES: Final = 150  # that a call takes in a log, about
TASKS: Final = 4  # of a worker on asyncio

Life = Generator["Call[Any] | float", Any, None]


# A worker


@dataclass
class Log:
    """Writes down calls and answers: each line whole, so that a kill cuts none but the last."""

    path: Path
    numbers: Iterator[int] = field(default_factory=itertools.count)
    connects: int = 0  # how often the client had to

    def __post_init__(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, *values: Any) -> None:
        os.write(self._file, json.dumps(values).encode() + b"\n")

    def call(self, kind: str, run: str, call: Call[Any], *rest: Any) -> Generator[Call[Any], Any, Any]:
        """Sends a call, written down before and after."""
        number, connects = next(self.numbers), self.connects
        self.write("sent", number, time.time(), kind, run, *rest)
        try:
            result = yield call
        except StaleStepRunError as error:
            result = error
            answer = ["stale", error.current.status, error.current.attempt, error.current.owner]
        except StepRunNotFoundError as error:
            result, answer = error, ["missing"]
        else:
            answer = _answer(kind, result)
        self.write("answered", number, time.time(), answer, self.connects != connects)
        return result


def _answer(kind: str, result: Any) -> list[Any]:
    if kind == "begin":
        step_run: StepRun = result.step_run
        if result.decision == "execute":
            ends = step_run.lease_ends_at
            return ["execute", step_run.attempt, ends.timestamp() if ends else float("inf")]
        if result.busy:
            return ["busy", step_run.attempt, step_run.owner]
        return ["completed", step_run.attempt, _value(step_run)] if result.reason == "completed" else [result.reason]
    if kind == "read":
        if result is None:
            return ["none", 0, "", None]
        return [result.status, result.attempt, result.owner or "", _value(result)]
    return result if kind == "order" else ["done"]


def _value(step_run: StepRun) -> int | None:
    return None if step_run.output is None else step_run.output["value"]


def live(calls: Calls, log: Log, dice: random.Random, name: str) -> Life:
    """Takes deliveries for ever: claims what it can, and is slow, wrong or late with some of it."""
    for number in itertools.count():
        run = f"run-{int(time.time() / GENERATION)}-{dice.randrange(RUNS)}"
        step, claim = f"step-{dice.randrange(STEPS)}", f"{name}-{number}"
        try:
            lease = dice.choice((0.01, 0.03, 0.1))
            begin = calls.begin_step(run, step, {"by": claim}, lease=lease, owner=claim)
            begun = yield from log.call("begin", run, begin, step, claim, None, lease)
            if begun.decision == "execute":
                yield from _work(calls, log, dice, run, begun.step_run, claim)
            elif dice.random() < 0.3:
                yield from log.call("read", run, calls.get_step_run(run, step), step, "", None, 0)
                yield from log.call("order", run, calls.completed_steps(run))
            else:
                yield dice.uniform(0, 0.01)
        except (redis.RedisError, OSError):
            yield 0.05  # its answer will not be known
        except SquidstepError as error:
            log.write("wrong", f"{claim}: {type(error).__name__}: {error}")


def _work(calls: Calls, log: Log, dice: random.Random, run: str, step_run: StepRun, claim: str) -> Life:
    step = step_run.step
    yield dice.choice((0, 0, 0, 0.02, 0.2))  # the last outlasts every lease: a zombie
    if dice.random() < 0.2:
        lease = 0.1
        yield from log.call("extend", run, calls.extend_claim(step_run, lease), step, claim, None, lease)
    value = dice.randrange(1_000_000)
    kind = dice.choice(("complete", "fail", "fail", "fail", "fail", "release"))
    end = {
        "complete": lambda: calls.complete_step(step_run, {"value": value}),
        "fail": lambda: calls.fail_step(step_run, {"value": value}),
        "release": lambda: calls.release_step(step_run),
    }[kind]
    yield from log.call(kind, run, end(), step, claim, value if kind == "complete" else None, 0)


def work(url: str, directory: str, name: str, seed: int, kind: str, lua: str | None) -> None:
    """A worker's process: until it is killed, or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if lua is not None:  # a store that is broken on purpose
        scripts.directory = lambda: Path(lua)
    log = Log(Path(directory, f"{name}.log"))
    parent = os.getppid()
    if kind == "asyncio":
        asyncio.run(_work_asyncio(url, log, name, seed, parent))
        return

    class Connection(redis.Connection):
        def connect(self) -> None:
            log.connects += 1
            super().connect()

    store = StepRunStore.from_url(url, prefix=PREFIX, connection_class=Connection)
    life, answer = live(store.calls, log, random.Random(seed), name), None
    wanted = next(life)
    while os.getppid() == parent:
        try:
            answer = store.send(wanted) if isinstance(wanted, Call) else time.sleep(wanted)
        except (SquidstepError, redis.RedisError) as error:
            wanted = life.throw(error)
        else:
            wanted = life.send(answer)


async def _work_asyncio(url: str, log: Log, name: str, seed: int, parent: int) -> None:
    class Connection(redis.asyncio.Connection):
        async def connect(self) -> None:
            log.connects += 1
            await super().connect()

    store = AsyncStepRunStore.from_url(url, prefix=PREFIX, connection_class=Connection)

    async def task(number: int) -> None:
        life, answer = live(store.calls, log, random.Random(seed + number), f"{name}-{number}"), None
        wanted = next(life)
        while os.getppid() == parent:
            try:
                answer = await (store.send(wanted) if isinstance(wanted, Call) else asyncio.sleep(wanted))
            except (SquidstepError, redis.RedisError) as error:
                wanted = life.throw(error)
            else:
                wanted = life.send(answer)

    await asyncio.gather(*(task(number) for number in range(TASKS)))


# The hand that kills, and the verdict


@dataclass
class Crew:
    """Worker processes, replaced when they are killed."""

    urls: tuple[str, ...]
    directory: Path
    lua: Path | None = None
    size: int = 4
    seed: int = 0
    killed: int = 0

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self.workers: list[Any] = []

    def __enter__(self) -> Crew:
        for _ in range(self.size):
            self.hire()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for worker in self.workers:
            worker.kill()
            worker.join()

    def hire(self) -> None:
        number = next(self._numbers)
        kind = ("blocking", "asyncio")[number % 2]
        url = self.urls[number % len(self.urls)]
        args = (url, str(self.directory), f"w{number}", self.seed + 100 * number, kind, self.lua and str(self.lua))
        worker = get_context("spawn").Process(target=work, args=args, name=f"w{number}", daemon=True)
        worker.start()
        self.workers.append(worker)

    def kill_one(self, dice: random.Random) -> None:
        """Kills a worker that is at work: one that is yet to start would never get to it on a slow machine."""
        at_work = [worker for worker in self.workers if (self.directory / f"{worker.name}.log").exists()]
        if not at_work:
            return
        worker = dice.choice(at_work)
        self.workers.remove(worker)
        worker.kill()
        worker.join()
        self.killed += 1
        self.hire()


@dataclass
class Verdict:
    """What came of it."""

    problems: list[str]
    counts: Counter[str]


def _written(logs: Path) -> int:
    return sum(path.stat().st_size for path in logs.iterdir())


def judge(directory: Path) -> Verdict:
    """Reads what the workers wrote, and checks it."""
    ops: list[Op] = []
    orders: list[Order] = []
    problems: list[str] = []
    counts: Counter[str] = Counter()
    for path in sorted(directory.glob("*.log")):
        sent: dict[int, list[Any]] = {}
        for line in path.read_text("utf-8").splitlines():
            try:
                what, number, *rest = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if what == "wrong":
                problems.append(number)  # which is what was wrong
            elif what == "sent":
                sent[number] = rest
            else:
                began, kind, run, *details = sent.pop(number)
                when, answer, resent = rest
                counts["calls"] += 1
                if kind == "order":
                    orders.append(Order(run, began, when, tuple(answer)))
                else:
                    step, claim, value, lease = details
                    ops.append(Op(kind, run, step, claim, began, when, tuple(answer), value, lease, resent))
                    counts[f"{kind}: {answer[0]}"] += 1
                    counts["takeovers"] += kind == "begin" and answer[0] == "execute" and answer[1] > 1
        for began, kind, run, *details in sent.values():
            counts["answers lost"] += 1
            if kind != "order":
                step, claim, value, lease = details
                ops.append(Op(kind, run, step, claim, began, value=value, lease=lease))
    return Verdict(problems + check(ops, orders), counts)


def soak(
    seconds: float, directory: Path, *, binary: Path, lua: Path | None = None, seed: int = 0, calls: int = 1_500
) -> Verdict:
    """Lets a crew work, while it is killed, its replies are lost and its server restarts.

    For so long, and then on until about so many calls were made, but for a minute more at most.
    """
    dice = random.Random(seed)
    options = {"appendonly": "yes", "appendfsync": "always"}  # everysec may put a write off while the disk is busy
    logs = directory / "logs"
    logs.mkdir()
    with (
        EmbeddedServer(binary=binary, options=options, port=0) as server,
        Proxy((server.host, server.port)) as proxy,
        redis.Redis.from_url(server.url) as client,
        Crew((server.url, f"redis://127.0.0.1:{proxy.port}/0"), logs, lua, seed=seed) as crew,
    ):
        faults = Counter[str]()

        def restart() -> None:
            server.kill()
            server.start()

        acts: dict[str, Callable[[], object]] = {
            "workers killed": lambda: crew.kill_one(dice),
            "replies lost": lambda: proxy.drop(dice.choice((1, 1, 3))),
            "scripts flushed": client.script_flush,
            "server restarted": restart,
        }
        weights = (4, 20, 2, 1)
        end = time.monotonic() + seconds
        while time.monotonic() < end or (time.monotonic() < end + 60 and _written(logs) < calls * CALL_BYTES):
            time.sleep(dice.uniform(0, 0.2))
            name = dice.choices(list(acts), weights)[0]
            acts[name]()
            faults[name] += 1
        for worker in crew.workers:
            if not worker.is_alive():
                raise AssertionError(f"{worker} ended by itself")
    verdict = judge(logs)
    return Verdict(verdict.problems, verdict.counts + faults)
