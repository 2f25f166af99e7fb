"""`purge` by the age of the last change, and listings in which one corrupt run must not hide others."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun
from support.server_time import at
from support.servers import wait_until

from squidstep_redis import StepRunStore
from squidstep_redis.protocol.keys import Keys


def finish_step(bench: Bench, store: StepRunStore, run_id: str, began: int, ended: int, ending: str) -> None:
    """Claims a step and ends it, each so many seconds ago."""
    now = int(bench.backend.now())
    claim = begun(store.send(at(store.calls.begin_step(run_id, ending, {}), now - began)))
    calls = {"complete": store.calls.complete_step(claim, {}), "fail": store.calls.fail_step(claim, {})}
    store.send(at(calls[ending], now - ended))


def purged(store: StepRunStore, older_than: Any) -> list[str]:
    """Returns the ids of the runs that `purge` would delete."""
    return [summary.run_id for summary in store.purge(older_than, dry_run=True)]


class TestPurge:
    """The ages differ by hundreds of seconds: a machine that stalls changes no result."""

    @pytest.mark.parametrize("ending", ["complete", "fail"])
    def test_age_counts_in_seconds_from_the_last_change(self, bench: Bench, store: StepRunStore, ending: str) -> None:
        finish_step(bench, store, "run", began=9_000, ended=1_000, ending=ending)

        assert purged(store, 600) == purged(store, timedelta(seconds=600)) == ["run"]
        assert purged(store, 1_400) == purged(store, timedelta(seconds=1_400)) == []

    def test_newest_of_several_changes_counts(self, bench: Bench, store: StepRunStore) -> None:
        finish_step(bench, store, "run", began=9_000, ended=1_000, ending="complete")
        finish_step(bench, store, "run", began=8_000, ended=5_000, ending="fail")

        assert purged(store, 600) == ["run"]
        assert purged(store, 1_400) == []

    def test_oldest_change_comes_first(self, bench: Bench, store: StepRunStore) -> None:
        for age in (2_000, 4_000, 1_000, 3_000):
            finish_step(bench, store, f"run-{age}", began=9_000, ended=age, ending="complete")

        assert purged(store, 1_500) == ["run-4000", "run-3000", "run-2000"]

    def test_deletes_only_runs_of_that_age(self, bench: Bench, store: StepRunStore) -> None:
        finish_step(bench, store, "old", began=9_000, ended=5_000, ending="complete")
        finish_step(bench, store, "new", began=9_000, ended=1_000, ending="complete")

        assert [summary.run_id for summary in store.purge(3_000)] == ["old"]

        assert [summary.run_id for summary in store.runs().runs] == ["new"]


CORRUPTIONS = ["a state line", "the type of a key", "a missing key"]


def corrupt(bench: Bench, run_id: str, how: str) -> None:
    """Overwrites a part of a run."""
    steps, done = bench.keys(run_id)[:2]
    match how:
        case "a state line":
            bench.backend.raw.hset(steps, "spay", "1r nonsense")
        case "the type of a key":
            bench.backend.raw.delete(steps)
            bench.backend.raw.set(steps, "x")
        case _:
            bench.backend.raw.delete(done)


@pytest.mark.parametrize("how", CORRUPTIONS)
class TestCorruptRun:
    """The corrupt run is neither the first nor the last, so that hidden runs on either side are noticed."""

    def make_runs(self, bench: Bench, store: StepRunStore, ending: str, how: str) -> set[str]:
        """Makes five runs, one of them corrupt; returns the ids of the others."""
        runs = [f"run-{number}" for number in range(5)]
        for run_id in runs:
            store.complete_step(begun(store.begin_step(run_id, "first", {})), {})
            claim = begun(store.begin_step(run_id, "pay", {}, lease=0.01 if ending == "expire" else 60))
            if ending == "fail":
                store.fail_step(claim, {})
            elif ending == "expire":
                bench.lapse(claim)
        corrupt(bench, runs[2], how)
        return set(runs) - {runs[2]}

    def test_corrupt_run_does_not_hide_other_runs(self, bench: Bench, store: StepRunStore, how: str) -> None:
        sound = self.make_runs(bench, store, "fail", how)

        problems = {summary.run_id: summary.problem for summary in store.runs().runs}

        assert {run_id for run_id, problem in problems.items() if problem is None} == sound
        assert problems["run-2"] is not None

    def test_corrupt_run_does_not_hide_failed_steps(self, bench: Bench, store: StepRunStore, how: str) -> None:
        sound = self.make_runs(bench, store, "fail", how)

        assert {step_run.run_id for step_run in store.failed_steps()} == sound

    def test_corrupt_run_does_not_hide_lapsed_claims(self, bench: Bench, store: StepRunStore, how: str) -> None:
        sound = self.make_runs(bench, store, "expire", how)

        assert {step_run.run_id for step_run in store.lapsed_claims()} == sound

    def test_corrupt_run_does_not_hide_live_claims(self, bench: Bench, store: StepRunStore, how: str) -> None:
        sound = self.make_runs(bench, store, "hold", how)

        assert {step_run.run_id for step_run in store.live_claims()} == sound

    def test_corrupt_run_does_not_stop_a_purge(self, bench: Bench, store: StepRunStore, how: str) -> None:
        sound = self.make_runs(bench, store, "fail", how)
        last = begun(store.begin_step("later", "pay", {}))
        bench.lapse(begun(store.begin_step("timer", "pay", {}, lease=0.005)))  # the server's clock moves on

        assert {summary.run_id for summary in store.purge(0.001)} == sound

        assert store.get_step_run("later", "pay") == last


@pytest.mark.servers("valkey", "cluster", "redis-7", "redis-6")  # fakeredis reads the indexes slowly
def test_entries_of_expired_runs_leave_the_indexes(bench: Bench) -> None:
    """Nothing else reads the indexes meanwhile."""
    store = bench.store(run_ttl=0.05)
    keep = begun(bench.store().begin_step("kept", "pay", {}, lease=0.02))
    failed = begun(bench.store().begin_step("kept", "mail", {}, lease=60))
    bench.store().fail_step(failed, {})
    for number in range(30):
        store.begin_step(f"lapsed-{number}", "pay", {}, lease=0.02)
        store.fail_step(begun(store.begin_step(f"failed-{number}", "pay", {})), {})
    bench.lapse(keep)
    wait_until(lambda: not store.get_run("lapsed-29") and not store.get_run("failed-29"))

    assert store.purge(60, dry_run=True) == []
    assert entries(bench) == 62
    assert store.purge(60) == []

    assert entries(bench) == 2
    assert [each.run_id for each in (*store.lapsed_claims(), *store.failed_steps())] == ["kept", "kept"]


def entries(bench: Bench) -> int:
    keys = Keys(bench.prefix.encode())
    return sum(bench.backend.raw.zcard(key) for key in (*keys.claims(), *keys.failed()))
