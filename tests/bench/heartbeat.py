"""The row that measures the heartbeat of many claims on one client."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import redis
from bench.budgets import BUDGETS
from bench.databases import connect, server
from bench.measure import Pace, Result, Spread, figure
from bench.ours import STEPS_OF_A_RUN, own_store

from squidstep_redis import Event

_CLAIMS = 2_000
_LEASE = 6  # seconds: a beat every two
_POLL = 0.02
_OWN_COMMANDS = (b"config", b"info", b"slowlog")


class Beat(NamedTuple):
    """One beat: all leases have been extended once.

    Attributes:
        batches: how many batches it took.
        server_ms: server time of all of its commands, by the server's SLOWLOG.
        slowest_ms: server time of the slowest of them.
        slowest: its name.
        cpu_ms: CPU time of the server, parsing and replying included.
        reads: how often the server read from the client. It executes what it has read before it serves others.
        seconds: how long the client took.
    """

    batches: int
    server_ms: float
    slowest_ms: float
    slowest: str
    cpu_ms: float
    reads: int
    seconds: float


def heartbeat(pace: Pace) -> Iterator[Result]:
    """The heartbeat of a blocking store that holds 2,000 claims."""
    extensions: list[float] = []  # for each extension, the duration of its batch

    def listener(event: Event) -> None:
        if event.kind == "extend":
            extensions.append(event.seconds)

    with server() as started, connect(started) as client, own_store(client) as store:
        client.config_set("slowlog-max-len", 10 * _CLAIMS)
        client.config_set("slowlog-log-slower-than", 0)
        store.on_event(listener)
        with contextlib.ExitStack() as held:
            for number in range(_CLAIMS):
                run, step = f"beat-{number // STEPS_OF_A_RUN}", f"step-{number % STEPS_OF_A_RUN}"
                claim = held.enter_context(store.claim_step(run, step, {}, lease=_LEASE))
                held.callback(claim.complete, {})
            for _ in range(2):  # claims that were entered one after the other come to share a batch
                _wait_for_beat(extensions)
            beats = [_beat(client, extensions) for _ in range(pace.of(7, minimum=3))]
    what = f"a heartbeat of {_CLAIMS:,} claims on one client"
    cpu_ms, client_ms, reads, after_a_read_ms = (
        statistics.median(values)
        for values in zip(
            *((it.cpu_ms, 1_000 * it.seconds, it.reads, it.server_ms / it.reads) for it in beats), strict=True
        )
    )
    slowest = min(beats, key=lambda beat: beat.slowest_ms)  # in the other beats, the server was probably preempted
    yield Result(
        f"{what}: batches per beat", Spread.of([it.batches for it in beats]), "", BUDGETS["heartbeat, batches"]
    )
    yield Result(
        f"{what}: server time per beat",
        Spread.of([it.server_ms for it in beats]),
        "ms",
        BUDGETS["heartbeat, ms"],
        f"with parsing and replying {figure(cpu_ms)} ms of the server's CPU; the client waits {figure(client_ms)} ms",
    )
    yield Result(
        f"{what}: longest slice of server time",
        max(slowest.slowest_ms, after_a_read_ms),
        "ms",
        BUDGETS["heartbeat, slice in ms"],
        f"slowest command: {slowest.slowest}, {figure(slowest.slowest_ms)} ms in the best beat; "
        f"{figure(after_a_read_ms)} ms after each of {reads:,.0f} reads, on average",
    )


def _beat(client: redis.Redis, extensions: list[float]) -> Beat:
    """Measures the next beat."""
    client.slowlog_reset()
    before: Any = client.info()
    durations = _wait_for_beat(extensions)
    after: Any = client.info()
    commands: list[Any] = [each for each in client.slowlog_get(-1) if not _is_own(each["command"])]
    slowest = max(commands, key=lambda each: each["duration"])
    return Beat(
        batches=len(durations),
        server_ms=sum(each["duration"] for each in commands) / 1_000,
        slowest_ms=slowest["duration"] / 1_000,
        slowest=slowest["command"].split()[0].decode(),
        cpu_ms=1_000 * sum(after[name] - before[name] for name in ("used_cpu_user", "used_cpu_sys")),
        reads=after["total_reads_processed"] - before["total_reads_processed"],
        seconds=sum(durations),
    )


def _is_own(command: bytes) -> bool:
    return command.split()[0].lower() in _OWN_COMMANDS


def _wait_for_beat(extensions: list[float]) -> set[float]:
    """Waits until all leases have been extended once more; returns the durations of the batches."""
    extensions.clear()
    deadline = time.monotonic() + 10 * _LEASE
    while len(extensions) < _CLAIMS:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {len(extensions)} of {_CLAIMS} leases were extended")
        time.sleep(_POLL)
    return set(extensions)
