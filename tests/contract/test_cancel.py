"""The effects of operations in a cancelled run, and after `resume_run`."""

from __future__ import annotations

from typing import Any

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import (
    InvalidArgumentError,
    RunDeletedError,
    StaleStepRunError,
    StepRun,
    StepRunStore,
    StepStatus,
)


@pytest.fixture
def claim(store: StepRunStore) -> StepRun:
    """The claim of the running step of a run that has a step in every state, and is cancelled."""
    store.schedule_step("run", "pending", {"n": 1})
    store.complete_step(begun(store.begin_step("run", "completed", {})), {"receipt": 7})
    store.fail_step(begun(store.begin_step("run", "failed", {})), {"reason": "declined"})
    claim = begun(store.begin_step("run", "running", {"amount": 1}, lease=60, owner="worker-1"))
    assert store.cancel_run("run", "wrong address ☃") is True
    return claim


class TestBegin:
    @pytest.mark.parametrize("step", ["pending", "failed", "running"])
    def test_unfinished_step_is_skipped(self, bench: Bench, store: StepRunStore, claim: StepRun, step: str) -> None:
        before = bench.dump()

        result = store.begin_step("run", step, {"amount": 2}, lease=60, max_attempts=1)

        assert (result.decision, result.reason, result.cancelled) == ("skip", "cancelled", True)
        assert result.step_run == stored(store, step=step)
        assert (result.step_run.cancel_reason, result.step_run.token) == ("wrong address ☃", b"")
        assert result.retry_in is None
        assert bench.dump() == before

    def test_lapsed_claim_is_not_taken_over(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        bench.lapse(store.extend_claim(claim, 0.01))

        assert store.begin_step("run", "running", {}, max_attempts=1).cancelled
        assert stored(store, step="running").status is StepStatus.RUNNING

    def test_new_step_is_described_but_not_stored(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        before = bench.dump()

        result = store.begin_step("run", "new", {"amount": 2}, lease=60)

        assert result.cancelled
        described = result.step_run
        assert (described.status, described.attempt, described.position) == (StepStatus.PENDING, 0, 0)
        assert (described.input, described.cancel_reason) == ({"amount": 2}, "wrong address ☃")
        assert store.get_step_run("run", "new") is None
        assert bench.dump() == before

    def test_completed_step_still_returns_its_output(self, store: StepRunStore, claim: StepRun) -> None:
        result = store.begin_step("run", "completed", {})

        assert (result.reason, result.step_run.output) == ("completed", {"receipt": 7})

    def test_resent_begin_still_gets_its_claim(self, store: StepRunStore) -> None:
        call = store.calls.begin_step("run", "pay", {"amount": 1})
        claim = begun(store.send(call))
        store.cancel_run("run")

        assert begun(store.send(call)) == claim

    def test_group_skips_each_step(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        before = bench.dump()

        results = store.begin_steps("run", {"pending": {}, "new": {"n": 2}, "completed": {}, "newer": {}}, lease=60)

        assert [each.reason for each in results.values()] == ["cancelled", "cancelled", "completed", "cancelled"]
        assert [each.step_run.input for each in results.values()] == [{"n": 1}, {"n": 2}, {}, {}]
        assert bench.dump() == before


class TestSchedule:
    def test_new_step_is_skipped(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        before = bench.dump()

        step_run, decision = store.schedule_step("run", "new", {"n": 2})

        assert (decision, step_run.position, step_run.input) == ("skip", 0, {"n": 2})
        assert step_run.cancel_reason == "wrong address ☃"
        assert store.schedule_steps("run", {"new": {}, "pending": {}}) == []
        assert bench.dump() == before

    def test_resent_schedule_returns_the_same(self, store: StepRunStore) -> None:
        one, many = store.calls.schedule_step("run", "a", {}), store.calls.schedule_steps("run", {"b": {}, "c": {}})
        results = [store.send(one), store.send(many)]
        store.cancel_run("run")

        assert [store.send(one), store.send(many)] == results


class TestClaimsOfRunningSteps:
    def test_completion_is_accepted_without_successors(self, store: StepRunStore, claim: StepRun) -> None:
        assert store.complete_step(claim, {"done": 1}, schedule={"next": {}}).status is StepStatus.COMPLETED

        assert store.completed_outputs("run") == [{"receipt": 7}, {"done": 1}]
        assert store.get_step_run("run", "next") is None

    def test_advancing_completes_and_skips_the_next_step(self, store: StepRunStore, claim: StepRun) -> None:
        result = store.advance_step(claim, {"done": 1}, "next", {"n": 3})

        assert (result.reason, result.step_run.input, result.step_run.position) == ("cancelled", {"n": 3}, 0)
        assert stored(store, step="running").output == {"done": 1}
        assert store.get_step_run("run", "next") is None

    def test_advancing_skips_a_scheduled_step(self, store: StepRunStore, claim: StepRun) -> None:
        result = store.advance_step(claim, {"done": 1}, "pending", {"n": 3})

        assert (result.reason, result.step_run.input) == ("cancelled", {"n": 1})
        assert stored(store, step="running").status is StepStatus.COMPLETED

    @pytest.mark.parametrize("ending", ["fail_step", "release_step"])
    def test_failure_and_release_are_accepted(self, store: StepRunStore, claim: StepRun, ending: str) -> None:
        ended = getattr(store, ending)(claim, *([] if ending == "release_step" else [{"reason": "stopped"}]))

        assert ended == stored(store, step="running")
        assert store.begin_step("run", "running", {}).cancelled

    @pytest.mark.parametrize("by_id", [False, True])
    def test_extension_informs_the_holder(self, bench: Bench, store: StepRunStore, claim: StepRun, by_id: bool) -> None:
        extended = store.extend_claim(claim.id if by_id else claim, 600)

        assert (extended.cancel_reason, extended.input) == ("wrong address ☃", {"amount": 1})
        assert extended == stored(store, step="running")
        assert extended.lease_ends_at is not None
        assert extended.lease_ends_at.timestamp() - bench.backend.now() > 590
        if not by_id:
            store.complete_step(extended, {})

    def test_extensions_in_a_group_inform_each_holder(self, store: StepRunStore) -> None:
        claims = store.begin_steps("run", {"a": {}, "b": {}, "c": {}}, lease=60)
        calls = [store.calls.extend_claim(each.step_run, 60) for each in claims.values()]
        assert [each.cancel_reason for each in store.batch(calls, raise_errors=True)] == [None] * 3
        store.cancel_run("run")

        extended = store.batch(calls, raise_errors=True)

        assert [(each.step, each.cancel_reason) for each in extended] == [("a", ""), ("b", ""), ("c", "")]

    def test_checkpoint_informs_the_holder(self, store: StepRunStore, claim: StepRun) -> None:
        earlier = store.calls.checkpoint_step(claim, {"page": 1})
        running = store.checkpoint_step(claim, {"page": 2})

        assert (running.cancel_reason, running.progress) == ("wrong address ☃", {"page": 2})
        assert store.send(earlier).progress == {"page": 2}
        assert store.extend_claim(running, 60, progress={"page": 3}).cancel_reason == "wrong address ☃"
        assert stored(store, step="running").progress == {"page": 3}

    def test_stale_claim_is_still_stale(self, store: StepRunStore, claim: StepRun) -> None:
        store.release_step(claim)

        with pytest.raises(StaleStepRunError):
            store.extend_claim(claim, 60)


class TestResume:
    def test_steps_begin_again(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        assert store.resume_run("run") is True

        assert begun(store.begin_step("run", "pending", {})).input == {"n": 1}
        assert begun(store.begin_step("run", "new", {})).position == 5
        assert store.extend_claim(claim, 60).cancel_reason is None
        assert bench.field("run", "c") is None
        assert bench.field("run", "r") == b"1 5 1"

    def test_both_are_idempotent_and_the_first_reason_stays(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {})
        assert store.resume_run("run") is True
        assert store.cancel_run("run", "first") is True
        before = bench.dump()

        assert bench.store(lost_replies=1).cancel_run("run", "second") is True

        assert bench.dump() == before
        assert store.begin_step("run", "pay", {}).step_run.cancel_reason == "first"
        assert bench.store(lost_replies=1).resume_run("run") is True
        store.cancel_run("run")
        assert store.begin_step("run", "pay", {}).step_run.cancel_reason == ""

    def test_missing_and_deleted_runs_are_not_cancelled(self, bench: Bench, store: StepRunStore) -> None:
        assert (store.cancel_run("run"), store.resume_run("run")) == (False, False)
        assert bench.dump() == {}
        store.schedule_step("run", "pay", {})
        store.delete_run("run")
        assert (store.cancel_run("run"), store.resume_run("run")) == (False, False)
        with pytest.raises(RunDeletedError):
            store.begin_step("run", "pay", {})

    @pytest.mark.parametrize("reason", ["", 7, "a\nb", "x" * 513])
    def test_bad_reason_is_rejected_before_anything_is_sent(self, store: StepRunStore, reason: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="reason"):
            store.cancel_run("run", reason)


class TestRun:
    def test_summary_says_that_the_run_is_cancelled(self, store: StepRunStore, claim: StepRun) -> None:
        summary = store.summarize_run("run")

        assert summary is not None
        assert (summary.cancel_reason, summary.steps) == ("wrong address ☃", 4)
        assert [each.cancel_reason for each in store.runs().runs] == ["wrong address ☃"]
        store.resume_run("run")
        assert [each.cancel_reason for each in store.runs().runs] == [None]
        assert store.summarize_run("other") is None

    def test_completed_run_can_be_cancelled(self, store: StepRunStore) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})
        store.cancel_run("run")

        summary = store.summarize_run("run")
        assert summary is not None
        assert summary.cancel_reason == ""

    def test_cancelled_run_still_expires(self, bench: Bench) -> None:
        store = bench.store(run_ttl=60)
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        store.cancel_run("run", "stop")
        assert bench.backend.raw.pttl(bench.keys("run")[0]) > 100_000

        assert store.extend_claim(claim, 600).cancel_reason == "stop"
        assert bench.backend.raw.pttl(bench.keys("run")[0]) > 640_000
        assert store.expire_run("run", None)
        assert bench.backend.raw.pttl(bench.keys("run")[0]) == -1
        assert store.begin_step("run", "new", {}).cancelled
        store.resume_run("run")
        assert begun(store.begin_step("run", "new", {}))

    def test_retried_step_begins_after_resume(self, store: StepRunStore, claim: StepRun) -> None:
        assert store.retry_step("run", "failed").status is StepStatus.PENDING
        assert [each.step for each in store.retry_run("run")] == []
        assert store.begin_step("run", "failed", {}).cancelled
        store.resume_run("run")
        assert begun(store.begin_step("run", "failed", {})).attempt == 3

    def test_run_without_steps_is_gone(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {})
        store.cancel_run("run", "stop")
        store.delete_pending_steps("run", ["pay"])

        assert bench.dump() == {}
        assert begun(store.begin_step("run", "pay", {}))

    def test_deleting_ends_the_cancellation(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        assert store.delete_run("run", tombstone=0.001)
        bench.backend.raw.delete(bench.keys("run")[0])

        assert begun(store.begin_step("run", "pay", {}))

    @pytest.mark.parametrize("reason", [None, "wrong address"])
    def test_export_and_import_carry_it(self, bench: Bench, reason: str | None) -> None:
        store, other = bench.store(run_ttl=60), bench.store(prefix=f"{bench.prefix}-other")
        store.schedule_step("run", "pay", {})
        store.cancel_run("run", reason)

        document = store.export_run("run")
        other.import_run(document)

        assert document["cancel_reason"] == (reason or "")
        assert other.begin_step("run", "pay", {}).step_run.cancel_reason == (reason or "")
        assert other.export_run("run") == document
        other.resume_run("run")
        assert other.export_run("run")["cancel_reason"] is None
