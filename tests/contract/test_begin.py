"""What `begin_step` does to each state of a step, and which step runs carry a claim."""

from __future__ import annotations

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import (
    Outcome,
    StaleStepRunError,
    StepRunStore,
    StepStatus,
)


class TestBeginStep:
    def test_step_without_a_record_executes(self, store: StepRunStore) -> None:
        result = store.begin_step("run", "pay", {"amount": 1}, owner="worker-1")
        step_run, decision = result

        assert decision == "execute"
        assert (result.reason, result.retry_in) == (None, None)
        assert (result.busy, result.exhausted, result.superseded) == (False, False, False)
        assert (step_run.status, step_run.attempt, step_run.owner) == (StepStatus.RUNNING, 1, "worker-1")
        assert step_run.input == {"amount": 1}
        assert step_run.lease_ends_at is None
        assert stored(store) == step_run

    def test_pending_step_executes_with_the_scheduled_input(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {"amount": 1})

        step_run = begun(store.begin_step("run", "pay", {"amount": 2}))

        assert (step_run.attempt, step_run.input) == (1, {"amount": 1})
        assert stored(store).input == {"amount": 1}

    def test_failed_step_executes_again_with_the_callers_input(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {"amount": 1}))
        store.fail_step(first, {"reason": "declined"})

        second = begun(store.begin_step("run", "pay", {"amount": 2}, owner="worker-2"))

        assert (second.attempt, second.input, second.owner) == (2, {"amount": 2}, "worker-2")
        assert (second.output, second.last_error) == (None, None)
        assert stored(store) == second

    def test_scheduled_step_that_failed_takes_the_callers_input(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {"amount": 1})
        store.fail_step(begun(store.begin_step("run", "pay", {})), {"reason": "declined"})

        assert begun(store.begin_step("run", "pay", {"amount": 2})).input == {"amount": 2}

    def test_expired_lease_is_taken_over(self, bench: Bench, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {"amount": 1}, lease=0.01, owner="worker-1"))
        bench.lapse(first)

        second = begun(store.begin_step("run", "pay", {"amount": 2}, owner="worker-2"))

        assert (second.attempt, second.input, second.owner) == (2, {"amount": 2}, "worker-2")
        abandoned, current = store.attempts("run", "pay")
        assert (abandoned.number, abandoned.owner, abandoned.outcome) == (1, "worker-1", Outcome.LEASE_EXPIRED)
        assert abandoned.ended_at == first.lease_ends_at
        assert (current.number, current.owner, current.outcome) == (2, "worker-2", Outcome.RUNNING)

    def test_live_lease_is_busy(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60, owner="worker-1"))

        result = store.begin_step("run", "pay", {"amount": 2}, lease=60)

        assert result.decision == "skip"
        assert (result.busy, result.exhausted, result.superseded) == (True, False, False)
        assert result.retry_in is not None
        assert 50 < result.retry_in <= 60
        assert result.step_run == first == stored(store)

    def test_claim_without_a_lease_is_busy_indefinitely(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))

        result = store.begin_step("run", "pay", {}, lease=1)

        assert (result.decision, result.busy, result.retry_in) == ("skip", True, None)

    @pytest.mark.parametrize("lost_replies", [1, 3, 11])
    def test_resent_begin_returns_the_same_claim(self, bench: Bench, lost_replies: int) -> None:
        store = bench.store()
        step_run = begun(bench.store(lost_replies=lost_replies).begin_step("run", "pay", {"amount": 1}, lease=60))

        assert step_run.attempt == 1
        assert [attempt.number for attempt in store.attempts("run", "pay")] == [1]
        assert store.complete_step(step_run, {}).status is StepStatus.COMPLETED

    def test_completed_step_is_skipped_with_its_output(self, store: StepRunStore) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {"amount": 1})), {"receipt": 7})
        before = stored(store)

        result = store.begin_step("run", "pay", {"amount": 2})

        assert (result.decision, result.reason, result.retry_in) == ("skip", "completed", None)
        assert result.step_run.output == {"receipt": 7}
        assert result.step_run == before == stored(store)

    def test_failed_step_without_attempts_left_is_exhausted(self, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("run", "pay", {"amount": 1}, max_attempts=1)), {"reason": "declined"})
        before = stored(store)

        result = store.begin_step("run", "pay", {"amount": 2}, max_attempts=1)

        assert (result.decision, result.exhausted, result.retry_in) == ("skip", True, None)
        assert result.step_run == before == stored(store)
        assert begun(store.begin_step("run", "pay", {}, max_attempts=2)).attempt == 2

    def test_expired_claim_without_attempts_left_becomes_failed(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {"amount": 1}, lease=0.01, max_attempts=1, owner="worker-1")))

        result = store.begin_step("run", "pay", {"amount": 2}, max_attempts=1)

        assert (result.decision, result.exhausted) == ("skip", True)
        assert (result.step_run.status, result.step_run.input) == (StepStatus.FAILED, {"amount": 1})
        assert result.step_run.last_error is not None
        assert result.step_run.last_error["type"] == "LeaseExpired"
        assert result.step_run == stored(store)
        (attempt,) = store.attempts("run", "pay")
        assert (attempt.outcome, attempt.owner) == (Outcome.LEASE_EXPIRED, "worker-1")
        again = store.begin_step("run", "pay", {}, max_attempts=1)
        assert (again.exhausted, again.step_run) == (True, result.step_run)

    def test_live_claim_is_busy_rather_than_exhausted(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}, lease=60, max_attempts=1))

        assert store.begin_step("run", "pay", {}, max_attempts=1).reason == "busy"


class TestClaimToken:
    def test_step_runs_that_were_read_or_skipped_carry_no_claim(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))
        before = bench.dump()

        for step_run in (stored(store), store.begin_step("run", "pay", {}).step_run, store.get_run("run")[0]):
            with pytest.raises(StaleStepRunError, match="carries no claim"):
                store.complete_step(step_run, {})

        assert bench.dump() == before
