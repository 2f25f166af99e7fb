"""`expire_claim`: ends the lease of a claim that was observed, and of no later one."""

from __future__ import annotations

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import (
    InvalidArgumentError,
    Outcome,
    RunDeletedError,
    StaleStepRunError,
    StepRunNotFoundError,
    StepRunStore,
    StepStatus,
)


class TestExpireClaim:
    def test_expired_claim_can_be_taken_over_immediately(self, store: StepRunStore) -> None:
        holder = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60, owner="w1"))
        (live,) = store.live_claims()

        expired = store.expire_claim(live)

        assert (expired.status, expired.input, expired.attempt) == (StepStatus.RUNNING, {"amount": 1}, 1)
        assert expired == stored(store)
        assert store.live_claims() == []
        assert store.lapsed_claims() == [expired]
        winner = begun(store.begin_step("run", "pay", {"amount": 2}, owner="w2"))
        assert [(each.owner, each.outcome) for each in store.attempts("run", "pay")] == [
            ("w1", Outcome.LEASE_EXPIRED),
            ("w2", Outcome.RUNNING),
        ]
        with pytest.raises(StaleStepRunError, match="was taken over: attempt 2"):
            store.complete_step(holder, {})
        assert stored(store) == winner

    @pytest.mark.parametrize("observed", ["get_step_run", "get_run", "begin_step", "the claim", "id"])
    def test_claim_expires_however_it_was_observed(self, store: StepRunStore, observed: str) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        step_run = {
            "get_step_run": lambda: stored(store),
            "get_run": lambda: store.get_run("run")[0],
            "begin_step": lambda: store.begin_step("run", "pay", {}).step_run,
            "the claim": lambda: claim,
            "id": lambda: claim.id,
        }[observed]()

        store.expire_claim(step_run)

        assert begun(store.begin_step("run", "pay", {})).attempt == 2

    def test_claim_without_a_lease_expires_too(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))

        store.expire_claim(stored(store))

        assert begun(store.begin_step("run", "pay", {})).attempt == 2

    def test_expiry_uses_up_the_attempt(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}, lease=60))
        store.expire_claim(stored(store))

        assert store.begin_step("run", "pay", {}, max_attempts=1).exhausted
        assert stored(store).last_error is not None

    def test_live_holder_continues_unless_taken_over(self, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        store.expire_claim(stored(store))

        assert store.extend_claim(claim, 60) == stored(store)
        assert store.live_claims() == [stored(store)]
        assert store.complete_step(claim, {}).status is StepStatus.COMPLETED

    @pytest.mark.parametrize("since", ["taken over", "failed", "released", "begun again", "completed"])
    def test_later_claim_is_never_expired(self, bench: Bench, store: StepRunStore, since: str) -> None:
        first = begun(store.begin_step("run", "pay", {}, lease=60))
        observed = stored(store)
        match since:
            case "taken over":
                store.expire_claim(observed)
                begun(store.begin_step("run", "pay", {}, lease=60))
            case "failed":
                store.fail_step(first, {})
            case "released":
                store.release_step(first)
            case "begun again":
                store.release_step(first)
                begun(store.begin_step("run", "pay", {}, lease=60))
            case _:
                store.complete_step(first, {})
        before = bench.dump()

        with pytest.raises(StaleStepRunError) as caught:
            store.expire_claim(observed)

        assert caught.value.current == stored(store)
        assert bench.dump() == before

    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_resent_expiry_ends_no_later_claim(self, bench: Bench, lost_replies: int) -> None:
        begun(bench.store().begin_step("run", "pay", {}, lease=60))
        observed = stored(bench.store())
        bench.store(lost_replies=lost_replies).expire_claim(observed)
        winner = begun(bench.store().begin_step("run", "pay", {}, lease=60))

        with pytest.raises(StaleStepRunError):
            bench.store().expire_claim(observed)

        assert stored(bench.store()) == winner

    def test_step_that_was_never_claimed_is_stale(self, bench: Bench, store: StepRunStore) -> None:
        scheduled = store.schedule_step("run", "pay", {}).step_run
        before = bench.dump()

        for step_run in (scheduled, scheduled.id):
            with pytest.raises(StaleStepRunError):
                store.expire_claim(step_run)

        assert bench.dump() == before

    def test_step_run_of_another_prefix_is_rejected(self, bench: Bench, store: StepRunStore) -> None:
        other = bench.store(prefix=f"{bench.prefix}-other")
        begun(store.begin_step("run", "pay", {}, lease=60))
        theirs = begun(other.begin_step("run", "pay", {}, lease=60))
        before = bench.dump()

        for step_run in (theirs, stored(other), theirs.id):
            with pytest.raises(InvalidArgumentError, match="prefix"):
                store.expire_claim(step_run)

        assert bench.dump() == before
        assert stored(other) == theirs

    def test_missing_record_is_not_found(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}, lease=60))
        observed = stored(store)
        bench.backend.raw.delete(*bench.keys("run")[:2])
        begun(store.begin_step("gone", "pay", {}, lease=60))
        deleted = stored(store, "gone")
        store.delete_run("gone")

        with pytest.raises(StepRunNotFoundError):
            store.expire_claim(observed)
        with pytest.raises(RunDeletedError):
            store.expire_claim(deleted)
