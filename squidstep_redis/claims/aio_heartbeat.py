"""Extends the leases of live claims of an asyncio store, with timers of the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from squidstep_redis.claims.aio_background import SideConnections
from squidstep_redis.claims.extensions import Claim, ExtensionSchedule, reply_seconds
from squidstep_redis.steady import steady_time as time


class AsyncHeartbeat:
    """Extends the claims of one store in one event loop, with timers; a task exists only while a batch is sent.

    A cancelled batch counts as a failed one: it is sent again after a pause. Only the loop holds the timer, so a
    cancellation cannot end the heartbeat for good.
    """

    def __init__(self, side: SideConnections) -> None:
        """Makes a heartbeat without claims.

        Args:
            side: the connections on which the batches are sent.
        """
        self._schedule: ExtensionSchedule = ExtensionSchedule()
        self._side = side
        self._uses_side = False
        self._pid = os.getpid()
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0  # handles of uvloop do not always know their time
        self._task: asyncio.Task[list[Any]] | None = None
        self._limit: asyncio.Timeout | None = None  # of the batch that is being sent

    @property
    def is_sending(self) -> bool:
        """Whether a batch is being sent."""
        return self._task is not None

    def add(self, claim: Claim) -> None:
        """Extends a claim from now on."""
        self._arm_timer(self._schedule.add(claim))
        limit = self._limit
        if limit is not None and not limit.expired():
            until = asyncio.get_running_loop().time() + reply_seconds([claim])
            limit.reschedule(min(until, limit.when() or until))

    def discard(self, claim: Claim) -> None:
        """Stops extending a claim."""
        self._schedule.discard(claim)
        if self._pid == os.getpid():  # in a forked child, timers and connections belong to the parent's event loop
            self._rest()

    async def stop(self) -> None:
        """Cancels the batch that is being sent; if a claim is still live, a later batch extends it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _rest(self) -> None:
        """Stops the timer and closes the connections if there is no claim."""
        if self._task is not None or self._schedule:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._uses_side:
            self._uses_side = False
            self._side.release()

    def _arm_timer(self, due: float | None) -> None:
        """Sets the timer to the next extension, unless a batch is being sent or the timer is set to an earlier time."""
        if due is None or self._task is not None:
            return
        loop = asyncio.get_running_loop()
        when = loop.time() + due - time.monotonic()
        if self._timer is not None:
            if self._fires_at <= when:
                return
            self._timer.cancel()
        self._fires_at = when
        self._timer = loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._pid != os.getpid():  # a forked child that continues its parent's loop; the parent extends the claims
            return
        if claims := self._schedule.due():
            self._start(claims)
        else:
            self._arm_timer(self._schedule.next_at())
            self._rest()

    def _start(self, claims: Sequence[Claim]) -> None:
        if not self._uses_side:
            self._uses_side = True
            self._side.acquire()
        # Not by the loop's task factory: an eager one would run the task before this method has stored it.
        self._task = asyncio.Task(self._send(claims), loop=asyncio.get_running_loop())
        # By a callback, because a task that is cancelled before its first step executes none of its code.
        self._task.add_done_callback(partial(self._on_sent, claims, time.monotonic()))

    async def _send(self, claims: Sequence[Claim]) -> list[Any]:
        try:
            seconds = reply_seconds(self._schedule.live())  # the next batch waits for this one
            async with asyncio.timeout(seconds) as self._limit:
                return await self._side.transport.send_batch([claim.extension() for claim in claims])
        except TimeoutError:
            self._side.close()  # the server does not reply on them
            raise
        finally:
            self._limit = None

    def _on_sent(self, claims: Sequence[Claim], sent_at: float, task: asyncio.Task[list[Any]]) -> None:
        self._task = None
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Exception):
            error = InterruptedError("the extension was interrupted")
        self._schedule.on_extension_results(claims, task.result() if error is None else error, sent_at)
        self._arm_timer(self._schedule.next_at())
        self._rest()
