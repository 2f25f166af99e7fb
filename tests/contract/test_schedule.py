"""What scheduling does to each state of a step, and how pending steps are deleted."""

from __future__ import annotations

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import (
    StepRunStore,
    StepStatus,
)


class TestScheduleStep:
    def test_step_without_a_record_becomes_pending(self, store: StepRunStore) -> None:
        step_run, decision = store.schedule_step("run", "pay", {"amount": 1})

        assert decision == "schedule"
        assert step_run.status is StepStatus.PENDING
        assert step_run.attempt == 0
        assert step_run.input == {"amount": 1}
        assert (step_run.output, step_run.last_error, step_run.owner) == (None, None, None)
        assert (step_run.started_at, step_run.ended_at, step_run.lease_ends_at) == (None, None, None)
        assert stored(store) == step_run

    @pytest.mark.parametrize("status", ["pending", "running", "completed", "failed"])
    def test_existing_record_is_left_unchanged(self, store: StepRunStore, status: str) -> None:
        if status == "pending":
            store.schedule_step("run", "pay", {"amount": 1})
        else:
            step_run = begun(store.begin_step("run", "pay", {"amount": 1}))
            if status == "completed":
                store.complete_step(step_run, {"receipt": 7})
            elif status == "failed":
                store.fail_step(step_run, {"reason": "declined"})
        before = stored(store)

        step_run, decision = store.schedule_step("run", "pay", {"amount": 2})

        assert decision == "skip"
        assert step_run == before == stored(store)
        assert (step_run.status, step_run.input) == (status, {"amount": 1})


class TestScheduleSteps:
    def test_new_steps_are_returned_in_the_callers_order(self, store: StepRunStore) -> None:
        store.schedule_step("run", "b", {"old": True})
        begun(store.begin_step("run", "d", {"old": True}))

        assert store.schedule_steps("run", {name: {"new": True} for name in "edcba"}) == ["e", "c", "a"]
        assert [(each.step, each.input) for each in store.get_run("run")] == [
            ("b", {"old": True}),
            ("d", {"old": True}),
            ("e", {"new": True}),
            ("c", {"new": True}),
            ("a", {"new": True}),
        ]

    def test_scheduling_no_steps_writes_nothing(self, bench: Bench, store: StepRunStore) -> None:
        assert store.schedule_steps("run", {}) == []
        assert bench.dump() == {}

    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_resent_schedule_returns_the_same(self, bench: Bench, lost_replies: int) -> None:
        store = bench.store(lost_replies=lost_replies)

        assert store.schedule_step("run", "a", {}).decision == "schedule"
        assert store.schedule_steps("run", {"a": {}, "b": {}, "c": {}}) == ["b", "c"]
        assert [each.position for each in store.get_run("run")] == [1, 2, 3]

    def test_schedule_resent_after_a_claim_returns_the_same(self, store: StepRunStore) -> None:
        one = store.calls.schedule_step("run", "a", {"by": "one"})
        many = store.calls.schedule_steps("run", {"b": {}, "c": {}})
        store.send(one)
        store.send(many)
        store.complete_step(begun(store.begin_step("run", "a", {})), {})
        store.fail_step(begun(store.begin_step("run", "b", {})), {"reason": "declined"})

        assert store.send(one).decision == "schedule"
        assert store.send(many) == ["b", "c"]


class TestDeletePendingSteps:
    def test_only_pending_steps_are_deleted(self, store: StepRunStore) -> None:
        store.schedule_steps("run", {name: {} for name in ("pending", "released", "running", "failed", "completed")})
        store.release_step(begun(store.begin_step("run", "released", {})))
        begun(store.begin_step("run", "running", {}))
        store.fail_step(begun(store.begin_step("run", "failed", {})), {"reason": "declined"})
        store.complete_step(begun(store.begin_step("run", "completed", {})), {})

        deleted = store.delete_pending_steps("run", ["completed", "released", "absent", "failed", "pending", "running"])

        assert deleted == ["released", "absent", "pending"]
        assert list(store.step_statuses("run")) == ["running", "failed", "completed"]
        assert store.attempts("run", "released") == []
        assert store.delete_pending_steps("run", ["pending"]) == ["pending"]
        assert store.delete_pending_steps("run", []) == []

    def test_deleted_imported_step_leaves_no_field_behind(self, bench: Bench, store: StepRunStore) -> None:
        """A pending step that was never begun has no last error, but an imported document may contain one."""
        store.schedule_steps("run", {"pay": {}, "mail": {}})
        document = store.export_run("run")
        document["steps"][0]["last_error"] = {"why": "it says so"}
        store.import_run({**document, "run_id": "copy"})

        assert store.delete_pending_steps("copy", ["pay"]) == ["pay"]

        assert set(bench.backend.raw.hkeys(bench.keys("copy")[0])) == {b"r", b"m", b"smail", b"imail"}

    @pytest.mark.parametrize("ttl", [None, 60])
    @pytest.mark.parametrize("imported", [False, True])
    def test_run_without_steps_is_gone(self, bench: Bench, ttl: float | None, imported: bool) -> None:
        store = bench.store(run_ttl=ttl)
        store.schedule_steps("run", {"pay": {}, "mail": {}})
        if imported:
            document = store.export_run("run")
            store.delete_pending_steps("run", ["pay", "mail"])
            store.import_run(document)
        store.release_step(begun(store.begin_step("run", "pay", {}, lease=60)))

        call = store.calls.delete_pending_steps("run", ["pay", "mail"])
        assert store.send(call) == store.send(call) == ["pay", "mail"]

        assert bench.dump() == {}
        assert begun(store.begin_step("run", "pay", {})).position == 1

    def test_deleted_step_can_be_begun_again(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {"amount": 1})
        store.delete_pending_steps("run", ["pay"])

        assert begun(store.begin_step("run", "pay", {"amount": 2})).input == {"amount": 2}
