"""Listing and deleting runs: `runs` and `purge`, on every server and both stores."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from support.backends import Bench
from support.internals import run_workflow
from support.records import begun, in_batch
from support.servers import wait_until

from squidstep_redis import (
    InvalidArgumentError,
    RunDeletedError,
    RunSummary,
    StepRunStore,
    StepStatus,
)
from squidstep_redis.operations.runs import _purge_run, scan_runs


def every_run(store: StepRunStore, **options: Any) -> list[RunSummary]:
    """Returns the runs of all pages."""
    found: list[RunSummary] = []
    page = store.runs(**options)
    pages = 1
    while True:
        found += page.runs
        if page.cursor is None:
            return found
        page = store.runs(cursor=page.cursor, **options)
        pages += 1
        assert pages < 1_000


def counts(**counted: int) -> dict[StepStatus, int]:
    return {status: counted.get(status, 0) for status in StepStatus}


def age(bench: Bench) -> None:
    """Waits until everything stored is more than a millisecond old."""
    end = bench.backend.now() + 0.002
    wait_until(lambda: bench.backend.now() > end)


class TestRuns:
    def test_empty_store_has_no_runs(self, store: StepRunStore) -> None:
        assert store.runs() == ([], None)

    def test_summary_has_counts_and_the_time_of_the_newest_change(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_steps("scheduled", {"a": {}, "b": {}})
        store.complete_step(begun(store.begin_step("done", "a", {})), {})
        store.fail_step(begun(store.begin_step("mixed", "f", {})), {})
        store.complete_step(begun(store.begin_step("mixed", "c", {})), {}, schedule={"p": {}})
        begun(store.begin_step("mixed", "r", {}, lease=60))

        found = {summary.run_id: summary for summary in every_run(store)}

        assert {run: summary.counts for run, summary in found.items()} == {
            "scheduled": counts(pending=2),
            "done": counts(completed=1),
            "mixed": counts(pending=1, running=1, completed=1, failed=1),
        }
        assert [found[run].steps for run in ("scheduled", "done", "mixed")] == [2, 1, 4]
        assert [run for run, summary in found.items() if summary.is_over] == ["done"]
        for run, summary in found.items():
            changes = [each.ended_at or each.started_at or each.created_at for each in store.get_run(run)]
            assert summary.changed_at == max(changes)

    @pytest.mark.slow
    def test_pages_have_each_run_once(self, bench: Bench, store: StepRunStore) -> None:
        names = {f"run-{number}" for number in range(700)}
        store.batch([store.calls.schedule_step(run, "step", {}) for run in sorted(names)])
        bench.store(prefix=f"{bench.prefix}-other").schedule_step("not ours", "step", {})

        first = store.runs(limit=100)
        found = [summary.run_id for summary in every_run(store, limit=100)]

        assert len(first.runs) == 100
        assert first.cursor is not None
        assert sorted(found) == sorted(names)

    @pytest.mark.parametrize(
        ("status", "found"), [("pending", {"p", "m"}), ("completed", {"m", "c"}), (StepStatus.FAILED, {"f"})]
    )
    def test_status_selects_runs_with_a_step_of_that_status(
        self, store: StepRunStore, status: Any, found: set[str]
    ) -> None:
        store.schedule_step("p", "step", {})
        store.complete_step(begun(store.begin_step("m", "first", {})), {}, schedule={"next": {}})
        store.complete_step(begun(store.begin_step("c", "step", {})), {})
        store.fail_step(begun(store.begin_step("f", "step", {})), {})

        assert {summary.run_id for summary in every_run(store, status=status)} == found

    @pytest.mark.parametrize("prefix", ["order-", "a*", "a[b]", "a\\", "a?", "ø", "^-"])
    def test_run_id_prefix_is_matched_literally(self, store: StepRunStore, prefix: str) -> None:
        ours = {f"{prefix}1", f"{prefix}:steps", prefix}
        for run in (*ours, "order", "axx", "ab", "a", "b"):
            store.schedule_step(run, "step", {})

        assert {summary.run_id for summary in every_run(store, run_id_prefix=prefix)} == ours

    @pytest.mark.parametrize("limit", [1, 7])
    def test_page_has_at_most_limit_runs_and_none_is_missed(self, store: StepRunStore, limit: int) -> None:
        store.batch([store.calls.schedule_step(f"run-{number}", "step", {}) for number in range(10)])
        store.fail_step(begun(store.begin_step("failed", "step", {})), {})

        page, sizes, found = store.runs(limit=limit), list[int](), list[str]()
        while True:
            sizes.append(len(page.runs))
            found += [summary.run_id for summary in page.runs]
            if page.cursor is None:
                break
            page = store.runs(limit=limit, cursor=page.cursor)

        assert max(sizes) == limit
        assert sorted(found) == sorted(["failed", *(f"run-{number}" for number in range(10))])
        assert [each.run_id for each in every_run(store, limit=limit, status="failed")] == ["failed"]

    def test_store_prefix_is_matched_literally(self, bench: Bench) -> None:
        for prefix in ("a*", "a?", "[a]"):
            store = bench.store(prefix=bench.prefix + prefix)
            bench.store(prefix=f"{bench.prefix}a!").schedule_step("not ours", "step", {})
            store.schedule_step("ours", "step", {})
            assert [summary.run_id for summary in every_run(store)] == ["ours"]

    def test_corrupt_run_is_listed_and_a_deleted_one_is_not(self, bench: Bench, store: StepRunStore) -> None:
        for run in ("torn", "typed", "line", "deleted", "sound"):
            store.complete_step(begun(store.begin_step(run, "step", {})), {}, schedule={"next": {}})
        raw = bench.backend.raw
        raw.delete(bench.keys("torn")[1])
        raw.delete(bench.keys("typed")[0])
        raw.set(bench.keys("typed")[0], "x")
        raw.hset(bench.keys("line")[0], "snext", "1p nonsense")
        store.delete_run("deleted")

        found = {summary.run_id: summary for summary in every_run(store)}

        assert found.keys() == {"torn", "typed", "line", "sound"}
        assert {run for run, summary in found.items() if summary.problem is None} == {"sound"}
        assert bench.keys("torn")[1].decode() in (found["torn"].problem or "")
        assert not any(summary.is_over for summary in found.values())

    def test_all_steps_of_a_large_run_are_counted(self, store: StepRunStore) -> None:
        steps = {f"step-{number}": {} for number in range(2_500)}
        store.schedule_steps("large", steps)
        store.batch(
            [store.calls.complete_step(store.begin_step("large", f"step-{n}", {}).step_run, {}) for n in range(3)]
        )

        (summary,) = every_run(store)

        assert summary.counts == counts(pending=2_497, completed=3)

    def test_deleted_pending_steps_are_not_counted(self, store: StepRunStore) -> None:
        store.complete_step(begun(store.begin_step("run", "a", {})), {}, schedule={"b": {}, "c": {}})
        store.delete_pending_steps("run", ["b", "c"])

        assert [summary.counts for summary in every_run(store)] == [counts(completed=1)]

    @pytest.mark.parametrize(
        "options",
        [
            {"limit": 0},
            {"limit": 1_001},
            {"status": "done"},
            {"cursor": "x"},
            {"cursor": 3},
            {"run_id_prefix": 7},
            {"since": 7},
            {"until": datetime(2026, 1, 1)},
            {"labels": ["tenant"]},
        ],
    )
    def test_invalid_argument_is_rejected(self, store: StepRunStore, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgumentError, match=f"^{next(iter(options))}: "):
            store.runs(**options)


class TestPurge:
    @pytest.fixture
    def old(self, bench: Bench, store: StepRunStore) -> set[str]:
        """Creates runs in all states; returns those that are over."""
        store.complete_step(begun(store.begin_step("completed", "a", {})), {})
        store.fail_step(begun(store.begin_step("failed", "a", {})), {})
        store.complete_step(begun(store.begin_step("failed", "b", {})), {})
        store.schedule_step("pending", "a", {})
        store.complete_step(begun(store.begin_step("running", "a", {})), {})
        begun(store.begin_step("running", "b", {}))
        bench.lapse(begun(store.begin_step("lapsed", "b", {}, lease=0.001)))
        age(bench)
        return {"completed", "failed"}

    def test_purge_deletes_old_runs_that_are_over(self, bench: Bench, store: StepRunStore, old: set[str]) -> None:
        purged = store.purge(0.001, tombstone=60)

        assert {summary.run_id for summary in purged} == old
        assert {summary.run_id for summary in every_run(store)} == {"pending", "running", "lapsed"}
        assert store.failed_steps() == []
        assert bench.backend.raw.zcard(bench.keys("failed")[3]) == 0
        with pytest.raises(RunDeletedError):
            store.begin_step("completed", "a", {})
        assert store.purge(0.001) == []

    def test_purge_skips_keys_of_other_programs(self, bench: Bench, store: StepRunStore, old: set[str]) -> None:
        for key in (b"{0}:wrong bucket:steps", b"{}::steps", b"{0}:\xff:steps", b"{zz}:x:steps"):
            bench.backend.raw.set(bench.prefix.encode() + b":" + key, "")

        assert {summary.run_id for summary in store.purge(0.001)} == old

    def test_dry_run_returns_the_same_and_deletes_nothing(
        self, bench: Bench, store: StepRunStore, old: set[str]
    ) -> None:
        before = bench.dump()

        listed = store.purge(0.001, dry_run=True)

        assert bench.dump() == before
        assert listed == store.purge(0.001)

    def test_recently_changed_runs_are_kept(self, store: StepRunStore, old: set[str]) -> None:
        assert store.purge(3_600) == []

    def test_run_id_prefix_selects_the_runs_to_delete(self, store: StepRunStore, old: set[str]) -> None:
        assert [summary.run_id for summary in store.purge(0.001, run_id_prefix="comp")] == ["completed"]

    def test_status_selects_the_runs_to_delete(self, store: StepRunStore, old: set[str]) -> None:
        assert [summary.run_id for summary in store.purge(0.001, status="completed")] == ["completed"]
        assert [summary.run_id for summary in store.purge(0.001, status=StepStatus.FAILED)] == ["failed"]
        for status in ("pending", "running", "done"):
            with pytest.raises(InvalidArgumentError, match="^status: "):
                store.purge(0.001, status=status)

    @pytest.mark.servers("valkey", "redis-7", "redis-6", "cluster")  # on fakeredis it takes ten seconds
    def test_run_of_700_failed_steps_is_deleted(self, store: StepRunStore, bench: Bench) -> None:
        steps = {f"step-{number}": {} for number in range(700)}
        store.schedule_steps("large", steps)
        claims = in_batch(store, [store.calls.begin_step("large", step, {}) for step in steps])
        ends = [store.calls.fail_step(claim.step_run, {}) for claim in claims[:900]]
        ends += [store.calls.complete_step(claim.step_run, {}) for claim in claims[900:]]
        store.batch(ends)
        age(bench)

        assert [summary.steps for summary in store.purge(0.001, tombstone=0.001)] == [700]

        assert store.get_run("large") == []
        assert store.failed_steps() == []

    @pytest.mark.servers("valkey", "redis-7", "redis-6", "cluster")  # on fakeredis it takes ten seconds
    def test_run_of_more_than_1000_failed_steps_is_kept(self, bench: Bench, store: StepRunStore) -> None:
        steps = {f"step-{number}": {} for number in range(1_001)}
        claims = in_batch(store, [store.calls.begin_step("large", step, {}) for step in steps])
        store.batch([store.calls.fail_step(claim.step_run, {}) for claim in claims])
        age(bench)

        assert store.purge(0.001) == store.purge(0.001, dry_run=True) == []

    @pytest.mark.parametrize("change", ["begin", "schedule", "retry", "delete"])
    def test_run_that_changes_after_the_scan_is_kept(self, bench: Bench, store: StepRunStore, change: str) -> None:
        store.complete_step(begun(store.begin_step("run", "a", {})), {})
        store.fail_step(begun(store.begin_step("run", "b", {})), {})
        (scan,) = run_workflow(store, scan_runs(store.calls, "purge", [b"run"]))
        match change:
            case "begin":
                begun(store.begin_step("run", "b", {}))
            case "schedule":
                store.schedule_step("run", "c", {})
            case "retry":
                store.retry_step("run", "b")
            case _:
                store.delete_run("run")
        before = bench.dump()

        assert store.send(_purge_run(store.calls, scan, b"60000")) is False

        assert bench.dump() == before

    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_resent_deletion_returns_the_same(self, bench: Bench, lost_replies: int) -> None:
        store = bench.store()
        store.fail_step(begun(store.begin_step("run", "a", {})), {})
        (scan,) = run_workflow(store, scan_runs(store.calls, "purge", [b"run"]))

        assert bench.store(lost_replies=lost_replies).send(_purge_run(store.calls, scan, b"60000")) is True

    @pytest.mark.parametrize("age", [0, -1, None, "1d", True])
    def test_invalid_age_is_rejected(self, store: StepRunStore, age: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="older_than"):
            store.purge(age)


def test_counts_of_a_summary_can_be_encoded_as_json(store: StepRunStore) -> None:
    store.schedule_step("run", "step", {})
    (summary,) = store.runs().runs
    assert json.loads(json.dumps(summary.counts)) == {"pending": 1, "running": 0, "completed": 0, "failed": 0}
