"""`ExtensionSchedule`: when to extend which claims, tried with a fake clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from support.claims import Clock, fake_clock, granted_claim, lease_seconds

from squidstep_redis.claims.extensions import ExtensionSchedule
from squidstep_redis.claims.rules import BaseClaim

leases = st.floats(1, 20).map(lambda seconds: round(seconds, 3))
moments = st.floats(0, 40)


class TestExtensionSchedule:
    @pytest.fixture
    def clock(self) -> Iterator[Clock]:
        with fake_clock() as clock:
            yield clock

    @settings(max_examples=25)
    @given(
        lives=st.lists(st.tuples(moments, leases, moments, st.booleans()), min_size=1, max_size=12),
        latency=st.floats(0, 0.25),
    )
    def test_every_claim_is_extended_before_its_lease_ends(
        self, clock: Clock, lives: list[tuple[float, float, float, bool]], latency: float
    ) -> None:
        """Each claim is begun at some time, held for some time, and then discarded or dropped."""
        schedule: ExtensionSchedule = ExtensionSchedule()
        clock.now = 1_000.0
        plans = {
            index: (clock.now + start, lease, time, drop) for index, (start, lease, time, drop) in enumerate(lives)
        }
        claims: dict[int, BaseClaim[threading.Event]] = {}
        ends: dict[int, float] = {}  # of the leases, on the server
        while plans or claims:
            begins = [(start, "begin", index) for index, (start, *_) in plans.items() if index not in claims]
            leaves = [(plans[index][0] + plans[index][2], "leave", index) for index in claims]
            due = schedule.next_at()
            at, event, index = min([*begins, *leaves, *([] if due is None else [(due, "extend", -1)])])
            clock.now = max(clock.now, at)
            if event == "begin":
                claims[index] = granted_claim(plans[index][1])
                ends[index] = clock.now + plans[index][1]
                assert schedule.add(claims[index]) > clock.now
            elif event == "leave":
                if not plans.pop(index)[3]:
                    schedule.discard(claims[index])
                del claims[index]
            else:
                due_claims, sent_at = schedule.due(), clock.now
                assert due_claims
                clock.now += latency  # the server may receive it at any time from sent_at to now
                for index, claim in claims.items():
                    if claim in due_claims:
                        assert clock.now < ends[index]
                        ends[index] = sent_at + plans[index][1]
                    assert clock.now < ends[index]
                schedule.on_extension_results(due_claims, [None] * len(due_claims), sent_at)
                del due_claims, claim
            assert len(schedule) == len(claims)
        assert schedule.next_at() is None

    @given(starts=st.lists(moments, min_size=1, max_size=12), lease=leases)
    def test_equal_leases_converge_to_one_batch(self, clock: Clock, starts: list[float], lease: float) -> None:
        schedule: ExtensionSchedule = ExtensionSchedule()
        clock.now = begin = 1_000.0
        claims: list[BaseClaim[threading.Event]] = []
        settled = begin + max(starts) + 2 * lease / 3
        for start in sorted(starts):
            self.extend_until(schedule, clock, begin + start)
            claims.append(granted_claim(lease))
            schedule.add(claims[-1])
        self.extend_until(schedule, clock, settled + 0.001)

        sizes = self.extend_until(schedule, clock, settled + 3 * lease)

        assert len(sizes) >= 8
        assert set(sizes) == {len(claims)}

    def extend_until(self, schedule: ExtensionSchedule, clock: Clock, end: float) -> list[int]:
        """Extends claims when they are due, until a time; returns the size of each batch."""
        sizes: list[int] = []
        while (due := schedule.next_at()) is not None and due < end:
            clock.now = due
            due_claims = schedule.due()
            schedule.on_extension_results(due_claims, [None] * len(due_claims), due)
            sizes.append(len(due_claims))
        clock.now = end
        return sizes

    @given(lease=st.floats(0.001, 400 * 24 * 3_600 - 40 * 24 * 3_600))
    def test_failed_batch_is_retried_within_a_second(self, clock: Clock, lease: float) -> None:
        schedule: ExtensionSchedule = ExtensionSchedule()
        claim = granted_claim(lease)
        end = clock.now + lease_seconds(claim)
        schedule.add(claim)
        tries = 0
        while (due := schedule.next_at()) is not None and due < end and tries < 10:
            clock.now = due
            assert schedule.due() == [claim]
            schedule.on_extension_results([claim], redis.ConnectionError("down"), due)
            tries += 1

        assert tries >= 3
        assert cast("float", schedule.next_at()) <= clock.now + 1
        assert not claim.lost.is_set()

    def test_nothing_is_due_before_the_interval_has_passed(self, clock: Clock) -> None:
        schedule: ExtensionSchedule = ExtensionSchedule()
        claim = granted_claim(30)
        assert schedule.next_at() is None
        assert schedule.add(claim) == schedule.next_at() == clock.now + 10

        clock.now += 9.9
        assert schedule.due() == []
        clock.now += 0.2
        assert schedule.due() == [claim]
