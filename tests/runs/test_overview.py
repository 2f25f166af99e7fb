"""`overview`: the counts of all indexes, and the first of each, as the listings return them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.backends import Bench, offline_store
from support.records import begun

from squidstep_redis import CorruptRunError, InvalidArgumentError, StepRunStore


def fill(bench: Bench, store: StepRunStore, number: int) -> None:
    """Makes so many runs, each with a live claim, a lapsed claim, a failed and a pending step."""
    for run in (f"run-{count:02}" for count in range(number)):
        store.fail_step(begun(store.begin_step(run, "failed", {"of": run}, lease=60)), {"type": "Declined"})
        begun(store.begin_step(run, "live", {"of": run}, lease=60))
        bench.lapse(begun(store.begin_step(run, "lapsed", {"of": run}, lease=0.005)))  # the clock moves on
        store.schedule_step(run, "pending", {})


def index(bench: Bench, name: str) -> bytes:
    """Returns the key of an index in the bucket of the run "run"."""
    return bench.keys("run")[2].removesuffix(b"claims") + name.encode()


def test_nothing_is_there(store: StepRunStore) -> None:
    assert store.overview() == (0, 0, 0, 0, [], [], [], [])


def test_lists_and_counts_are_those_of_the_listings(bench: Bench, store: StepRunStore) -> None:
    fill(bench, store, 3)

    seen = store.overview()

    assert (seen.live, seen.lapsed, seen.failed, seen.total) == (3, 3, 3, 3)
    assert seen.live_claims == store.live_claims(payloads=False)
    assert seen.lapsed_claims == store.lapsed_claims(payloads=False)
    assert seen.failed_steps == store.failed_steps(payloads=False)
    assert seen.runs == store.runs().runs
    assert [summary.run_id for summary in seen.runs] == ["run-02", "run-01", "run-00"]
    assert seen.failed_steps[0].last_error == {"type": "Declined"}


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "failures"), [(1, 1), (4, 7)])
def test_limits_shorten_the_lists_and_not_the_counts(
    bench: Bench, store: StepRunStore, limit: int, failures: int
) -> None:
    fill(bench, store, 30)

    seen = store.overview(limit, failures=failures)

    assert (seen.live, seen.lapsed, seen.failed, seen.total) == (30, 30, 30, 30)
    assert seen.live_claims == store.live_claims(limit, payloads=False)
    assert seen.lapsed_claims == store.lapsed_claims(limit, payloads=False)
    assert seen.failed_steps == store.failed_steps(failures, payloads=False)
    assert seen.runs == store.runs(limit=limit).runs
    assert len(seen.runs) == limit


def test_entries_of_lost_runs_are_neither_listed_nor_counted(bench: Bench, store: StepRunStore) -> None:
    fill(bench, store, 2)
    bench.backend.raw.delete(*bench.keys("run-01")[:2])

    seen = store.overview()

    assert (seen.live, seen.lapsed, seen.failed, seen.total) == (1, 1, 1, 1)
    assert [summary.run_id for summary in seen.runs] == ["run-00"]


@pytest.mark.parametrize("member", [b"garbage", b"\xff"])
@pytest.mark.parametrize("name", ["claims", "failed", "runs"])
def test_foreign_members_hide_nothing(bench: Bench, store: StepRunStore, name: str, member: bytes) -> None:
    fill(bench, store, 1)
    first = 9e12 if name != "claims" else 1
    bench.backend.raw.zadd(index(bench, name), {member: first})

    seen = store.overview()

    assert [len(found) for found in seen[4:]] == [1, 1, 1, 1]
    assert seen[:4] == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("claims", lambda raw, key: raw.set(key, "x")),
        ("failed", lambda raw, key: raw.hset(key, "field", "x")),
        ("runs", lambda raw, key: raw.rpush(key, "x")),
    ],
)
def test_index_of_another_type_is_named(
    bench: Bench, store: StepRunStore, name: str, write: Callable[[Any, bytes], object]
) -> None:
    write(bench.backend.raw, index(bench, name))

    with pytest.raises(CorruptRunError, match=name):
        store.overview()


@pytest.mark.parametrize(("limit", "failures"), [(0, 1), (1, 1_001), (True, 1), (1, "2")])
def test_invalid_limits_are_rejected(limit: Any, failures: Any) -> None:
    with offline_store() as store, pytest.raises(InvalidArgumentError, match="limit: must|failures: must"):
        store.overview(limit, failures=failures)
