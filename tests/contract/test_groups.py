"""What begin_steps and complete_steps do to each state of a step."""

from __future__ import annotations

from typing import Any, cast

import pytest
from support.backends import Bench
from support.records import begun

from squidstep_redis import (
    CorruptRunError,
    InvalidArgumentError,
    RunDeletedError,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
)
from squidstep_redis.model import step_run_id
from squidstep_redis.operations.groups import MAX_STEPS


class TestBeginSteps:
    def test_each_step_has_the_result_of_begin_step(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "pending", {"old": 1})
        store.complete_step(begun(store.begin_step("run", "completed", {})), {"done": 1})
        begun(store.begin_step("run", "busy", {}))
        store.fail_step(begun(store.begin_step("run", "failed", {})), {})
        bench.lapse(begun(store.begin_step("run", "lapsed", {}, lease=0.001)))
        names = ["new", "completed", "pending", "busy", "newer", "failed", "lapsed"]

        results = store.begin_steps("run", {name: {"new": 1} for name in names}, lease=60, owner="worker-1")

        assert list(results) == names
        assert {name: result.reason for name, result in results.items() if result.decision == "skip"} == {
            "completed": "completed",
            "busy": "busy",
        }
        claims = [result.step_run for result in results.values() if result.decision == "execute"]
        assert [(claim.step, claim.attempt, claim.input) for claim in claims] == [
            ("new", 1, {"new": 1}),
            ("pending", 1, {"old": 1}),
            ("newer", 1, {"new": 1}),
            ("failed", 2, {"new": 1}),
            ("lapsed", 2, {"new": 1}),
        ]
        assert [name for name, result in results.items() if result.takeover] == ["lapsed"]
        assert len({claim.token for claim in claims}) == 5
        assert all(claim.owner == "worker-1" and claim.lease_ends_at for claim in claims)
        assert [store.complete_step(claim, {}).status for claim in claims] == ["completed"] * 5

    def test_one_step_is_enough(self, store: StepRunStore) -> None:
        assert begun(store.begin_steps("run", {"pay": {}})["pay"]).attempt == 1

    def test_used_up_attempts_are_exhausted(self, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("run", "failed", {})), {})

        results = store.begin_steps("run", {"failed": {}, "new": {}}, max_attempts=1)

        assert [result.reason for result in results.values()] == ["exhausted", None]

    def test_the_same_call_has_the_same_claims(self, store: StepRunStore) -> None:
        call = store.calls.begin_steps("run", {"a": {}, "b": {}}, lease=60)

        first, second = store.send(call), store.send(call)

        assert [begun(result).token for result in first.values()] == [begun(result).token for result in second.values()]
        assert [len(store.attempts("run", step)) for step in first] == [1, 1]

    def test_a_refusal_affects_all_steps(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "spoiled", {})
        bench.backend.raw.hset(bench.keys("run")[0], "sspoiled", "1z spoiled")
        before = bench.dump()

        with pytest.raises(CorruptRunError, match="'sspoiled'"):
            store.begin_steps("run", {"a": {}, "spoiled": {}})

        assert bench.dump() == before

    def test_a_corrupt_index_affects_all_steps(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "pending", {})
        bench.backend.raw.set(bench.keys("run")[3], "other")
        before = bench.dump()

        with pytest.raises(CorruptRunError, match="failed"):
            store.begin_steps("run", {"a": {}, "pending": {}}, lease=60)

        assert bench.dump() == before

    def test_a_deleted_run_raises(self, store: StepRunStore) -> None:
        store.schedule_step("run", "a", {})
        store.delete_run("run")

        with pytest.raises(RunDeletedError):
            store.begin_steps("run", {"a": {}, "b": {}})

    def test_a_thousand_steps_are_accepted(self, store: StepRunStore) -> None:
        steps = {f"step-{number}": {"n": number} for number in range(MAX_STEPS)}

        results = store.begin_steps("run", steps, lease=60)

        assert {step: begun(result).input for step, result in results.items()} == steps
        with pytest.raises(InvalidArgumentError, match="steps: must be 1 to 1,000 steps, not 1,001"):
            store.begin_steps("run", {**steps, "more": {}})

    def test_no_steps_are_rejected(self, store: StepRunStore) -> None:
        with pytest.raises(InvalidArgumentError, match="steps: must be 1 to 1,000 steps, not 0"):
            store.begin_steps("run", {})


class TestCompleteSteps:
    def test_claims_end_in_the_given_order(self, store: StepRunStore) -> None:
        claims = [begun(store.begin_step(run, step, {})) for step in "ab" for run in ("run", "other")]

        results = store.complete_steps([(claim, {"of": claim.step}) for claim in reversed(claims)])

        assert [(each.run_id, each.step, each.output) for each in cast("list[StepRun]", results)] == [
            ("other", "b", {"of": "b"}),
            ("run", "b", {"of": "b"}),
            ("other", "a", {"of": "a"}),
            ("run", "a", {"of": "a"}),
        ]
        assert store.completed_steps("run") == store.completed_steps("other") == ["b", "a"]

    def test_an_error_takes_the_place_of_its_result(self, store: StepRunStore) -> None:
        lost = begun(store.begin_step("run", "lost", {}))
        store.release_step(lost)
        running = begun(store.begin_step("run", "running", {}))
        unknown = step_run_id(store.calls.prefix, "run", "unknown")

        results = store.complete_steps([(lost, {}), (unknown, {}), (running.id, {"by": "id"})])

        assert [type(result) for result in results] == [StaleStepRunError, StepRunNotFoundError, StepRun]
        assert store.completed_outputs("run") == [{"by": "id"}]

    def test_repeating_it_returns_the_same(self, store: StepRunStore) -> None:
        claims = [result.step_run for result in store.begin_steps("run", {"a": {}, "b": {}}).values()]
        pairs = [(claim, {"n": 1}) for claim in claims]

        assert store.complete_steps(pairs) == store.complete_steps(pairs)
        assert store.completed_steps("run") == ["a", "b"]

    def test_no_pairs_send_nothing(self, store: StepRunStore) -> None:
        assert store.complete_steps([]) == []

    @pytest.mark.parametrize("pair", [None, "ab", (1, 2, 3), {"a": 1}])
    def test_value_that_is_not_a_pair_is_rejected(self, store: StepRunStore, pair: Any) -> None:
        claim = begun(store.begin_step("run", "a", {}))

        with pytest.raises(InvalidArgumentError, match=r"completions\[1\]: must be a pair"):
            store.complete_steps([(claim, {}), pair])

        assert store.completed_steps("run") == []

    def test_an_error_of_an_output_names_its_pair(self, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "a", {}))

        with pytest.raises(InvalidArgumentError, match=r"output of completions\[0\]\['n'\]: complex"):
            store.complete_steps([(claim, {"n": 1j})])
