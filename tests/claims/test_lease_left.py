"""How long a lease lasts, as its holder, its heartbeat and a waiter calculate it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
from support.backends import Bench
from support.claims import (
    Clock,
    Worker,
    acquisition,
    around_batches,
    asyncio_only,
    extend_now,
    fake_clock,
    fakeredis_only,
    granted_claim,
    interrupted_seconds,
    no_heartbeat_threads,
)
from support.records import begun

from squidstep_redis import BeginResult, Call, StaleStepRunError, StepRunStore
from squidstep_redis.claims.extensions import ExtensionSchedule
from squidstep_redis.protocol.workflow import Send, Sleep

LEASE = 30.0
DELAY = 5.0  # seconds that a reply takes


@pytest.fixture
def clock() -> Iterator[Clock]:
    with fake_clock() as clock:
        yield clock


@pytest.mark.parametrize("lease", [1.001, 4.018, 0.0019, timedelta(microseconds=1_900)])
def test_lease_is_rounded_to_the_nearest_millisecond(store: StepRunStore, lease: Any) -> None:
    seconds = lease.total_seconds() if isinstance(lease, timedelta) else lease
    claim = begun(store.begin_step("run", "pay", {}, lease=lease))

    assert claim.lease_ends_at == cast("Any", claim.started_at) + timedelta(milliseconds=round(seconds * 1_000))


class TestLeaseLeft:
    """`lease_left` counts from the moment before the call was sent: the server cannot have received it earlier."""

    def test_lease_left_decreases_with_time(self, clock: Clock) -> None:
        claim = granted_claim(LEASE)
        assert claim.lease_left == LEASE

        clock.now += 12
        assert claim.lease_left == LEASE - 12
        clock.now += LEASE
        assert claim.lease_left == 0

    @fakeredis_only
    def test_slow_reply_to_the_claim_shortens_lease_left(self, store: StepRunStore, clock: Clock) -> None:
        claim = store.claim_step("run", "pay", {}, lease=LEASE)
        acquiring = acquisition(claim)
        effect = next(acquiring)
        assert isinstance(effect, Send)
        reply = store.send(effect.call)
        clock.now += DELAY
        with pytest.raises(StopIteration):
            acquiring.send(reply)

        assert claim.lease_left == LEASE - DELAY

    @fakeredis_only
    def test_slow_reply_to_the_extension_shortens_lease_left(self, worker: Worker, clock: Clock) -> None:
        def delay(size: int) -> None:
            clock.now += DELAY

        with no_heartbeat_threads(), worker.claim(lease=LEASE) as block:
            around_batches(worker, after=delay)
            extend_now(worker, block.claim, clock)

            assert block.claim.lease_left == LEASE - DELAY
            assert block.claim.next_extension_at == clock.now - DELAY + LEASE / 3
            block.complete({})


class TestWaiter:
    @fakeredis_only
    @pytest.mark.parametrize("left", [0.001, 0.02])
    def test_pause_is_not_longer_than_the_lease_of_the_holder(self, store: StepRunStore, left: float) -> None:
        holder = begun(store.begin_step("run", "pay", {}, lease=LEASE))
        acquiring = acquisition(store.claim_step("run", "pay", {}, on_busy="wait"))

        for _ in range(8):
            assert isinstance(next(acquiring), Send)
            pause = acquiring.send(BeginResult(holder, "busy", left))
            assert pause == Sleep(left)

    @fakeredis_only
    def test_pauses_under_a_long_lease_stay_short(self, store: StepRunStore) -> None:
        holder = begun(store.begin_step("run", "pay", {}, lease=LEASE))
        acquiring = acquisition(store.claim_step("run", "pay", {}, on_busy="wait"))

        for _ in range(8):
            assert isinstance(next(acquiring), Send)
            pause: Any = acquiring.send(BeginResult(holder, "busy", LEASE))
            assert 0 < pause.seconds <= 1.25


class TestDeadClaim:
    """A claim that ended, was lost or is unreferenced gives the heartbeat nothing to do."""

    def test_unreferenced_claim_is_never_due(self, clock: Clock) -> None:
        schedule: ExtensionSchedule = ExtensionSchedule()
        claim = granted_claim(LEASE)
        schedule.add(claim)
        assert (len(schedule), schedule.next_at()) == (1, clock.now + LEASE / 3)

        del claim
        gc.collect()

        assert (len(schedule), schedule.next_at()) == (0, None)

    @fakeredis_only
    def test_ended_claim_is_dropped_when_it_is_due(self, worker: Worker, clock: Clock) -> None:
        schedule: ExtensionSchedule = ExtensionSchedule()
        with no_heartbeat_threads(), worker.claim(lease=LEASE) as block:
            schedule.add(block.claim)
            block.complete({})
        clock.now += LEASE

        assert schedule.due() == []
        assert (len(schedule), schedule.next_at()) == (0, None)

    @fakeredis_only
    def test_lost_claim_is_dropped_at_once(self, store: StepRunStore, clock: Clock) -> None:
        current = begun(store.begin_step("run", "pay", {}))
        schedule: ExtensionSchedule = ExtensionSchedule()
        lost, live = granted_claim(LEASE), granted_claim(LEASE)
        for claim in (lost, live):
            schedule.add(claim)

        schedule.on_extension_results([lost, live], [StaleStepRunError(current, "was taken over"), None], clock.now)

        assert len(schedule) == 1
        assert (lost.lost.is_set(), live.lost.is_set()) == (True, False)
        clock.now += LEASE
        assert schedule.due() == [live]


@fakeredis_only
@asyncio_only
@pytest.mark.parametrize("reply", ["is late", "never comes"])
def test_cancelled_acquisition_is_undone_for_a_limited_time(bench: Bench, worker: Worker, reply: str) -> None:
    """The cancelled task re-sends the claim to release it, but does not wait without limit for the reply."""
    sent: list[str] = []
    store = worker.plain_store
    send = store._transport.send

    async def send_slowly(call: Call[Any]) -> Any:
        sent.append(call.script.name)
        if len(sent) == 1:
            task.cancel()
        elif reply == "never comes":
            await asyncio.Event().wait()
        await asyncio.sleep(0.01)
        return await send(call)

    async def main() -> None:
        nonlocal task
        store._transport.send = send_slowly
        task = asyncio.create_task(store.run_step("run", "pay", dict, {}))
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(task), 30)
        assert task.cancelled()

    task: asyncio.Task[Any] = cast("Any", None)
    with interrupted_seconds(0.05 if reply == "never comes" else 30):
        cast("asyncio.Runner", worker.runner).run(main())

    assert sent == ["begin_step", "begin_step"] + (["release_step"] if reply == "is late" else [])
