"""The times on records, when the server's clock is set back or has just begun a second."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from support.backends import Bench
from support.records import begun, stored
from support.server_time import at

from squidstep_redis import Attempt, StepRun, StepRunStore

NOON = 4_000_000_000  # seconds since 1970, after any real time: no key expires by it
AN_HOUR_BEFORE = NOON - 3_600

# With these leases and settings, a script takes its common case or its general path.
paths = pytest.mark.parametrize(
    "path", [pytest.param({}, id="common case"), pytest.param({"run_ttl": 86_400}, id="general path")]
)


def begin(store: StepRunStore, seconds: int, microseconds: int = 0, step: str = "pay") -> StepRun:
    """Claims a step at a time of the server."""
    return begun(store.send(at(store.calls.begin_step("run", step, {}, lease=60), seconds, microseconds)))


def only_attempt(store: StepRunStore, step: str = "pay") -> Attempt:
    """Returns the attempt of a step that has exactly one."""
    (attempt,) = store.attempts("run", step)
    return attempt


class TestClockSetBack:
    """No attempt starts before its step was created, or ends before it started."""

    def test_scheduled_step_begun_before_its_creation_starts_at_it(self, store: StepRunStore) -> None:
        store.send(at(store.calls.schedule_step("run", "pay", {}), NOON))

        begin(store, AN_HOUR_BEFORE)

        assert only_attempt(store).started_at == stored(store).created_at == datetime.fromtimestamp(NOON, UTC)

    def test_run_does_not_expire_before_the_delay_of_a_failure(self, bench: Bench) -> None:
        store = bench.store(run_ttl=1)
        failed = store.send(at(store.calls.fail_step(begin(store, NOON), {}, retry_after=600), AN_HOUR_BEFORE))

        assert failed.retry_at is not None
        expires_at = bench.backend.now() + bench.backend.raw.pttl(bench.keys("run")[0]) / 1_000
        assert expires_at > failed.retry_at.timestamp()

    def test_second_attempt_begun_before_the_creation_starts_at_it(self, store: StepRunStore) -> None:
        store.send(at(store.calls.fail_step(begin(store, NOON), {}), NOON + 1))

        begin(store, AN_HOUR_BEFORE)

        assert stored(store).started_at == stored(store).created_at

    def test_retry_before_the_creation_starts_at_it(self, store: StepRunStore) -> None:
        store.send(at(store.calls.fail_step(begin(store, NOON), {}), NOON + 1))

        store.send(at(store.calls.retry_step("run", "pay"), AN_HOUR_BEFORE))

        latest = store.attempts("run", "pay")[-1]
        assert latest.started_at == latest.ended_at == stored(store).created_at

    @pytest.mark.parametrize("ending", ["complete", "fail", "release"])
    @paths
    def test_attempt_that_ends_before_its_start_takes_no_time(
        self, bench: Bench, path: dict[str, float], ending: str
    ) -> None:
        store = bench.store(**path)
        claim = begin(store, NOON)
        calls = {
            "complete": store.calls.complete_step(claim, {}),
            "fail": store.calls.fail_step(claim, {}),
            "release": store.calls.release_step(claim),
        }

        store.send(at(calls[ending], AN_HOUR_BEFORE))

        attempt = only_attempt(store)
        assert attempt.ended_at == attempt.started_at == datetime.fromtimestamp(NOON, UTC)

    @paths
    def test_step_advanced_before_its_start_takes_no_time(self, bench: Bench, path: dict[str, float]) -> None:
        store = bench.store(**path)
        claim = begin(store, NOON)

        store.send(at(store.calls.advance_step(claim, {}, "mail", {}, lease=60), AN_HOUR_BEFORE))

        attempt = only_attempt(store)
        assert attempt.ended_at == attempt.started_at
        assert only_attempt(store, "mail").started_at == datetime.fromtimestamp(AN_HOUR_BEFORE, UTC)


class TestMicroseconds:
    """The server returns microseconds as a number, without leading zeros; records keep milliseconds."""

    @pytest.mark.parametrize("microseconds", [0, 999, 1_000, 7_654, 98_765, 100_000, 999_999])
    @paths
    def test_every_operation_stores_the_exact_millisecond(
        self, bench: Bench, path: dict[str, float], microseconds: int
    ) -> None:
        store = bench.store(**path)
        moment = datetime.fromtimestamp(NOON, UTC) + timedelta(milliseconds=microseconds // 1_000)

        claim = begin(store, NOON, microseconds)
        assert claim.created_at == claim.started_at == moment
        assert claim.lease_ends_at == moment + timedelta(seconds=60)

        store.send(at(store.calls.advance_step(claim, {}, "mail", {}, lease=60), NOON, microseconds))
        assert stored(store).ended_at == moment
        mail = stored(store, step="mail")
        assert mail.started_at == moment

    @pytest.mark.parametrize("microseconds", [999, 7_654, 98_765])
    @paths
    def test_completion_stores_the_exact_millisecond(
        self, bench: Bench, path: dict[str, float], microseconds: int
    ) -> None:
        store = bench.store(**path)
        claim = begin(store, NOON)

        store.send(at(store.calls.complete_step(claim, {}), NOON, microseconds))

        started = datetime.fromtimestamp(NOON, UTC)
        assert stored(store).ended_at == started + timedelta(milliseconds=microseconds // 1_000)
