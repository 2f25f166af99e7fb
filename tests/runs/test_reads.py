"""Reading a run: at once, page by page, in completion order, and the attempts of a step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.backends import Bench
from support.records import begun, in_batch

from squidstep_redis import (
    Outcome,
    StepRun,
    StepRunStore,
    StepStatus,
)


class TestReadingARun:
    def test_missing_run_reads_as_empty(self, store: StepRunStore) -> None:
        assert store.get_step_run("run", "pay") is None
        assert store.get_run("run") == []
        assert store.attempts("run", "pay") == []
        assert store.completed_steps("run") == []
        assert store.completed_outputs("run") == []
        assert store.step_statuses("run") == {}

    def test_statuses_and_step_runs_come_in_creation_order(self, store: StepRunStore) -> None:
        store.schedule_steps("run", {"zeta": {}, "alpha": {}})
        begun(store.begin_step("run", "mid", {"n": 1}))
        store.complete_step(begun(store.begin_step("run", "alpha", {})), {"n": 2}, schedule={"beta": {}})
        store.fail_step(begun(store.begin_step("run", "zeta", {})), {"n": 3})

        assert list(store.step_statuses("run").items()) == [
            ("zeta", StepStatus.FAILED),
            ("alpha", StepStatus.COMPLETED),
            ("mid", StepStatus.RUNNING),
            ("beta", StepStatus.PENDING),
        ]
        step_runs = store.get_run("run")
        assert [step_run.step for step_run in step_runs] == ["zeta", "alpha", "mid", "beta"]
        assert step_runs == [store.get_step_run("run", step_run.step) for step_run in step_runs]

    @pytest.mark.servers("valkey", "cluster", "redis-7", "redis-6")  # takes six seconds in fakeredis
    def test_run_of_2500_steps_reads_completely_and_in_order(self, store: StepRunStore) -> None:
        names = [f"step-{number}" for number in range(2_500)]

        assert store.schedule_steps("run", {name: {"n": index} for index, name in enumerate(names)}) == names
        claims = store.batch([store.calls.begin_step("run", name, {}) for name in reversed(names)])
        store.batch([store.calls.complete_step(begun(claim), {"of": claim[0].step}) for claim in claims])

        assert list(store.step_statuses("run")) == names
        assert [step_run.input["n"] for step_run in store.get_run("run")] == list(range(2_500))
        assert store.completed_steps("run") == names[::-1]
        assert store.completed_outputs("run") == [{"of": name} for name in reversed(names)]
        found = {each.step: each for page in pages(store, limit=500) for each in page}
        assert sorted(found.values(), key=lambda each: each.position) == store.get_run("run")
        assert store.completed_steps("run", after=1_000, limit=1_200) == names[1_499:299:-1]
        assert store.completed_outputs("run", after=1_000, limit=1_200) == [
            {"of": name} for name in names[1_499:299:-1]
        ]


def pages(store: StepRunStore, limit: int) -> Iterator[list[StepRun]]:
    """All pages of the run."""
    cursor: str | None = None
    while True:
        page = store.scan_steps("run", limit=limit, cursor=cursor)
        yield page.step_runs
        cursor = page.cursor
        if cursor is None:
            return


class TestScanSteps:
    def test_missing_or_deleted_run_is_one_empty_page(self, store: StepRunStore) -> None:
        assert store.scan_steps("run") == ([], None)
        store.schedule_step("run", "pay", {})
        store.delete_run("run")
        assert store.scan_steps("run") == ([], None)

    def test_small_run_is_one_page_with_complete_step_runs(self, store: StepRunStore) -> None:
        store.schedule_steps("run", {"zeta": {}, "alpha": {}, "mid": {"n": 1}})
        store.complete_step(begun(store.begin_step("run", "alpha", {})), {"n": 2})
        store.fail_step(begun(store.begin_step("run", "zeta", {})), {"n": 3})
        begun(store.begin_step("run", "zeta", {}))  # its past attempt is a field that is no step
        begun(store.begin_step("run", "seen", {}, owner="s"))

        page = store.scan_steps("run")

        assert page.cursor is None
        assert sorted(page.step_runs, key=lambda each: each.position) == store.get_run("run")

    def test_pages_are_about_as_large_as_requested(self, bench: Bench, store: StepRunStore) -> None:
        names = {f"step-{number}" for number in range(1_000)}
        store.schedule_steps("run", {name: {} for name in names})

        found = list(pages(store, limit=100))

        assert {each.step for page in found for each in page} == names
        # The page size assumes three fields per step; a pending step has two. Servers return a few more or fewer.
        assert len(found) >= 4

    def test_each_step_reads_as_of_its_page(self, store: StepRunStore) -> None:
        store.schedule_steps("run", {f"step-{number}": {} for number in range(500)})
        first = store.scan_steps("run", limit=50)
        assert first.cursor is not None
        seen = {each.step for each in first.step_runs}
        claims = in_batch(store, [store.calls.begin_step("run", f"step-{number}", {}) for number in range(500)])

        rest: dict[str, StepRun] = {}
        cursor: str | None = first.cursor
        while cursor is not None:
            page = store.scan_steps("run", limit=50, cursor=cursor)
            rest |= {each.step: each for each in page.step_runs}
            cursor = page.cursor

        assert all(each.status is StepStatus.PENDING for each in first.step_runs)
        assert all(each.status is StepStatus.RUNNING for each in rest.values())
        assert seen | rest.keys() == {claim.step_run.step for claim in claims}


class TestCompletionOrder:
    def test_completion_order_can_be_followed_by_offset(self, store: StepRunStore) -> None:
        followed: list[str] = []
        for name in ("a", "b", "c", "d", "e"):
            store.complete_step(begun(store.begin_step("run", name, {})), {"of": name})
            if name in "bde":
                followed += store.completed_steps("run", after=len(followed))

        assert followed == store.completed_steps("run") == ["a", "b", "c", "d", "e"]
        assert store.completed_outputs("run", after=3) == [{"of": "d"}, {"of": "e"}]
        assert store.completed_outputs("run", limit=2) == [{"of": "a"}, {"of": "b"}]
        assert store.completed_steps("run", after=1, limit=1) == ["b"]
        assert store.completed_steps("run", after=5) == store.completed_outputs("run", after=7, limit=2) == []


class TestAttempts:
    def test_attempts_carry_owner_outcome_error_and_times(self, bench: Bench, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("run", "pay", {}, owner="w1")), {"reason": "declined"})
        bench.lapse(begun(store.begin_step("run", "pay", {}, owner="w2", lease=0.01)))
        store.release_step(begun(store.begin_step("run", "pay", {}, owner="w3")))
        store.complete_step(begun(store.begin_step("run", "pay", {}, owner="w4")), {})

        attempts = store.attempts("run", "pay")

        assert [(each.number, each.owner, each.outcome, each.error) for each in attempts] == [
            (1, "w1", Outcome.FAILED, {"reason": "declined"}),
            (2, "w2", Outcome.LEASE_EXPIRED, None),
            (3, "w3", Outcome.RELEASED, None),
            (4, "w4", Outcome.COMPLETED, None),
        ]
        times = [time for each in attempts for time in (each.started_at, each.ended_at) if time is not None]
        assert len(times) == 8
        assert times == sorted(times)

    def test_latest_attempt_and_eight_earlier_ones_are_kept(self, bench: Bench, store: StepRunStore) -> None:
        for number in range(1, 13):
            store.fail_step(begun(store.begin_step("run", "pay", {})), {"of": number})

        assert [(each.number, each.error) for each in store.attempts("run", "pay")] == [
            (number, {"of": number}) for number in range(4, 13)
        ]
        kept = [field for field in bench.backend.raw.hkeys(bench.keys("run")[0]) if field.startswith(b"a")]
        assert len(kept) == 8

    def test_pending_step_has_no_attempts(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {})

        assert store.attempts("run", "pay") == []
