"""Failures that are final, and failures that delay the next attempt."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun, stored
from support.servers import wait_until

from squidstep_redis import InvalidArgumentError, Outcome, StaleStepRunError, StepRun, StepRunStore, StepStatus

ERROR = {"reason": "declined"}


def failed_step(store: StepRunStore, step: str = "pay", **options: Any) -> StepRun:
    return store.fail_step(begun(store.begin_step("run", step, {"amount": 1}, lease=60)), ERROR, **options)


class TestFinal:
    def test_no_delivery_can_claim_the_step(self, bench: Bench, store: StepRunStore) -> None:
        failed = failed_step(store, final=True)
        assert (failed.status, failed.final, failed.retry_at) == (StepStatus.FAILED, True, None)
        before = bench.dump()

        result = store.begin_step("run", "pay", {"amount": 2}, lease=60, max_attempts=9)

        assert (result.decision, result.reason, result.retry_in) == ("skip", "failed", None)
        assert (result.failed, result.delayed, result.busy, result.exhausted) == (True, False, False, False)
        assert result.step_run == failed == stored(store)
        assert (failed.input, failed.last_error) == ({"amount": 1}, ERROR)
        assert bench.dump() == before

    def test_a_retry_lets_it_be_claimed(self, store: StepRunStore) -> None:
        failed_step(store, final=True)

        assert store.retry_step("run", "pay").status is StepStatus.PENDING
        again = begun(store.begin_step("run", "pay", {"amount": 2}, max_attempts=1))

        assert (again.attempt, again.input, again.final, again.attempts_used) == (3, {"amount": 1}, False, 1)
        outcomes = [attempt.outcome for attempt in store.attempts("run", "pay")]
        assert outcomes == [Outcome.FAILED, Outcome.RELEASED, Outcome.RUNNING]

    def test_retry_run_includes_it(self, store: StepRunStore) -> None:
        failed_step(store, "pay", final=True)
        failed_step(store, "ship", retry_after=60)
        assert [step_run.step for step_run in store.retry_run("run")] == ["pay", "ship"]

    def test_it_is_found_among_the_failed_steps(self, store: StepRunStore) -> None:
        failed = [failed_step(store, "pay", final=True), failed_step(store, "ship", retry_after=60)]
        assert sorted(store.failed_steps(), key=lambda step_run: step_run.step) == failed
        assert store.step_statuses("run") == {"pay": StepStatus.FAILED, "ship": StepStatus.FAILED}

    @pytest.mark.parametrize("lost_replies", [1, 11])
    @pytest.mark.parametrize("options", [{"final": True}, {"retry_after": 60}], ids=["final", "delayed"])
    def test_resent_failure_returns_the_same(self, bench: Bench, options: Any, lost_replies: int) -> None:
        store = bench.store()
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        failed = bench.store(lost_replies=lost_replies).fail_step(claim, ERROR, **options)
        assert failed == stored(store) == store.fail_step(claim, ERROR, **options)

    def test_failure_resent_after_the_next_attempt_returns_the_same(self, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        failed = store.fail_step(claim, ERROR, final=True)
        store.retry_step("run", "pay")
        second = begun(store.begin_step("run", "pay", {}, lease=60))

        assert store.fail_step(claim, ERROR, final=True) == failed
        with pytest.raises(StaleStepRunError):
            store.fail_step(claim, ERROR)
        assert stored(store) == second

    @pytest.mark.parametrize("final", [True, False])
    def test_a_failure_does_not_become_the_other_kind(self, store: StepRunStore, final: bool) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        failed = store.fail_step(claim, ERROR, final=final)
        with pytest.raises(StaleStepRunError):
            store.fail_step(claim, ERROR, final=not final)
        assert stored(store) == failed

    def test_no_other_transition_changes_it(self, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        failed = store.fail_step(claim, ERROR, final=True)
        for transition in (
            lambda: store.complete_step(claim, {}),
            lambda: store.extend_claim(claim, 60),
            lambda: store.release_step(claim),
            lambda: store.complete_step(claim.id, {}),
        ):
            with pytest.raises(StaleStepRunError):
                transition()
        assert stored(store) == failed


class TestDelay:
    def test_no_delivery_can_claim_the_step_before_it_ends(self, bench: Bench, store: StepRunStore) -> None:
        failed = failed_step(store, retry_after=60)
        assert (failed.status, failed.final, failed.lease_ends_at) == (StepStatus.FAILED, False, None)
        assert failed.retry_at is not None
        assert failed.ended_at is not None
        assert failed.retry_at - failed.ended_at == timedelta(seconds=60)
        before = bench.dump()

        result = store.begin_step("run", "pay", {"amount": 2}, lease=60)

        assert (result.decision, result.reason, result.delayed) == ("skip", "delayed", True)
        assert result.retry_in is not None
        assert 0 < result.retry_in <= 60
        assert result.step_run == failed == stored(store)
        assert bench.dump() == before

    def test_it_ends_by_the_servers_clock(self, store: StepRunStore) -> None:
        failed_step(store, retry_after=timedelta(seconds=0.05))
        wait_until(lambda: not store.begin_step("run", "pay", {}, lease=60).delayed)

        again = stored(store)

        assert (again.status, again.attempt, again.retry_at) == (StepStatus.RUNNING, 2, None)
        first, _ = store.attempts("run", "pay")
        assert (first.outcome, first.error) == (Outcome.FAILED, ERROR)
        assert again.started_at is not None
        assert first.ended_at is not None
        assert again.started_at - first.ended_at >= timedelta(seconds=0.05)

    def test_a_retry_ends_it(self, store: StepRunStore) -> None:
        failed_step(store, retry_after=3_600)
        assert store.retry_step("run", "pay").retry_at is None
        assert begun(store.begin_step("run", "pay", {})).attempt == 3

    def test_an_exhausted_step_is_not_only_delayed(self, store: StepRunStore) -> None:
        failed_step(store, retry_after=3_600)
        assert store.begin_step("run", "pay", {}, max_attempts=1).reason == "exhausted"
        assert store.begin_step("run", "pay", {}, max_attempts=2).reason == "delayed"

    def test_the_run_does_not_expire_before(self, bench: Bench) -> None:
        """A run is kept for its ttl after the failure, or after the delay."""
        store = bench.store(run_ttl=10)
        claims = [begun(store.begin_step(run, "pay", {}, lease=60)) for run in ("run", "delayed")]
        store.fail_step(claims[0], ERROR)
        store.fail_step(claims[1], ERROR, retry_after=100)
        store.import_run({**store.export_run("delayed"), "run_id": "imported"})
        at_once, *delayed = (bench.backend.raw.pttl(bench.keys(run)[0]) for run in ("run", "delayed", "imported"))
        assert at_once > 0
        assert all(95_000 < each - at_once < 105_000 for each in delayed)


class TestOperationsOnSeveralSteps:
    def test_each_step_is_skipped_for_its_own_reason(self, store: StepRunStore) -> None:
        failed_step(store, "pay", final=True)
        failed_step(store, "ship", retry_after=60)
        failed_step(store, "mail")

        results = store.begin_steps("run", {step: {} for step in ("pay", "ship", "mail", "new")}, lease=60)

        assert [result.reason for result in results.values()] == ["failed", "delayed", None, None]
        assert 0 < (results["ship"].retry_in or math.inf) <= 60

    def test_advance_step_completes_the_first_one(self, store: StepRunStore) -> None:
        failed_step(store, "ship", final=True)
        failed_step(store, "mail", retry_after=60)
        for number, (step, reason) in enumerate({"ship": "failed", "mail": "delayed"}.items(), 1):
            claim = begun(store.begin_step("run", f"first-{number}", {}, lease=60))
            assert store.advance_step(claim, {}, step, {}, lease=60).reason == reason
            assert len(store.completed_steps("run")) == number

    def test_a_bare_id_fails_the_current_claim(self, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "pay", {"amount": 1}))
        failed = store.fail_step(claim.id, ERROR, final=True)
        assert (failed.final, failed.input) == (True, {"amount": 1})
        assert store.fail_step(claim.id, ERROR, final=True) == failed

    def test_an_export_keeps_both(self, store: StepRunStore) -> None:
        failed = [failed_step(store, "pay", final=True), failed_step(store, "ship", retry_after=60)]
        failed_step(store, "mail", final=True)
        store.retry_step("run", "mail")
        document = store.export_run("run")
        store.delete_run("run")

        store.import_run({**document, "run_id": "copy"})

        copies = [step_run for step in ("pay", "ship") if (step_run := store.get_step_run("copy", step))]
        assert [(each.final, each.retry_at) for each in copies] == [(each.final, each.retry_at) for each in failed]
        assert store.begin_step("copy", "pay", {}).failed
        assert store.begin_step("copy", "ship", {}).delayed
        assert [each.outcome for each in store.attempts("copy", "mail")] == [Outcome.FAILED, Outcome.RELEASED]
        assert {**store.export_run("copy"), "run_id": "run"} == document


@pytest.mark.parametrize(
    "options",
    [
        *({"retry_after": value} for value in (0, -1, 0.0001, math.nan, math.inf, True, "60", timedelta(days=367))),
        {"retry_after": 60, "final": True},
    ],
    ids=str,
)
def test_invalid_arguments_are_rejected_before_anything_is_sent(
    bench: Bench, store: StepRunStore, options: Any
) -> None:
    claim = begun(store.begin_step("run", "pay", {}, lease=60))
    before = bench.dump()
    with pytest.raises(InvalidArgumentError, match="^retry_after: "):
        store.fail_step(claim, ERROR, **options)
    assert bench.dump() == before
