"""The rows that compare with alternatives: on Redis, and on databases with the same durability."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from bench import peers
from bench.budgets import BUDGETS
from bench.crew import Crew, blocking_worker, measure_crews
from bench.databases import connect, postgres, server
from bench.measure import (
    Bars,
    Budget,
    MissingError,
    Pace,
    Result,
    Side,
    Summary,
    Turns,
    Work,
    figure,
    measure_in_turns,
)
from bench.ours import BATCH, STEPS_OF_A_RUN, Blocking

_WORKERS = 64
_SQL = "the same rules in SQL on PostgreSQL 15"
_SURVIVES = {"durable": "completed steps survive a crash", "relaxed": "about the last second may be lost"}
_OURS = {"squidstep": "squidstep_redis", "chain": "with advance_step", "in batches": "in batches of 100"}


class _Versus(NamedTuple):
    """Comparisons with several alternatives.

    Attributes:
        turns: their measurements.
        problems: why an alternative could not be measured.
    """

    turns: Turns
    problems: Mapping[str, str]

    def result(
        self, what: str, side: str, other: str, budget: Budget | None = None, summary: Summary | None = None
    ) -> Result:
        """One of our sides against an alternative."""
        if other not in self.turns.seconds:
            return Result(what, None, budget=budget, note=self.problems[other])
        note = self.turns.rates(side, other, "steps")
        return Result(what, self.turns.times(side, other), budget=budget, note=note, summary=summary)

    def bars(self, panel: str) -> Bars:
        """All sides, for the plot."""
        rates = {side: self.turns.rate(side) for side in self.turns.seconds}
        return Bars(
            panel,
            {_OURS[side]: rate for side, rate in rates.items() if side in _OURS},
            {
                side: (rate, self.turns.times("squidstep", side).median)
                for side, rate in rates.items()
                if side not in _OURS
            },
        )


def against_peers(pace: Pace) -> Iterator[Result]:
    """Single steps against alternatives that store their records in Redis, in memory."""
    with server() as started, connect(started) as client:
        ours = Blocking(client)
        sides: dict[str, Work | Side] = {"squidstep": ours.steps, "in batches": Side(ours.batched_steps, BATCH)}
        sides |= {"SET NX + SET": peers.set_nx_and_set(client), "Lock + HSET": peers.lock_around_hset(client)}
        problems: dict[str, str] = {}
        try:
            sides["Powertools"] = peers.powertools(client)
        except MissingError as missing:
            problems["Powertools"] = str(missing)
        versus = _Versus(measure_in_turns(pace, sides), problems)
    yield Result(
        "begin + complete, in memory",
        versus.turns.rate("squidstep"),
        "steps/s",
        note=f"in batches {figure(versus.turns.rate('in batches'))} steps/s",
        bars=versus.bars("one worker, in memory, no AOF"),
    )
    nx, lock, powertools = "SET NX + SET", "Lock + HSET", "Powertools"
    labels = {nx: "`SET NX` and `SET`, the simplest claim", lock: "redis-py's `Lock` around an `HSET`"}
    labels[powertools] = "Powertools' idempotency on Redis"
    for what, side, other, key in (
        ("against SET NX + SET, the simplest claim", "squidstep", nx, ""),
        ("against redis-py's Lock around an HSET", "squidstep", lock, ""),
        ("against Powertools' Redis idempotency", "squidstep", powertools, "Powertools"),
        ("batches of 100, against the same", "in batches", powertools, "Powertools, batch"),
    ):
        summary: Summary = labels[other], "batch" if side == "in batches" else "single"
        yield versus.result(what, side, other, BUDGETS.get(key), summary)


def against_databases(pace: Pace) -> Iterator[Result]:
    """Single steps against alternatives that use a database, with the same durability on both sides."""
    yield from _against_databases(pace, "durable", "always", "on")
    yield from _against_databases(pace, "relaxed", "everysec", "off")


def _against_databases(pace: Pace, how: str, aof: str, commit: str) -> Iterator[Result]:
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
            enter("source's SQL", lambda: peers.source_sql(url, commit, peers.source_tables(url)))
            enter("DBOS, PostgreSQL", lambda: peers.dbos(dbos_url), STEPS_OF_A_RUN)
        if how == "durable":  # DBOS opens SQLite in a mode that waits for fsync
            enter("DBOS, SQLite", peers.dbos_on_sqlite, STEPS_OF_A_RUN)
        slower = Pace(3 * pace.seconds, 2 * pace.turn, pace.scale)
        versus = _Versus(measure_in_turns(slower, sides), problems)
    rates = {side: figure(versus.turns.rate(side)) for side in ("chain", "in batches")}
    meaning = f"AOF {aof}, synchronous_commit={commit}"
    yield Result(
        f"{how}: begin + complete, {meaning}",
        versus.turns.rate("squidstep"),
        "steps/s",
        note=f"with advance_step {rates['chain']}, in batches {rates['in batches']} steps/s",
        bars=versus.bars(f"one worker, {meaning}: {_SURVIVES[how]}"),
    )
    for side, name, what, label in (
        ("squidstep", "source's SQL", "the source's SQL on PostgreSQL 15", _SQL),
        ("chain", "DBOS, PostgreSQL", "DBOS Transact on PostgreSQL, ten-step workflows", "DBOS Transact on PostgreSQL"),
        ("chain", "DBOS, SQLite", "DBOS Transact on SQLite, ten-step workflows", ""),
    ):
        if name in versus.turns.seconds or name in problems:
            key = f"SQL, {how}" if label == _SQL else ""
            single: Summary | None = (f"{label}, both {how}", "single") if label else None
            batch: Summary | None = (f"{label}, both {how}", "batch") if label else None
            yield versus.result(f"{how}: against {what}", side, name, BUDGETS.get(key), single)
            batches = f"{how}: batches of 100, against the same"
            yield versus.result(batches, "in batches", name, BUDGETS.get(f"{key}, batch"), batch)


def durable_workers(pace: Pace) -> Iterator[Result]:
    """Many durable workers at once, each a process, against as many with the source's SQL: both share each fsync."""
    size = pace.of(_WORKERS, minimum=16)
    budget = BUDGETS["SQL, durable, 64 workers"]
    what = f"durable, {size} workers at once: against as many with the source's SQL on PostgreSQL 15"
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(postgres())
            runs = peers.source_tables(url)
        except MissingError as missing:
            yield Result(what, None, budget=budget, note=str(missing))
            return

        @contextlib.contextmanager
        def sql_worker(number: int) -> Iterator[Mapping[str, Work]]:
            with peers.source_sql(url, "on", runs[number::size]) as steps:
                yield {"steps": steps}

        started = stack.enter_context(server(durability="always"))
        ours = stack.enter_context(Crew(size, blocking_worker(started.url)))
        theirs = stack.enter_context(Crew(size, sql_worker))
        sides = {"squidstep": (ours, "steps"), "source's SQL": (theirs, "steps")}
        measured = measure_crews(sides, max(0.3, pace.seconds / 6))
    panel = f"{size} workers, AOF always, synchronous_commit=on: they share each fsync"
    yield Result(
        what,
        measured.turns.times("squidstep", "source's SQL"),
        budget=budget,
        note=measured.note("squidstep", "source's SQL"),
        bars=_Versus(measured.turns, {}).bars(panel),
        summary=(f"{_SQL}, both durable, {size} workers at once", "single"),
    )
