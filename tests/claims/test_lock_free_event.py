"""The event of a lost claim: `set` never blocks."""

from __future__ import annotations

import threading

from squidstep_redis.claims.threads import LockFreeEvent


class TestLockFreeEvent:
    def test_set_wakes_all_waiters(self) -> None:
        event, results = LockFreeEvent(), list[bool]()
        waiters = [threading.Thread(target=lambda: results.append(event.wait(30))) for _ in range(5)]
        for waiter in waiters:
            waiter.start()
        event.set()
        for waiter in waiters:
            waiter.join(30)

        assert (results, event.is_set()) == ([True] * 5, True)

    def test_wait_returns_false_after_its_timeout(self) -> None:
        event = LockFreeEvent()

        assert not event.wait(0.01)
        assert not event.wait(-1)
        event.set()
        assert event.wait(0)
        event.clear()
        assert not event.is_set()
