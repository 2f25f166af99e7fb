"""The index of runs: `runs` in the order of creation, its pages and filters, `count_runs`, and entries that leave."""

from __future__ import annotations

from datetime import timedelta
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import Bench
from support.internals import run_workflow
from support.records import begun, runs_of_one_bucket
from support.servers import wait_until

from squidstep_redis import CorruptRunError, StepRunStore
from squidstep_redis.operations.pacing import load
from squidstep_redis.operations.run_index import ALL, Bucket, Selection

ACME = {"tenant": "acme"}


def listed(store: StepRunStore, **options: Any) -> list[str]:
    """Returns the ids of the runs of all pages."""
    found: list[str] = []
    page = store.runs(**options)
    while True:
        found += [summary.run_id for summary in page.runs]
        if page.cursor is None:
            return found
        page = store.runs(cursor=page.cursor, **options)


def schedule_in_order(bench: Bench, store: StepRunStore, *runs: str) -> None:
    """Creates runs, each in another millisecond of the server's clock."""
    for run in runs:
        store.schedule_step(run, "step", {})
        now = int(bench.backend.now() * 1_000)
        wait_until(lambda now=now: int(bench.backend.now() * 1_000) > now)


def set_created(bench: Bench, run_id: str, ms: float) -> None:
    """Changes the time at which the index says that a run was created."""
    bench.backend.raw.zadd(index_of(bench, run_id), {f"{len(run_id)}:{run_id}".encode(): ms})


def index_of(bench: Bench, run_id: str) -> bytes:
    return bench.keys(run_id)[2].removesuffix(b"claims") + b"runs"


class TestOrder:
    def test_newest_run_comes_first_whatever_changes(self, bench: Bench, store: StepRunStore) -> None:
        schedule_in_order(bench, store, "a", "c", "b")
        begun(store.begin_step("a", "step", {}))

        assert listed(store) == ["b", "c", "a"]

    def test_runs_of_one_millisecond_are_sorted_by_id(self, bench: Bench, store: StepRunStore) -> None:
        runs = ["m", "b", "z", "a", "k"]
        for run in runs:
            store.schedule_step(run, "step", {})
            set_created(bench, run, 1_790_000_000_000)

        assert listed(store) == listed(store, limit=2) == sorted(runs)

    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [7, 99, 1_000])
    def test_pages_have_each_run_once_and_in_order(self, bench: Bench, store: StepRunStore, limit: int) -> None:
        runs = [f"run-{number}" for number in range(150)]
        store.batch([store.calls.schedule_step(run, "step", {}) for run in runs])
        for number, run in enumerate(runs):
            set_created(bench, run, 1_790_000_000_000 + number // 3)

        expected = sorted(runs, key=lambda run: (-(int(run[4:]) // 3), run))
        assert listed(store, limit=limit) == expected

    def test_many_runs_of_one_bucket_and_millisecond_are_paged(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "step", {})
        (document,) = [store.export_run("run")]
        runs = runs_of_one_bucket(20)
        for run in runs:
            store.import_run({**document, "run_id": run})
            set_created(bench, run, 1_790_000_000_000)
        set_created(bench, "run", 1_790_000_000_000)

        assert listed(store, limit=3) == sorted(["run", *runs])

    def test_created_at_is_the_time_of_the_first_call(self, bench: Bench, store: StepRunStore) -> None:
        step_run = store.schedule_step("run", "step", {}).step_run
        schedule_in_order(bench, store, "other")
        store.schedule_step("run", "later", {})

        created = {summary.run_id: summary.created_at for summary in store.runs().runs}["run"]
        summary = store.summarize_run("run")

        assert created == step_run.created_at
        assert summary is not None
        assert summary.created_at == created

    @pytest.mark.slow
    def test_pages_continue_while_runs_come_and_go(self, bench: Bench, store: StepRunStore) -> None:
        schedule_in_order(bench, store, *(f"run-{number:02}" for number in range(12)))
        page = store.runs(limit=4)
        found = [summary.run_id for summary in page.runs]

        store.delete_run("run-08")
        store.delete_run("run-05")
        schedule_in_order(bench, store, "new")
        begun(store.begin_step("run-00", "step", {}))
        rest = store.runs(limit=100, cursor=page.cursor)
        found += [summary.run_id for summary in rest.runs]

        assert rest.cursor is None
        assert found == [f"run-{number:02}" for number in range(11, -1, -1) if number != 5]

    @pytest.mark.parametrize("apart_ms", [0, 1])
    def test_run_deleted_while_a_page_is_read_hides_no_other(
        self, bench: Bench, store: StepRunStore, apart_ms: int
    ) -> None:
        """An index is read in parts. The next part begins after a run that may be gone."""
        for number, run in enumerate(runs_of_one_bucket(12)):
            store.schedule_step(run, "step", {})
            set_created(bench, run, 1_790_000_000_000 + number * apart_ms)
        bucket = Bucket(index_of(bench, "run"), ALL, None, 1)
        while bucket.loaded_to is not None:
            run_workflow(store, load([bucket], "runs"))
            store.delete_run(bucket.entries[-1].position[1].decode())

        found = [each.position[1].decode() for each in bucket.entries]
        assert sorted(found) == sorted(runs_of_one_bucket(12))

    def test_run_deleted_while_runs_are_counted_hides_no_other(self, bench: Bench, store: StepRunStore) -> None:
        key, first = index_of(bench, "run"), 1_790_000_000_000
        bench.backend.raw.zadd(key, {f"8:run-{number:04}": first + number for number in range(4_000)})
        bucket = Bucket(key, Selection(prefix=b"run"), None, 0)
        while bucket.loaded_to is not None:
            run_workflow(store, load([bucket], "count_runs"))
            if bucket.loaded_to is not None:
                assert bench.backend.raw.zremrangebyscore(key, -bucket.loaded_to, -bucket.loaded_to) == 1

        assert bucket.count == 4_000


class TestFilters:
    def test_since_is_inclusive_and_until_exclusive(self, bench: Bench, store: StepRunStore) -> None:
        schedule_in_order(bench, store, "a", "b", "c")
        created = {summary.run_id: summary.created_at for summary in store.runs().runs}

        assert listed(store, since=created["b"]) == ["c", "b"]
        assert listed(store, until=created["b"]) == ["a"]
        assert listed(store, since=created["b"], until=created["c"]) == ["b"]
        assert (store.count_runs(since=created["b"]), store.count_runs(until=created["b"])) == (2, 1)
        between = (created["b"] or bench) + timedelta(microseconds=1)
        assert (listed(store, since=between), listed(store, until=between)) == (["c"], ["b", "a"])

    def test_labels_and_prefix_select_runs(self, store: StepRunStore) -> None:
        store.schedule_step("order-1", "step", {}, labels={**ACME, "order": "1"})
        store.schedule_step("order-2", "step", {}, labels={**ACME, "order": "2"})
        store.schedule_step("bill-1", "step", {}, labels={"tenant": "acme-2", "order": "1"})
        store.schedule_step("bill-2", "step", {})

        for options, found in (
            ({"labels": ACME}, {"order-1", "order-2"}),
            ({"labels": {"order": "1"}}, {"order-1", "bill-1"}),
            ({"labels": {**ACME, "order": "1"}}, {"order-1"}),
            ({"labels": {"tenant": "acm"}}, set[str]()),
            ({"labels": {"order": "1"}, "run_id_prefix": "bill"}, {"bill-1"}),
            ({"run_id_prefix": "bill-"}, {"bill-1", "bill-2"}),
            ({"labels": {}}, {"order-1", "order-2", "bill-1", "bill-2"}),
        ):
            assert set(listed(store, **options)) == found
            assert store.count_runs(**options) == len(found)

    @pytest.mark.slow
    def test_filter_finds_runs_after_a_thousand_others(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "step", {}, labels=ACME)
        index = index_of(bench, "run")
        bench.backend.raw.zadd(index, {f"9:other{number:04}".encode(): 2e12 + number for number in range(2_500)})

        assert store.count_runs() == 2_501
        assert store.count_runs(labels=ACME) == 1
        assert store.count_runs(run_id_prefix="other") == 2_500
        assert listed(store, labels=ACME) == ["run"]
        assert listed(store) == ["run"]
        assert bench.indexed() == {b"3:run\ntenant=acme"}

    def test_status_is_that_of_a_step(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("pending", "step", {})
        begun(store.begin_step("running", "step", {}))
        bench.lapse(begun(store.begin_step("lapsed", "step", {}, lease=0.01)))
        store.fail_step(begun(store.begin_step("failed", "step", {})), {})
        store.fail_step(begun(store.begin_step("final", "step", {})), {}, final=True)
        bench.lapse(begun(store.begin_step("exhausted", "step", {}, lease=0.01)))
        store.begin_step("exhausted", "step", {}, max_attempts=1)
        store.complete_step(begun(store.begin_step("completed", "step", {})), {})

        assert set(listed(store, status="pending")) == {"pending"}
        assert set(listed(store, status="running")) == {"running", "lapsed"}
        assert set(listed(store, status="failed", limit=1)) == {"failed", "final", "exhausted"}
        assert set(listed(store, status="completed")) == {"completed"}

    def test_status_is_found_among_many_steps(self, store: StepRunStore) -> None:
        many = {f"step-{number}": {} for number in range(400)}
        for run in ("pending", "failed"):
            store.schedule_steps(run, many)
        store.fail_step(begun(store.begin_step("failed", "step-399", {})), {})

        assert listed(store, status="failed") == ["failed"]
        assert listed(store, status="completed") == []

    @pytest.mark.slow
    @pytest.mark.parametrize("limit", [8, 1_000])
    def test_pages_of_a_status_have_every_run_once_in_order(
        self, bench: Bench, store: StepRunStore, limit: int
    ) -> None:
        runs = [*runs_of_one_bucket(90), *(f"other-{number}" for number in range(60))]
        store.batch([store.calls.schedule_step(run, "step", {}) for run in runs])
        for run in runs[::3]:
            store.fail_step(begun(store.begin_step(run, "step", {})), {})
        for number, run in enumerate(runs):
            set_created(bench, run, 1_790_000_000_000 + number // 4)
        newest_first = sorted(runs, key=lambda run: (-(runs.index(run) // 4), run))

        for status, expected in (("failed", set(runs[::3])), ("pending", {*runs} - {*runs[::3]})):
            found = listed(store, status=status, limit=limit)
            assert found == [run for run in newest_first if run in expected]

    @pytest.mark.servers("valkey", "redis-7", "redis-6")
    def test_page_ends_before_it_has_looked_at_thousands_of_runs(self, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("failed", "step", {})), {})
        for first in range(0, 8_000, 1_000):
            store.batch([store.calls.schedule_step(f"{first + number}", "step", {}) for number in range(1_000)])

        page = store.runs(status="failed")

        assert (page.runs, page.cursor is None) == ([], False)
        assert listed(store, status="failed") == ["failed"]


class TestEntries:
    def test_deleted_run_leaves_the_index(self, bench: Bench, store: StepRunStore) -> None:
        for run in ("deleted", "purged", "emptied"):
            store.schedule_step(run, "step", {}, labels=ACME)
        store.complete_step(begun(store.begin_step("purged", "step", {})), {})
        assert len(bench.indexed()) == 3

        store.delete_run("deleted")
        store.delete_pending_steps("emptied", ["step"])
        wait_until(lambda: store.purge(0.001))

        assert bench.indexed() == set()
        assert store.count_runs() == 0

    def test_run_that_is_gone_is_dropped_by_the_next_listing(self, bench: Bench, store: StepRunStore) -> None:
        schedule_in_order(bench, store, "kept", "gone")
        bench.backend.raw.delete(*bench.keys("gone")[:2])

        assert listed(store) == ["kept"]
        assert bench.indexed() == {b"4:kept"}

    def test_purge_drops_the_entries_of_expired_runs(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("gone", "step", {})
        bench.backend.raw.delete(*bench.keys("gone")[:2])

        store.purge(3_600)

        assert bench.indexed() == set()

    @pytest.mark.servers("valkey", "redis-7", "redis-6")
    def test_entries_of_expired_runs_leave_without_a_reader(self, bench: Bench) -> None:
        """A quarter of the calls, by their random token, drop entries: of the last runs, some may remain."""
        store = bench.store(run_ttl=0.001)
        for run in runs_of_one_bucket(500):
            store.schedule_step(run, "step", {})

        assert len(bench.indexed()) < 400

    @pytest.mark.servers("valkey", "redis-7", "redis-6")
    def test_expire_run_drops_entries_of_expired_runs(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "step", {})
        index = index_of(bench, "run")
        bench.backend.raw.zadd(index, {b"4:gone": 1})

        wait_until(lambda: store.expire_run("run", 60) and bench.indexed() == {b"3:run"})

    def test_live_runs_stay_while_others_are_created(self, bench: Bench) -> None:
        store = bench.store(run_ttl=600)
        runs = {f"run-{number}" for number in range(60)}
        store.batch([store.calls.schedule_step(run, "step", {}, labels=ACME) for run in runs])

        assert bench.indexed() == {f"{len(run)}:{run}\ntenant=acme".encode() for run in runs}

    @pytest.mark.parametrize("member", [b"run", b"3:ru", b"0:", b"3:runx", b"x:run", b"", b"03:run"])
    def test_foreign_members_are_dropped(self, bench: Bench, store: StepRunStore, member: bytes) -> None:
        store.schedule_step("run", "step", {})
        bench.backend.raw.zadd(index_of(bench, "run"), {member: 9e12})

        assert listed(store) == ["run"]
        assert bench.indexed() == {b"3:run"}

    @pytest.mark.parametrize("score", [inf, -inf, 1e300, -1e300, 3e14, -1])
    def test_time_that_no_clock_has_hides_no_run(self, bench: Bench, store: StepRunStore, score: float) -> None:
        runs = ["run", *runs_of_one_bucket(3)]
        schedule_in_order(bench, store, *runs)
        for run in runs[1:3]:
            set_created(bench, run, score)

        assert (
            set(listed(store, limit=1))
            == set(listed(store))
            == {each.run_id for each in store.overview().runs}
            == set(runs)
        )
        created = {each.run_id: each.created_at for each in store.runs().runs}
        assert [run for run in runs if created[run] is None] == runs[1:3]
        assert store.purge(60) == []

    def test_run_that_is_created_again_has_its_new_labels(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "step", {}, labels=ACME)
        bench.backend.raw.delete(*bench.keys("run")[:2])
        store.schedule_step("run", "step", {}, labels={"tenant": "other"})

        assert listed(store, labels=ACME) == []
        assert listed(store) == ["run"]
        assert bench.indexed() == {b"3:run\ntenant=other"}

    def test_resent_call_enters_the_run_once(self, bench: Bench) -> None:
        store = bench.store(lost_replies=1)
        begun(store.begin_step("run", "step", {}, labels=ACME))

        assert bench.indexed() == {b"3:run\ntenant=acme"}

    @pytest.mark.parametrize("labels", [None, ACME])
    @pytest.mark.parametrize(
        "call", ["begin_step", "begin_step with lease", "schedule_step", "schedule_steps", "import"]
    )
    def test_index_of_another_type_is_refused_and_nothing_written(
        self, bench: Bench, store: StepRunStore, call: str, labels: dict[str, str] | None
    ) -> None:
        store.schedule_step("run", "step", {}, labels=labels)
        document = store.export_run("run")
        store.delete_pending_steps("run", ["step"])
        bench.backend.raw.set(index_of(bench, "run"), "x")
        before = bench.dump()

        create = {
            "begin_step": lambda: store.begin_step("run", "step", {}, labels=labels),
            "begin_step with lease": lambda: store.begin_step("run", "step", {}, labels=labels, lease=60),
            "schedule_step": lambda: store.schedule_step("run", "step", {}, labels=labels),
            "schedule_steps": lambda: store.schedule_steps("run", {"step": {}}, labels=labels),
            "import": lambda: store.import_run(document),
        }[call]

        with pytest.raises(CorruptRunError, match="runs"):
            create()

        assert bench.dump() == before

    @pytest.mark.parametrize("lease", [None, 60])
    def test_indexes_of_other_types_are_refused_together(
        self, bench: Bench, store: StepRunStore, lease: int | None
    ) -> None:
        for key in (index_of(bench, "run"), bench.keys("run")[2]):
            bench.backend.raw.set(key, "x")
        before = bench.dump()

        with pytest.raises(CorruptRunError):
            store.begin_step("run", "step", {}, lease=lease)

        assert bench.dump() == before


RUNS = ["a", "b", "a\n", "1:a", "é:steps", "{x}"]
LABELS = [{}, {"tenant": "acme"}, {"tenant": "acme", "order": "=7 é"}]


@pytest.mark.servers("valkey", "redis-7", "redis-6")
@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "schedule", "delete", "lose", "expire"]),
            st.sampled_from(RUNS),
            st.sampled_from(LABELS),
        ),
        max_size=25,
    )
)
def test_listing_agrees_with_a_model(bench: Bench, calls: list[tuple[str, str, dict[str, str]]]) -> None:
    """`runs` returns the runs that exist, with the labels of the call that created them."""
    bench.backend.flush()
    store = bench.store()
    model: dict[str, dict[str, str]] = {}
    for number, (call, run, labels) in enumerate(calls):
        match call:
            case "begin":
                store.begin_step(run, f"step-{number}", {}, lease=60, labels=labels)
                model.setdefault(run, labels)
            case "schedule":
                store.schedule_step(run, f"step-{number}", {}, labels=labels)
                model.setdefault(run, labels)
            case "delete":
                store.delete_run(run, tombstone=0.001)
                wait_until(lambda run=run: not bench.backend.raw.exists(bench.keys(run)[0]))
                model.pop(run, None)
            case "lose":
                bench.backend.raw.delete(*bench.keys(run)[:2])
                model.pop(run, None)
            case _:
                store.expire_run(run, 600)

    assert {summary.run_id: summary.labels for summary in store.runs().runs} == model
    for labels in LABELS:
        expected = {run for run, those in model.items() if labels.items() <= those.items()}
        assert set(listed(store, labels=labels)) == expected
        assert store.count_runs(labels=labels) == len(expected)
