"""The soak's workers: the calls they make, and how they log them.

Each worker has its own log. It logs every call before sending it, and the reply when it arrives, so the log shows what
a killed worker had sent. A worker runs several actors, threads or tasks that share a store. `audit.py` reads the logs.
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
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import redis
from support.internals import counting

from squidstep_redis import (
    AsyncStepRunStore,
    BeginResult,
    Call,
    Calls,
    InputMismatchError,
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
GENERATION: Final = 1.0  # seconds until the workers turn to new runs, because completed steps do not change any more
RUNS: Final = 2  # per generation
STEPS: Final = 16  # per run
ACTORS: Final = 4  # per worker

# A forked process starts ten times as fast, because it does not import these modules again.
PROCESSES: Final = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["squidstep_redis", "redis.asyncio", "asyncio"])

Routine = Generator["list[Call[Any]] | float", Any, Any]
"""Yields calls and receives a result or an error for each, or yields seconds to sleep."""


class Request(NamedTuple):
    """A call, and what the history records of it, as in `history.Op`."""

    call: Call[Any]
    kind: str
    run: str
    step: str = ""
    claim: str = ""
    value: int | None = None
    lease: float = 0.0
    limit: float = math.inf
    printed: str = ""


_sends: ContextVar[int] = ContextVar("sends", default=0)  # of the current actor; a retried call is sent more than once


def count_send() -> None:
    """Counts a call or a batch that a store sends for the current actor."""
    _sends.set(_sends.get() + 1)


@dataclass
class Log:
    """A worker's log. Each line is one write, so that a kill can truncate only the last."""

    path: Path

    def __post_init__(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._numbers = itertools.count()

    def write(self, *values: Any) -> None:
        os.write(self._file, json.dumps(values, separators=(",", ":")).encode() + b"\n")

    def call(self, *requests: Request) -> Routine:
        """Makes calls in one round trip and logs them before and after; returns their results."""
        if not requests:
            return []
        received = self.sent(requests)
        results = yield [request.call for request in requests]
        received(results)
        return results

    def sent(self, requests: Sequence[Request]) -> Callable[[Sequence[Any]], None]:
        """Logs calls that are about to be sent; returns the function that logs their results."""
        number, sends = next(self._numbers), _sends.get()
        self.write("sent", number, time.time(), [request[1:] for request in requests])

        def received(results: Sequence[Any]) -> None:
            when = time.time()
            replies = [self._reply(*each) for each in zip(requests, results, strict=True)]
            self.write("received", number, when, replies, _sends.get() - sends > 1)

        return received

    def _reply(self, request: Request, result: Any) -> list[Any] | None:
        try:
            return reply_of(request, result)
        except (redis.RedisError, OSError, OutcomeUnknownError) as error:
            self.write("error", f"{request.kind} of {request.claim} in {request.run}: {type(error).__name__}: {error}")
            return None


def reply_of(request: Request, result: Any) -> list[Any] | None:
    """Returns a result as the history records it; None if the outcome is unknown."""
    match result:
        case asyncio.CancelledError():
            return None
        case Exception():
            return _reply_of_error(result)
        case BeginResult():
            return _reply_of_begin(result)
        case ScheduleResult():
            return [result.decision]
        case StepRun() if request.kind == "extend":
            return ["done", result.lease_ends_at.timestamp()]
        case StepRun() if request.kind == "read":
            return [result.status, result.attempt, result.owner or "", _value(result)]
        case None:
            return ["none", 0, "", None]
        case list():
            return result
        case _:
            return ["done"]


def _reply_of_error(error: Exception) -> list[Any] | None:
    match error:
        case StaleStepRunError():
            return ["stale", error.current.status, error.current.attempt, error.current.owner or ""]
        case StepRunNotFoundError():
            return ["missing"]
        case InputMismatchError():
            return ["mismatch"]
        case NotSentError() | RefusedError():
            return ["unwritten"]
        case ReplyMismatchError():
            return ["error", str(error)]
        case OutcomeUnknownError() if error.transient:
            return None
        case SquidstepError() if not isinstance(error, OutcomeUnknownError):
            return ["error", f"{type(error).__name__}: {error}"]  # which a correct store never returns
        case _:
            raise error  # a script that fails, or an unmapped error of redis-py


def _reply_of_begin(result: BeginResult) -> list[Any]:
    step_run = result.step_run
    if result.decision == "execute":
        return ["execute", step_run.attempt, step_run.input["by"], step_run.lease_ends_at.timestamp()]
    parts = [result.reason, step_run.attempt, step_run.owner or ""]
    match result.reason:
        case "completed":
            return [*parts, _value(step_run)]
        case "superseded":
            return parts[:1]
        case _:
            return parts


def _value(step_run: StepRun) -> int | None:
    return (step_run.output or step_run.last_error or {}).get("value")


@dataclass
class Actor:
    """Executes steps in an endless loop. Some calls it makes late, repeats, or makes without a claim."""

    calls: Calls
    log: Log
    dice: random.Random
    name: str
    number: int

    def run(self) -> Routine:
        self._claims = (f"{self.name}-{self.number}-{number}" for number in itertools.count())
        while True:
            generation = int(time.time() / GENERATION)
            # The audit relies on this: from here on, no call belongs to an earlier generation.
            self.log.write("generation", self.number, generation)
            self._sent: deque[Request] = deque(maxlen=16)  # requests that may be repeated later
            while generation == int(time.time() / GENERATION):
                yield from self._deliver(generation)

    def _deliver(self, generation: int) -> Routine:
        dice, log = self.dice, self.log
        places = [(f"run-{generation}-{run}", f"step-{step}") for run in range(RUNS) for step in range(STEPS)]
        places = dice.sample(places, dice.choice((1, 2, 8, 16)))
        begins = [self._begin(*place) for place in places]
        results = yield from log.call(*begins)
        self._sent += begins
        held = [
            (request, result.step_run)
            for request, result in zip(begins, results, strict=True)
            if isinstance(result, BeginResult) and result.decision == "execute"
        ]
        if len(held) < len(begins) and dice.random() < 0.3:
            yield from log.call(*self._reads(begins, results))
        yield dice.choice((0, 0, 0, 0.005, 0.02, 0.2) if held else (0, 0.01))  # 0.2 outlasts the lease: a zombie
        yield from log.call(*(self._extend(*claim) for claim in held if dice.random() < 0.2))
        yield from log.call(*(begin for begin, _ in held if dice.random() < 0.1))  # a repeated begin
        ends = [self._end(*claim) for claim in held]
        yield from log.call(*ends)
        self._sent += ends
        if dice.random() < 0.1:  # a second end of the same claims, which must be rejected if it differs
            kinds = [end.kind if dice.random() < 0.5 else None for end in ends]
            yield from log.call(*(self._end(*claim, kind) for claim, kind in zip(held, kinds, strict=True)))
        if dice.random() < 0.2:  # a client repeats requests after a lost reply, and the network delivers late copies
            yield dice.choice((0, 0.01, 0.05))
            yield from log.call(*dice.sample(self._sent, min(4, len(self._sent))))

    def _begin(self, run: str, step: str) -> Request:
        claim = next(self._claims)
        input = {"by": claim}
        if self.dice.random() < 0.05:
            return Request(self.calls.schedule_step(run, step, input), "schedule", run, step, claim)
        lease, limit = self.dice.choice((0.01, 0.03, 0.1)), self.dice.choice((None, None, None, 3, 9))
        printed = self.dice.choice(("",) * 8 + ("x", "y"))
        call = self.calls.begin_step(
            run, step, input, lease=lease, max_attempts=limit, owner=claim, fingerprint=printed or False
        )
        return Request(call, "begin", run, step, claim, None, lease, math.inf if limit is None else limit, printed)

    def _extend(self, begin: Request, step_run: StepRun) -> Request:
        lease = self.dice.choice((0.01, 0.1))
        return begin._replace(call=self.calls.extend_claim(step_run, lease), kind="extend", lease=lease)

    def _end(self, begin: Request, step_run: StepRun, kind: str | None = None) -> Request:
        value = self.dice.randrange(1_000_000)
        match kind or self.dice.choices(("fail", "final", "release", "complete"), (15, 1, 3, 1))[0]:
            case "release":
                return begin._replace(call=self.calls.release_step(step_run), kind="release")
            case "fail":
                return begin._replace(call=self.calls.fail_step(step_run, {"value": value}), kind="fail", value=value)
            case "final":
                call = self.calls.fail_step(step_run, {"value": value}, final=True)
                return begin._replace(call=call, kind="final", value=value)
            case _:
                call = self.calls.complete_step(step_run, {"value": value})
                return begin._replace(call=call, kind="complete", value=value)

    def _reads(self, begins: list[Request], results: list[Any]) -> list[Request]:
        """Returns reads, and what an operator does: expires the claim of a dead holder, or retries a failed step."""
        run, step = begins[0].run, begins[0].step
        requests = [
            Request(self.calls.get_step_run(run, step), "read", run, step),
            Request(self.calls.completed_steps(run), "order", run),
        ]
        for request, result in zip(begins, results, strict=True):
            if isinstance(result, BeginResult) and result.busy and self.dice.random() < 0.2:
                holder = result.step_run
                requests.append(
                    Request(self.calls.expire_claim(holder), "expire", request.run, request.step, holder.owner or "")
                )
            elif isinstance(result, BeginResult) and result.failed:
                owner = next(self._claims)
                call = self.calls.retry_step(request.run, request.step, owner=owner)
                requests.append(Request(call, "retry", request.run, request.step, owner))
        return requests


# A worker's process


def work(url: str, log: Path, seed: int, number: int, lua: str | None) -> None:
    """Runs a worker's process until it is killed or its parent ends."""
    set_up_process(lua)
    own_connections = number % 3 > 0  # the others use the client's pool
    if number % 2:
        asyncio.run(_work_asyncio(url, Log(log), seed, own_connections))
    else:
        _work_blocking(url, Log(log), seed, own_connections)


def exit_with_parent() -> None:
    """Ends this process as soon as its parent has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def set_up_process(lua: str | None) -> None:
    """Prepares a worker's process, which ends with its parent.

    Args:
        lua: a directory of scripts to use instead of the package's: those of a mutant.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    os.nice(5)  # below the processes that kill and check
    if lua is not None:
        scripts.directory = lambda: Path(lua)


def _actors(calls: Calls, log: Log, seed: int) -> list[Actor]:
    return [Actor(calls, log, random.Random(seed + number), log.path.stem, number) for number in range(ACTORS)]


def _work_blocking(url: str, log: Log, seed: int, own_connections: bool) -> None:
    store = counting(StepRunStore, count_send).from_url(url, prefix=PREFIX, own_connections=own_connections)

    def send(calls: list[Call[Any]]) -> list[Any]:
        try:
            return store.batch(calls) if len(calls) > 1 else [store.send(calls[0])]
        except (SquidstepError, redis.RedisError, OSError) as error:
            return [error] * len(calls)

    def run(actor: Actor) -> None:
        routine, result = actor.run(), None
        try:
            while True:
                effect = routine.send(result)
                result = send(effect) if isinstance(effect, list) else time.sleep(effect)
        except Exception as error:
            end_worker(log, error)

    threads = [threading.Thread(target=run, args=(actor,), daemon=True) for actor in _actors(store.calls, log, seed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def _work_asyncio(url: str, log: Log, seed: int, own_connections: bool) -> None:
    store = counting(AsyncStepRunStore, count_send).from_url(url, prefix=PREFIX, own_connections=own_connections)

    async def send(calls: list[Call[Any]]) -> list[Any]:
        try:
            return await store.batch(calls) if len(calls) > 1 else [await store.send(calls[0])]
        except (SquidstepError, redis.RedisError, OSError) as error:
            return [error] * len(calls)

    async def run(actor: Actor) -> None:
        routine, result = actor.run(), None
        try:
            while True:
                effect = routine.send(result)
                result = await (send(effect) if isinstance(effect, list) else asyncio.sleep(effect))
        except Exception as error:
            end_worker(log, error)

    await asyncio.gather(*(run(actor) for actor in _actors(store.calls, log, seed)))


def end_worker(log: Log, error: BaseException) -> None:
    """Ends the worker after an error in an actor, which is a bug in the soak; the soak notices the end."""
    log.write("error", f"{log.path.stem} ended unexpectedly: {error!r}")
    os._exit(1)


# The pool of workers


@dataclass
class Crew:
    """Worker processes; each is replaced when it is killed.

    This class writes the first and the last line of a worker's log, its start and its end, while the worker cannot
    write.
    """

    urls: tuple[str, ...]
    logs: Path
    dice: random.Random
    lua: Path | None = None
    size: int = 6
    target: Callable[..., None] = work

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._workers: dict[Path, Any] = {}

    def __enter__(self) -> Crew:
        for _ in range(self.size):
            self.start_one()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for log in list(self._workers):
            self._kill(log)

    def start_one(self) -> None:
        number = next(self._numbers)
        log = self.logs / f"w{number}.log"
        _append(log, "started", int(time.time() / GENERATION), ACTORS)
        url = self.urls[number // 2 % len(self.urls)]
        args = (url, log, self.dice.randrange(1 << 32), number, self.lua and str(self.lua))
        worker = PROCESSES.Process(target=self.target, args=args, name=log.stem, daemon=True)
        worker.start()
        self._workers[log] = worker

    def kill_one(self) -> None:
        """Kills a worker that has made calls; on a slow machine, killing new ones would leave none at work."""
        active = [log for log in self._workers if log.stat().st_size > 1_000]
        if active:
            self._kill(self.dice.choice(active))
            self.start_one()

    def _kill(self, log: Path) -> None:
        worker = self._workers.pop(log)
        worker.kill()
        worker.join()
        _append(log, "killed")

    def unexpected_ends(self) -> list[str]:
        return [log.stem for log, worker in self._workers.items() if not worker.is_alive()]


def _append(log: Path, *values: Any) -> None:
    with log.open("ab") as file:
        file.write(b"\n" + json.dumps(values).encode() + b"\n")  # the first newline ends a truncated line
