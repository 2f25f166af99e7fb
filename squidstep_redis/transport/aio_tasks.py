"""What the asyncio transport has to know about the cancellation of tasks."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from redis.exceptions import ConnectionError, TimeoutError

from squidstep_redis.transport.retry import RoundTripError

T = TypeVar("T")


async def result_of(task: asyncio.Task[T], seconds: float | None) -> T:
    """Waits for a task that connects for several others, even if one of them is cancelled; returns its result.

    Args:
        task: the task, which continues in any case.
        seconds: how long to wait at most; None: no limit.

    Raises:
        RoundTripError: it took longer, or something has cancelled the task itself, such as a program that cancels all
            tasks but its own.
    """
    await asyncio.wait((task,), timeout=seconds)
    if not task.done():
        raise RoundTripError(TimeoutError("Timeout connecting to server"), sent=False)
    if task.cancelled():
        raise RoundTripError(ConnectionError("Connecting was interrupted."), sent=False)
    return task.result()


def cancellations() -> int:
    """Returns how often the running task was cancelled so far."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


async def raise_swallowed_cancellation(before: int) -> None:
    """Raises a cancellation that redis-py has swallowed since `before` was counted.

    redis-py writes with `asyncio.wait_for`. Before Python 3.12, `wait_for` returns a result that is already available,
    and forgets that it was cancelled.
    """
    if cancellations() > before:
        for _ in range(2):  # a cancelled scope of anyio cancels again, with a message that it recognizes
            await asyncio.sleep(0)
        raise asyncio.CancelledError
