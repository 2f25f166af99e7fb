"""The soak's workers whose tasks are cancelled: in the middle of a call, of a batch, or of a `claim_step` block.

All tasks of a worker share one store, and so one connection. The calls are logged where the store sends them, because a
block sends calls of its own: it extends its lease, and gives back its claim when it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from support.internals import counting, log_calls

from squidstep_redis import (
    AsyncStepRunStore,
    BeginResult,
    Call,
    Calls,
    ServerError,
    StaleStepRunError,
    StepBusyError,
    StepExhaustedError,
    StepRun,
    StepRunNotFoundError,
)

from .crew import ACTORS, GENERATION, PREFIX, STEPS, Log, Request, count_send, end_worker, set_up_process

RUNS: Final = 6  # per generation; with fewer, each step has too many calls without a reply for the checker
TASKS: Final = 16  # at once, per worker
CANCELLATIONS: Final = (0, 0, 0, 0, 0, 0, 0, 1, 1, 2)  # of one task
VALUES: Final = 1_000_000
REMEMBERED: Final = 10_000  # calls; more than are under way


class DeclinedError(Exception):
    """The error that the work in a block raises."""


EXPECTED: Final = (
    DeclinedError,
    ServerError,
    StaleStepRunError,
    StepBusyError,
    StepExhaustedError,
    StepRunNotFoundError,
)


_values = itertools.count(VALUES)


class RecordedCalls(Calls):
    """Makes calls, and remembers what the history records of each. Each begin has its own owner and input.

    Attributes:
        requests: what the history records, by the call's nonce.
        claims: names for claims.
    """

    requests: dict[bytes, Request]
    claims: Iterator[str]

    @classmethod
    def of(cls, calls: Calls, claims: Iterator[str]) -> RecordedCalls:
        """Returns the same calls, recorded."""
        recorded = cls.__new__(cls)
        vars(recorded).update(vars(calls), requests={}, claims=claims)
        return recorded

    def begin_step(self, run_id: Any, step: Any, input: Any, **options: Any) -> Call[BeginResult]:
        claim = next(self.claims)  # a block may begin several times
        call = super().begin_step(run_id, step, {"by": claim}, **{**options, "owner": claim})
        limit = math.inf if options["max_attempts"] is None else options["max_attempts"]
        return self._record(call, "begin", claim, None, options["lease"], limit)

    def complete_step(self, step_run: Any, output: Any, **options: Any) -> Call[StepRun]:
        call = super().complete_step(step_run, output, **options)
        return self._record(call, "complete", step_run.owner, output["value"])

    def fail_step(self, step_run: Any, error: Any, **options: Any) -> Call[StepRun]:
        if isinstance(error, BaseException):  # the history tells errors by their values
            error = {"value": next(_values), "type": type(error).__name__}
        return self._record(super().fail_step(step_run, error, **options), "fail", step_run.owner, error["value"])

    def release_step(self, step_run: Any) -> Call[StepRun]:
        return self._record(super().release_step(step_run), "release", step_run.owner)

    def extend_claim(self, step_run: Any, lease: Any) -> Call[StepRun]:
        return self._record(super().extend_claim(step_run, lease), "extend", step_run.owner, None, lease)

    def get_step_run(self, run_id: Any, step: Any) -> Call[StepRun | None]:
        return self._record(super().get_step_run(run_id, step), "read", "")

    def _record(self, call: Call[Any], kind: str, claim: str, *rest: Any) -> Call[Any]:
        self.requests[call.args[0]] = Request(call, kind, call.run_id or "", call.step or "", claim, *rest)
        if len(self.requests) > REMEMBERED:
            del self.requests[next(iter(self.requests))]
        return call


@dataclass
class Actor:
    """Executes steps in tasks, and cancels some of them at random."""

    store: AsyncStepRunStore
    log: Log
    dice: random.Random

    async def run(self, generation: int) -> None:
        """Works until the generation is over."""
        while generation == int(time.time() / GENERATION):
            task, is_cancelled = asyncio.create_task(self._deliver(generation)), False
            for _ in range(self.dice.choice(CANCELLATIONS)):
                await self._pause()
                if task.cancel():
                    is_cancelled = True
                    self.log.write("cancelled")
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()
                if is_cancelled:
                    self.log.write("error", f"{task!r} has swallowed its cancellation")

    async def _pause(self) -> None:
        if self.dice.random() < 0.5:
            for _ in range(self.dice.randrange(10)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(0.02 * self.dice.random())

    async def _deliver(self, generation: int) -> None:
        places = [(f"run-{generation}-{run}", f"step-{step}") for run in range(RUNS) for step in range(STEPS)]
        with contextlib.suppress(*EXPECTED):
            match self.dice.choices(("block", "calls", "batch"), (6, 3, 1))[0]:
                case "block":
                    await self._hold(*self.dice.choice(places))
                case "calls":
                    await self._call(*self.dice.choice(places))
                case _:
                    await self._batch(self.dice.sample(places, 4))

    async def _hold(self, run: str, step: str) -> None:
        cancels = self.dice.random() < 0.5
        options = self._options()
        async with self.store.claim_step(run, step, cancel_when_lost=cancels, **options) as claim:
            if claim.decision == "skip":
                return
            await self._work()
            value = self.dice.randrange(VALUES)
            match self._ending():
                case "complete":
                    await claim.complete({"value": value})
                case "fail":
                    await claim.fail({"value": value})
                case "release":
                    await claim.release()
                case _:
                    raise DeclinedError

    async def _call(self, run: str, step: str) -> None:
        begin = self.store.calls.begin_step(run, step, **self._options())
        result = await self.store.send(begin)
        if self.dice.random() < 0.1:  # the same call again, as after a lost reply
            result = await self.store.send(begin)
        if result.decision == "execute":
            await self._work()
            if self.dice.random() < 0.2:
                await self.store.send(self.store.calls.extend_claim(result.step_run, 0.03))
            await self.store.send(self._end(result.step_run))

    async def _batch(self, places: Sequence[tuple[str, str]]) -> None:
        begins = [self.store.calls.begin_step(*place, **self._options()) for place in places]
        results = await self.store.batch(begins)
        await self._work()
        held = [each.step_run for each in results if isinstance(each, BeginResult) and each.decision == "execute"]
        await self.store.batch([self._end(step_run) for step_run in held])

    def _options(self) -> dict[str, Any]:
        lease, limit = self.dice.choice((0.03, 0.1, 0.3)), self.dice.choice((None, None, None, 3, 9))
        return {"input": {}, "lease": lease, "max_attempts": limit}

    async def _work(self) -> None:
        await asyncio.sleep(self.dice.choice((0, 0, 0, 0.005, 0.02, 0.2)))  # 0.2 outlasts a lease that is not extended

    def _ending(self) -> str:
        return self.dice.choices(("fail", "raise", "release", "complete"), (10, 5, 3, 1))[0]

    def _end(self, step_run: StepRun) -> Call[StepRun]:
        calls, value = self.store.calls, self.dice.randrange(VALUES)
        match self._ending():
            case "complete":
                return calls.complete_step(step_run, {"value": value})
            case "release":
                return calls.release_step(step_run)
            case _:
                return calls.fail_step(step_run, {"value": value})


def work(url: str, log: Path, seed: int, number: int, lua: str | None) -> None:
    """Runs a worker's process until it is killed or its parent ends."""
    set_up_process(lua)
    asyncio.run(_work(url, Log(log), random.Random(seed)))


async def _work(url: str, log: Log, dice: random.Random) -> None:
    store = counting(AsyncStepRunStore, count_send).from_url(url, prefix=PREFIX)
    claims = (f"{log.path.stem}-{number}" for number in itertools.count())
    store.calls = recorded = RecordedCalls.of(store.calls, claims)

    @contextlib.contextmanager
    def logged(calls: Sequence[Call[Any]]) -> Iterator[list[Any]]:
        """Logs calls before they are sent, and then the results that the block adds, or its error."""
        received = log.sent([recorded.requests[call.args[0]] for call in calls])
        results: list[Any] = []
        try:
            yield results
        except BaseException as error:
            results = [error] * len(calls)
            raise
        finally:
            received(results)

    log_calls(store, logged)
    actors = [Actor(store, log, random.Random(dice.random())) for _ in range(TASKS)]
    try:
        while True:
            generation = int(time.time() / GENERATION)
            for number in range(ACTORS):
                log.write("generation", number, generation)
            async with asyncio.TaskGroup() as group:
                for actor in actors:
                    group.create_task(actor.run(generation))
            while len(asyncio.all_tasks()) > 1:  # those that give back claims; then no call of the generation follows
                await asyncio.sleep(0.002)
    except BaseException as error:
        end_worker(log, error)
