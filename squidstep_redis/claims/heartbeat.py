"""Extends the leases of live claims: one heartbeat per client, in a thread or with timers of an event loop.

`ExtensionSchedule` decides when to extend which claims. The two heartbeats do the waiting and send the batches.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary, ref

from squidstep_redis.claims.rules import LAST_PAUSE, BaseClaim

Claim = BaseClaim[Any]


class ExtensionSchedule:
    """Decides when to extend which claims of one client, in as few batches as possible.

    Unreferenced claims are dropped; their leases expire.
    """

    def __init__(self) -> None:
        # By id: the claim, and when its extension is due. Not a WeakKeyDictionary, which runs a callback for each claim
        # that is freed: an exception that a signal handler raises there is lost.
        self._due: dict[int, tuple[ref[Claim], float]] = {}

    def __len__(self) -> int:
        return sum(reference() is not None for reference, _ in self._due.values())

    def add(self, claim: Claim) -> float:
        """Adds a claim; returns when its extension is due, on the monotonic clock."""
        self._due[id(claim)] = ref(claim), claim.next_extension_at
        return claim.next_extension_at

    def discard(self, claim: Claim) -> None:
        """Removes a claim."""
        self._due.pop(id(claim), None)

    def next_at(self) -> float | None:
        """Returns when the next extension is due; None if there is no claim."""
        return min((due for reference, due in self._due.values() if reference() is not None), default=None)

    def due(self) -> list[Claim]:
        """Returns the claims to extend now: if one is due, also those due soon, so that they share later batches."""
        now = time.monotonic()
        earliest = self.next_at()
        if earliest is None or earliest > now:
            return []
        found: list[Claim] = []
        for key, (reference, due) in list(self._due.items()):
            claim = reference()
            if claim is None or not claim.is_live:
                del self._due[key]
            elif due - claim.interval / 2 <= now:
                found.append(claim)
        return found

    def on_extension_results(
        self, claims: Sequence[Claim], results: Sequence[object] | Exception, sent_at: float
    ) -> None:
        """Applies the results of a batch, or the error that the batch raised."""
        if isinstance(results, Exception):
            results = [results] * len(claims)
        now = time.monotonic()
        for claim, result in zip(claims, results, strict=True):
            if id(claim) not in self._due:  # it ended in the meantime
                continue
            if not claim.on_extension_result(result, sent_at):
                self.discard(claim)
                continue
            failed = isinstance(result, Exception)
            due = now + min(LAST_PAUSE, claim.interval / 2) if failed else claim.next_extension_at
            self._due[id(claim)] = ref(claim), due


class Heartbeat:
    """Extends the claims of one client in its own thread, which exits after IDLE seconds without a claim."""

    IDLE: Final = 5.0  # seconds

    def __init__(self) -> None:
        self._schedule: ExtensionSchedule = ExtensionSchedule()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._waits_until = 0.0

    def add(self, claim: Claim) -> None:
        """Extends a claim from now on."""
        with self._changed:
            due = self._schedule.add(claim)
            if self._thread is None:
                self._waits_until = due
                thread = threading.Thread(target=self._run, name="squidstep-heartbeat", daemon=True)
                thread.start()
                self._thread = thread
            elif due < self._waits_until:
                self._changed.notify()

    def discard(self, claim: Claim) -> None:
        """Stops extending a claim."""
        with self._changed:
            self._schedule.discard(claim)

    def _run(self) -> None:
        while True:
            with self._changed:
                claims = self._wait()
                if claims is None:
                    self._thread = None
                    return
            self._extend(claims)
            del claims  # this reference would prevent a claim from being freed

    def _wait(self) -> Sequence[Claim] | None:
        """Waits until extensions are due; returns None if there was no claim for IDLE seconds."""
        idle_since = time.monotonic()
        while True:
            due, now = self._schedule.next_at(), time.monotonic()
            if due is not None and due <= now:
                return self._schedule.due()
            if due is not None:
                idle_since = now
            elif now >= idle_since + self.IDLE:
                return None
            # Ending the last claim does not notify this thread: that would make every short step slower.
            self._waits_until = min(due or now + self.IDLE, now + self.IDLE)
            self._changed.wait(self._waits_until - now)

    def _extend(self, claims: Sequence[Claim]) -> None:
        sent_at = time.monotonic()
        try:
            results: Any = claims[0].store.batch([claim.extension() for claim in claims])
        except Exception as error:  # noqa: BLE001 -- the next extension may succeed
            results = error
        with self._changed:
            self._schedule.on_extension_results(claims, results, sent_at)


_heartbeats: WeakKeyDictionary[Any, Heartbeat] = WeakKeyDictionary()
_heartbeats_lock = threading.Lock()


def heartbeat_of(client: Any) -> Heartbeat:
    """Returns the heartbeat of a blocking client, in this process."""
    with _heartbeats_lock:
        heartbeat = _heartbeats.get(client)
        if heartbeat is None:
            heartbeat = _heartbeats[client] = Heartbeat()
        return heartbeat


def _after_fork() -> None:
    """Drops the claims and the threads in the child: the parent extends them."""
    global _heartbeats_lock  # noqa: PLW0603 -- in the child, the old lock may never be released
    _heartbeats_lock = threading.Lock()
    _heartbeats.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_after_fork)


class AsyncHeartbeat:
    """Extends the claims of one client with timers of the event loop; a task exists only while a batch is sent."""

    def __init__(self) -> None:
        self._schedule: ExtensionSchedule = ExtensionSchedule()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, claim: Claim) -> None:
        """Extends a claim from now on."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a client may be used in several loops, one after another
            self._loop, self._timer, self._task = loop, None, None
        self._schedule.add(claim)
        self._arm_timer()

    def discard(self, claim: Claim) -> None:
        """Stops extending a claim."""
        self._schedule.discard(claim)
        if not self._schedule and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def stop(self) -> None:
        """Cancels the batch that is being sent; if a claim is still live, the next batch extends it."""
        if self._task is not None and self._loop is asyncio.get_running_loop():
            self._task.cancel()
            await asyncio.wait([self._task])
            self._arm_timer()

    def _arm_timer(self) -> None:
        """Sets the timer to the next extension, unless a batch is being sent or the timer is set to an earlier time."""
        due = self._schedule.next_at()
        if due is None or self._loop is None or self._task is not None:
            return
        when = self._loop.time() + due - time.monotonic()
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._start)

    def _start(self) -> None:
        self._timer = None
        if self._loop is not None:
            self._task = self._loop.create_task(self._extend())

    async def _extend(self) -> None:
        try:
            if claims := self._schedule.due():
                sent_at = time.monotonic()
                try:
                    results: Any = await claims[0].store.batch([claim.extension() for claim in claims])
                except Exception as error:  # noqa: BLE001 -- the next extension may succeed
                    results = error
                self._schedule.on_extension_results(claims, results, sent_at)
        finally:
            self._task = None
        self._arm_timer()


_async_heartbeats: WeakKeyDictionary[Any, AsyncHeartbeat] = WeakKeyDictionary()


def async_heartbeat_of(client: Any) -> AsyncHeartbeat:
    """Returns the heartbeat of an asyncio client."""
    heartbeat = _async_heartbeats.get(client)
    if heartbeat is None:
        heartbeat = _async_heartbeats[client] = AsyncHeartbeat()
    return heartbeat
