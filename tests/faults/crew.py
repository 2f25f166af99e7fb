"""The soak's workers: what they do to the store, and how they write it down.

Each writes down every call before it is sent, and its answer when it came, in a file of its own: what a killed worker
had sent is known. A worker has several lives, threads or tasks that share a store. `audit.py` reads what they write.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import redis
import redis.asyncio

from squidstep_redis import (
    AsyncStepRunStore,
    BeginResult,
    Call,
    Calls,
    NotSentError,
    OutcomeUnknownError,
    RefusedError,
    ReplyMismatchError,
    ScheduleResult,
    SquidstepError,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
)
from squidstep_redis.protocol import scripts

PREFIX: Final = "soak"
GENERATION: Final = 1.0  # seconds after which new runs begin: completed steps are of no more interest
RUNS: Final = 2  # of a generation
STEPS: Final = 16  # of a run
LIVES: Final = 4  # of a worker

# A new process takes a tenth of the time when it need not import all this again.
PROCESSES: Final = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["squidstep_redis", "redis.asyncio", "asyncio"])

Life = Generator["list[Call[Any]] | float", Any, Any]
"""Yields calls, and is sent a result or an error for each; or seconds to pause."""


class Deed(NamedTuple):
    """A call, and what the history is to know of it, see `history.Op`."""

    call: Call[Any]
    kind: str
    run: str
    step: str = ""
    claim: str = ""
    value: int | None = None
    lease: float = 0.0
    limit: float = math.inf


_sends: ContextVar[int] = ContextVar("sends", default=0)  # of this life: more than one for a call, if it was sent again


class Connection(redis.Connection):
    """Counts what is sent."""

    def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        _sends.set(_sends.get() + 1)
        super().send_packed_command(*args, **kwargs)


class AsyncConnection(redis.asyncio.Connection):
    """Likewise."""

    async def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        _sends.set(_sends.get() + 1)
        await super().send_packed_command(*args, **kwargs)


@dataclass
class Log:
    """Writes down what is sent and answered: each line whole, so that a kill cuts none but the last."""

    path: Path

    def __post_init__(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._numbers = itertools.count()

    def write(self, *values: Any) -> None:
        os.write(self._file, json.dumps(values, separators=(",", ":")).encode() + b"\n")

    def do(self, *deeds: Deed) -> Life:
        """Sends calls, in one round trip, and writes them down before and after. Answers their results."""
        if not deeds:
            return []
        number, sends = next(self._numbers), _sends.get()
        self.write("sent", number, time.time(), [deed[1:] for deed in deeds])
        results = yield [deed.call for deed in deeds]
        when = time.time()
        answers = [self._answer(*each) for each in zip(deeds, results, strict=True)]
        self.write("answered", number, when, answers, _sends.get() - sends > 1)
        return results

    def _answer(self, deed: Deed, result: Any) -> list[Any] | None:
        try:
            return answer_to(deed, result)
        except (redis.RedisError, OSError, OutcomeUnknownError) as error:
            self.write("error", f"{deed.kind} of {deed.claim} in {deed.run}: {type(error).__name__}: {error}")
            return None


def answer_to(deed: Deed, result: Any) -> list[Any] | None:
    """A result in the words of the history; None if it is not known."""
    match result:
        case Exception():
            return _refused(result)
        case BeginResult():
            return _begun(result)
        case ScheduleResult():
            return [result.decision]
        case StepRun() if deed.kind == "extend":
            return ["done", result.lease_ends_at.timestamp()]
        case StepRun() if deed.kind == "read":
            return [result.status, result.attempt, result.owner or "", _value(result)]
        case None:
            return ["none", 0, "", None]
        case list():
            return result
        case _:
            return ["done"]


def _refused(error: Exception) -> list[Any] | None:
    match error:
        case StaleStepRunError():
            return ["stale", error.current.status, error.current.attempt, error.current.owner or ""]
        case StepRunNotFoundError():
            return ["missing"]
        case NotSentError() | RefusedError():
            return ["unwritten"]
        case ReplyMismatchError():
            return ["error", str(error)]
        case OutcomeUnknownError() if error.transient:
            return None
        case SquidstepError() if not isinstance(error, OutcomeUnknownError):
            return ["error", f"{type(error).__name__}: {error}"]  # which a correct store never returns
        case _:
            raise error  # a script that fails, or an error of redis-py's own


def _begun(result: BeginResult) -> list[Any]:
    step_run = result.step_run
    if result.decision == "execute":
        return ["execute", step_run.attempt, step_run.input["by"], step_run.lease_ends_at.timestamp()]
    known = [result.reason, step_run.attempt, step_run.owner or ""]
    match result.reason:
        case "completed":
            return [*known, _value(step_run)]
        case "superseded":
            return known[:1]
        case _:
            return known


def _value(step_run: StepRun) -> int | None:
    return (step_run.output or step_run.last_error or {}).get("value")


@dataclass
class Hand:
    """One life's hand at the store: it takes deliveries for ever, and is slow, wrong, late or insistent with some."""

    calls: Calls
    log: Log
    dice: random.Random
    name: str
    life: int

    def live(self) -> Life:
        self._claims = (f"{self.name}-{self.life}-{number}" for number in itertools.count())
        while True:
            generation = int(time.time() / GENERATION)
            # From here on nothing of an earlier generation is sent: the audit relies on it.
            self.log.write("turn", self.life, generation)
            self._said: deque[Deed] = deque(maxlen=16)  # what may be sent once more, much later
            while generation == int(time.time() / GENERATION):
                yield from self._deliver(generation)

    def _deliver(self, generation: int) -> Life:
        dice, log = self.dice, self.log
        places = [(f"run-{generation}-{run}", f"step-{step}") for run in range(RUNS) for step in range(STEPS)]
        places = dice.sample(places, dice.choice((1, 2, 8, 16)))
        begins = [self._begin(*place) for place in places]
        results = yield from log.do(*begins)
        self._said += begins
        held = [
            (deed, result.step_run)
            for deed, result in zip(begins, results, strict=True)
            if isinstance(result, BeginResult) and result.decision == "execute"
        ]
        if len(held) < len(begins) and dice.random() < 0.3:
            yield from log.do(*self._look(begins, results))
        yield dice.choice((0, 0, 0, 0.005, 0.02, 0.2) if held else (0, 0.01))  # the last outlasts most leases: a zombie
        yield from log.do(*(self._extend(*claim) for claim in held if dice.random() < 0.2))
        yield from log.do(*(begin for begin, _ in held if dice.random() < 0.1))  # it is told so once more
        ends = [self._end(*claim) for claim in held]
        yield from log.do(*ends)
        self._said += ends
        if dice.random() < 0.1:  # and another end, which must not be had
            kinds = [end.kind if dice.random() < 0.5 else None for end in ends]
            yield from log.do(*(self._end(*claim, kind) for claim, kind in zip(held, kinds, strict=True)))
        if dice.random() < 0.2:  # as a client does after a lost reply, or the network with a late copy
            yield dice.choice((0, 0.01, 0.05))
            yield from log.do(*dice.sample(self._said, min(4, len(self._said))))

    def _begin(self, run: str, step: str) -> Deed:
        claim = next(self._claims)
        input = {"by": claim}
        if self.dice.random() < 0.05:
            return Deed(self.calls.schedule_step(run, step, input), "schedule", run, step, claim)
        lease, limit = self.dice.choice((0.01, 0.03, 0.1)), self.dice.choice((None, None, None, 3, 9))
        call = self.calls.begin_step(run, step, input, lease=lease, max_attempts=limit, owner=claim)
        return Deed(call, "begin", run, step, claim, None, lease, math.inf if limit is None else limit)

    def _extend(self, begin: Deed, step_run: StepRun) -> Deed:
        lease = self.dice.choice((0.01, 0.1))
        return begin._replace(call=self.calls.extend_claim(step_run, lease), kind="extend", lease=lease)

    def _end(self, begin: Deed, step_run: StepRun, kind: str | None = None) -> Deed:
        value = self.dice.randrange(1_000_000)
        match kind or self.dice.choices(("fail", "release", "complete"), (16, 3, 1))[0]:
            case "release":
                return begin._replace(call=self.calls.release_step(step_run), kind="release")
            case "fail":
                return begin._replace(call=self.calls.fail_step(step_run, {"value": value}), kind="fail", value=value)
            case _:
                call = self.calls.complete_step(step_run, {"value": value})
                return begin._replace(call=call, kind="complete", value=value)

    def _look(self, begins: list[Deed], results: list[Any]) -> list[Deed]:
        """Reads, and sometimes expires a claim, as an operator does who knows that its holder is dead."""
        run, step = begins[0].run, begins[0].step
        deeds = [
            Deed(self.calls.get_step_run(run, step), "read", run, step),
            Deed(self.calls.completed_steps(run), "order", run),
        ]
        for deed, result in zip(begins, results, strict=True):
            if isinstance(result, BeginResult) and result.busy and self.dice.random() < 0.2:
                holder = result.step_run
                deeds.append(Deed(self.calls.expire_claim(holder), "expire", deed.run, deed.step, holder.owner or ""))
        return deeds


# A worker's process


def work(url: str, log: Path, seed: int, kind: str, lua: str | None) -> None:
    """A worker's process: until it is killed, or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.nice(5)  # the killer and the checker come first
    if lua is not None:  # a store that is broken on purpose
        scripts.directory = lambda: Path(lua)
    if kind == "asyncio":
        asyncio.run(_work_asyncio(url, Log(log), seed))
    else:
        _work_blocking(url, Log(log), seed)


def _hands(calls: Calls, log: Log, seed: int) -> list[Hand]:
    return [Hand(calls, log, random.Random(seed + life), log.path.stem, life) for life in range(LIVES)]


def _work_blocking(url: str, log: Log, seed: int) -> None:
    store = StepRunStore.from_url(url, prefix=PREFIX, connection_class=Connection)

    def send(calls: list[Call[Any]]) -> list[Any]:
        try:
            return store.batch(calls) if len(calls) > 1 else [store.send(calls[0])]
        except (SquidstepError, redis.RedisError, OSError) as error:
            return [error] * len(calls)

    def live(hand: Hand) -> None:
        life, answer = hand.live(), None
        try:
            while True:
                wanted = life.send(answer)
                answer = send(wanted) if isinstance(wanted, list) else time.sleep(wanted)
        except Exception as error:  # noqa: BLE001 -- it is told
            _end_all(log, error)

    threads = [threading.Thread(target=live, args=(hand,), daemon=True) for hand in _hands(store.calls, log, seed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def _work_asyncio(url: str, log: Log, seed: int) -> None:
    store = AsyncStepRunStore.from_url(url, prefix=PREFIX, connection_class=AsyncConnection)

    async def send(calls: list[Call[Any]]) -> list[Any]:
        try:
            return await store.batch(calls) if len(calls) > 1 else [await store.send(calls[0])]
        except (SquidstepError, redis.RedisError, OSError) as error:
            return [error] * len(calls)

    async def live(hand: Hand) -> None:
        life, answer = hand.live(), None
        try:
            while True:
                wanted = life.send(answer)
                answer = await (send(wanted) if isinstance(wanted, list) else asyncio.sleep(wanted))
        except Exception as error:  # noqa: BLE001 -- it is told
            _end_all(log, error)

    await asyncio.gather(*(live(hand) for hand in _hands(store.calls, log, seed)))


def _end_all(log: Log, error: Exception) -> None:
    """A life that ends by itself is a mistake of the soak: it ends the worker, whose end is noticed."""
    log.write("error", f"{log.path.stem} ended by itself: {error!r}")
    os._exit(1)


# All of them


@dataclass
class Crew:
    """Worker processes, replaced when they are killed.

    A worker's log begins with when it was hired, written here, and ends with its death: before and after anything that
    it can write itself.
    """

    urls: tuple[str, ...]
    logs: Path
    dice: random.Random
    lua: Path | None = None
    size: int = 6

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._workers: dict[Path, Any] = {}

    def __enter__(self) -> Crew:
        for _ in range(self.size):
            self.hire()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for log in list(self._workers):
            self._kill(log)

    def hire(self) -> None:
        number = next(self._numbers)
        log = self.logs / f"w{number}.log"
        _append(log, "hired", int(time.time() / GENERATION), LIVES)
        kind, url = ("blocking", "asyncio")[number % 2], self.urls[number // 2 % len(self.urls)]
        args = (url, log, self.dice.randrange(1 << 32), kind, self.lua and str(self.lua))
        worker = PROCESSES.Process(target=work, args=args, name=log.stem, daemon=True)
        worker.start()
        self._workers[log] = worker

    def kill_one(self) -> None:
        """Kills a worker that is at work: one that is yet to start would never get to it on a slow machine."""
        at_work = [log for log in self._workers if log.stat().st_size > 1_000]
        if at_work:
            self._kill(self.dice.choice(at_work))
            self.hire()

    def _kill(self, log: Path) -> None:
        worker = self._workers.pop(log)
        worker.kill()
        worker.join()
        _append(log, "dead")

    def ended_by_themselves(self) -> list[str]:
        return [log.stem for log, worker in self._workers.items() if not worker.is_alive()]


def _append(log: Path, *values: Any) -> None:
    with log.open("ab") as file:
        file.write(b"\n" + json.dumps(values).encode() + b"\n")  # the break ends a line that was cut off
