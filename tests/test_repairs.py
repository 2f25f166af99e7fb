"""`retry_step` and `retry_run`: failed steps can be claimed again, and their attempt counter is reset."""

from __future__ import annotations

from typing import Any

import pytest
from support.backends import Bench
from support.records import begun, in_batch

from squidstep_redis import (
    CorruptRunError,
    InvalidArgumentError,
    Outcome,
    RunDeletedError,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
    StepStatus,
)

# A run is in one slot, so a cluster adds nothing here.
pytestmark = pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")


def fail_step(store: StepRunStore, times: int = 1, step: str = "pay", lease: float | None = None) -> StepRun:
    """Begins and fails a step `times` times; returns the last claim."""
    claim = None
    for number in range(times):
        claim = begun(store.begin_step("run", step, {"given": number}, lease=lease, owner=f"w{number}"))
        store.fail_step(claim, {"of": number})
    assert claim is not None
    return claim


def outcomes(store: StepRunStore) -> list[tuple[int, str | None, Outcome, Any]]:
    """Returns number, owner, outcome and error of each attempt."""
    return [attempt[:4] for attempt in store.attempts("run", "pay")]


class TestRetryStep:
    def test_retried_step_is_pending_with_its_last_input(self, store: StepRunStore) -> None:
        fail_step(store, 2)

        retried = store.retry_step("run", "pay", owner="me")

        assert (retried.status, retried.attempt, retried.owner) == (StepStatus.PENDING, 3, "me")
        assert (retried.input, retried.last_error, retried.token) == ({"given": 1}, None, b"")
        assert store.get_step_run("run", "pay") == retried
        assert store.failed_steps() == []
        result = store.begin_step("run", "pay", {"given": "again"})
        assert (result.decision, result.step_run.attempt, result.step_run.input) == ("execute", 4, {"given": 1})
        assert outcomes(store) == [
            (1, "w0", Outcome.FAILED, {"of": 0}),
            (2, "w1", Outcome.FAILED, {"of": 1}),
            (3, "me", Outcome.RELEASED, None),
            (4, None, Outcome.RUNNING, None),
        ]

    @pytest.mark.parametrize("limit", [1, 2, 3])
    def test_attempt_counter_is_reset(self, store: StepRunStore, limit: int) -> None:
        fail_step(store, 3)
        assert store.begin_step("run", "pay", {}, max_attempts=limit).exhausted

        store.retry_step("run", "pay")

        for _ in range(limit):
            store.fail_step(begun(store.begin_step("run", "pay", {}, max_attempts=limit)), {})
        assert store.begin_step("run", "pay", {}, max_attempts=limit).exhausted

    def test_exhausted_step_can_be_begun_again(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.001, owner="w")))
        assert store.begin_step("run", "pay", {}, max_attempts=1).exhausted

        store.retry_step("run", "pay")

        assert [each[:3] for each in outcomes(store)] == [(1, "w", Outcome.LEASE_EXPIRED), (2, None, Outcome.RELEASED)]
        assert store.attempts("run", "pay")[0].error is not None
        assert begun(store.begin_step("run", "pay", {}, max_attempts=1)).attempt == 3

    def test_step_with_an_expired_claim_can_be_retried(self, bench: Bench, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=0.001, owner="w"))
        bench.lapse(claim)

        store.retry_step("run", "pay")

        assert store.lapsed_claims() == []
        assert bench.backend.raw.zcard(bench.keys("run")[2]) == 0
        assert [each[:3] for each in outcomes(store)] == [(1, "w", Outcome.LEASE_EXPIRED), (2, None, Outcome.RELEASED)]
        with pytest.raises(StaleStepRunError):
            store.complete_step(claim, {})

    def test_claims_before_the_retry_stay_stale(self, bench: Bench, store: StepRunStore) -> None:
        claim = fail_step(store)
        store.retry_step("run", "pay")
        before = bench.dump()

        calls = store.calls
        for call in (
            calls.complete_step(claim, {}),
            calls.extend_claim(claim, 60),
            calls.release_step(claim),
            calls.fail_step(claim, {"of": "another"}),
        ):
            with pytest.raises(StaleStepRunError):
                store.send(call)
        assert bench.dump() == before
        assert store.fail_step(claim, {"of": 0}).status is StepStatus.FAILED  # the same call, re-sent
        assert bench.dump() == before

    def test_resent_begin_acquires_no_claim(self, store: StepRunStore) -> None:
        begin = store.calls.begin_step("run", "pay", {})
        store.fail_step(begun(store.send(begin)), {})
        store.retry_step("run", "pay")

        assert store.send(begin).superseded
        assert store.step_statuses("run") == {"pay": StepStatus.PENDING}

    @pytest.mark.parametrize("state", ["live", "unleased", "completed"])
    def test_running_or_completed_step_is_rejected(self, bench: Bench, store: StepRunStore, state: str) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60 if state == "live" else None))
        if state == "completed":
            store.complete_step(claim, {})
        before = bench.dump()

        with pytest.raises(StaleStepRunError, match="is completed" if state == "completed" else "is running") as caught:
            store.retry_step("run", "pay")

        assert caught.value.current == store.get_step_run("run", "pay")
        assert bench.dump() == before

    @pytest.mark.parametrize("how", ["scheduled", "released", "retried"])
    def test_pending_step_is_not_changed(self, bench: Bench, store: StepRunStore, how: str) -> None:
        if how == "scheduled":
            store.schedule_step("run", "pay", {"given": 1})
        elif how == "released":
            store.release_step(begun(store.begin_step("run", "pay", {"given": 1})))
        else:
            fail_step(store)
            store.retry_step("run", "pay")
        before = bench.dump()

        assert store.retry_step("run", "pay") == store.get_step_run("run", "pay")

        assert bench.dump() == before

    def test_missing_step_or_run_is_rejected(self, bench: Bench, store: StepRunStore) -> None:
        for run in ("none", "run"):
            with pytest.raises(StepRunNotFoundError):
                store.retry_step(run, "pay")
            store.schedule_step("run", "other", {})
        store.delete_run("run")
        with pytest.raises(RunDeletedError):
            store.retry_step("run", "pay")
        with pytest.raises(InvalidArgumentError, match="owner"):
            store.retry_step("run", "pay", owner="a\nb")

    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_resent_retry_takes_effect_once(self, bench: Bench, lost_replies: int) -> None:
        fail_step(bench.store())

        retried = bench.store(lost_replies=lost_replies).retry_step("run", "pay")

        assert retried == bench.store().get_step_run("run", "pay")
        assert retried.attempt == 2

    def test_late_resend_does_not_change_a_later_attempt(self, bench: Bench, store: StepRunStore) -> None:
        fail_step(store)
        retry = store.calls.retry_step("run", "pay")
        first = store.send(retry)
        store.fail_step(begun(store.begin_step("run", "pay", {})), {})
        before = bench.dump()

        again = store.send(retry)

        assert (again.status, again.attempt) == (first.status, first.attempt)
        assert bench.dump() == before

    def test_history_stays_bounded(self, bench: Bench, store: StepRunStore) -> None:
        fail_step(store, 9)

        for _ in range(3):
            store.retry_step("run", "pay")
            store.fail_step(begun(store.begin_step("run", "pay", {})), {})

        assert [each[0] for each in outcomes(store)] == list(range(7, 16))
        fields = bench.backend.raw.hkeys(bench.keys("run")[0])
        assert len([field for field in fields if field[:1] == b"a"]) == 8

    def test_retry_renews_the_expiry(self, bench: Bench) -> None:
        store = bench.store(run_ttl=100)
        fail_step(store)
        for key in bench.keys("run")[:2]:
            bench.backend.raw.expire(key, 10)

        store.retry_step("run", "pay")

        assert 90 < bench.backend.raw.ttl(bench.keys("run")[0]) <= 100

    @pytest.mark.parametrize("key", [0, 1, 2, 3])
    def test_key_of_another_type_is_rejected(self, bench: Bench, store: StepRunStore, key: int) -> None:
        store.complete_step(begun(store.begin_step("run", "done", {})), {})
        fail_step(store)
        bench.backend.raw.delete(bench.keys("run")[key])
        bench.backend.raw.set(bench.keys("run")[key], "x")
        before = bench.dump()

        with pytest.raises(CorruptRunError) as caught:
            store.retry_step("run", "pay")

        assert caught.value.key == bench.keys("run")[key].decode()
        assert bench.dump() == before


class TestRetryRun:
    def test_exactly_the_failed_steps_are_retried(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "pending", {})
        store.complete_step(begun(store.begin_step("run", "completed", {})), {})
        fail_step(store, step="one")
        begun(store.begin_step("run", "running", {}))
        bench.lapse(begun(store.begin_step("run", "exhausted", {}, lease=0.001)))
        assert store.begin_step("run", "exhausted", {}, max_attempts=1).exhausted
        before = store.step_statuses("run")

        retried = store.retry_run("run", owner="me")

        assert [(each.step, each.status, each.owner) for each in retried] == [
            ("one", StepStatus.PENDING, "me"),
            ("exhausted", StepStatus.PENDING, "me"),
        ]
        assert store.step_statuses("run") == {
            **before,
            "one": StepStatus.PENDING,
            "exhausted": StepStatus.PENDING,
        }
        assert store.retry_run("run") == []

    @pytest.mark.servers("valkey", "redis-7", "redis-6")  # on fakeredis it takes ten seconds
    def test_run_of_1100_failed_steps_is_retried_completely(self, store: StepRunStore) -> None:
        steps = [f"step-{number}" for number in range(1_100)]
        claims = in_batch(store, [store.calls.begin_step("run", step, {}) for step in steps])
        store.batch([store.calls.fail_step(claim.step_run, {}) for claim in claims])

        assert [each.step for each in store.retry_run("run")] == steps

    def test_missing_or_corrupt_run_is_rejected(self, bench: Bench, store: StepRunStore) -> None:
        with pytest.raises(StepRunNotFoundError):
            store.retry_run("run")
        store.complete_step(begun(store.begin_step("run", "done", {})), {})
        bench.backend.raw.delete(bench.keys("run")[1])
        with pytest.raises(CorruptRunError):
            store.retry_run("run")
