"""What `fail_step`, `extend_claim` and `release_step` do to each state of a step."""

from __future__ import annotations

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import (
    Outcome,
    StaleStepRunError,
    StepRun,
    StepRunStore,
    StepStatus,
)


class TestFailStep:
    def test_held_claim_is_failed(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

        failed = store.fail_step(step_run, {"reason": "declined"})

        assert (failed.status, failed.attempt) == (StepStatus.FAILED, 1)
        assert (failed.input, failed.output, failed.last_error) == ({"amount": 1}, None, {"reason": "declined"})
        assert failed == stored(store)
        assert store.completed_steps("run") == []

    def test_exception_is_stored_as_a_map(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        try:
            raise ConnectionResetError("the bank hung up")
        except ConnectionResetError as error:
            failed = store.fail_step(step_run, error)

        assert failed.last_error is not None
        assert failed.last_error["type"] == "ConnectionResetError"
        assert failed.last_error["message"] == "the bank hung up"
        assert "test_exception_is_stored_as_a_map" in failed.last_error["traceback"]

    @pytest.mark.parametrize("lost_replies", [1, 3, 11])
    def test_resent_failure_returns_the_same(self, bench: Bench, lost_replies: int) -> None:
        store = bench.store()
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))

        failed = bench.store(lost_replies=lost_replies).fail_step(step_run, {"reason": "declined"})

        assert failed == stored(store)
        assert [attempt.outcome for attempt in store.attempts("run", "pay")] == [Outcome.FAILED]

    def test_failure_resent_after_the_next_attempt_returns_the_same(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {}, lease=60))
        failed = store.fail_step(first, {"reason": "declined"})
        second = begun(store.begin_step("run", "pay", {}, lease=60))

        assert store.fail_step(first, {"reason": "declined"}) == failed
        assert stored(store) == second
        with pytest.raises(StaleStepRunError):
            store.fail_step(first, {"reason": "another"})

    def test_second_failure_with_another_error_is_stale(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        failed = store.fail_step(step_run, {"reason": "declined"})

        with pytest.raises(StaleStepRunError):
            store.fail_step(step_run, {"reason": "another"})
        with pytest.raises(StaleStepRunError):
            store.complete_step(step_run, {})
        assert stored(store) == failed

    def test_bare_id_fails_the_current_claim(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}))

        failed = store.fail_step(step_run.id, {"reason": "operator"})

        assert (failed.input, failed.last_error) == ({"amount": 1}, {"reason": "operator"})
        assert store.fail_step(step_run.id, {"reason": "operator"}) == failed == stored(store)


class TestExtendClaim:
    def test_extension_starts_a_new_lease_from_now(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

        extended = store.extend_claim(step_run, 120)

        assert extended.lease_ends_at is not None
        assert 110 < extended.lease_ends_at.timestamp() - bench.backend.now() <= 120
        assert (extended.attempt, extended.input) == (1, {"amount": 1})
        assert extended == stored(store)
        assert store.complete_step(extended, {}).status is StepStatus.COMPLETED

    def test_expired_claim_that_was_not_taken_over_is_extended(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=0.01))
        bench.lapse(step_run)

        store.extend_claim(step_run, 60)

        assert store.begin_step("run", "pay", {}).busy

    def test_extending_by_none_removes_the_lease(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))

        assert store.extend_claim(step_run, None).lease_ends_at is None
        assert store.begin_step("run", "pay", {}).retry_in is None

    def test_claim_without_a_lease_can_be_given_one(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        bench.lapse(store.extend_claim(step_run, 0.01))

        assert begun(store.begin_step("run", "pay", {})).attempt == 2

    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_resent_extension_returns_the_same(self, bench: Bench, lost_replies: int) -> None:
        step_run = begun(bench.store().begin_step("run", "pay", {}, lease=60))

        assert bench.store(lost_replies=lost_replies).extend_claim(step_run, 60) == stored(bench.store())

    def test_ended_claim_cannot_be_extended(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        store.complete_step(step_run, {})

        with pytest.raises(StaleStepRunError):
            store.extend_claim(step_run, 60)


class TestReleaseStep:
    def test_released_step_is_pending_with_its_input(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

        released = store.release_step(step_run)

        assert (released.status, released.input) == (StepStatus.PENDING, {"amount": 1})
        assert released == stored(store)
        assert begun(store.begin_step("run", "pay", {"amount": 2})).input == {"amount": 1}

    def test_release_refunds_the_attempt_but_not_its_number(self, store: StepRunStore) -> None:
        store.release_step(begun(store.begin_step("run", "pay", {}, max_attempts=1)))

        second = begun(store.begin_step("run", "pay", {}, max_attempts=1))
        assert second.attempt == 2  # a fencing token is never handed out twice
        store.fail_step(second, {"reason": "declined"})

        assert store.begin_step("run", "pay", {}, max_attempts=1).exhausted
        outcomes = [(attempt.number, attempt.outcome) for attempt in store.attempts("run", "pay")]
        assert outcomes == [(1, Outcome.RELEASED), (2, Outcome.FAILED)]

    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_resent_release_returns_the_same(self, bench: Bench, lost_replies: int) -> None:
        store = bench.store()
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))

        assert bench.store(lost_replies=lost_replies).release_step(step_run) == stored(store)
        assert begun(store.begin_step("run", "pay", {})).attempt == 2

    def test_release_resent_after_the_next_claim_returns_the_same(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {}))
        released = store.release_step(first)
        second = begun(store.begin_step("run", "pay", {}))

        assert store.release_step(first) == released
        assert stored(store) == second

    def test_ended_claim_cannot_be_released(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        store.fail_step(step_run, {"reason": "declined"})

        with pytest.raises(StaleStepRunError):
            store.release_step(step_run)


@pytest.mark.parametrize("operation", ["release_step", "fail_step", "complete_step", "extend_claim"])
def test_operator_ends_the_claim_that_a_read_shows(store: StepRunStore, operation: str) -> None:
    begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))
    shown = stored(store)
    with pytest.raises(StaleStepRunError, match="carries no claim"):
        call_on(store, operation, shown)

    assert call_on(store, operation, shown.with_claim()).input == {"amount": 1}


@pytest.mark.parametrize("operation", ["release_step", "fail_step", "complete_step", "extend_claim"])
def test_operator_cannot_end_a_later_claim(store: StepRunStore, operation: str) -> None:
    begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))
    shown = store.expire_claim(stored(store))
    winner = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

    with pytest.raises(StaleStepRunError, match="attempt 2 holds the claim"):
        call_on(store, operation, shown.with_claim())
    assert stored(store) == winner


def test_step_that_does_not_run_has_no_claim_to_show(store: StepRunStore) -> None:
    store.release_step(begun(store.begin_step("run", "pay", {})))

    assert stored(store).with_claim().token == b""


def call_on(store: StepRunStore, operation: str, step_run: StepRun) -> StepRun:
    arguments: dict[str, tuple[object, ...]] = {"release_step": (), "extend_claim": (60,)}
    return getattr(store, operation)(step_run, *arguments.get(operation, ({},)))
