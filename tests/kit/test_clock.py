"""The clock of a kit: what goes by it, on each server, by both stores."""

from __future__ import annotations

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


def test_a_lease_ends_when_the_clock_gets_there_and_not_before(kit: StepKit, store: StepRunStore) -> None:
    held = begun(store.begin_step("run", "pay", {}, lease=HOUR))

    kit.clock.advance(HOUR - 60)
    assert store.begin_step("run", "pay", {}).busy
    assert store.lapsed_claims() == []
    assert store.live_claims() == [held]
    kit.clock.advance(timedelta(seconds=60))

    assert store.lapsed_claims() == [held]
    assert store.live_claims() == []
    assert begun(store.begin_step("run", "pay", {})).attempt == 2
    assert [attempt.outcome for attempt in store.attempts("run", "pay")] == [Outcome.LEASE_EXPIRED, Outcome.RUNNING]


def test_a_live_lease_says_when_it_ends_by_the_moved_clock(kit: StepKit, store: StepRunStore) -> None:
    kit.clock.advance(10 * HOUR)
    held = begun(store.begin_step("run", "pay", {}, lease=HOUR))
    kit.clock.advance(HOUR / 2)

    retry_in = store.begin_step("run", "pay", {}).retry_in

    assert retry_in is not None
    assert HOUR / 2 - 10 < retry_in <= HOUR / 2
    assert held.lease_ends_at is not None
    assert abs((held.lease_ends_at - kit.clock.now()).total_seconds() - retry_in) < 10


def test_to_the_end_of_a_lease(kit: StepKit, store: StepRunStore) -> None:
    held = begun(store.begin_step("run", "pay", {}, lease=HOUR))
    assert held.lease_ends_at is not None

    kit.clock.advance_to(held.lease_ends_at)
    now = kit.clock.now()
    kit.clock.advance_to(held.started_at or now)  # has passed

    assert kit.clock.now() - now < timedelta(seconds=10)
    assert begun(store.begin_step("run", "pay", {})).attempt == 2


@pytest.mark.parametrize("span", [-0.001, float("nan"), timedelta(seconds=-1)])
def test_it_cannot_be_set_back(span: float | timedelta) -> None:
    with pytest.raises(ValueError, match="span"):
        StepClock(lambda: (0, 0)).advance(span)


def test_a_run_expires_by_it(kit: StepKit, store: StepRunStore) -> None:
    for run in ("short", "long", "claimed"):
        store.complete_step(begun(store.begin_step(run, "pay", {})), {"of": run})
    begun(store.begin_step("claimed", "mail", {}, lease=2 * HOUR))
    assert [store.expire_run(run, ttl) for run, ttl in (("short", 60), ("long", HOUR), ("claimed", 60))] == [True] * 3

    kit.clock.advance(59)
    assert [len(store.get_run(run)) for run in ("short", "long", "claimed")] == [1, 1, 2]
    kit.clock.advance(2)
    assert [len(store.get_run(run)) for run in ("short", "long", "claimed")] == [0, 1, 2]
    store.complete_step(begun(store.begin_step("long", "mail", {})), {})  # renews it
    kit.clock.advance(HOUR - 10)
    assert [len(store.get_run(run)) for run in ("short", "long", "claimed")] == [0, 2, 2]
    kit.clock.advance(2 * HOUR)

    assert [len(store.get_run(run)) for run in ("short", "long", "claimed")] == [0, 0, 0]
    assert begun(store.begin_step("long", "pay", {})).attempt == 1


def test_time_goes_on_by_itself_as_well(kit: StepKit, store: StepRunStore) -> None:
    kit.clock.advance(HOUR)
    store.complete_step(begun(store.begin_step("run", "pay", {})), {})
    assert store.expire_run("run", 0.05)
    began = time.monotonic()
    kit.clock.advance(0.02)

    wait_until(lambda: not store.get_run("run"))

    assert time.monotonic() - began > 0.02


def test_a_tombstone_goes_by_it(kit: StepKit, store: StepRunStore) -> None:
    kit.clock.advance(HOUR)  # what is written now is to last its whole time
    store.complete_step(begun(store.begin_step("run", "pay", {})), {})
    assert store.delete_run("run", tombstone=60)

    kit.clock.advance(59)
    with pytest.raises(RunDeletedError):
        store.begin_step("run", "pay", {})
    kit.clock.advance(1)

    assert begun(store.begin_step("run", "pay", {})).attempt == 1


def test_heartbeats_go_on_by_the_clock_that_is(kit: StepKit) -> None:
    # With the blocking store: its heartbeat is a thread, while this test looks on.
    def is_over() -> bool:
        lease_ends_at = stored(kit.observer).lease_ends_at
        assert lease_ends_at is not None
        return lease_ends_at <= kit.clock.now()

    def work(input: dict[str, object]) -> dict[str, object]:
        assert not is_over()
        kit.clock.advance(HOUR)
        assert is_over()
        wait_until(lambda: not is_over())  # the next beat extends what nobody has taken over
        with pytest.raises(StepBusyError):
            kit.observer.run_step("run", "pay", work, {})
        return {"done": True}

    assert kit.store.run_step("run", "pay", work, {}, lease=0.3) == {"done": True}


def test_batches_and_pipelines_go_by_it(kit: StepKit) -> None:
    store = kit.store
    held = [result.step_run for result in store.batch([store.calls.begin_step("run", "a", {}, lease=HOUR)])]
    kit.clock.advance(HOUR)

    (taken,) = store.batch([store.calls.begin_step("run", "a", {}, lease=HOUR)])
    kit.clock.advance(HOUR)
    pipeline = store.client.pipeline(transaction=False)
    queued = store.queue(pipeline, store.calls.begin_step("run", "a", {}, lease=HOUR))
    third = queued.result(pipeline.execute())

    assert [held[0].attempt, taken.step_run.attempt, third.step_run.attempt] == [1, 2, 3]


def test_the_doctor_is_none_the_worse(kit: StepKit, store: StepRunStore) -> None:
    def checks(of: StepRunStore) -> dict[str, object]:
        return {finding.check: finding.level for finding in of.doctor().findings}

    before = checks(store)
    kit.clock.advance(HOUR)

    assert checks(store) == before


@pytest.mark.servers("valkey", "cluster", "redis-7", "redis-6")
def test_a_store_of_no_kit_never_sends_a_moved_script(kit: StepKit, backend: Backend) -> None:
    kit.clock.advance(HOUR)
    mine = StepRunStore(backend.connect(), prefix=kit.prefix)
    with mine.client:
        held = begun(kit.store.begin_step("run", "pay", {}, lease=HOUR))
        assert stored(mine).started_at == held.started_at
        begun(mine.begin_step("run", "mail", {}))
        started = stored(mine, step="mail").started_at
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
def test_every_script_is_known_however_it_is_sent(name: str, command: Callable[..., list[bytes]]) -> None:
    sent = command(script(name))
    clock = StepClock(lambda: (0, 0))

    assert script_of(sent) == name
    assert script(name).source in clock.moved(sent)
    clock.advance(1)
    assert script(name).source not in clock.moved(sent)
    assert any(word.endswith(script(name).source) for word in clock.moved(sent))
    assert len(clock.moved(sent)) == len(sent)
    assert clock.moved([b"GET", script(name).sha]) == [b"GET", script(name).sha]


def test_the_end_of_a_kit_leaves_no_key(backend: Backend) -> None:
    with StepKit(backend.url or "fakeredis") as kit:
        kit.store.fail_step(begun(kit.store.begin_step("run", "pay", {}, lease=60)), {})
        begun(kit.store.begin_step("run*", "pay", {}, lease=60))
        prefix = kit.prefix
        assert len(keys_of(kit.observer.client, prefix)) >= 3

    assert keys_of(backend.raw, prefix) == set()
