"""What a transition costs against a script with a single HSET, the least that a script can do.

    python tests/bench/transitions.py [SERVER BINARY]

Both sides send the same payloads through the same kind of client and take turns, so that a machine whose speed drifts
does not favour either. What is printed is the median of the ratios.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import msgpack
import redis

from squidstep_redis import StepRunStore
from squidstep_redis.embedded import EmbeddedServer

ROUNDS = 15
STEPS_OF_A_RUN = 10
HSET = "return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])"
PAYLOAD = {"order": 123456, "items": ["a" * 20] * 6, "note": "x" * 40}  # about 200 bytes


class Sides:
    """The store and the yardstick, each doing the same number of transitions."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.store = StepRunStore(client)
        self.sha = client.script_load(HSET)
        self.numbers = itertools.count()

    def names(self, count: int) -> list[tuple[str, str]]:
        taken = itertools.islice(self.numbers, count)
        return [(f"run-{number // STEPS_OF_A_RUN}", f"step-{number % STEPS_OF_A_RUN}") for number in taken]

    def yardsticks(self, count: int) -> None:
        for run, step in self.names(count):
            self.client.evalsha(self.sha, 1, "y:" + run, step, msgpack.packb(PAYLOAD))

    def yardsticks_in_a_pipeline(self, count: int) -> None:
        with self.client.pipeline(transaction=False) as pipeline:
            for run, step in self.names(count):
                pipeline.evalsha(self.sha, 1, "y:" + run, step, msgpack.packb(PAYLOAD))
            pipeline.execute()

    def transitions(self, count: int) -> None:
        for run, step in self.names(count // 2):
            claim, _ = self.store.begin_step(run, step, PAYLOAD, lease=30)
            self.store.complete_step(claim, PAYLOAD)

    def transitions_in_batches(self, count: int) -> None:
        calls = self.store.calls
        begun = self.store.batch([calls.begin_step(run, step, PAYLOAD, lease=30) for run, step in self.names(count)])
        self.store.batch([calls.complete_step(result[0], PAYLOAD) for result in begun])

    def server_us(self, work: Callable[[int], None], count: int) -> float:
        self.client.config_resetstat()
        work(count)
        return self.client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]

    def bytes_per_step(self, payload: dict[str, Any]) -> float:
        """Memory of a completed step beyond its payloads, in runs of ten."""
        self.client.execute_command("FLUSHDB", "SYNC")
        before = self.client.info("memory")["used_memory"]
        runs = 1_000
        for run in range(runs):
            steps = [(f"memory-{run:05}", f"step-{number}") for number in range(STEPS_OF_A_RUN)]
            begun = self.store.batch([self.store.calls.begin_step(*names, payload, lease=30) for names in steps])
            self.store.batch([self.store.calls.complete_step(result[0], payload) for result in begun])
        used = self.client.info("memory")["used_memory"] - before
        return used / (runs * STEPS_OF_A_RUN) - 2 * len(msgpack.packb(payload))


def seconds_each(work: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    work(count)
    return (time.perf_counter() - start) / count


def main(binary: str | None = None) -> None:
    with EmbeddedServer(binary=binary, port=0) as server, redis.Redis.from_url(server.url, protocol=2) as client:
        sides = Sides(client)
        sides.transitions(200)
        sides.yardsticks(200)
        ratios: list[tuple[float, ...]] = []
        for _ in range(ROUNDS):
            yardstick = seconds_each(sides.yardsticks, 1_000)
            single = seconds_each(sides.transitions, 1_000)
            pipeline = seconds_each(sides.yardsticks_in_a_pipeline, 100)
            batch = seconds_each(sides.transitions_in_batches, 100) / 2
            server_time = sides.server_us(sides.transitions, 500) / sides.server_us(sides.yardsticks, 500)
            ratios.append((yardstick / single, single / batch, pipeline / batch, server_time))
        medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
        rows = [
            ("transitions against yardsticks, rate", medians[0], "at least 0.80"),
            ("a batch of 100 against single calls, rate", medians[1], "at least 6"),
            ("a batch of 100 against a pipeline of 100 yardsticks, rate", medians[2], "at least 0.50"),
            ("server time of a transition, in yardsticks", medians[3], "at most 4"),
            ("bytes per step beyond 200 B payloads", sides.bytes_per_step(PAYLOAD), "at most 330"),
            ("bytes per step beyond 50 B payloads", sides.bytes_per_step({"note": "x" * 42}), "at most 160"),
        ]
        about = client.info("server")
        print(about.get("server_name", "redis"), about.get("valkey_version", about["redis_version"]))
        for name, measured, budget in rows:
            print(f"{name:60}{measured:8.2f}   budget: {budget}")


if __name__ == "__main__":
    main(*sys.argv[1:])
