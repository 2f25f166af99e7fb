"""What `complete_step` and `advance_step` do to each state of a step."""

from __future__ import annotations

from typing import Any

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import (
    InvalidArgumentError,
    StaleStepRunError,
    StepRunNotFoundError,
    StepRunStore,
    StepStatus,
)


class TestCompleteStep:
    def test_held_claim_is_completed(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

        completed = store.complete_step(step_run, {"receipt": 7})

        assert (completed.status, completed.attempt) == (StepStatus.COMPLETED, 1)
        assert (completed.input, completed.output, completed.last_error) == ({"amount": 1}, {"receipt": 7}, None)
        assert completed.lease_ends_at is None
        assert completed.ended_at is not None
        assert completed == stored(store)
        assert store.completed_steps("run") == ["pay"]

    def test_completion_clears_the_last_error(self, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("run", "pay", {})), {"reason": "declined"})

        store.complete_step(begun(store.begin_step("run", "pay", {})), {"receipt": 7})

        assert stored(store).last_error is None

    @pytest.mark.parametrize("lost_replies", [1, 3, 11])
    def test_resent_completion_returns_the_same_and_counts_once(self, bench: Bench, lost_replies: int) -> None:
        store = bench.store()
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))

        completed = bench.store(lost_replies=lost_replies).complete_step(step_run, {"receipt": 7})

        assert completed == stored(store)
        assert store.complete_step(step_run, {"receipt": 7}) == completed
        assert store.completed_steps("run") == ["pay"]
        assert store.completed_outputs("run") == [{"receipt": 7}]

    def test_second_completion_with_another_output_is_stale(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        completed = store.complete_step(step_run, {"receipt": 7})

        with pytest.raises(StaleStepRunError, match="is completed by attempt 1") as caught:
            store.complete_step(step_run, {"receipt": 8})

        assert caught.value.current == completed == stored(store)

    @pytest.mark.parametrize("how", ["complete_step", "complete_steps", "by id", "batch"])
    def test_equal_output_in_another_order_is_a_resend(self, bench: Bench, store: StepRunStore, how: str) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        completed = store.complete_step(claim, {"receipt": 7, "items": [{"a": 1, "b": 2}]})
        before, again = bench.dump(), {"items": [{"b": 2, "a": 1}], "receipt": 7}

        results: dict[str, Any] = {
            "complete_step": lambda: store.complete_step(claim, again),
            "complete_steps": lambda: store.complete_steps([(claim, again)])[0],
            "by id": lambda: store.complete_step(claim.id, again),
            "batch": lambda: store.batch([store.calls.complete_step(claim, again)])[0],
        }

        assert results[how]() == completed
        assert bench.dump() == before

    def test_equal_output_of_another_claim_is_stale(self, bench: Bench, store: StepRunStore) -> None:
        zombie = begun(store.begin_step("run", "pay", {}, lease=0.01))
        bench.lapse(zombie)
        store.complete_step(begun(store.begin_step("run", "pay", {})), {"a": 1, "b": 2})
        with pytest.raises(StaleStepRunError):
            store.complete_step(zombie, {"b": 2, "a": 1})

    def test_expired_claim_that_was_not_taken_over_still_completes(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=0.01))
        bench.lapse(step_run)

        assert store.complete_step(step_run, {"receipt": 7}).status is StepStatus.COMPLETED

    def test_zombie_is_rejected_and_the_winner_is_unchanged(self, bench: Bench, store: StepRunStore) -> None:
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

    def test_missing_record_is_not_found(self, bench: Bench, store: StepRunStore) -> None:
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
        assert bench.dump().keys() <= {bench.keys("run")[2].removesuffix(b"claims") + b"runs"}

    def test_bare_id_completes_the_current_claim(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))

        completed = store.complete_step(step_run.id, {"receipt": 7})

        assert (completed.input, completed.output) == ({"amount": 1}, {"receipt": 7})
        assert completed == stored(store)
        assert store.complete_step(step_run.id, {"receipt": 7}) == completed

    @pytest.mark.parametrize("status", ["pending", "failed", "completed"])
    def test_bare_id_requires_a_running_step(self, bench: Bench, store: StepRunStore, status: str) -> None:
        id = store.schedule_step("run", "pay", {}).step_run.id
        if status != "pending":
            step_run = begun(store.begin_step("run", "pay", {}))
            store.fail_step(step_run, {"no": 1}) if status == "failed" else store.complete_step(step_run, {"no": 1})
        before = bench.dump()

        with pytest.raises(StaleStepRunError, match=f"is {status}, not running"):
            store.complete_step(id, {"receipt": 7})

        assert bench.dump() == before

    def test_completed_steps_are_listed_in_completion_order(self, store: StepRunStore) -> None:
        steps = [f"step-{number}" for number in range(20)]
        store.schedule_steps("run", {step: {} for step in steps})
        claims = {step: begun(store.begin_step("run", step, {})) for step in steps}

        store.batch([store.calls.complete_step(claims[step], {"of": step}) for step in reversed(steps)])

        assert store.completed_steps("run") == steps[::-1]
        assert store.completed_outputs("run") == [{"of": step} for step in reversed(steps)]

    def test_completion_schedules_the_successors_without_a_record(self, store: StepRunStore) -> None:
        store.schedule_step("run", "mail", {"to": "old"})
        step_run = begun(store.begin_step("run", "pay", {}))

        store.complete_step(step_run, {}, schedule={"ship": {"to": "new"}, "mail": {"to": "new"}, "pay": {}})

        assert [(each.step, each.status, each.input) for each in store.get_run("run")] == [
            ("mail", "pending", {"to": "old"}),
            ("pay", "completed", {}),
            ("ship", "pending", {"to": "new"}),
        ]

    def test_rejected_completion_schedules_nothing(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        store.fail_step(step_run.id, {"reason": "operator"})
        before = bench.dump()

        with pytest.raises(StaleStepRunError):
            store.complete_step(step_run, {}, schedule={"ship": {}})

        assert bench.dump() == before


class TestAdvanceStep:
    def test_advance_completes_one_step_and_begins_the_next(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {}, lease=60))
        result = store.advance_step(first, {"receipt": 7}, "ship", {"to": "Bergen"}, lease=60, owner="worker-1")
        step_run, decision = result
        assert (decision, step_run.step, step_run.attempt, step_run.owner) == ("execute", "ship", 1, "worker-1")
        assert step_run == stored(store, step="ship")
        assert stored(store).output == {"receipt": 7}
        store.complete_step(step_run, {})
        assert store.completed_steps("run") == ["pay", "ship"]
        assert store.live_claims() == []

    def test_scheduled_next_step_keeps_its_input(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {}))
        store.schedule_step("run", "ship", {"to": "Oslo"})
        assert begun(store.advance_step(first, {}, "ship", {"to": "Bergen"})).input == {"to": "Oslo"}

    @pytest.mark.parametrize("ended", ["failed", "lapsed", "released"])
    def test_next_step_that_ended_before_begins_its_second_attempt(self, store: StepRunStore, ended: str) -> None:
        first = begun(store.begin_step("run", "pay", {}))
        other = begun(store.begin_step("run", "ship", {}))
        end = {"failed": lambda: store.fail_step(other, {}), "lapsed": lambda: store.expire_claim(other)}
        end["released"] = lambda: store.release_step(other)
        end[ended]()
        step_run = begun(store.advance_step(first, {}, "ship", {}))
        assert (step_run.attempt, stored(store).status) == (2, "completed")

    @pytest.mark.parametrize("reason", ["busy", "completed", "exhausted"])
    def test_first_step_is_completed_even_if_the_next_is_skipped(self, store: StepRunStore, reason: str) -> None:
        first = begun(store.begin_step("run", "pay", {}))
        other = begun(store.begin_step("run", "ship", {}))
        if reason == "completed":
            store.complete_step(other, {"by": "another"})
        elif reason == "exhausted":
            store.fail_step(other, {})
        result = store.advance_step(first, {"receipt": 7}, "ship", {}, max_attempts=1)
        assert (result.decision, result.reason) == ("skip", reason)
        assert stored(store).output == {"receipt": 7}

    @pytest.mark.parametrize("lost_replies", [1, 3])
    def test_resent_advance_returns_the_same_claim_and_counts_once(self, bench: Bench, lost_replies: int) -> None:
        store = bench.store(lost_replies=lost_replies)
        first = begun(store.begin_step("run", "pay", {}))
        step_run = begun(store.advance_step(first, {}, "ship", {}, lease=60))
        assert store.completed_steps("run") == ["pay"]
        assert [attempt.number for attempt in store.attempts("run", "ship")] == [1]
        store.complete_step(step_run, {})

    def test_zombie_is_rejected_and_begins_nothing(self, bench: Bench, store: StepRunStore) -> None:
        zombie = begun(store.begin_step("run", "pay", {}, lease=0.01))
        bench.lapse(zombie)
        begun(store.begin_step("run", "pay", {}, lease=60))
        before = bench.dump()
        with pytest.raises(StaleStepRunError, match="taken over"):
            store.advance_step(zombie, {}, "ship", {})
        assert bench.dump() == before

    def test_next_step_must_be_another_step(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("run", "pay", {}))
        with pytest.raises(InvalidArgumentError, match="^step: must differ from the step"):
            store.advance_step(first, {}, "pay", {})
