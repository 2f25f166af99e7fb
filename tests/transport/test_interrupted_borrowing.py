"""Exceptions from outside while a connection goes back to the user's pool: the pool loses none."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from math import inf
from typing import Any

import pytest
import redis
from support.backends import Bench
from support.interruptions import at_call

from squidstep_redis import StepRunStore
from squidstep_redis.transport.pool import borrow

pytestmark = [pytest.mark.servers("valkey"), pytest.mark.parametrize("bench", ["blocking"], indirect=True)]

MODULES = ("squidstep_redis", "queue", "threading")


class Interruption(BaseException):
    pass


def interrupt() -> None:
    raise Interruption


class InterruptedConnection(redis.UnixDomainSocketConnection):
    """Its first connection attempt is interrupted; once it is closed again, `then` is called."""

    def __init__(self, then: Callable[[], object], **options: Any) -> None:
        super().__init__(**options)
        self._then = [then]
        self._was_interrupted = False

    def connect(self) -> None:
        if not self._was_interrupted:
            self._was_interrupted = True
            raise Interruption
        super().connect()

    def disconnect(self, *args: object) -> None:
        super().disconnect(*args)
        if self._was_interrupted and self._then:
            self._then.pop()()


@pytest.mark.parametrize("pool_type", [redis.ConnectionPool, redis.BlockingConnectionPool])
def test_second_exception_while_a_connection_is_given_back_loses_none(bench: Bench, pool_type: Any) -> None:
    """It arrives wherever the interpreter lets one in."""
    number, place = 0, ["none yet"]
    while place:
        with ExitStack() as stack:

            def interrupt_again(stack: ExitStack = stack, number: int = number) -> None:
                nonlocal place
                place = stack.enter_context(at_call(number, MODULES, interrupt))

            pool: Any = pool_type.from_url(bench.backend.url, max_connections=1)
            pool.connection_class = partial(InterruptedConnection, interrupt_again)
            with suppress(Interruption):
                borrow(pool, inf)
        loan = borrow(pool, time.monotonic())
        loan.give_back()
        loan.connection.disconnect()
        number += 1
    assert number >= 3


class InterruptedLock:
    """A lock; while a thread waits to acquire it for the n-th time, an exception from outside arrives."""

    def __init__(self, lock: Any, number: int) -> None:
        self.inner = lock
        self._left = number
        self.was_interrupted = False
        self.release = lock.release

    def acquire(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.was_interrupted = True
            raise Interruption
        self.inner.acquire()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def test_exception_while_waiting_for_the_lock_of_a_pool_loses_no_connection(bench: Bench) -> None:
    number, was_interrupted = 0, True
    while was_interrupted:
        number += 1
        with redis.Redis.from_url(bench.backend.url, max_connections=1) as client:
            pool: Any = client.connection_pool
            lock = pool._lock = InterruptedLock(pool._lock, number)
            store = StepRunStore(client, prefix=bench.prefix)
            with suppress(Interruption):
                store.schedule_step("run", "pay", {})
            was_interrupted = lock.was_interrupted
            pool._lock = lock.inner
            borrow(pool, time.monotonic()).give_back()
    assert number >= 3
