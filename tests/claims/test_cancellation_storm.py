"""Thousands of short tasks with random cancellations: no claim stays held, no task hangs, and no heartbeat is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter
from typing import Any

import anyio
import pytest
from support.asyncio_stores import either_kind, embedded, opened
from support.backends import Backend
from support.claims import DeclinedError, until
from support.storm_length import StormLength

from squidstep_redis import AsyncClaim, AsyncStepRunStore, StepStatus

pytestmark = pytest.mark.servers("valkey")

WIDTH = 50  # tasks at once
RUNS = 20
LONG_CLAIMS = 5
LONG_LEASE = 1.5


class Storm:
    """Starts short tasks, and cancels most of them once or twice, at random moments."""

    def __init__(self, store: AsyncStepRunStore, seed: int) -> None:
        self.store = store
        self.random = random.Random(seed)
        self.problems: Counter[str] = Counter()
        self.started = 0

    async def run(self, seconds: float) -> None:
        is_over = asyncio.Event()
        long = [asyncio.create_task(self._hold(number, is_over)) for number in range(LONG_CLAIMS)]
        running: set[asyncio.Task[None]] = set()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while len(running) < WIDTH:
                self.started += 1
                running.add(asyncio.create_task(self._disturb(self.started)))
            _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        _, hanging = await asyncio.wait(running, timeout=30)
        is_over.set()
        _, long_hanging = await asyncio.wait(long, timeout=30)
        self.problems["task hangs"] += len(hanging) + len(long_hanging)

    async def _hold(self, number: int, is_over: asyncio.Event) -> None:
        """Holds a claim all the time."""
        async with self.store.claim_step("long", f"step-{number}", {}, lease=LONG_LEASE) as claim:
            await is_over.wait()
            await until_extended(claim)
            if claim.lost.is_set():
                self.problems["lost heartbeat"] += 1
            await claim.complete({})

    async def _disturb(self, number: int) -> None:
        task = asyncio.create_task(self._execute(number))
        is_cancelled = False
        for _ in range(self.random.choice((0, 1, 1, 2))):
            await self._pause()
            is_cancelled |= task.cancel()
        began = time.monotonic()
        await asyncio.wait([task])
        if not is_cancelled:
            if not task.cancelled() and isinstance(task.exception(), DeclinedError | None):
                return
            self.problems[f"not cancelled: {task!r}"] += 1
        elif not task.cancelled():
            self.problems[f"cancelled: {task!r}"] += 1
        elif time.monotonic() - began > 5:  # one, and the delays of a loaded machine
            self.problems["block left late"] += 1

    async def _pause(self) -> None:
        if self.random.random() < 0.5:
            for _ in range(self.random.randrange(10)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(0.01 * self.random.random())

    async def _execute(self, number: int) -> None:
        scope = anyio.move_on_after(0.02 * self.random.random()) if self.random.random() < 0.3 else None
        with scope or contextlib.nullcontext():
            await self.store.run_step(f"run-{number % RUNS}", f"step-{number}", self._work, {}, lease=60)

    async def _work(self, input: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.01 * self.random.random())
        if self.random.random() < 0.3:
            raise DeclinedError
        return {}


async def until_extended(claim: AsyncClaim) -> None:
    """Waits until a claim has been extended once more, or is lost."""
    due = claim.next_extension_at
    await until(lambda: claim.lost.is_set() or claim.next_extension_at > due)


def brew(name: str, kind: str, seconds: float, seed: int) -> None:
    """Runs a storm on a separate server, and checks what it has left behind."""

    async def main() -> Storm:
        async with opened(server.url, kind) as store:
            storm = Storm(store, seed)
            await storm.run(seconds)
            return storm

    with embedded(name) as (server, observer):
        storm = asyncio.run(main())

        assert +storm.problems == {}, f"seed {seed}, {storm.started} tasks"
        runs = ["long", *(f"run-{number}" for number in range(RUNS))]
        statuses = Counter(status for run in runs for status in observer.step_statuses(run).values())
        assert StepStatus.RUNNING not in statuses, f"seed {seed}: {statuses}"
        assert list(observer.live_claims()) == []
        assert statuses[StepStatus.COMPLETED] > LONG_CLAIMS
        assert statuses[StepStatus.FAILED] > 0


@either_kind
def test_storm_leaves_no_claim_and_no_task(backend: Backend, kind: str, storm_length: StormLength) -> None:
    seed = int.from_bytes(os.urandom(4), "big") if storm_length.least else 1
    brew(backend.name, kind, storm_length.seconds(1), seed)
