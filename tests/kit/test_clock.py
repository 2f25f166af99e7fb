"""The clock of a kit: what it controls, on each server, for both stores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from support.backends import Backend, keys_of
from support.records import begun, stored
from support.servers import wait_until

from squidstep_redis import Outcome, RunDeletedError, StepBusyError, StepRunStore
from squidstep_redis.protocol.scripts import directory, script
from squidstep_redis.testing import StepClock, StepKit
from squidstep_redis.testing.clock import script_of

HOUR = 3_600
LEASE = 3  # seconds; the heartbeat extends it every second


def test_lease_expires_when_the_clock_reaches_its_end(kit: StepKit, store: StepRunStore) -> None:
    held = begun(store.begin_step("run", "pay", {}, lease=HOUR))

    kit.clock.advance(HOUR - 600)
    assert store.begin_step("run", "pay", {}).busy
    assert store.lapsed_claims() == []
    assert store.live_claims() == [held]
    assert store.explain_step("run", "pay").reason == "leased"
    kit.clock.advance(timedelta(seconds=600))

    assert store.explain_step("run", "pay").reason == "lapsed"
    assert store.lapsed_claims() == [held]
    assert store.live_claims() == []
    assert begun(store.begin_step("run", "pay", {})).attempt == 2
    assert [attempt.outcome for attempt in store.attempts("run", "pay")] == [Outcome.LEASE_EXPIRED, Outcome.RUNNING]


def test_retry_in_and_lease_end_follow_the_clock(kit: StepKit, store: StepRunStore) -> None:
    kit.clock.advance(10 * HOUR)
    held = begun(store.begin_step("run", "pay", {}, lease=HOUR))
    kit.clock.advance(HOUR / 2)

    before = kit.clock.now()
    retry_in = store.begin_step("run", "pay", {}).retry_in
    after = kit.clock.now()

    assert retry_in is not None
    assert retry_in <= HOUR / 2
    assert held.lease_ends_at is not None
    longest, shortest = ((held.lease_ends_at - now).total_seconds() for now in (before, after))
    assert shortest - 0.001 <= retry_in <= longest + 0.001  # retry_in is rounded to milliseconds


def test_advance_to_moves_forward_but_never_back(kit: StepKit, store: StepRunStore) -> None:
    held = begun(store.begin_step("run", "pay", {}, lease=HOUR))
    assert held.lease_ends_at is not None
    assert held.started_at is not None

    kit.clock.advance_to(held.lease_ends_at)
    offset = repr(kit.clock)
    kit.clock.advance_to(held.started_at)  # in the past

    assert repr(kit.clock) == offset
    assert kit.clock.now() >= held.lease_ends_at
    assert begun(store.begin_step("run", "pay", {})).attempt == 2


@pytest.mark.parametrize("span", [-0.001, float("nan"), timedelta(seconds=-1)])
def test_clock_cannot_be_set_back(span: float | timedelta) -> None:
    with pytest.raises(ValueError, match="span"):
        StepClock(lambda: (0, 0)).advance(span)


def test_run_expiry_follows_the_clock(kit: StepKit, store: StepRunStore) -> None:
    for run in ("short", "long", "claimed"):
        store.complete_step(begun(store.begin_step(run, "pay", {})), {"of": run})
    begun(store.begin_step("claimed", "mail", {}, lease=2 * HOUR))
    assert [store.expire_run(run, ttl) for run, ttl in (("short", 600), ("long", HOUR), ("claimed", 600))] == [True] * 3

    kit.clock.advance(300)
    assert [len(store.get_run(run)) for run in ("short", "long", "claimed")] == [1, 1, 2]
    kit.clock.advance(300)
    assert [len(store.get_run(run)) for run in ("short", "long", "claimed")] == [0, 1, 2]
    store.complete_step(begun(store.begin_step("long", "mail", {})), {})  # renews the expiry
    kit.clock.advance(HOUR - 600)
    assert [len(store.get_run(run)) for run in ("short", "long", "claimed")] == [0, 2, 2]
    kit.clock.advance(2 * HOUR)

    assert [len(store.get_run(run)) for run in ("short", "long", "claimed")] == [0, 0, 0]
    assert begun(store.begin_step("long", "pay", {})).attempt == 1


def test_expiry_continues_without_advancing_the_clock(kit: StepKit, store: StepRunStore) -> None:
    kit.clock.advance(HOUR)
    store.complete_step(begun(store.begin_step("run", "pay", {})), {})
    began = time.monotonic()  # before the call, so that the test holds however long the call takes
    assert store.expire_run("run", 0.05)
    kit.clock.advance(0.02)

    wait_until(lambda: not store.get_run("run"))

    assert time.monotonic() - began > 0.025


def test_tombstones_follow_the_clock(kit: StepKit, store: StepRunStore) -> None:
    kit.clock.advance(HOUR)  # what is written from now on must still last its full time
    store.complete_step(begun(store.begin_step("run", "pay", {})), {})
    assert store.delete_run("run", tombstone=600)

    kit.clock.advance(300)
    with pytest.raises(RunDeletedError):
        store.begin_step("run", "pay", {})
    kit.clock.advance(300)

    assert begun(store.begin_step("run", "pay", {})).attempt == 1


@pytest.mark.slow
def test_heartbeat_extends_the_lease_after_an_advance(kit: StepKit) -> None:
    # With the blocking store, because its heartbeat is a thread that runs while the test checks.
    def has_expired() -> bool:
        lease_ends_at = stored(kit.observer).lease_ends_at
        assert lease_ends_at is not None
        return lease_ends_at <= kit.clock.now()

    may_extend = threading.Event()
    kit.faults.before("extend_claim", may_extend.wait)

    def work(input: dict[str, object]) -> dict[str, object]:
        assert not has_expired()
        kit.clock.advance(HOUR)
        assert has_expired()
        may_extend.set()
        wait_until(lambda: not has_expired())  # the next heartbeat extends the lease, as no one took over
        with pytest.raises(StepBusyError):
            kit.observer.run_step("run", "pay", work, {})
        return {"done": True}

    assert kit.store.run_step("run", "pay", work, {}, lease=LEASE) == {"done": True}


def test_batches_and_pipelines_follow_the_clock(kit: StepKit) -> None:
    store = kit.store
    claims = [result.step_run for result in store.batch([store.calls.begin_step("run", "a", {}, lease=HOUR)])]
    kit.clock.advance(HOUR)

    (taken,) = store.batch([store.calls.begin_step("run", "a", {}, lease=HOUR)])
    kit.clock.advance(HOUR)
    pipeline = store.client.pipeline(transaction=False)
    queued = store.queue(pipeline, store.calls.begin_step("run", "a", {}, lease=HOUR))
    third = queued.result(pipeline.execute())

    assert [claims[0].attempt, taken.step_run.attempt, third.step_run.attempt] == [1, 2, 3]


def test_advanced_clock_does_not_change_the_diagnosis(kit: StepKit, store: StepRunStore) -> None:
    def levels(store: StepRunStore) -> dict[str, object]:
        return {finding.check: finding.level for finding in store.doctor().findings}

    before = levels(store)
    kit.clock.advance(HOUR)

    assert levels(store) == before


@pytest.mark.servers("valkey", "cluster", "redis-7", "redis-6")
def test_store_without_a_kit_uses_the_server_time(kit: StepKit, backend: Backend) -> None:
    kit.clock.advance(HOUR)
    other = StepRunStore(backend.connect(), prefix=kit.prefix)
    with other.client:
        held = begun(kit.store.begin_step("run", "pay", {}, lease=HOUR))
        assert stored(other).started_at == held.started_at
        begun(other.begin_step("run", "mail", {}))
        started = stored(other, step="mail").started_at
        assert started is not None
        assert abs(started.timestamp() - backend.now()) < HOUR / 2


@pytest.mark.parametrize("name", sorted(path.stem for path in directory().glob("*.lua")))
@pytest.mark.parametrize(
    "command",
    [
        lambda known: [b"evalsha", known.sha, b"1", b"key"],
        lambda known: [b"EVAL", known.source, b"1", b"key"],
        lambda known: [b"SCRIPT", b"load", known.source],
    ],
)
def test_every_script_is_recognized_in_every_command_form(name: str, command: Callable[..., list[bytes]]) -> None:
    sent = command(script(name))
    clock = StepClock(lambda: (0, 0))

    assert script_of(sent) == name
    assert script(name).source in clock.shift(sent)
    clock.advance(1)
    assert script(name).source not in clock.shift(sent)
    assert any(word.endswith(script(name).source) for word in clock.shift(sent))
    assert len(clock.shift(sent)) == len(sent)
    assert clock.shift([b"GET", script(name).sha]) == [b"GET", script(name).sha]


def test_closed_kit_leaves_no_keys(backend: Backend) -> None:
    with StepKit(backend.url or "fakeredis") as kit:
        kit.store.fail_step(begun(kit.store.begin_step("run", "pay", {}, lease=60)), {})
        begun(kit.store.begin_step("run*", "pay", {}, lease=60))
        prefix = kit.prefix
        assert len(keys_of(kit.observer.client, prefix)) >= 3

    assert keys_of(backend.raw, prefix) == set()
