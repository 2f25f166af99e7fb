"""Expiry: `run_ttl` and `expire_run`; both keys of a run expire together, never under a live claim."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from support.backends import Bench
from support.records import begun
from support.servers import wait_until

from squidstep_redis import StaleStepRunError, StepRun, StepRunNotFoundError, StepRunStore
from squidstep_redis.model import step_run_id


def ttls(bench: Bench) -> list[int]:
    """The time to live of both keys of the run, in milliseconds: -1 if it never expires, -2 if there is no key."""
    return [bench.backend.raw.pttl(key) for key in bench.keys("run")[:2]]


class TestRunTtl:
    def test_run_without_a_ttl_never_expires(self, bench: Bench, store: StepRunStore) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})

        assert ttls(bench) == [-1, -1]

    @pytest.mark.parametrize(
        "write",
        [
            lambda store: store.schedule_step("run", "new", {}),
            lambda store: store.schedule_steps("run", {"new": {}}),
            lambda store: store.begin_step("run", "pay", {}, lease=1),
            lambda store: store.delete_pending_steps("run", ["pay"]),
            lambda store: store.complete_step(begun(store.begin_step("run", "pay", {})), {}),
            lambda store: store.fail_step(begun(store.begin_step("run", "pay", {})), {}),
            lambda store: store.release_step(begun(store.begin_step("run", "pay", {}))),
            lambda store: store.extend_claim(begun(store.begin_step("run", "pay", {})), 1),
            lambda store: store.expire_claim(begun(store.begin_step("run", "pay", {}))),
        ],
    )
    def test_each_write_renews_the_ttl_of_both_keys(self, bench: Bench, write: object) -> None:
        assert callable(write)
        store = bench.store(run_ttl=1_000)
        store.complete_step(begun(store.begin_step("run", "first", {})), {})
        store.schedule_step("run", "pay", {})
        for key in bench.keys("run")[:2]:
            bench.backend.raw.pexpire(key, 100_000)

        write(store)

        assert all(900_000 < ttl <= 1_002_000 for ttl in ttls(bench))

    def test_skipped_writes_and_reads_renew_nothing(self, bench: Bench) -> None:
        store = bench.store(run_ttl=1_000)
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})
        for key in bench.keys("run")[:2]:
            bench.backend.raw.pexpire(key, 100_000)

        store.begin_step("run", "pay", {})
        store.schedule_step("run", "pay", {})
        store.get_run("run")

        assert all(0 < ttl <= 100_000 for ttl in ttls(bench))

    def test_ttl_starts_at_the_end_of_a_live_lease(self, bench: Bench) -> None:
        store = bench.store(run_ttl=100)
        begun(store.begin_step("run", "pay", {}, lease=1_000))
        store.complete_step(begun(store.begin_step("run", "mail", {}, lease=50)), {})

        assert all(1_050_000 < ttl <= 1_100_000 for ttl in ttls(bench))

    def test_claim_without_a_lease_keeps_the_run_until_it_ends(self, bench: Bench) -> None:
        store = bench.store(run_ttl=100)
        one = begun(store.begin_step("run", "one", {}))
        two = begun(store.begin_step("run", "two", {}))
        assert ttls(bench) == [-1, -2]
        store.complete_step(one, {})
        assert ttls(bench) == [-1, -1]
        store.extend_claim(two, 50)
        assert all(100_000 < ttl <= 150_000 for ttl in ttls(bench))
        store.extend_claim(two, None)
        assert ttls(bench) == [-1, -1]

        store.fail_step(two, {"reason": "declined"})

        assert all(0 < ttl <= 100_000 for ttl in ttls(bench) if ttl != -2)

    @pytest.mark.parametrize(
        "end",
        [
            lambda store, claim: store.complete_step(claim, {}),
            lambda store, claim: store.complete_steps([(claim, {}), (claim, {})]),
            lambda store, claim: store.advance_step(claim, {}, "next", {}, lease=1),
            lambda store, claim: store.fail_step(claim, {}),
            lambda store, claim: store.release_step(claim),
            lambda store, claim: store.extend_claim(claim, 1),
            lambda store, claim: store.expire_claim(claim) and store.begin_step("run", "pay", {}, lease=1),
            lambda store, claim: store.expire_claim(claim) and store.begin_step("run", "pay", {}, max_attempts=1),
            lambda store, claim: store.expire_claim(claim) and store.retry_step("run", "pay"),
            lambda store, claim: store.fail_step(claim, {}, retry_after=5_000) and store.retry_step("run", "pay"),
        ],
        ids=[
            *("completed", "completed in a batch", "advanced", "failed", "released", "extended", "taken over"),
            *("exhausted", "lapsed and retried", "delayed and retried"),
        ],
    )
    def test_long_lease_no_longer_counts_once_it_has_ended(
        self, bench: Bench, end: Callable[[StepRunStore, StepRun], object]
    ) -> None:
        store = bench.store(run_ttl=100)
        claim = begun(store.begin_step("run", "pay", {}, lease=5_000))
        begun(store.begin_step("run", "mail", {}, lease=1_000))
        assert ttls(bench)[0] > 5_000_000
        store.complete_step(begun(store.begin_step("run", "other", {}, lease=10)), {})
        assert ttls(bench)[0] > 5_000_000  # as long as another claim is live, the longest lease counts
        end(store, claim)
        for step in ("mail", "pay", "next"):
            with contextlib.suppress(StaleStepRunError, StepRunNotFoundError):
                store.release_step(step_run_id(bench.prefix, "run", step))

        assert all(0 < ttl <= 110_000 for ttl in ttls(bench) if ttl != -2)

    def test_delay_after_a_failure_counts_as_a_lease(self, bench: Bench) -> None:
        store = bench.store()
        store.fail_step(begun(store.begin_step("run", "pay", {})), {}, retry_after=5_000)
        store.expire_run("run", 100)
        assert 5_000_000 < ttls(bench)[0] <= 5_100_000


class TestExpireRun:
    def test_expire_run_takes_effect_once_no_claim_is_live(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "leased", {}, lease=500))
        unleased = begun(store.begin_step("run", "unleased", {}))
        store.complete_step(begun(store.begin_step("run", "done", {})), {})

        assert store.expire_run("run", 100) is True

        assert ttls(bench) == [-1, -1]
        store.complete_step(unleased, {})
        assert all(500_000 < ttl <= 600_000 for ttl in ttls(bench))

    def test_expire_run_with_none_keeps_the_run(self, bench: Bench) -> None:
        store = bench.store(run_ttl=10)
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})

        assert store.expire_run("run", None) is True
        store.schedule_step("run", "mail", {})

        assert ttls(bench) == [-1, -1]

    def test_expire_run_of_a_missing_run_returns_false(self, bench: Bench, store: StepRunStore) -> None:
        assert store.expire_run("run", 10) is False
        assert bench.dump() == {}

    def test_expired_runs_leave_no_key_once_indexes_are_read(self, bench: Bench) -> None:
        """An expired run leaves only index entries, and the next read of the indexes drops them."""
        store = bench.store(run_ttl=1_000)
        runs = ("one", "two")
        for run in runs:
            store.complete_step(begun(store.begin_step(run, "done", {}, lease=0.01)), {}, schedule={"next": {}})
            store.fail_step(begun(store.begin_step(run, "next", {}, lease=0.01)), {"reason": "declined"})
            begun(store.begin_step(run, "crashed", {}, lease=0.01))

        for run in runs:
            store.expire_run(run, 0.01)
        run_keys = {key for run in runs for key in bench.keys(run)[:2]}
        wait_until(lambda: not run_keys & bench.backend.keys(bench.prefix))

        assert store.lapsed_claims() == store.failed_steps() == store.runs().runs == []
        assert bench.backend.keys(bench.prefix) == set()
