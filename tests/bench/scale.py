"""The rows with many steps, runs, processes or live claims."""

from __future__ import annotations

import functools
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from hashlib import sha1
from typing import Any

import msgpack
import redis
from bench.budgets import BUDGETS
from bench.crew import Crew, blocking_worker, measure_crews, processes
from bench.databases import connect, server
from bench.listing import RUNS, filled, listing
from bench.measure import Budget, Pace, Result, Spread, Turns, figure, measure_in_turns
from bench.ours import LEASE, PAYLOAD, STEPS_OF_A_RUN, Blocking, Name
from bench.pages import pages

from squidstep_redis import StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.scripts import Script, script

_CORES = os.cpu_count() or 1
_LONG_RUN = "long"
_TRIES = 5  # repetitions of a measurement without turns


def long_run(pace: Pace) -> Iterator[Result]:
    """A transition in a run of 10,000 steps against one in a small run, and how long each call blocks the server."""
    size = pace.of(10_000, minimum=1_000)
    with server() as full, server() as empty, connect(full) as full_client, connect(empty) as empty_client:
        _side_by_side(full, empty)
        numbers = itertools.count()

        def in_the_long_run(count: int) -> Iterator[Name]:
            return ((_LONG_RUN, f"step-{number}") for number in itertools.islice(numbers, count))

        long = Blocking(full_client, names=in_the_long_run)
        long.batched_steps(size)
        turns = measure_in_turns(pace, {"long": long.steps, "small": Blocking(empty_client).steps})
        yield _slowdown(
            f"a transition in a run of {size:,} steps, against a small store",
            turns,
            "long",
            "small",
            BUDGETS["run of 10,000"],
        )
        yield from _blocking(StepRunStore(full_client), full_client, size)


def _side_by_side(*servers: EmbeddedServer) -> None:
    """Lets servers run on the same core: otherwise one may share the client's, which halves or doubles its times."""
    if hasattr(os, "sched_setaffinity"):
        core = max(os.sched_getaffinity(0))
        for each in servers:
            os.sched_setaffinity(each.pid, {core})


def _slowdown(what: str, turns: Turns, side: str, other: str, budget: Budget) -> Result:
    ratio = turns.times(other, side)  # a ratio of rates is the inverse ratio of times
    return Result(what, ratio, "x the time", budget, turns.rates(side, other, "steps"))


def _blocking(store: StepRunStore, client: redis.Redis, size: int) -> Iterator[Result]:
    """The longest time for which a single command of each operation blocks the server."""
    following = {f"step-{number}": PAYLOAD for number in range(size)}
    claims = [store.begin_step(f"fan-out-{turn}", "first", PAYLOAD, lease=LEASE).step_run for turn in range(_TRIES)]
    calls: dict[str, Callable[[int], Any]] = {
        "schedule_steps": lambda turn: store.schedule_steps(f"many-{turn}", following),
        "complete_step(schedule=)": lambda turn: store.complete_step(claims[turn], PAYLOAD, schedule=following),
        "completed_outputs": lambda _: store.completed_outputs(_LONG_RUN),
        "completed_outputs(limit=1000)": lambda turn: store.completed_outputs(
            _LONG_RUN, after=1_000 * turn, limit=1_000
        ),
        "step_statuses": lambda _: store.step_statuses(_LONG_RUN),
        "get_run": lambda _: store.get_run(_LONG_RUN),
        "scan_steps, every page": lambda _: _scan(store, _LONG_RUN),
        "delete_pending_steps": lambda turn: store.delete_pending_steps(f"many-{turn}", list(following)),
        "delete_run": lambda turn: store.delete_run(f"fan-out-{turn}"),
    }
    for name, call in calls.items():
        longest = [_longest_ms(client, functools.partial(call, turn)) for turn in range(_TRIES)]
        yield Result(f"{size:,} steps: {name} blocks the server for", Spread.of(longest), "ms")


def _scan(store: StepRunStore, run: str) -> None:
    cursor: str | None = None
    while True:
        _, cursor = store.scan_steps(run, cursor=cursor)
        if cursor is None:
            return


def _longest_ms(client: Any, call: Callable[[], Any]) -> float:
    """The slowest command of a call in ms, by the server's SLOWLOG; 0 if all are below 0.1 ms."""
    client.config_set("slowlog-max-len", 100_000)
    client.config_set("slowlog-log-slower-than", 100)  # clearing a log of every command would be slow
    client.slowlog_reset()
    call()
    client.config_set("slowlog-log-slower-than", -1)
    return max((entry["duration"] for entry in client.slowlog_get(-1)), default=0) / 1_000


def many_steps(pace: Pace) -> Iterator[Result]:
    """A store of 1,000,000 steps in 100,000 runs against an empty one."""
    runs = pace.of(100_000)
    steps = runs * STEPS_OF_A_RUN
    with server() as full, server() as empty, connect(full) as client, connect(empty) as empty_client:
        _side_by_side(full, empty)
        before = client.info("memory")["used_memory"]
        start = time.monotonic()
        _filled(full.url, runs)
        filling = time.monotonic() - start
        used = (client.info("memory")["used_memory"] - before) / steps
        yield Result(
            f"memory of a step among {steps:,}, with its 200 B payloads",
            used,
            "bytes",
            note=f"{figure(used - 2 * len(msgpack.packb(PAYLOAD)))} beyond them; filled at {figure(steps / filling)}/s",
        )
        chance = random.Random(1)
        added = itertools.count()

        def scattered(count: int) -> Iterator[Name]:
            return ((f"full-{chance.randrange(runs)}", f"more-{next(added)}") for _ in range(count))

        sides = {
            "full": Blocking(client).steps,
            "scattered": Blocking(client, names=scattered).steps,
            "empty": Blocking(empty_client).steps,
        }
        turns = measure_in_turns(pace, sides)
        what = f"a transition among {steps:,} steps, against an empty store"
        budget = BUDGETS["1,000,000 steps"]
        yield _slowdown(f"{what}: in new runs", turns, "full", "empty", budget)
        yield _slowdown(f"{what}: in any of its runs", turns, "scattered", "empty", budget)


def _filled(url: str, runs: int) -> None:
    """Completes all steps of `runs` runs, with one process per core."""
    workers = [
        processes.Process(target=_fill, args=(url, range(part, runs, _CORES)), daemon=True) for part in range(_CORES)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"a process that fills the store exited with status {worker.exitcode}")


def _fill(url: str, runs: range) -> None:
    names = ((f"full-{run}", f"step-{step}") for run in runs for step in range(STEPS_OF_A_RUN))
    with redis.Redis.from_url(url, protocol=2) as client:
        ours = Blocking(client, names=functools.partial(itertools.islice, names))
        ours.batched_steps(len(runs) * STEPS_OF_A_RUN)


def many_processes(pace: Pace) -> Iterator[Result]:
    """64 client processes on one server."""
    size = pace.of(64, minimum=4)
    with server() as started:
        worker = blocking_worker(started.url)
        with Crew(size, worker) as crew, Crew(1, worker) as one:
            sides = {"crew": (crew, "steps"), "yardstick": (crew, "yardsticks"), "one": (one, "steps")}
            measured = measure_crews(sides, max(0.1, pace.seconds / 24))
    yield Result(
        f"{size} processes: begin + complete, against as many yardsticks",
        measured.turns.times("crew", "yardstick"),
        note=measured.note("crew", "yardstick"),
    )
    yield Result(
        f"{size} processes, against one",
        measured.turns.times("crew", "one"),
        note=f"{measured.turns.rates('crew', 'one', 'steps')}, on {_CORES} cores, the server's included",
    )


def indexes(pace: Pace) -> Iterator[Result]:
    """Reads across runs with 100,000 live claims: time for the caller, and for the server."""
    count = pace.of(100_000)
    with server() as started, connect(started) as client:
        store = StepRunStore(client)
        for first in range(0, count, 1_000):
            numbers = range(first, min(first + 1_000, count))
            store.batch(
                [
                    store.calls.begin_step(
                        f"live-{number // STEPS_OF_A_RUN}",
                        f"step-{number}",
                        {},
                        lease=3_600,
                        owner=f"host:{number % 97}",
                    )
                    for number in numbers
                ]
            )
        calls: dict[str, Callable[[], list[Any]]] = {
            "live_claims()": store.live_claims,
            "live_claims(owner=)": lambda: store.live_claims(owner="host:7"),
            "lapsed_claims()": store.lapsed_claims,
            "failed_steps()": store.failed_steps,
        }
        for name, call in calls.items():
            times = []
            for _ in range(pace.of(10, minimum=3)):
                start = time.perf_counter()
                found = call()
                times.append(1_000 * (time.perf_counter() - start))
            yield Result(
                f"{count:,} live claims: {name}",
                Spread.of(times),
                "ms",
                note=f"{len(found)} found; slowest command: {figure(_longest_ms(client, call))} ms of server time",
            )


def first_transitions(pace: Pace) -> Iterator[Result]:
    """The call that creates a run against the same script without the index of runs."""
    entered = b'tonumber(try("ZADD", string.sub(claims, 1, -7) .. "runs", now, ARGV[4]))'
    known = script("begin_step")
    assert known.source.count(entered) == 1
    source = known.source.replace(entered, b"true")
    without = Script(known.name, source, sha1(source, usedforsecurity=False).hexdigest().encode(), True)
    numbers = itertools.count()
    with server() as started, connect(started) as client:
        store = Blocking(client).store

        def begin(chosen: Script) -> Callable[[int], None]:
            def work(count: int) -> None:
                for number in itertools.islice(numbers, count):
                    call = store.calls.begin_step(f"order-{number}", "charge", PAYLOAD, lease=LEASE)
                    store.send(call._replace(script=chosen))

            return work

        turns = measure_in_turns(pace, {"with": begin(known), "without": begin(without)})
    yield _slowdown(
        "the first transition of a run, against one without the index of runs",
        turns,
        "with",
        "without",
        BUDGETS["first transition"],
    )


def lists(pace: Pace) -> Iterator[Result]:
    """The first page of each listing with 100,000 runs, a purge, and how long their commands block the server."""
    runs = pace.of(RUNS)
    with server() as started:
        middle, index_bytes = filled(started.port, runs)
        yield Result(
            f"{runs:,} runs: the index of runs, of each run", index_bytes, "bytes", BUDGETS["index of runs, bytes"]
        )
        for page in pages(started.port, pace.of(20)):
            what = f"{runs:,} runs, web page: {page.what}"
            pings = f"99 % of concurrent PINGs took at most {1_000 * page.ping:.1f} ms"
            yield Result(what, 1_000 * page.seconds, "ms", BUDGETS["listing, ms"], pings)
        for listed in listing(started.port, middle, runs):
            slow = f"{len(listed.slow) or 'no'} command{'s' * (len(listed.slow) > 1)} over 5 ms of server time"
            budget = BUDGETS["listing, ms"] if listed.is_page else None
            yield Result(f"{runs:,} runs: {listed.what}", 1_000 * listed.seconds, "ms", budget, slow)
