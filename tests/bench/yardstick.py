"""The rows that compare transitions with the yardstick: one at a time and in batches, on asyncio, on a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack
import redis
from bench.budgets import BUDGETS
from bench.databases import SERVERS, connect, server
from bench.measure import Bars, MissingError, Pace, Result, Side, Spread, Turns, Work, measure_in_turns
from bench.ours import BATCH, PAYLOAD, STEPS_OF_A_RUN, Asyncio, Blocking, payload_of, scattered_names
from support.servers import EmbeddedCluster

_SCRIPT = "two calls of a script with a single `HSET`"


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
    yield Result(
        f"{title}: round trips per transition", calls / 200, "", BUDGETS["round trips"], "EVALSHA calls counted"
    )

    is_first = title == SERVERS["valkey"]  # the server of the README's figures, and of the budgets for memory
    sides = {"ours": ours.steps, "yardstick": ours.yardsticks, "on a client": ours.steps_on_users_client}
    turns = measure_in_turns(pace, sides)
    for side, what, budget in (
        ("ours", "begin + complete, against as many yardsticks", "blocking"),
        ("on a client", "the same, with a store on the user's client", "blocking, user's client"),
    ):
        yield Result(
            f"{title}: {what}",
            turns.times(side, "yardstick"),
            budget=BUDGETS[budget],
            note=f"{turns.rates(side, 'yardstick', 'steps')}; {turns.client_cpu(side, 'yardstick')}",
            summary=(_SCRIPT, "single") if is_first and side == "ours" else None,
        )
    yield from _batches(pace, ours, title, is_first)

    theirs: list[float] = []
    mine: list[float] = []
    for _ in range(pace.of(50, minimum=5)):
        mine.append(_server_us(ours.client, ours.steps))
        theirs.append(_server_us(ours.client, ours.yardsticks))
    yield Result(
        f"{title}: server time of a transition, in yardsticks",
        Spread.of([a / b for a, b in zip(mine, theirs, strict=True)]),
        note=f"{statistics.median(mine):.1f} µs against {statistics.median(theirs):.1f} µs",
    )
    for size, payload in ((200, PAYLOAD), (50, payload_of(50))):
        yield Result(
            f"{title}: memory of a completed step beyond {size} B payloads",
            _bytes_per_step(Blocking(ours.client, payload), pace.of(1_000, minimum=100)),
            "bytes",
            BUDGETS[f"bytes beyond {size} B"] if is_first else None,
            summary=(str(size), "bytes") if is_first else None,
        )


def _batches(pace: Pace, ours: Blocking, title: str, is_first: bool) -> Iterator[Result]:
    scattered = Blocking(ours.client, names=scattered_names)
    sides = {
        "single": ours.steps,
        "ten runs": Side(ours.batched_steps, BATCH),
        "pipeline, ten runs": Side(ours.piped_yardsticks, BATCH),
        "100 runs": Side(scattered.batched_steps, BATCH),
        "pipeline, 100 runs": Side(scattered.piped_yardsticks, BATCH),
    }
    turns = measure_in_turns(pace, sides)
    yield Result(
        f"{title}: batches of 100 on ten runs, against single calls",
        turns.times("ten runs", "single"),
        note=turns.rates("ten runs", "single", "steps"),
    )
    for side in ("ten runs", "100 runs"):
        pipeline = f"pipeline, {side}"
        yield Result(
            f"{title}: batches of 100 on {side}, against pipelines of 100 yardsticks",
            turns.times(side, pipeline),
            budget=BUDGETS[f"batch, {side}"],
            note=f"{turns.rates(side, pipeline, 'steps')}; {turns.client_cpu(side, pipeline)}",
            summary=(_SCRIPT, "batch") if is_first and side == "ten runs" else None,
        )


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
    """Transitions on asyncio against the yardstick: by one task, and by 16 and 100 concurrent tasks."""
    with server() as started, asyncio.Runner() as runner:
        yield from _on_asyncio(pace, "asyncio", runner, started.url, (1, 16, 100))


def on_uvloop(pace: Pace) -> Iterator[Result]:
    """The same on uvloop, with the yardstick on uvloop as well."""
    try:
        import uvloop
    except ImportError as error:
        raise MissingError("uvloop: pip install uvloop") from error
    with server() as started, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield from _on_asyncio(pace, "uvloop", runner, started.url, (16, 100))


def _on_asyncio(
    pace: Pace, loop: str, runner: asyncio.Runner, url: str, numbers_of_tasks: Sequence[int]
) -> Iterator[Result]:
    mine: dict[str, float] = {}
    theirs: dict[str, tuple[float, float]] = {}
    for tasks in numbers_of_tasks:
        title = f"{tasks} task{'s' * (tasks > 1)}"
        with Asyncio(runner, url, tasks) as ours:
            sides = {"ours": ours.steps, "yardstick": ours.yardsticks}
            if tasks == 16:
                sides["on a client"] = ours.steps_on_users_client
            turns = _measure_tasks(pace, tasks, sides)
        ratio = turns.times("ours", "yardstick")
        mine[f"squidstep_redis, {title}"] = turns.rate("ours")
        theirs[f"HSET script, {title}"] = turns.rate("yardstick"), ratio.median
        is_summarized = (loop, tasks) == ("asyncio", 16)
        yield Result(
            f"{loop}, {title}: begin + complete, against as many yardsticks",
            ratio,
            budget=BUDGETS.get(f"{loop}, {title}"),
            note=f"{turns.rates('ours', 'yardstick', 'steps')}; {turns.client_cpu('ours', 'yardstick')}",
            bars=Bars("asyncio, in memory, no AOF", mine, theirs) if (loop, tasks) == ("asyncio", 100) else None,
            summary=(f"{_SCRIPT} on asyncio, {title} at once", "single") if is_summarized else None,
        )
        if "on a client" in sides:
            yield Result(
                f"{loop}, {title}: the same, with a store on the user's client",
                turns.times("on a client", "yardstick"),
                note=turns.rates("on a client", "yardstick", "steps"),
            )


def _measure_tasks(pace: Pace, tasks: int, sides: dict[str, Work]) -> Turns:
    """Measures sides with concurrent tasks, in turns in which each task makes several steps."""
    longer = dataclasses.replace(pace, turn=5 * pace.turn)
    return measure_in_turns(longer, {name: Side(work, tasks) for name, work in sides.items()})


def on_a_cluster(pace: Pace) -> Iterator[Result]:
    """A cluster of three nodes against yardsticks on the cluster, and against one node."""
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(EmbeddedCluster())
        cluster_client = stack.enter_context(redis.RedisCluster.from_url(nodes.url, protocol=2))
        client = stack.enter_context(connect(stack.enter_context(server())))
        three, single = Blocking(cluster_client), Blocking(client)
        sides = {
            "three": three.steps,
            "one": single.steps,
            "yardstick": three.yardsticks,
            "three, batch": Side(three.batched_steps, BATCH),
            "one, batch": Side(single.batched_steps, BATCH),
        }
        turns = measure_in_turns(pace, sides)
        runner = stack.enter_context(asyncio.Runner())
        with Asyncio(runner, nodes.url, 16, is_cluster=True) as ours:
            tasks = _measure_tasks(pace, 16, {"three": ours.steps, "yardstick": ours.yardsticks})
    what = "a cluster of three"
    yield Result(
        f"{what}: begin + complete, against as many yardsticks on the cluster",
        turns.times("three", "yardstick"),
        budget=BUDGETS["cluster"],
        note=f"{turns.rates('three', 'yardstick', 'steps')}; {turns.client_cpu('three', 'yardstick')}",
        summary=(f"{_SCRIPT} on a cluster of three nodes", "single"),
    )
    yield Result(
        f"{what}: the same on asyncio, 16 tasks",
        tasks.times("three", "yardstick"),
        budget=BUDGETS["cluster"],
        note=f"{tasks.rates('three', 'yardstick', 'steps')}; {tasks.client_cpu('three', 'yardstick')}",
    )
    yield Result(
        f"{what}: begin + complete, against one node",
        turns.times("three", "one"),
        note=turns.rates("three", "one", "steps"),
    )
    yield Result(
        f"{what}: batches of 100, against one node",
        turns.times("three, batch", "one, batch"),
        budget=BUDGETS["cluster, batch"],
        note=turns.rates("three, batch", "one, batch", "steps"),
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
