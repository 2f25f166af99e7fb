"""The squidstep_redis side of every comparison, and the yardstick.

One operation is one step: begin_step with a lease, then complete_step. Its yardstick is two calls of a script
with a single HSET, with the same payloads, through the same kind of client.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgpack
import redis
import redis.asyncio

from squidstep_redis import AsyncStepRunStore, StepRunStore

HSET = "return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])"
STEPS_OF_A_RUN = 10
BATCH = 100
LEASE = 30
PAYLOAD: dict[str, Any] = {"order": 123456, "items": ["a" * 20] * 6, "note": "x" * 40}  # about 200 bytes

Name = tuple[str, str]

_numbers = itertools.count()


def payload_of(size: int) -> dict[str, Any]:
    """Returns a payload of about `size` bytes, in strings of up to 1 kB."""
    pieces, rest = divmod(max(0, size - 10), 1_000)
    return {"note": "x" * rest, "rows": ["y" * 997] * pieces}


def new_names(count: int) -> Iterator[Name]:
    """Yields unused pairs of run and step, ten steps per run."""
    for number in itertools.islice(_numbers, count):
        yield f"run-{number // STEPS_OF_A_RUN}", f"step-{number % STEPS_OF_A_RUN}"


def scattered_names(count: int) -> Iterator[Name]:
    """Yields unused pairs of run and step. Each 100 of them are in 100 runs, and each run gets ten steps."""
    for number in itertools.islice(_numbers, count):
        turn, run = divmod(number, BATCH)
        yield f"wide-{turn // STEPS_OF_A_RUN}-{run}", f"step-{turn % STEPS_OF_A_RUN}"


def own_store(client: redis.Redis | redis.RedisCluster) -> StepRunStore:
    """Returns a store with its own client, on the server of the yardstick's client."""
    if isinstance(client, redis.RedisCluster):
        return StepRunStore(client)
    options: dict[str, Any] = client.connection_pool.connection_kwargs
    return StepRunStore.from_url(f"redis://{options['host']}:{options['port']}")


class Blocking:
    """A store from `from_url` (or on the cluster client), and the yardstick on redis-py's client."""

    def __init__(
        self,
        client: redis.Redis | redis.RedisCluster,
        payload: dict[str, Any] = PAYLOAD,
        names: Callable[[int], Iterator[Name]] = new_names,
    ) -> None:
        self.client: Any = client
        self.store = own_store(client)
        self.users = StepRunStore(client)
        self.payload = payload
        self.names = names
        self.sha = self.client.script_load(HSET)

    def steps(self, count: int) -> None:
        self._steps(self.store, count)

    def steps_on_users_client(self, count: int) -> None:
        self._steps(self.users, count)

    def _steps(self, store: StepRunStore, count: int) -> None:
        for run, step in self.names(count):
            claim, _ = store.begin_step(run, step, self.payload, lease=LEASE)
            store.complete_step(claim, self.payload)

    def batched_steps(self, count: int) -> None:
        """The same steps, in batches of 100 calls."""
        calls = self.store.calls
        names = self.names(count)
        while chunk := list(itertools.islice(names, BATCH)):
            results = self.store.batch([calls.begin_step(*name, self.payload, lease=LEASE) for name in chunk])
            self.store.batch([calls.complete_step(result.step_run, self.payload) for result in results])

    def chained_steps(self, count: int) -> None:
        """Runs of ten steps by one worker, chained with `advance_step`."""
        for number in itertools.islice(_numbers, count // STEPS_OF_A_RUN):
            claim, _ = self.store.begin_step(f"chain-{number}", "step-0", self.payload, lease=LEASE)
            for step in range(1, STEPS_OF_A_RUN):
                claim, _ = self.store.advance_step(claim, self.payload, f"step-{step}", self.payload, lease=LEASE)
            self.store.complete_step(claim, self.payload)

    def yardsticks(self, count: int) -> None:
        for run, step in self.names(count):
            for _ in range(2):
                self.client.evalsha(self.sha, 1, "y:" + run, step, msgpack.packb(self.payload))

    def piped_yardsticks(self, count: int) -> None:
        """The same yardsticks, in pipelines of 100 calls."""
        names = self.names(count)
        while chunk := list(itertools.islice(names, BATCH)):
            for _ in range(2):
                with self.client.pipeline(transaction=False) as pipeline:
                    for run, step in chunk:
                        pipeline.evalsha(self.sha, 1, "y:" + run, step, msgpack.packb(self.payload))
                    pipeline.execute()


class Asyncio:
    """A store from `from_url` (or on the cluster client), and the yardstick on redis-py's client; `tasks` at once."""

    def __init__(self, runner: asyncio.Runner, url: str, tasks: int, *, is_cluster: bool = False) -> None:
        kind: Any = redis.asyncio.RedisCluster if is_cluster else redis.asyncio.Redis
        self.runner = runner
        self.tasks = tasks
        self.client: Any = kind.from_url(url, protocol=2)
        self.store = AsyncStepRunStore(self.client) if is_cluster else AsyncStepRunStore.from_url(url)
        self.users = AsyncStepRunStore(self.client)
        self.sha = runner.run(self.client.script_load(HSET))

    def __enter__(self) -> Asyncio:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for it in (self.store, self.users):
            self.runner.run(it.close())
        self.runner.run(self.client.aclose())

    def steps(self, count: int) -> None:
        self._share(count, lambda names: self._steps(self.store, names))

    def steps_on_users_client(self, count: int) -> None:
        self._share(count, lambda names: self._steps(self.users, names))

    def yardsticks(self, count: int) -> None:
        async def task(names: list[Name]) -> None:
            for run, step in names:
                for _ in range(2):
                    await self.client.evalsha(self.sha, 1, "y:" + run, step, msgpack.packb(PAYLOAD))

        self._share(count, task)

    async def _steps(self, store: AsyncStepRunStore, names: list[Name]) -> None:
        for run, step in names:
            claim, _ = await store.begin_step(run, step, PAYLOAD, lease=LEASE)
            await store.complete_step(claim, PAYLOAD)

    def _share(self, count: int, task: Callable[[list[Name]], Coroutine[Any, Any, None]]) -> None:
        async def share() -> None:
            names = list(new_names(count))
            await asyncio.gather(*(task(names[first :: self.tasks]) for first in range(self.tasks)))

        self.runner.run(share())
