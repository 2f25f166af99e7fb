"""What keeps claims alive: one heartbeat for all claims on one client, from a thread or by the timers of an event loop.

`ExtensionSchedule` decides when to extend which claims; the two heartbeats wait, and send the batches.
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
    """When to extend which claims: those of one client, in as few batches as can be.

    A claim that nobody else holds is forgotten: whatever tore its block down, its lease shall end.
    """

    def __init__(self) -> None:
        # By id, each with when it is due. Not a WeakKeyDictionary: it has a callback for each claim that dies, and an
        # exception that a signal handler raises in there is lost.
        self._due: dict[int, tuple[ref[Claim], float]] = {}

    def __len__(self) -> int:
        return sum(reference() is not None for reference, _ in self._due.values())

    def add(self, claim: Claim) -> float:
        """Looks after a claim; answers when it is to be extended, by the monotonic clock."""
        self._due[id(claim)] = ref(claim), claim.next_extension_at
        return claim.next_extension_at

    def discard(self, claim: Claim) -> None:
        """Looks after a claim no more."""
        self._due.pop(id(claim), None)

    def next_at(self) -> float | None:
        """When to extend next; None if there is no claim."""
        return min((due for reference, due in self._due.values() if reference() is not None), default=None)

    def due(self) -> list[Claim]:
        """The claims to extend now: if one is due, also those that will be soon, so that they fall into step."""
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
        """Takes in what the batch answered, or why it did not."""
        if isinstance(results, Exception):
            results = [results] * len(claims)
        now = time.monotonic()
        for claim, result in zip(claims, results, strict=True):
            if id(claim) not in self._due:  # it has ended meanwhile
                continue
            if not claim.on_extension_result(result, sent_at):
                self.discard(claim)
                continue
            failed = isinstance(result, Exception)
            due = now + min(LAST_PAUSE, claim.interval / 2) if failed else claim.next_extension_at
            self._due[id(claim)] = ref(claim), due


class Heartbeat:
    """Extends the claims of one client from a thread of its own, which ends when it has had none for a while."""

    IDLE: Final = 5.0  # seconds

    def __init__(self) -> None:
        self._schedule: ExtensionSchedule = ExtensionSchedule()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wakes_at = 0.0

    def add(self, claim: Claim) -> None:
        """Keeps a claim alive from now on."""
        with self._changed:
            due = self._schedule.add(claim)
            if self._thread is None:
                self._wakes_at = due
                thread = threading.Thread(target=self._run, name="squidstep-heartbeat", daemon=True)
                thread.start()
                self._thread = thread
            elif due < self._wakes_at:
                self._changed.notify()

    def discard(self, claim: Claim) -> None:
        """Lets a claim go."""
        with self._changed:
            self._schedule.discard(claim)

    def _run(self) -> None:
        while True:
            with self._changed:
                claims = self._wait()
                if claims is None:
                    self._thread = None
                    return
            self._beat(claims)
            del claims  # nothing here keeps a claim alive that nobody else holds

    def _wait(self) -> Sequence[Claim] | None:
        """Waits for the next beat; None if there has been nothing to wait for."""
        idle_since = time.monotonic()
        while True:
            due, now = self._schedule.next_at(), time.monotonic()
            if due is not None and due <= now:
                return self._schedule.due()
            if due is not None:
                idle_since = now
            elif now >= idle_since + self.IDLE:
                return None
            # Who ends the last claim does not wake it: that would cost each short step more than this does.
            self._wakes_at = min(due or now + self.IDLE, now + self.IDLE)
            self._changed.wait(self._wakes_at - now)

    def _beat(self, claims: Sequence[Claim]) -> None:
        sent_at = time.monotonic()
        try:
            results: Any = claims[0].store.batch([claim.extension() for claim in claims])
        except Exception as error:  # noqa: BLE001 -- whatever it was, the next beat may get through
            results = error
        with self._changed:
            self._schedule.on_extension_results(claims, results, sent_at)


_heartbeats: WeakKeyDictionary[Any, Heartbeat] = WeakKeyDictionary()
_heartbeats_lock = threading.Lock()


def heartbeat_of(client: Any) -> Heartbeat:
    """The heartbeat of a blocking client, in this process."""
    with _heartbeats_lock:
        heartbeat = _heartbeats.get(client)
        if heartbeat is None:
            heartbeat = _heartbeats[client] = Heartbeat()
        return heartbeat


def _after_fork() -> None:
    """The claims stay with the parent, as do the threads."""
    global _heartbeats_lock  # noqa: PLW0603 -- the old one may be held for ever
    _heartbeats_lock = threading.Lock()
    _heartbeats.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


class AsyncHeartbeat:
    """Extends the claims of one client, by timers of the event loop: no task lives while there is nothing to send."""

    def __init__(self) -> None:
        self._schedule: ExtensionSchedule = ExtensionSchedule()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def add(self, claim: Claim) -> None:
        """Keeps a claim alive from now on."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:  # a client may serve one loop after another
            self._loop, self._timer, self._task = loop, None, None
        self._schedule.add(claim)
        self._arm_timer()

    def discard(self, claim: Claim) -> None:
        """Lets a claim go."""
        self._schedule.discard(claim)
        if not self._schedule and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def stop(self) -> None:
        """Ends a beat that is under way; if a claim is live yet, another makes up for it."""
        if self._task is not None and self._loop is asyncio.get_running_loop():
            self._task.cancel()
            await asyncio.wait([self._task])
            self._arm_timer()

    def _arm_timer(self) -> None:
        """Sets the timer to the next beat, unless one is under way or it is set to an earlier time."""
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
            self._task = self._loop.create_task(self._beat())

    async def _beat(self) -> None:
        try:
            if claims := self._schedule.due():
                sent_at = time.monotonic()
                try:
                    results: Any = await claims[0].store.batch([claim.extension() for claim in claims])
                except Exception as error:  # noqa: BLE001 -- whatever it was, the next beat may get through
                    results = error
                self._schedule.on_extension_results(claims, results, sent_at)
        finally:
            self._task = None
        self._arm_timer()


_async_heartbeats: WeakKeyDictionary[Any, AsyncHeartbeat] = WeakKeyDictionary()


def async_heartbeat_of(client: Any) -> AsyncHeartbeat:
    """The heartbeat of an asyncio client."""
    heartbeat = _async_heartbeats.get(client)
    if heartbeat is None:
        heartbeat = _async_heartbeats[client] = AsyncHeartbeat()
    return heartbeat
