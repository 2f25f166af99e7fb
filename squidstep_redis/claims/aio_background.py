"""Asyncio work that continues when the task that started it is cancelled: it gives claims back, or records failures.

the caller ──starts──▶ BackgroundTask ──starts──▶ a task for each attempt to send
waits a second at most     a cancellation does not     may be cancelled like any other;
                           end it                      then the call is sent again
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final, Generic, Self, TypeVar
from weakref import WeakKeyDictionary

from squidstep_redis.claims.unfinished import INTERRUPTED_SECONDS
from squidstep_redis.errors import SquidstepError
from squidstep_redis.protocol.call import Call
from squidstep_redis.server_errors import NotReplicatedError, OutcomeUnknownError, ServerError
from squidstep_redis.signals import is_raised_by_handler
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.aio import AsyncTransport

T = TypeVar("T")

_GRACE: Final = 1.0  # seconds for which a background task continues after a cancellation
_FIRST_PAUSE: Final = 0.05
_LAST_PAUSE: Final = 1.0
_SEND_SECONDS: Final = 0.25  # seconds until a call is sent on another connection

_running: set[BackgroundTask[Any]] = set()  # an event loop has only weak references to its tasks


class BackgroundTask(asyncio.Task[T]):
    """A task that ends at its deadline, or a second after it was cancelled.

    Shutdown routines, such as that of `asyncio.run`, cancel all tasks and wait for them. This task then has a second.
    It must not use `asyncio.timeout`, which would cancel it.

    Attributes:
        owner: the object for which it works.
        is_over: whether its time is up.
    """

    def __init__(self, work: Coroutine[Any, Any, T], owner: object, seconds: float) -> None:
        """Starts work in the running event loop.

        Args:
            work: a coroutine.
            owner: the object for which it works.
            seconds: seconds after which it ends.
        """
        loop = asyncio.get_running_loop()
        self.owner = owner
        self.is_over = False
        self._ends_at = loop.time() + seconds  # handles of uvloop do not always know their time
        self._limit: asyncio.TimerHandle | None = None
        # An exception from outside may leave it after this line: then the task exists, and may be cancelled.
        super().__init__(work, loop=loop)  # not by the loop's task factory, which may be an eager one
        self._limit_to(self._ends_at)
        _running.add(self)
        self.add_done_callback(_forget)

    def cancel(self, msg: Any | None = None) -> bool:  # noqa: ARG002 -- as in the base class
        """Ends the task in a second."""
        if self.done():
            return False
        loop = self.get_loop()
        ends_at = loop.time() + _GRACE
        if ends_at < self._ends_at:
            self._limit_to(ends_at)
        return True

    def _limit_to(self, ends_at: float) -> None:
        before, self._ends_at = self._limit, ends_at
        self._limit = self.get_loop().call_at(ends_at, self.end)
        if before is not None:
            before.cancel()

    def end(self) -> None:
        """Ends the task now."""
        self._unlimit()
        self.is_over = True
        super().cancel()

    def _unlimit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()

    def forget(self) -> None:
        """Cleans up when the task has ended."""
        _running.discard(self)
        self._unlimit()
        if not self.cancelled():
            self.exception()  # otherwise asyncio logs that it was never retrieved


def _forget(task: BackgroundTask[Any]) -> None:
    task.forget()


async def wait_for_background_of(owner: object, seconds: float) -> None:
    """Waits until the background tasks of an owner in this event loop have ended; ends those that take longer."""
    loop = asyncio.get_running_loop()
    tasks = [task for task in list(_running) if task.owner is owner and task.get_loop() is loop]
    if not tasks:
        return
    try:
        await asyncio.wait(tasks, timeout=seconds)
    finally:
        for task in tasks:
            task.end()


class SideConnections:
    """Connections outside the client's pool, which may be exhausted. They are open while they are used."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._main = transport
        self._side: AsyncTransport | None = None
        self._users = 0

    def acquire(self) -> None:
        """Prepares the connections, which are opened at their first use."""
        self._users += 1

    def release(self) -> None:
        """Closes the connections unless they are used otherwise."""
        self._users -= 1
        if not self._users:
            self.close()

    @property
    def transport(self) -> AsyncTransport:
        """The transport that sends on these connections."""
        if self._side is None:
            self._side = self._main.beside_pool()
        return self._side

    def close(self) -> None:
        """Closes the connections. Senders that still use them open new ones."""
        side, self._side = self._side, None
        if side is not None and side is not self._main:
            side.close()


class LastingSender:
    """Sends calls until the server has replied, a permanent error is raised, or the time is up.

    Attributes:
        last_error: the error of the last attempt.
        interruption: the exception of a signal handler that interrupted an attempt; the call was sent again.
    """

    def __init__(self, transport: AsyncTransport, side: SideConnections) -> None:
        self._transport = transport
        self._side = side
        self.last_error: ServerError | None = None
        self.interruption: BaseException | None = None

    def start(self, work: Callable[[], Coroutine[Any, Any, T]], seconds: float) -> BackgroundTask[T]:
        """Starts work that uses `send`, for some seconds at most. If it is interrupted, it begins again."""
        self._side.acquire()
        task = BackgroundTask(self._repeated(work), self._transport, seconds)
        task.add_done_callback(lambda _: self._side.release())
        return task

    async def _repeated(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        while True:
            try:
                return await work()
            except (SquidstepError, asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as error:
                if not _is_from_outside(error):
                    raise
                self.interruption = error
                if not isinstance(error, Exception):  # such as KeyboardInterrupt, which ends the event loop's run
                    asyncio.get_running_loop().call_soon(_raise, error)

    def limited(self, _: float) -> Self:
        """Returns itself: its time is limited."""
        return self

    async def send(self, call: Call[T]) -> T:
        """Sends a call; returns its result. Call it in a background task."""
        pause = _FIRST_PAUSE
        transport, limit = self._transport, _SEND_SECONDS
        while True:
            try:
                return await self._attempt(transport, call, limit)
            except TimeoutError:
                pass
            except ServerError as error:
                if not error.transient or isinstance(error, NotReplicatedError):  # which is about a call that succeeded
                    raise
                self.last_error = error
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE)
            transport, limit = self._side.transport, None

    async def _attempt(self, transport: AsyncTransport, call: Call[T], limit: float | None) -> T:
        """Sends a call in a separate task, which may be cancelled like any other."""
        loop = asyncio.get_running_loop()
        task = asyncio.Task(transport.send(call), loop=loop)
        timer = None if limit is None else loop.call_later(limit, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if isinstance(current, BackgroundTask) and current.is_over:
                raise
            raise TimeoutError from None
        except (SquidstepError, GeneratorExit):
            raise
        except BaseException as error:
            if not _is_from_outside(error):
                raise
            self.interruption = error
            raise TimeoutError from None
        finally:
            if timer is not None:
                timer.cancel()


class LeavingSender:
    """Sends the calls of a claim whose block ends, each in the background: they continue if the caller is gone.

    If the caller is cancelled, it no longer waits, but the remaining calls are still started.

    Attributes:
        waits: whether the caller may wait at all.
        interruption: what has cancelled the caller, or what a signal handler has raised in a call; raise it when all
            calls have been started.
    """

    def __init__(self, sender: Callable[[], LastingSender], retry_seconds: float, seconds: float) -> None:
        """Makes a sender of one block.

        Args:
            sender: makes a sender of one call in the background.
            retry_seconds: seconds to wait for a retryable call; for any other call, one second.
            seconds: how long a call continues in the background.
        """
        self._sender = sender
        self.waits = True
        self.interruption: BaseException | None = None
        self._retry_seconds = retry_seconds
        self._seconds = seconds
        self._began = time.monotonic()
        self._latest: BackgroundTask[Any] | None = None

    def limited(self, _: float) -> Self:
        """Returns itself: all its calls together have a limit."""
        return self

    async def send(self, call: Call[T]) -> T:
        """Sends a call; returns its result."""
        sender = self._sender()
        task = self._latest = sender.start(partial(_send_after, self._latest, sender, call), self._seconds)
        timeout = self._retry_seconds if call.retryable else INTERRUPTED_SECONDS  # for all calls together
        if self.waits:
            try:
                await asyncio.wait([task], timeout=max(0.0, self._began + timeout - time.monotonic()))
            except asyncio.CancelledError as error:
                self.waits, self.interruption = False, error
        if isinstance(sender.interruption, Exception):  # a KeyboardInterrupt has left the event loop
            self.interruption = self.interruption or sender.interruption
        if task.done() and not task.is_over:
            return task.result()
        why = "" if sender.last_error is None else f" ({sender.last_error.problem})"
        problem = f"not confirmed within {timeout if self.waits else 0:.1f} s{why}; it continues in the background"
        # Not transient if the caller is gone: it must not send the call again.
        raise OutcomeUnknownError(call.operation, call.run_id, call.step, problem, self.waits, call)


def _is_from_outside(error: BaseException) -> bool:
    return not isinstance(error, Exception) or is_raised_by_handler(error)


def _raise(error: BaseException) -> None:
    raise error


async def _send_after(earlier: BackgroundTask[Any] | None, sender: LastingSender, call: Call[T]) -> T:
    """Sends a call when an earlier one has ended."""
    if earlier is not None:
        await asyncio.wait([earlier])
    return await sender.send(call)


class PerLoop(Generic[T]):
    """One object for each event loop of this process."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._pid = os.getpid()
        self._by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, T] = WeakKeyDictionary()
        self._of_parent: list[Any] = []  # not freed: that would change the parent's event loop

    def get(self) -> T:
        """Returns the object of the running loop."""
        loop = asyncio.get_running_loop()
        if self._pid != os.getpid():
            self._of_parent.append(self._by_loop)
            self._by_loop, self._pid = WeakKeyDictionary(), os.getpid()
        found = self._by_loop.get(loop)
        if found is None:
            for other in self._by_loop.keyrefs():
                closed = other()
                if closed is not None and closed.is_closed():
                    self._by_loop.pop(closed, None)
            found = self._by_loop[loop] = self._make()
        return found
