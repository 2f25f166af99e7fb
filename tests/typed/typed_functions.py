"""Type tests of `store.step` and `store.run`. Pyright checks this file; it is never run."""

from __future__ import annotations

import enum
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, Protocol, assert_type
from uuid import UUID

from squidstep_redis import AsyncRun, AsyncStepRunStore, ExponentialBackoff, Run, StepRunStore

store = StepRunStore.from_url("redis://localhost:6379/0")
async_store = AsyncStepRunStore.from_url("redis://localhost:6379/0")


class Name(enum.Enum):
    PAY = "pay"


def run_of(order_id: int, *, amount: int) -> str:
    return f"order-{order_id}"


@store.step(
    "charge",
    run_id="order-{order_id}",
    lease=timedelta(minutes=1),
    max_attempts=3,
    permanent=(ValueError, KeyError),
    backoff=ExponentialBackoff(),
    on_busy="wait",
    owner="till-3",
    fingerprint=True,
    exclude=("amount",),
)
def charge(order_id: int, *, amount: int = 1) -> dict[str, int]:
    return {"charged": amount * order_id}


@async_store.step(
    Name.PAY,
    run_id=run_of,
    lease=None,
    fingerprint=lambda given: given["order_id"],
    cancel_when_lost=True,
    cancel_with_run=True,
)
async def pay(order_id: int, *, amount: int = 1) -> str:
    return str(order_id)


class Till:
    @store.step("open", run_id="till-{number}", exclude=("self",))
    def open(self, number: int) -> str:
        return str(number)

    @async_store.step("close", run_id="till-{number}", exclude=("self",))
    async def close(self, number: int) -> str:
        return str(number)


class Charges(Protocol):
    def __call__(self, order_id: int, *, amount: int = 1) -> dict[str, int]: ...


class ChargesByPosition(Protocol):
    def __call__(self, order_id: int, amount: int) -> dict[str, int]: ...


class Pays(Protocol):
    def __call__(self, order_id: int, *, amount: int = 1) -> Coroutine[Any, Any, str]: ...


def the_signature_stays(till: Till) -> None:
    assert_type(charge(7, amount=2), dict[str, int])
    assert_type(till.open(7), str)
    _same: Charges = charge
    _other: ChargesByPosition = charge  # pyright: ignore[reportAssignmentType]: amount is given by name
    charge()  # pyright: ignore[reportCallIssue]: order_id is missing
    charge("7")  # pyright: ignore[reportArgumentType]: order_id is no str
    charge(7, 2)  # pyright: ignore[reportCallIssue]: amount is given by name
    till.open("7")  # pyright: ignore[reportArgumentType]: number is no str


async def a_coroutine_function_stays_one(till: Till) -> None:
    assert_type(await pay(7, amount=2), str)
    assert_type(await till.close(7), str)
    _same: Pays = pay
    pay("7")  # pyright: ignore[reportArgumentType, reportUnusedCoroutine]: order_id is no str


def several_steps() -> None:
    run = store.run("order-7", lease=60, on_busy="wait", exclude=("amount",))
    assert_type(run, Run)
    assert_type(run.id, str)
    assert_type(store.run(UUID(int=7)).call("charge", charge, 7, amount=2), dict[str, int])
    assert_type(run.call(Name.PAY, str, 7), str)
    run.call("charge", charge)  # pyright: ignore[reportCallIssue]: order_id is missing
    run.call("charge", charge, "7")  # pyright: ignore[reportArgumentType]: order_id is no str
    run.call("charge", charge, 7, amuont=2)  # pyright: ignore[reportCallIssue]: no such argument
    run.call(7, charge, 7)  # pyright: ignore[reportArgumentType]: no name of a step


async def several_steps_asyncio() -> None:
    run = async_store.run("order-7", max_attempts=3, cancel_when_lost=True, cancel_with_run=True)
    assert_type(run, AsyncRun)
    assert_type(await run.call("pay", pay, 7, amount=2), str)
    await run.call("pay", pay)  # pyright: ignore[reportCallIssue]: order_id is missing
    await run.call("pay", pay, "7")  # pyright: ignore[reportArgumentType]: order_id is no str
    await run.call("charge", charge, 7)  # pyright: ignore[reportArgumentType]: no coroutine function


def what_is_wrong_is_seen() -> None:
    store.step("pay")  # pyright: ignore[reportCallIssue]: a run id is needed
    store.step(charge, run_id="run")  # pyright: ignore[reportArgumentType]: no name of a step
    store.step("pay", run_id=None)  # pyright: ignore[reportArgumentType]: neither a format string nor a function
    store.step("pay", run_id="run", lease="30")  # pyright: ignore[reportArgumentType]: not seconds
    store.step("pay", run_id="run", on_busy="reschedule")  # pyright: ignore[reportArgumentType]: for RQ jobs only
    store.step("pay", run_id="run", exclude="amount")  # pyright: ignore[reportArgumentType]: not a tuple
    store.step("pay", run_id="run", leas=30)  # pyright: ignore[reportCallIssue]: no such setting
    store.step("pay", run_id="run", cancel_with_run=True)  # pyright: ignore[reportCallIssue]: on asyncio only
    store.run("run", cancel_when_lost=True)  # pyright: ignore[reportCallIssue]: on asyncio only
    async_store.run("run", cancel_when_lost=1)  # pyright: ignore[reportArgumentType]: no bool
    async_store.step("pay", run_id="run")(charge)  # pyright: ignore[reportArgumentType]: no coroutine function
    store.run()  # pyright: ignore[reportCallIssue]: a run id is needed
    store.run("run", on_busy="skip")  # pyright: ignore[reportArgumentType]: neither "raise" nor "wait"
