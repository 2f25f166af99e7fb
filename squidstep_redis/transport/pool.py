"""Borrows one connection of a redis-py pool, for no longer than a call may take, and never takes it half set up."""

from __future__ import annotations

import time
from math import inf
from typing import Any, Final, cast

import redis

_PURPOSE: Final = () if tuple(map(int, redis.__version__.split(".")[:2])) >= (5, 3) else ("EVALSHA",)


class Borrower:
    """A view of a pool for one borrowed connection: the pool's own `get_connection` runs on it.

    A pool of redis-py's waits for a connection as long as it is set to, whatever the call's timeout is; and it takes
    back a connection whose set-up was interrupted as it is, possibly without credentials or on another database.
    """

    def __init__(self, pool: Any, deadline: float) -> None:
        vars(self).update(_pool=pool, _deadline=deadline)

    @property
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]: a pool's methods call super()
        return cast("Any", type(self._pool))

    @property
    def timeout(self) -> float | None:
        """Seconds that the pool waits for a connection; None: without a limit."""
        left = max(0.0, self._deadline - time.monotonic())
        own: float | None = self._pool.timeout
        return own if left == inf else left if own is None else min(own, left)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._pool, name, value)


def get_connection(borrower: Borrower) -> Any:
    """Returns a connection of the borrower's pool; for an asyncio pool, a coroutine of it."""
    pool = vars(borrower)["_pool"]
    if "get_connection" in vars(pool):  # replaced on this pool
        return pool.get_connection(*_PURPOSE)
    kind = cast("Any", type(pool))
    return kind.get_connection(borrower, *_PURPOSE)
