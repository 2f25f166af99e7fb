"""`retry_step` and `retry_run`: what failed can be claimed again, with attempts that count anew."""

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

# Not on a cluster: one run is one slot: a cluster adds nothing here.
pytestmark = pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")


def failed(store: StepRunStore, times: int = 1, step: str = "pay", lease: float | None = None) -> StepRun:
    """A step that failed so often; the last claim on it."""
    claim = None
    for number in range(times):
        claim = begun(store.begin_step("run", step, {"given": number}, lease=lease, owner=f"w{number}"))
        store.fail_step(claim, {"of": number})
    assert claim is not None
    return claim


def outcomes(store: StepRunStore) -> list[tuple[int, str | None, Outcome, Any]]:
    return [attempt[:4] for attempt in store.attempts("run", "pay")]


class TestRetryStep:
    def test_the_step_is_pending_with_the_input_it_had(self, store: StepRunStore) -> None:
        failed(store, 2)

        retried = store.retry_step("run", "pay", owner="me")

        assert (retried.status, retried.attempt, retried.owner) == (StepStatus.PENDING, 3, "me")
        assert (retried.input, retried.last_error, retried.token) == ({"given": 1}, None, b"")
        assert store.get_step_run("run", "pay") == retried
        assert store.failed_steps() == []
        result = store.begin_step("run", "pay", {"given": "anew"})
        assert (result.decision, result.step_run.attempt, result.step_run.input) == ("execute", 4, {"given": 1})
        assert outcomes(store) == [
            (1, "w0", Outcome.FAILED, {"of": 0}),
            (2, "w1", Outcome.FAILED, {"of": 1}),
            (3, "me", Outcome.RELEASED, None),
            (4, None, Outcome.RUNNING, None),
        ]

    @pytest.mark.parametrize("most", [1, 2, 3])
    def test_max_attempts_count_anew(self, store: StepRunStore, most: int) -> None:
        failed(store, 3)
        assert store.begin_step("run", "pay", {}, max_attempts=most).exhausted

        store.retry_step("run", "pay")

        for _ in range(most):
            store.fail_step(begun(store.begin_step("run", "pay", {}, max_attempts=most)), {})
        assert store.begin_step("run", "pay", {}, max_attempts=most).exhausted

    def test_an_exhausted_claim_that_lapsed(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.001, owner="w")))
        assert store.begin_step("run", "pay", {}, max_attempts=1).exhausted

        store.retry_step("run", "pay")

        assert [each[:3] for each in outcomes(store)] == [(1, "w", Outcome.LEASE_EXPIRED), (2, None, Outcome.RELEASED)]
        assert store.attempts("run", "pay")[0].error is not None
        assert begun(store.begin_step("run", "pay", {}, max_attempts=1)).attempt == 3

    def test_a_claim_that_lapsed_counts_as_failed(self, bench: Bench, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=0.001, owner="w"))
        bench.lapse(claim)

        store.retry_step("run", "pay")

        assert store.lapsed_claims() == []
        assert bench.backend.raw.zcard(bench.keys("run")[2]) == 0
        assert [each[:3] for each in outcomes(store)] == [(1, "w", Outcome.LEASE_EXPIRED), (2, None, Outcome.RELEASED)]
        with pytest.raises(StaleStepRunError):
            store.complete_step(claim, {})

    def test_old_tokens_stay_refused(self, bench: Bench, store: StepRunStore) -> None:
        claim = failed(store)
        store.retry_step("run", "pay")
        before = bench.dump()

        calls = store.calls
        for refused in (
            calls.complete_step(claim, {}),
            calls.extend_claim(claim, 60),
            calls.release_step(claim),
            calls.fail_step(claim, {"of": "another"}),
        ):
            with pytest.raises(StaleStepRunError):
                store.send(refused)
        assert bench.dump() == before
        assert store.fail_step(claim, {"of": 0}).status is StepStatus.FAILED  # the same call, sent again
        assert bench.dump() == before

    def test_a_begin_that_is_sent_again_claims_nothing(self, store: StepRunStore) -> None:
        begin = store.calls.begin_step("run", "pay", {})
        store.fail_step(begun(store.send(begin)), {})
        store.retry_step("run", "pay")

        assert store.send(begin).superseded
        assert store.step_statuses("run") == {"pay": StepStatus.PENDING}

    @pytest.mark.parametrize("state", ["live", "unleased", "completed"])
    def test_what_is_at_work_or_done_is_refused(self, bench: Bench, store: StepRunStore, state: str) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60 if state == "live" else None))
        if state == "completed":
            store.complete_step(claim, {})
        before = bench.dump()

        with pytest.raises(StaleStepRunError, match="is completed" if state == "completed" else "is running") as caught:
            store.retry_step("run", "pay")

        assert caught.value.current == store.get_step_run("run", "pay")
        assert bench.dump() == before

    @pytest.mark.parametrize("how", ["scheduled", "released", "retried"])
    def test_what_is_pending_stays_as_it_is(self, bench: Bench, store: StepRunStore, how: str) -> None:
        if how == "scheduled":
            store.schedule_step("run", "pay", {"given": 1})
        elif how == "released":
            store.release_step(begun(store.begin_step("run", "pay", {"given": 1})))
        else:
            failed(store)
            store.retry_step("run", "pay")
        before = bench.dump()

        assert store.retry_step("run", "pay") == store.get_step_run("run", "pay")

        assert bench.dump() == before

    def test_what_is_not_there(self, bench: Bench, store: StepRunStore) -> None:
        for run in ("none", "run"):
            with pytest.raises(StepRunNotFoundError):
                store.retry_step(run, "pay")
            store.schedule_step("run", "other", {})
        store.delete_run("run")
        with pytest.raises(RunDeletedError):
            store.retry_step("run", "pay")
        with pytest.raises(InvalidArgumentError, match="owner"):
            store.retry_step("run", "pay", owner="a\nb")

    @pytest.mark.parametrize("losing", [1, 11])
    def test_sent_again_it_takes_effect_once(self, bench: Bench, losing: int) -> None:
        failed(bench.store())

        retried = bench.store(losing=losing).retry_step("run", "pay")

        assert retried == bench.store().get_step_run("run", "pay")
        assert retried.attempt == 2

    def test_sent_again_late_it_disturbs_no_later_claim(self, bench: Bench, store: StepRunStore) -> None:
        failed(store)
        retry = store.calls.retry_step("run", "pay")
        first = store.send(retry)
        store.fail_step(begun(store.begin_step("run", "pay", {})), {})
        before = bench.dump()

        again = store.send(retry)

        assert (again.status, again.attempt) == (first.status, first.attempt)
        assert bench.dump() == before

    def test_the_history_stays_bounded(self, bench: Bench, store: StepRunStore) -> None:
        failed(store, 9)

        for _ in range(3):
            store.retry_step("run", "pay")
            store.fail_step(begun(store.begin_step("run", "pay", {})), {})

        assert [each[0] for each in outcomes(store)] == list(range(7, 16))
        fields = bench.backend.raw.hkeys(bench.keys("run")[0])
        assert len([field for field in fields if field[:1] == b"a"]) == 8

    def test_it_renews_the_expiry(self, bench: Bench) -> None:
        store = bench.store(run_ttl=100)
        failed(store)
        for key in bench.keys("run")[:2]:
            bench.backend.raw.expire(key, 10)

        store.retry_step("run", "pay")

        assert 90 < bench.backend.raw.ttl(bench.keys("run")[0]) <= 100

    @pytest.mark.parametrize("key", [0, 1, 2, 3])
    def test_a_key_of_another_type_is_refused(self, bench: Bench, store: StepRunStore, key: int) -> None:
        store.complete_step(begun(store.begin_step("run", "done", {})), {})
        failed(store)
        bench.backend.raw.delete(bench.keys("run")[key])
        bench.backend.raw.set(bench.keys("run")[key], "x")
        before = bench.dump()

        with pytest.raises(CorruptRunError) as caught:
            store.retry_step("run", "pay")

        assert caught.value.key == bench.keys("run")[key].decode()
        assert bench.dump() == before


class TestRetryRun:
    def test_all_failed_steps_and_no_others(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "pending", {})
        store.complete_step(begun(store.begin_step("run", "completed", {})), {})
        failed(store, step="one")
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

    @pytest.mark.servers("valkey", "redis-7", "redis-6")  # fakeredis takes ten seconds for it
    def test_thousands(self, store: StepRunStore) -> None:
        steps = [f"step-{number}" for number in range(1_100)]
        claims = in_batch(store, [store.calls.begin_step("run", step, {}) for step in steps])
        store.batch([store.calls.fail_step(claim.step_run, {}) for claim in claims])

        assert [each.step for each in store.retry_run("run")] == steps

    def test_what_is_not_there_or_corrupt(self, bench: Bench, store: StepRunStore) -> None:
        with pytest.raises(StepRunNotFoundError):
            store.retry_run("run")
        store.complete_step(begun(store.begin_step("run", "done", {})), {})
        bench.backend.raw.delete(bench.keys("run")[1])
        with pytest.raises(CorruptRunError):
            store.retry_run("run")
