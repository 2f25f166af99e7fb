"""Steps whose lease expired: what repairs and exhausted claims leave in the indexes."""

from __future__ import annotations

from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import StepRunStore, StepStatus


def claims(bench: Bench) -> list[bytes]:
    """Returns the entries of the claims index of the run's bucket."""
    return bench.backend.raw.zrange(bench.keys("run")[2], 0, -1)


def failed(bench: Bench) -> list[bytes]:
    """Returns the entries of the failed index of the run's bucket."""
    return bench.backend.raw.zrange(bench.keys("run")[3], 0, -1)


class TestRetriedStep:
    def test_expired_claim_leaves_the_claims_index(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.01)))
        assert len(claims(bench)) == 1

        store.retry_step("run", "pay")

        assert (claims(bench), failed(bench)) == ([], [])

    def test_failed_step_leaves_the_failed_index(self, bench: Bench, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("run", "pay", {}, lease=60)), {})
        assert len(failed(bench)) == 1

        store.retry_step("run", "pay")

        assert (claims(bench), failed(bench)) == ([], [])


class TestExhaustedStep:
    """The lease of the last allowed attempt expired: the next delivery records the failure."""

    def test_step_moves_from_the_claims_to_the_failed_index(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.01, max_attempts=1)))
        entries = claims(bench)
        assert len(entries) == 1

        assert store.begin_step("run", "pay", {}, lease=60, max_attempts=1).exhausted

        assert stored(store).status is StepStatus.FAILED
        assert (claims(bench), failed(bench)) == ([], entries)

    def test_failure_renews_the_expiry_of_the_run(self, bench: Bench) -> None:
        store = bench.store(run_ttl=60)
        store.complete_step(begun(store.begin_step("run", "mail", {})), {})
        bench.lapse(begun(store.begin_step("run", "ship", {}, lease=0.01, max_attempts=1)))
        keys = bench.keys("run")[:2]
        for key in keys:
            bench.backend.raw.persist(key)

        assert store.begin_step("run", "ship", {}, lease=60, max_attempts=1).exhausted

        assert all(bench.backend.raw.pttl(key) > 0 for key in keys)
