"""What `checkpoint_step` does to each state of a step, and when its progress is read, kept and cleared."""

from __future__ import annotations

from typing import Any

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import (
    PayloadError,
    PayloadTooLargeError,
    RunDeletedError,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
)
from squidstep_redis.model import step_run_id
from squidstep_redis.operations import leases

PROGRESS = {"page": 7, "cursor": b"\x00\n\xff"}


@pytest.fixture
def claim(store: StepRunStore) -> StepRun:
    return begun(store.begin_step("run", "crawl", {"site": 1}, lease=60, owner="worker-1"))


def crawl(store: StepRunStore, **options: Any) -> StepRun:
    """Begins the step once more."""
    return begun(store.begin_step("run", "crawl", {"site": 2}, **options))


class TestCheckpoint:
    def test_progress_is_stored_and_nothing_else_changes(self, store: StepRunStore, claim: StepRun) -> None:
        running = store.checkpoint_step(claim, PROGRESS)

        found = stored(store, step="crawl")
        assert running.progress == found.progress == PROGRESS
        assert running == found == claim
        assert found.lease_ends_at == claim.lease_ends_at
        assert store.complete_step(running, {}).output == {}

    def test_later_checkpoint_replaces_the_earlier_one(self, store: StepRunStore, claim: StepRun) -> None:
        store.checkpoint_step(claim, {"page": 1, "site": "a"})
        store.checkpoint_step(claim, {"page": 2})

        assert stored(store, step="crawl").progress == {"page": 2}

    def test_checkpoint_after_the_lease_is_accepted_without_a_takeover(self, bench: Bench, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "crawl", {}, lease=0.01))
        bench.lapse(claim)

        assert store.checkpoint_step(claim, PROGRESS).progress == PROGRESS

    def test_bare_id_checkpoints_the_current_claim(self, store: StepRunStore, claim: StepRun) -> None:
        running = store.checkpoint_step(claim.id, PROGRESS)

        assert (running.progress, running.input) == (PROGRESS, {"site": 1})

    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_resent_checkpoint_returns_the_same(self, bench: Bench, claim: StepRun, lost_replies: int) -> None:
        running = bench.store(lost_replies=lost_replies).checkpoint_step(claim, PROGRESS)

        assert running.progress == stored(bench.store(), step="crawl").progress == PROGRESS

    def test_delayed_copy_does_not_replace_a_later_checkpoint(self, store: StepRunStore, claim: StepRun) -> None:
        earlier = store.calls.checkpoint_step(claim, {"page": 1})
        store.send(earlier)
        store.checkpoint_step(claim, {"page": 2})

        assert store.send(earlier).progress == {"page": 2}
        assert stored(store, step="crawl").progress == {"page": 2}

    def test_another_process_continues_with_its_own_numbers(
        self, store: StepRunStore, claim: StepRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        call = store.calls.checkpoint_step(claim, {"page": 2})
        store.checkpoint_step(claim, {"page": 1})

        other = call._replace(args=(*call.args[:3], b"another", *call.args[4:]))
        assert store.send(other).progress == {"page": 2}
        assert stored(store, step="crawl").progress == {"page": 2}

    def test_forked_process_is_another_sender(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own = leases.sender()
        assert leases.sender() == own
        monkeypatch.setattr("os.getpid", lambda: -1)
        assert leases.sender() != own


class TestNextAttempt:
    def test_attempt_after_a_failure_finds_it(self, store: StepRunStore, claim: StepRun) -> None:
        store.checkpoint_step(claim, PROGRESS)
        failed = store.fail_step(claim, {"reason": "network"})
        assert failed.progress == stored(store, step="crawl").progress == PROGRESS
        assert store.fail_step(claim, {"reason": "network"}).progress == PROGRESS

        second = crawl(store)

        assert (second.attempt, second.progress, second.input) == (2, PROGRESS, {"site": 2})

    def test_attempt_after_a_release_finds_it(self, store: StepRunStore, claim: StepRun) -> None:
        store.checkpoint_step(claim, PROGRESS)
        assert store.release_step(claim).progress == PROGRESS

        second = crawl(store)

        assert (second.progress, second.input) == (PROGRESS, {"site": 1})

    def test_takeover_finds_it(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "crawl", {"site": 1})
        claim = begun(store.begin_step("run", "crawl", {}, lease=0.02))
        store.checkpoint_step(claim, PROGRESS)
        bench.lapse(claim)

        result = store.begin_step("run", "crawl", {"site": 2}, lease=60)

        assert result.takeover
        assert (result.step_run.progress, result.step_run.input) == (PROGRESS, {"site": 2})

    def test_resent_begin_finds_it(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        store.checkpoint_step(claim, PROGRESS)
        store.fail_step(claim, {})

        second = begun(bench.store(lost_replies=1).begin_step("run", "crawl", {"site": 2}))

        assert (second.progress, second.input) == (PROGRESS, {"site": 2})

    def test_next_attempt_replaces_it_with_any_number(self, store: StepRunStore, claim: StepRun) -> None:
        later = store.calls.checkpoint_step(claim, {"page": 1})
        store.checkpoint_step(claim, {"page": 9})
        store.fail_step(claim, {})
        second = crawl(store)

        store.send(later._replace(args=(*later.args[:2], second.token, *later.args[3:])))

        assert stored(store, step="crawl").progress == {"page": 1}

    def test_retry_step_keeps_it(self, store: StepRunStore, claim: StepRun) -> None:
        store.checkpoint_step(claim, PROGRESS)
        store.fail_step(claim, {"reason": "quota"}, final=True)

        assert store.retry_step("run", "crawl").progress == PROGRESS
        assert crawl(store).progress == PROGRESS

    def test_without_a_checkpoint_there_is_none(self, store: StepRunStore, claim: StepRun) -> None:
        assert claim.progress is None
        store.fail_step(claim, {})

        assert crawl(store).progress is None

    def test_every_attempt_of_a_group_finds_its_own(self, store: StepRunStore) -> None:
        inputs = {f"page-{number}": {"n": number} for number in range(3)}
        claims = store.begin_steps("run", inputs, lease=60)
        store.checkpoint_step(claims["page-1"].step_run, PROGRESS)
        store.batch([store.calls.fail_step(each.step_run, {}) for each in claims.values()], raise_errors=True)

        again = store.begin_steps("run", inputs, lease=60)

        assert [each.step_run.progress for each in again.values()] == [None, PROGRESS, None]
        assert [each.step_run.input for each in again.values()] == [*inputs.values()]


class TestCompletion:
    def assert_cleared(self, bench: Bench, store: StepRunStore) -> None:
        assert stored(store, step="crawl").progress is None
        assert bench.field("run", "pcrawl") is None
        assert bench.field("run", "wcrawl") is None

    def test_completion_clears_it(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        store.checkpoint_step(claim, PROGRESS)

        completed = store.complete_step(claim, {"pages": 9})

        assert (completed.progress, completed.input) == (None, {"site": 1})
        self.assert_cleared(bench, store)

    def test_completion_in_a_group_clears_it(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        other = begun(store.begin_step("run", "index", {}))
        store.checkpoint_step(claim, PROGRESS)

        store.complete_steps([(other, {}), (claim, {})])

        self.assert_cleared(bench, store)
        assert store.completed_steps("run") == ["index", "crawl"]

    def test_advancing_clears_it(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        store.checkpoint_step(claim, PROGRESS)

        assert store.advance_step(claim, {}, "index", {}).step_run.progress is None

        self.assert_cleared(bench, store)

    def test_deleting_the_pending_step_clears_it(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        store.schedule_step("run", "other", {})
        store.checkpoint_step(claim, PROGRESS)
        store.release_step(claim)

        store.delete_pending_steps("run", ["crawl"])

        assert bench.field("run", "pcrawl") is None
        assert crawl(store).progress is None

    def test_exhausted_step_keeps_it(self, bench: Bench, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "crawl", {}, lease=0.02, max_attempts=1))
        store.checkpoint_step(claim, PROGRESS)
        bench.lapse(claim)

        result = store.begin_step("run", "crawl", {}, max_attempts=1)

        assert result.exhausted
        assert result.step_run.progress == stored(store, step="crawl").progress == PROGRESS


class TestRefusals:
    def test_stale_claim_is_refused_and_writes_nothing(self, bench: Bench, store: StepRunStore) -> None:
        stale = begun(store.begin_step("run", "crawl", {}, lease=0.01))
        bench.lapse(stale)
        winner = crawl(store, lease=60)
        store.checkpoint_step(winner, PROGRESS)
        before = bench.dump()

        for call in (store.calls.checkpoint_step(stale, {}), store.calls.extend_claim(stale, 60, progress={})):
            with pytest.raises(StaleStepRunError) as caught:
                store.send(call)
            assert (caught.value.current, caught.value.current.progress) == (winner, PROGRESS)
        assert bench.dump() == before

    @pytest.mark.parametrize("ending", ["complete_step", "fail_step", "release_step"])
    def test_ended_claim_is_refused(self, store: StepRunStore, claim: StepRun, ending: str) -> None:
        getattr(store, ending)(claim, *([] if ending == "release_step" else [{}]))

        with pytest.raises(StaleStepRunError):
            store.checkpoint_step(claim, PROGRESS)
        assert stored(store, step="crawl").progress is None

    def test_unknown_step_and_deleted_run_are_not_found(self, bench: Bench, store: StepRunStore) -> None:
        with pytest.raises(StepRunNotFoundError):
            store.checkpoint_step(step_run_id(bench.prefix, "run", "crawl"), PROGRESS)
        claim = crawl(store)
        store.delete_run("run")
        with pytest.raises(RunDeletedError):
            store.checkpoint_step(claim, PROGRESS)

    def test_bad_progress_is_rejected_before_anything_is_sent(self, bench: Bench) -> None:
        store = bench.store(max_payload_bytes=100)
        claim = crawl(store)
        before = bench.dump()

        for progress in (["page"], {"page": object()}, None):
            with pytest.raises(PayloadError, match="progress"):
                store.checkpoint_step(claim, progress)
        with pytest.raises(PayloadTooLargeError, match="progress"):
            store.extend_claim(claim, 60, progress={"page": "x" * 100})
        assert bench.dump() == before


class TestExtension:
    def test_extension_carries_progress(self, bench: Bench, store: StepRunStore, claim: StepRun) -> None:
        extended = store.extend_claim(claim, 120, progress=PROGRESS)

        assert extended.progress == stored(store, step="crawl").progress == PROGRESS
        assert extended.lease_ends_at is not None
        assert 110 < extended.lease_ends_at.timestamp() - bench.backend.now() <= 120
        assert [each.step for each in store.live_claims()] == ["crawl"]

    def test_extension_by_none_removes_the_lease(self, store: StepRunStore, claim: StepRun) -> None:
        assert store.extend_claim(claim, None, progress=PROGRESS).lease_ends_at is None
        assert store.live_claims() == []

    def test_extension_without_progress_keeps_the_stored_one(self, store: StepRunStore, claim: StepRun) -> None:
        running = store.checkpoint_step(claim, PROGRESS)

        assert store.extend_claim(running, 60).progress == PROGRESS
        assert stored(store, step="crawl").progress == PROGRESS

    def test_delayed_extension_extends_but_keeps_later_progress(self, store: StepRunStore, claim: StepRun) -> None:
        delayed = store.calls.extend_claim(claim, 600, progress={"page": 1})
        store.checkpoint_step(claim, {"page": 2})

        extended = store.send(delayed)

        assert extended == stored(store, step="crawl")
        assert extended.progress == stored(store, step="crawl").progress == {"page": 2}

    def test_run_with_a_ttl_outlives_the_extended_lease(self, bench: Bench) -> None:
        store = bench.store(run_ttl=60)
        claim = crawl(store, lease=60)

        store.extend_claim(claim, 600, progress=PROGRESS)

        assert bench.backend.raw.pttl(bench.keys("run")[0]) > 640_000


def test_waiter_is_notified_beside_progress(bench: Bench, store: StepRunStore, claim: StepRun) -> None:
    waiting = store.calls.wait_for_step("run", "crawl", 60)
    store.send(next(waiting).call)
    store.checkpoint_step(claim, PROGRESS)
    assert bench.field("run", "wcrawl") == b"wp"

    store.fail_step(claim, {})

    assert bench.field("run", "wcrawl") == b"p"
    assert len(bench.backend.raw.xrange(bench.keys("run")[0].removesuffix(b"steps") + b"wake")) == 1
