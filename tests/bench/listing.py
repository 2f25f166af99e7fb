"""Measures the duration of listings of a large store, and how long their commands block the server."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import redis

from squidstep_redis import StepRunStore

RUNS = 100_000
_BATCH = 1_000
_EVERY_PAGE = "runs, every page"
_SLOW_US = 5_000  # commands slower than this are reported


class Listed(NamedTuple):
    """One measurement.

    Attributes:
        what: the operation.
        seconds: the duration until its first page was returned.
        slow: the commands that blocked the server for longer than 5 ms, each with its duration in ms.
    """

    what: str
    seconds: float
    slow: list[tuple[str, float]]

    @property
    def is_page(self) -> bool:
        """Whether it is one page, not all pages or a purge."""
        return self.what not in (_EVERY_PAGE, "purge")


def filled(port: int, runs: int = RUNS) -> tuple[datetime, float]:
    """Fills an empty server with runs; returns when half of them existed, and the bytes of their index for each run.

    Of ten runs, four are completed, two have failed, two have an expired lease, and two are running. One in ten runs
    has one label, and ten runs have another one. One additional run has 10,000 steps.

    Args:
        port: the server's port on loopback.
        runs: the number of runs.
    """
    with redis.Redis(port=port, protocol=2) as client, StepRunStore.from_url(f"redis://127.0.0.1:{port}") as store:
        fill(store, runs // 2)
        middle = datetime.now(UTC)
        fill(store, runs, runs // 2)
        index_bytes = sum(client.memory_usage(key) or 0 for key in client.scan_iter("*:runs", count=10_000)) / runs
        return middle, index_bytes


def listing(port: int, middle: datetime, runs: int = RUNS) -> list[Listed]:
    """Times the first page of each listing of a server that was `filled`, and a purge."""
    with redis.Redis(port=port, protocol=2) as client, StepRunStore.from_url(f"redis://127.0.0.1:{port}") as store:
        listings: dict[str, Callable[[], Any]] = {
            "runs": store.runs,
            "runs(limit=1_000)": lambda: store.runs(limit=1_000),
            "runs, a page in the middle": lambda: store.runs(until=middle),
            "runs(status='failed')": lambda: store.runs(status="failed"),
            "runs(status='pending'), of which there is one": lambda: store.runs(status="pending"),
            "runs(labels=…), one in ten": lambda: store.runs(labels={"tenant": "acme"}),
            "runs(labels=…), ten of all": lambda: store.runs(labels={"rare": "yes"}),
            "runs(run_id_prefix=…), ten of all": lambda: store.runs(run_id_prefix=f"run-{runs // 10 - 1}"),
            "count_runs": store.count_runs,
            "count_runs(labels=…)": lambda: store.count_runs(labels={"tenant": "acme"}),
            "overview": store.overview,
            "lapsed_claims": store.lapsed_claims,
            "live_claims": store.live_claims,
            "failed_steps": store.failed_steps,
            "failed_steps(1_000)": lambda: store.failed_steps(1_000),
            _EVERY_PAGE: lambda: _read_all_pages(store),
            "purge": lambda: store.purge(0.001, tombstone=1),
        }
        client.config_set("slowlog-log-slower-than", _SLOW_US)
        client.config_set("slowlog-max-len", 1_000)
        found: list[Listed] = []
        for what, call in listings.items():
            client.slowlog_reset()
            start = time.monotonic()
            call()
            seconds = time.monotonic() - start
            slow = [(str(each["command"][:60]), each["duration"] / 1_000) for each in client.slowlog_get(100)]
            found.append(Listed(what, seconds, slow))
        return found


def fill(store: StepRunStore, runs: int, first_run: int = 0) -> None:
    """Creates the runs from `first_run` on, up to `runs`."""
    calls = store.calls
    for first in range(first_run, runs, _BATCH):
        names = [f"run-{number}" for number in range(first, min(first + _BATCH, runs))]
        leases = [(None, 0.001, 3_600)[(number % 10 >= 6) + (number % 10 >= 8)] for number in range(len(names))]
        results: list[Any] = store.batch(
            [
                calls.begin_step(run, "step", {"of": run}, lease=leases[index], labels=_labels(first + index, runs))
                for index, run in enumerate(names)
            ]
        )
        ends: list[Any] = []
        for number, claim in enumerate(result.step_run for result in results):
            if number % 10 < 4:
                ends.append(calls.complete_step(claim, {}))
            elif number % 10 < 6:
                ends.append(calls.fail_step(claim, ValueError("declined")))
        store.batch(ends)
    store.schedule_steps("large", {f"step-{number}": {} for number in range(10_000)})


def _labels(number: int, runs: int) -> dict[str, str] | None:
    labels = {"tenant": "acme"} if number % 10 == 3 else {}
    return labels | {"rare": "yes"} if number % (runs // 10) == 0 else labels or None


def _read_all_pages(store: StepRunStore) -> None:
    cursor = None
    while (cursor := store.runs(limit=1_000, cursor=cursor).cursor) is not None:
        pass
