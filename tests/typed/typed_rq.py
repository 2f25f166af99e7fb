"""Type tests of squidstep_redis.rq. Pyright checks this file; it is never run."""

from __future__ import annotations

import enum
from datetime import timedelta
from typing import Any, Protocol, assert_type

from redis import Redis
from rq import Worker
from rq.job import Job

from squidstep_redis import Queued, StepRun, StepRunStore
from squidstep_redis.rq import (
    Run,
    configure,
    current_run,
    queue_completion,
    release_killed_work_horse,
    step,
    steps,
    store,
)


class Name(enum.Enum):
    PAY = "pay"


@step("charge", run_id="order-{order_id}", lease=timedelta(minutes=1), max_attempts=3, on_busy="wait")
def charge(order_id: int, *, amount: int = 1) -> dict[str, int]:
    return {"charged": amount * order_id}


def run_of(order_id: int) -> str:
    return f"order-{order_id}"


@step(Name.PAY, run_id=run_of, lease=None, exclude=("order_id",))
async def pay(order_id: int) -> str:
    return str(order_id)


@steps(run_id="order-{order_id}", exclude=("password",))
def ship(order_id: int) -> list[str]:
    run = current_run()
    assert_type(run, Run)
    assert_type(run.id, str | None)
    assert_type(run.call("charge", charge, order_id, amount=2), dict[str, int])
    assert_type(run.call(Name.PAY, str, order_id), str)
    run.call("charge", charge)  # pyright: ignore[reportCallIssue]: order_id is missing
    run.call("charge", charge, "7")  # pyright: ignore[reportArgumentType]: order_id is no str
    run.call("charge", charge, 7, amuont=2)  # pyright: ignore[reportCallIssue]: no such argument
    run.call(7, charge, 7)  # pyright: ignore[reportArgumentType]: no name of a step
    return []


@steps()
async def ship_asyncio(order_id: int) -> list[str]:
    assert_type(await current_run(f"order-{order_id}", on_busy="wait").call("pay", pay, order_id), str)
    return []


class Charges(Protocol):
    def __call__(self, order_id: int, *, amount: int = 1) -> dict[str, int]: ...


class ChargesByPosition(Protocol):
    def __call__(self, order_id: int, amount: int) -> dict[str, int]: ...


def the_signature_stays() -> None:
    assert_type(charge(7, amount=2), dict[str, int])
    assert_type(ship(order_id=7), list[str])
    _same: Charges = charge
    _other: ChargesByPosition = charge  # pyright: ignore[reportAssignmentType]: amount is given by name
    charge()  # pyright: ignore[reportCallIssue]: order_id is missing
    charge("7")  # pyright: ignore[reportArgumentType]: order_id is no str
    charge(7, 2)  # pyright: ignore[reportCallIssue]: amount is given by name
    ship(7, amount=2)  # pyright: ignore[reportCallIssue]: no such argument


async def a_coroutine_function_stays_one() -> None:
    assert_type(await pay(7), str)
    assert_type(await ship_asyncio(7), list[str])


def the_rest(client: Redis, job: Job, pipeline: Any) -> None:
    assert_type(store(), StepRunStore)
    assert_type(queue_completion(pipeline, {"any": "thing"}, schedule={"ship": {}}), Queued[StepRun])
    configure("redis://localhost:6379/0", prefix="mine", run_ttl=60)
    configure(lambda: client)
    configure(store=StepRunStore(client))
    Worker(["orders"], connection=client, work_horse_killed_handler=release_killed_work_horse)
    release_killed_work_horse(job, None, None, None)


def what_is_wrong_is_seen(client: Redis) -> None:
    step("pay", on_busy="skip")  # pyright: ignore[reportArgumentType]: not what to do with a busy step
    step("pay", lease="30")  # pyright: ignore[reportArgumentType]: not seconds
    step("pay", run_id=7)  # pyright: ignore[reportArgumentType]: neither a format string nor a function
    step()  # pyright: ignore[reportCallIssue]: a step has a name
    steps("pay")  # pyright: ignore[reportCallIssue]: several steps have none
    current_run(on_busy="reschedule")  # pyright: ignore[reportArgumentType]: that is for the decorators
    step("pay", exclude="password")  # pyright: ignore[reportArgumentType]: not a tuple
    step("pay", leas=30)  # pyright: ignore[reportCallIssue]: no such setting
    step("pay", owner="me")  # pyright: ignore[reportCallIssue]: the job is the owner
    configure()  # pyright: ignore[reportCallIssue]: one of them
    configure(client)  # pyright: ignore[reportArgumentType]: what makes a client, in each process
