"""The contract, row by row, in the order of the README's table: what each call does to each state of a step."""

from __future__ import annotations

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import (
    InvalidArgumentError,
    Outcome,
    StaleStepRunError,
    StepRunNotFoundError,
    StepRunStore,
    StepStatus,
)


class TestScheduleStep:
    def test_without_a_record_it_becomes_pending(self, store: StepRunStore) -> None:
        step_run, decision = store.schedule_step("run", "pay", {"amount": 1})

        assert decision == "schedule"
        assert step_run.status is StepStatus.PENDING
        assert step_run.attempt == 0
        assert step_run.input == {"amount": 1}
        assert (step_run.output, step_run.last_error, step_run.owner) == (None, None, None)
        assert (step_run.started_at, step_run.ended_at, step_run.lease_ends_at) == (None, None, None)
        assert stored(store) == step_run

    @pytest.mark.parametrize("status", ["pending", "running", "completed", "failed"])
    def test_any_record_stays_as_it_is(self, store: StepRunStore, status: str) -> None:
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


class TestBeginStep:
    def test_without_a_record_it_executes(self, store: StepRunStore) -> None:
        result = store.begin_step("run", "pay", {"amount": 1}, owner="worker-1")
        step_run, decision = result

        assert decision == "execute"
        assert (result.reason, result.retry_in) == (None, None)
        assert (result.busy, result.exhausted, result.superseded) == (False, False, False)
        assert (step_run.status, step_run.attempt, step_run.owner) == (StepStatus.RUNNING, 1, "worker-1")
        assert step_run.input == {"amount": 1}
        assert step_run.lease_ends_at is None
        assert stored(store) == step_run

    def test_pending_executes_with_the_scheduled_input(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {"amount": 1})

        step_run = begun(store.begin_step("run", "pay", {"amount": 2}))

        assert (step_run.attempt, step_run.input) == (1, {"amount": 1})
        assert stored(store).input == {"amount": 1}

    def test_failed_executes_again_with_the_callers_input(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {"amount": 1}))
        store.fail_step(first, {"reason": "declined"})

        second = begun(store.begin_step("run", "pay", {"amount": 2}, owner="worker-2"))

        assert (second.attempt, second.input, second.owner) == (2, {"amount": 2}, "worker-2")
        assert (second.output, second.last_error) == (None, None)
        assert stored(store) == second

    def test_a_scheduled_step_that_failed_takes_the_callers_input(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {"amount": 1})
        store.fail_step(begun(store.begin_step("run", "pay", {})), {"reason": "declined"})

        assert begun(store.begin_step("run", "pay", {"amount": 2})).input == {"amount": 2}

    def test_a_lease_that_is_over_is_taken_over(self, bench: Bench, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {"amount": 1}, lease=0.01, owner="worker-1"))
        bench.lapse(first)

        second = begun(store.begin_step("run", "pay", {"amount": 2}, owner="worker-2"))

        assert (second.attempt, second.input, second.owner) == (2, {"amount": 2}, "worker-2")
        abandoned, current = store.attempts("run", "pay")
        assert (abandoned.number, abandoned.owner, abandoned.outcome) == (1, "worker-1", Outcome.LEASE_EXPIRED)
        assert abandoned.ended_at == first.lease_ends_at
        assert (current.number, current.owner, current.outcome) == (2, "worker-2", Outcome.RUNNING)

    def test_a_live_lease_is_busy(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60, owner="worker-1"))

        result = store.begin_step("run", "pay", {"amount": 2}, lease=60)

        assert result.decision == "skip"
        assert (result.busy, result.exhausted, result.superseded) == (True, False, False)
        assert result.retry_in is not None
        assert 50 < result.retry_in <= 60
        assert result.step_run == first == stored(store)

    def test_a_claim_without_lease_is_busy_for_ever(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))

        result = store.begin_step("run", "pay", {}, lease=1)

        assert (result.decision, result.busy, result.retry_in) == ("skip", True, None)

    @pytest.mark.parametrize("losing", [1, 3, 11])
    def test_the_same_call_sent_again_executes_the_same_claim(self, bench: Bench, losing: int) -> None:
        store = bench.store()
        step_run = begun(bench.store(losing=losing).begin_step("run", "pay", {"amount": 1}, lease=60))

        assert step_run.attempt == 1
        assert [attempt.number for attempt in store.attempts("run", "pay")] == [1]
        assert store.complete_step(step_run, {}).status is StepStatus.COMPLETED

    def test_completed_is_skipped_with_the_output(self, store: StepRunStore) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {"amount": 1})), {"receipt": 7})
        before = stored(store)

        result = store.begin_step("run", "pay", {"amount": 2})

        assert (result.decision, result.reason, result.retry_in) == ("skip", "completed", None)
        assert result.step_run.output == {"receipt": 7}
        assert result.step_run == before == stored(store)

    def test_failed_with_no_attempt_left_is_exhausted(self, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("run", "pay", {"amount": 1}, max_attempts=1)), {"reason": "declined"})
        before = stored(store)

        result = store.begin_step("run", "pay", {"amount": 2}, max_attempts=1)

        assert (result.decision, result.exhausted, result.retry_in) == ("skip", True, None)
        assert result.step_run == before == stored(store)
        assert begun(store.begin_step("run", "pay", {}, max_attempts=2)).attempt == 2

    def test_a_lapsed_claim_with_no_attempt_left_becomes_failed(self, bench: Bench, store: StepRunStore) -> None:
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

    def test_a_live_claim_is_busy_and_not_exhausted(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}, lease=60, max_attempts=1))

        assert store.begin_step("run", "pay", {}, max_attempts=1).reason == "busy"


class TestCompleteStep:
    def test_a_held_claim_is_completed(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

        completed = store.complete_step(step_run, {"receipt": 7})

        assert (completed.status, completed.attempt) == (StepStatus.COMPLETED, 1)
        assert (completed.input, completed.output, completed.last_error) == ({"amount": 1}, {"receipt": 7}, None)
        assert completed.lease_ends_at is None
        assert completed.ended_at is not None
        assert completed == stored(store)
        assert store.completed_steps("run") == ["pay"]

    def test_it_clears_the_last_error(self, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("run", "pay", {})), {"reason": "declined"})

        store.complete_step(begun(store.begin_step("run", "pay", {})), {"receipt": 7})

        assert stored(store).last_error is None

    @pytest.mark.parametrize("losing", [1, 3, 11])
    def test_sent_again_it_answers_the_same_and_holds_one_place(self, bench: Bench, losing: int) -> None:
        store = bench.store()
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))

        completed = bench.store(losing=losing).complete_step(step_run, {"receipt": 7})

        assert completed == stored(store)
        assert store.complete_step(step_run, {"receipt": 7}) == completed
        assert store.completed_steps("run") == ["pay"]
        assert store.completed_outputs("run") == [{"receipt": 7}]

    def test_the_same_claim_with_another_output_is_stale(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        completed = store.complete_step(step_run, {"receipt": 7})

        with pytest.raises(StaleStepRunError, match="is completed by attempt 1") as caught:
            store.complete_step(step_run, {"receipt": 8})

        assert caught.value.current == completed == stored(store)

    def test_a_lease_that_ended_still_completes_if_nobody_took_over(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=0.01))
        bench.lapse(step_run)

        assert store.complete_step(step_run, {"receipt": 7}).status is StepStatus.COMPLETED

    def test_a_zombie_is_refused_and_the_winner_untouched(self, bench: Bench, store: StepRunStore) -> None:
        zombie = begun(store.begin_step("run", "pay", {"amount": 1}, lease=0.01))
        bench.lapse(zombie)
        winner = begun(store.begin_step("run", "pay", {"amount": 2}, lease=60))
        before = bench.dump()

        for transition in (
            lambda: store.complete_step(zombie, {"receipt": 1}),
            lambda: store.fail_step(zombie, {"reason": "late"}),
            lambda: store.extend_claim(zombie, 60),
            lambda: store.release_step(zombie),
        ):
            with pytest.raises(StaleStepRunError, match="taken over: attempt 2") as caught:
                transition()
            assert caught.value.current == winner
        assert bench.dump() == before

        assert store.complete_step(winner, {"receipt": 2}).output == {"receipt": 2}
        with pytest.raises(StaleStepRunError):
            store.complete_step(zombie, {"receipt": 1})
        assert store.completed_outputs("run") == [{"receipt": 2}]

    def test_without_a_record_it_is_not_found(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        bench.backend.raw.delete(*bench.keys("run")[:2])

        for transition in (
            lambda: store.complete_step(step_run, {}),
            lambda: store.fail_step(step_run, {"reason": "declined"}),
            lambda: store.extend_claim(step_run, 60),
            lambda: store.release_step(step_run),
        ):
            with pytest.raises(StepRunNotFoundError, match="run 'run', step 'pay'"):
                transition()
        assert bench.dump() == {}

    def test_a_bare_id_stands_for_whoever_holds_the_claim(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

        completed = store.complete_step(step_run.id, {"receipt": 7})

        assert (completed.input, completed.output) == ({"amount": 1}, {"receipt": 7})
        assert completed == stored(store)
        assert store.complete_step(step_run.id, {"receipt": 7}) == completed

    @pytest.mark.parametrize("status", ["pending", "failed", "completed"])
    def test_a_bare_id_is_checked_against_running(self, bench: Bench, store: StepRunStore, status: str) -> None:
        id = store.schedule_step("run", "pay", {}).step_run.id
        if status != "pending":
            step_run = begun(store.begin_step("run", "pay", {}))
            store.fail_step(step_run, {"no": 1}) if status == "failed" else store.complete_step(step_run, {"no": 1})
        before = bench.dump()

        with pytest.raises(StaleStepRunError, match=f"is {status}, not running"):
            store.complete_step(id, {"receipt": 7})

        assert bench.dump() == before

    def test_the_order_is_that_of_completion(self, store: StepRunStore) -> None:
        steps = [f"step-{number}" for number in range(20)]
        store.schedule_steps("run", {step: {} for step in steps})
        claims = {step: begun(store.begin_step("run", step, {})) for step in steps}

        store.batch([store.calls.complete_step(claims[step], {"of": step}) for step in reversed(steps)])

        assert store.completed_steps("run") == steps[::-1]
        assert store.completed_outputs("run") == [{"of": step} for step in reversed(steps)]

    def test_successors_are_scheduled_in_the_same_step(self, store: StepRunStore) -> None:
        store.schedule_step("run", "mail", {"to": "old"})
        step_run = begun(store.begin_step("run", "pay", {}))

        store.complete_step(step_run, {}, schedule={"ship": {"to": "new"}, "mail": {"to": "new"}, "pay": {}})

        assert [(each.step, each.status, each.input) for each in store.get_run("run")] == [
            ("mail", "pending", {"to": "old"}),
            ("pay", "completed", {}),
            ("ship", "pending", {"to": "new"}),
        ]

    def test_a_refused_completion_schedules_nothing(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        store.fail_step(step_run.id, {"reason": "operator"})
        before = bench.dump()

        with pytest.raises(StaleStepRunError):
            store.complete_step(step_run, {}, schedule={"ship": {}})

        assert bench.dump() == before


class TestAdvanceStep:
    def test_it_completes_a_step_and_begins_the_next(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {}, lease=60))
        result = store.advance_step(first, {"receipt": 7}, "ship", {"to": "Bergen"}, lease=60, owner="worker-1")
        step_run, decision = result
        assert (decision, step_run.step, step_run.attempt, step_run.owner) == ("execute", "ship", 1, "worker-1")
        assert step_run == stored(store, step="ship")
        assert stored(store).output == {"receipt": 7}
        store.complete_step(step_run, {})
        assert store.completed_steps("run") == ["pay", "ship"]
        assert store.live_claims() == []

    def test_it_begins_as_begin_step_does(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {}))
        store.schedule_step("run", "ship", {"to": "Oslo"})
        assert begun(store.advance_step(first, {}, "ship", {"to": "Bergen"})).input == {"to": "Oslo"}

    @pytest.mark.parametrize("ended", ["failed", "lapsed", "released"])
    def test_it_begins_a_step_that_was_begun_before(self, store: StepRunStore, ended: str) -> None:
        first = begun(store.begin_step("run", "pay", {}))
        other = begun(store.begin_step("run", "ship", {}))
        end = {"failed": lambda: store.fail_step(other, {}), "lapsed": lambda: store.expire_claim(other)}
        end["released"] = lambda: store.release_step(other)
        end[ended]()
        step_run = begun(store.advance_step(first, {}, "ship", {}))
        assert (step_run.attempt, stored(store).status) == (2, "completed")

    @pytest.mark.parametrize("reason", ["busy", "completed", "exhausted"])
    def test_where_there_is_nothing_to_begin_the_first_is_completed_all_the_same(
        self, store: StepRunStore, reason: str
    ) -> None:
        first = begun(store.begin_step("run", "pay", {}))
        other = begun(store.begin_step("run", "ship", {}))
        if reason == "completed":
            store.complete_step(other, {"by": "another"})
        elif reason == "exhausted":
            store.fail_step(other, {})
        result = store.advance_step(first, {"receipt": 7}, "ship", {}, max_attempts=1)
        assert (result.decision, result.reason) == ("skip", reason)
        assert stored(store).output == {"receipt": 7}

    @pytest.mark.parametrize("losing", [1, 3])
    def test_sent_again_it_answers_the_same_claim_and_holds_one_place(self, bench: Bench, losing: int) -> None:
        store = bench.store(losing=losing)
        first = begun(store.begin_step("run", "pay", {}))
        step_run = begun(store.advance_step(first, {}, "ship", {}, lease=60))
        assert store.completed_steps("run") == ["pay"]
        assert [attempt.number for attempt in store.attempts("run", "ship")] == [1]
        store.complete_step(step_run, {})

    def test_a_zombie_is_refused_and_begins_nothing(self, bench: Bench, store: StepRunStore) -> None:
        zombie = begun(store.begin_step("run", "pay", {}, lease=0.01))
        bench.lapse(zombie)
        begun(store.begin_step("run", "pay", {}, lease=60))
        before = bench.dump()
        with pytest.raises(StaleStepRunError, match="taken over"):
            store.advance_step(zombie, {}, "ship", {})
        assert bench.dump() == before

    def test_the_next_step_is_another(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {}))
        with pytest.raises(InvalidArgumentError, match="^step: must be another step"):
            store.advance_step(first, {}, "pay", {})


class TestFailStep:
    def test_a_held_claim_is_failed(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

        failed = store.fail_step(step_run, {"reason": "declined"})

        assert (failed.status, failed.attempt) == (StepStatus.FAILED, 1)
        assert (failed.input, failed.output, failed.last_error) == ({"amount": 1}, None, {"reason": "declined"})
        assert failed == stored(store)
        assert store.completed_steps("run") == []

    def test_an_exception_becomes_a_map(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        try:
            raise ConnectionResetError("the bank hung up")
        except ConnectionResetError as error:
            failed = store.fail_step(step_run, error)

        assert failed.last_error is not None
        assert failed.last_error["type"] == "ConnectionResetError"
        assert failed.last_error["message"] == "the bank hung up"
        assert "test_an_exception_becomes_a_map" in failed.last_error["traceback"]

    @pytest.mark.parametrize("losing", [1, 3, 11])
    def test_sent_again_it_answers_the_same(self, bench: Bench, losing: int) -> None:
        store = bench.store()
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))

        failed = bench.store(losing=losing).fail_step(step_run, {"reason": "declined"})

        assert failed == stored(store)
        assert [attempt.outcome for attempt in store.attempts("run", "pay")] == [Outcome.FAILED]

    def test_sent_again_after_the_next_attempt_began_it_answers_the_same(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {}, lease=60))
        failed = store.fail_step(first, {"reason": "declined"})
        second = begun(store.begin_step("run", "pay", {}, lease=60))

        assert store.fail_step(first, {"reason": "declined"}) == failed
        assert stored(store) == second
        with pytest.raises(StaleStepRunError):
            store.fail_step(first, {"reason": "another"})

    def test_the_same_claim_with_another_error_is_stale(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        failed = store.fail_step(step_run, {"reason": "declined"})

        with pytest.raises(StaleStepRunError):
            store.fail_step(step_run, {"reason": "another"})
        with pytest.raises(StaleStepRunError):
            store.complete_step(step_run, {})
        assert stored(store) == failed

    def test_a_bare_id_stands_for_whoever_holds_the_claim(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}))

        failed = store.fail_step(step_run.id, {"reason": "operator"})

        assert (failed.input, failed.last_error) == ({"amount": 1}, {"reason": "operator"})
        assert store.fail_step(step_run.id, {"reason": "operator"}) == failed == stored(store)


class TestExtendClaim:
    def test_the_lease_runs_from_now(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

        extended = store.extend_claim(step_run, 120)

        assert extended.lease_ends_at is not None
        assert 110 < extended.lease_ends_at.timestamp() - bench.backend.now() <= 120
        assert (extended.attempt, extended.input) == (1, {"amount": 1})
        assert extended == stored(store)
        assert store.complete_step(extended, {}).status is StepStatus.COMPLETED

    def test_a_lapsed_lease_that_nobody_took_over_is_revived(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=0.01))
        bench.lapse(step_run)

        store.extend_claim(step_run, 60)

        assert store.begin_step("run", "pay", {}).busy

    def test_none_never_ends(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))

        assert store.extend_claim(step_run, None).lease_ends_at is None
        assert store.begin_step("run", "pay", {}).retry_in is None

    def test_a_claim_without_lease_can_be_given_one(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        bench.lapse(store.extend_claim(step_run, 0.01))

        assert begun(store.begin_step("run", "pay", {})).attempt == 2

    @pytest.mark.parametrize("losing", [1, 11])
    def test_sent_again_it_answers_the_same(self, bench: Bench, losing: int) -> None:
        step_run = begun(bench.store().begin_step("run", "pay", {}, lease=60))

        assert bench.store(losing=losing).extend_claim(step_run, 60) == stored(bench.store())

    def test_an_ended_claim_is_stale(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        store.complete_step(step_run, {})

        with pytest.raises(StaleStepRunError):
            store.extend_claim(step_run, 60)


class TestReleaseStep:
    def test_it_is_pending_again_with_its_input(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

        released = store.release_step(step_run)

        assert (released.status, released.input) == (StepStatus.PENDING, {"amount": 1})
        assert released == stored(store)
        assert begun(store.begin_step("run", "pay", {"amount": 2})).input == {"amount": 1}

    def test_the_attempt_does_not_count_but_its_number_is_spent(self, store: StepRunStore) -> None:
        store.release_step(begun(store.begin_step("run", "pay", {}, max_attempts=1)))

        second = begun(store.begin_step("run", "pay", {}, max_attempts=1))
        assert second.attempt == 2  # a fencing token is never handed out twice
        store.fail_step(second, {"reason": "declined"})

        assert store.begin_step("run", "pay", {}, max_attempts=1).exhausted
        outcomes = [(attempt.number, attempt.outcome) for attempt in store.attempts("run", "pay")]
        assert outcomes == [(1, Outcome.RELEASED), (2, Outcome.FAILED)]

    @pytest.mark.parametrize("losing", [1, 11])
    def test_sent_again_it_answers_the_same(self, bench: Bench, losing: int) -> None:
        store = bench.store()
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))

        assert bench.store(losing=losing).release_step(step_run) == stored(store)
        assert begun(store.begin_step("run", "pay", {})).attempt == 2

    def test_sent_again_after_the_next_claim_it_answers_the_same(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {}))
        released = store.release_step(first)
        second = begun(store.begin_step("run", "pay", {}))

        assert store.release_step(first) == released
        assert stored(store) == second

    def test_an_ended_claim_is_stale(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        store.fail_step(step_run, {"reason": "declined"})

        with pytest.raises(StaleStepRunError):
            store.release_step(step_run)


class TestClaimsAreCarriedByBeginAlone:
    def test_what_was_read_or_skipped_carries_none(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))
        before = bench.dump()

        for step_run in (stored(store), store.begin_step("run", "pay", {}).step_run, store.get_run("run")[0]):
            with pytest.raises(StaleStepRunError, match="carries no claim"):
                store.complete_step(step_run, {})

        assert bench.dump() == before
