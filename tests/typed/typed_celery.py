"""Type tests of squidstep_redis.celery. Pyright checks this file; it is never run. Celery itself has no types."""

from __future__ import annotations

import enum
from datetime import timedelta
from typing import Any, assert_type

from redis import Redis

from squidstep_redis import StepRunStore
from squidstep_redis.celery import Run, configure, current_run, step, steps, store


class Name(enum.Enum):
    PAY = "pay"


@step("charge", run_id="order-{order_id}", lease=timedelta(minutes=1), max_attempts=3, on_busy="wait")
def charge(order_id: int, *, amount: int = 1) -> dict[str, int]:
    return {"charged": amount * order_id}


def run_of(order_id: int) -> str:
    return f"order-{order_id}"


@step(Name.PAY, run_id=run_of, lease=None, exclude=("order_id",))
def pay(self: Any, order_id: int) -> str:
    return str(order_id)


@steps(run_id="order-{order_id}")
def ship(order_id: int) -> list[str]:
    run = current_run()
    assert_type(run, Run)
    assert_type(run.id, str | None)
    assert_type(run.call("charge", charge, order_id, amount=2), dict[str, int])
    assert_type(run.call(Name.PAY, pay, None, order_id), str)
    run.call("charge", charge)  # pyright: ignore[reportCallIssue]: order_id is missing
    run.call("charge", charge, "7")  # pyright: ignore[reportArgumentType]: order_id is no str
    run.call("charge", charge, 7, amuont=2)  # pyright: ignore[reportCallIssue]: no such argument
    run.call(7, charge, 7)  # pyright: ignore[reportArgumentType]: no name of a step
    return []


assert_type(charge(7, amount=2), dict[str, int])
assert_type(pay(None, 7), str)
assert_type(ship(7), list[str])
charge("7")  # pyright: ignore[reportArgumentType]: order_id is no str
step("charge", on_busy="retry")  # pyright: ignore[reportArgumentType]: no such mode
steps(max_attempts="3")  # pyright: ignore[reportArgumentType]: no number
current_run(on_busy="reschedule")  # pyright: ignore[reportArgumentType]: only a decorator can reschedule

configure("redis://localhost:6379/0", prefix="shop")
configure(Redis)
configure(store=StepRunStore.from_url("redis://localhost:6379/0"))
configure()  # pyright: ignore[reportCallIssue]: neither a server nor a store
assert_type(store(), StepRunStore)
