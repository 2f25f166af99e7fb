"""`delete_run`: the run is gone, its tombstone rejects late writes, and other runs stay."""

from __future__ import annotations

import pytest
from support.backends import Bench
from support.records import begun, stored
from support.servers import wait_until

from squidstep_redis import (
    RunDeletedError,
    StepRunStore,
    StepStatus,
)


class TestDeleteRun:
    def test_deleted_run_is_empty_and_rejects_late_writes(self, bench: Bench, store: StepRunStore) -> None:
        running = begun(store.begin_step("run", "pay", {}, lease=60))
        store.fail_step(begun(store.begin_step("run", "ship", {})), {"reason": "declined"})
        store.complete_step(begun(store.begin_step("run", "mail", {})), {})

        assert store.delete_run("run") is True

        before = bench.dump()
        assert store.get_run("run") == store.completed_steps("run") == store.completed_outputs("run") == []
        assert store.get_step_run("run", "pay") is None
        assert store.step_statuses("run") == {}
        assert store.attempts("run", "pay") == []
        assert store.delete_pending_steps("run", ["pay"]) == ["pay"]
        assert store.expire_run("run", 60) is False
        assert store.failed_steps() == store.lapsed_claims() == store.live_claims() == []
        for write in (
            lambda: store.complete_step(running, {}),
            lambda: store.complete_step(running.id, {}),
            lambda: store.fail_step(running, {}),
            lambda: store.extend_claim(running, 60),
            lambda: store.release_step(running),
            lambda: store.begin_step("run", "pay", {}),
            lambda: store.schedule_step("run", "pay", {}),
            lambda: store.schedule_steps("run", {"pay": {}}),
        ):
            with pytest.raises(RunDeletedError, match="run 'run'"):
                write()
        assert bench.dump() == before
        assert set(before) == {bench.keys("run")[0]}  # the tombstone alone

    def test_tombstone_expires(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))
        store.delete_run("run", tombstone=0.02)

        wait_until(lambda: not bench.backend.raw.exists(bench.keys("run")[0]))

        assert begun(store.begin_step("run", "pay", {})).attempt == 1

    def test_deleting_a_missing_run_leaves_no_tombstone(self, bench: Bench, store: StepRunStore) -> None:
        assert store.delete_run("run") is False
        assert bench.dump() == {}

    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_resent_deletion_returns_the_same(self, bench: Bench, lost_replies: int) -> None:
        begun(bench.store().begin_step("run", "pay", {}))

        assert bench.store(lost_replies=lost_replies).delete_run("run") is True
        assert bench.store().delete_run("run") is False

    @pytest.mark.servers("valkey", "cluster", "redis-7", "redis-6")  # seconds in fakeredis, as other index reads
    @pytest.mark.parametrize("steps", [10, 700])
    def test_deleted_run_leaves_no_entry_in_the_indexes(self, store: StepRunStore, bench: Bench, steps: int) -> None:
        """Entries of a long run are dropped when the indexes are read: to search for them would block the server."""
        calls = store.calls
        begun_steps = store.batch([calls.begin_step("run", f"step-{number}", {}, lease=60) for number in range(steps)])
        store.batch([calls.fail_step(result.step_run, {}) for result in begun_steps[::2]])
        store.batch([calls.expire_claim(result.step_run) for result in begun_steps[1::4]])

        assert store.delete_run("run") is True

        assert store.failed_steps(1_000) == store.live_claims(1_000) == store.lapsed_claims(1_000) == []
        assert bench.backend.keys(bench.prefix) == {bench.keys("run")[0]}  # the tombstone

    def test_deletion_leaves_other_runs_unchanged(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))
        begun(store.begin_step("other", "pay", {}))

        store.delete_run("run")

        assert stored(store, "other").status is StepStatus.RUNNING
