"""The job functions of test_rq_inputs.py: they call one step with several inputs."""

from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from rq import get_current_job

from squidstep_redis.rq import current_run, step, steps
from support.rq_jobs import effect


def reserve(amount: int, region: str = "eu") -> str:
    effect(f"reserve {amount}")
    return f"{amount} {region}"


async def reserve_asyncio(amount: int) -> str:
    await asyncio.sleep(0)
    return reserve(amount)


def reserve_quietly(amount: int) -> int:
    return amount


def reserve_path(path: Any) -> str:
    return str(path)


@step("each")
def announce(amount: int) -> str:
    effect("announce")
    return str(amount)


@steps()
def reserve_in_a_loop(amounts: list[int]) -> list[str]:
    run = current_run()
    return [run.call("each", reserve, amount) for amount in amounts]


@steps()
async def reserve_in_a_loop_asyncio(amounts: list[int]) -> list[str]:
    run = current_run()
    return [await run.call("each", reserve_asyncio, amount) for amount in amounts]


@steps()
async def reserve_at_the_same_time(amounts: list[int]) -> list[str]:
    run = current_run()
    calls = [asyncio.ensure_future(run.call("each", reserve_asyncio, amount)) for amount in amounts]
    done = await asyncio.gather(*calls, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return [str(result) for result in done]


@steps()
def reserve_with_current_run(amounts: list[int]) -> list[str]:
    return [current_run().call("each", reserve, amount) for amount in amounts]


def reserve_without_decorator(amounts: list[int]) -> list[str]:
    return [current_run().call("each", reserve, amount) for amount in amounts]


@steps()
def announce_in_a_loop(amounts: list[int]) -> list[str]:
    return [announce(amount) for amount in amounts]


def announce_without_decorator(amounts: list[int]) -> list[str]:
    return [announce(amount) for amount in amounts]


@steps(on_busy="wait")
def reserve_in_threads(amounts: list[int]) -> list[str]:
    run = current_run()
    with ThreadPoolExecutor(1) as pool:
        return list(pool.map(lambda amount: run.call("each", reserve, amount), amounts))


@steps()
def reserve_in_several_ways() -> list[str]:
    run = current_run()
    return [
        run.call("each", reserve, 1),
        run.call("each", reserve, amount=1),
        run.call("each", reserve, 1, "eu"),
        run.call("each", reserve, region="eu", amount=1),
    ]


@steps()
def reserve_in_several_runs(amounts: list[int]) -> list[str]:
    return [current_run(f"order-{amount}").call("each", reserve, amount) for amount in amounts]


@steps()
def reserve_under_several_names(amounts: list[int]) -> list[str]:
    return [current_run().call(f"reserve-{amount}", reserve, amount) for amount in amounts]


def reserve_if_possible(amount: int) -> str:
    if not amount:
        raise LookupError("nothing to reserve")
    return reserve(amount)


@steps()
def reserve_an_alternative(amounts: list[int]) -> str:
    for amount in amounts:
        try:
            return current_run().call("each", reserve_if_possible, amount)
        except LookupError:
            continue
    raise AssertionError


def reserve_the_attempt() -> str:
    """Reserves its number among its two executions; the first one fails after that."""
    job = get_current_job()
    assert job is not None
    number = 2 - (job.retries_left or 0)
    result = current_run().call("each", reserve, number)
    if number == 1:
        raise LookupError("try again")
    return result


def reserve_the_next(amounts: list[int]) -> str:
    """Calls its step with a different input in each of its executions, which share the list."""
    amounts.append(amounts[-1] + 1)
    return current_run().call("each", reserve, amounts[-2])


class PickleCodec:
    """Accepts arguments that have no fingerprint."""

    def encode(self, payload: dict[str, Any]) -> bytes:
        return pickle.dumps(payload)

    def decode(self, data: bytes) -> dict[str, Any]:
        return pickle.loads(data)


@step("charge", run_id="order-{number}", fingerprint=True)
def charge_once(number: int, *, amount: int) -> int:
    effect("charge")
    return amount


@step("charge", run_id="order-{number}", fingerprint=True)
async def charge_once_asyncio(number: int, *, amount: int) -> int:
    await asyncio.sleep(0)
    effect("charge")
    return amount


def _charge(amount: int) -> int:
    effect("charge")
    return amount


@steps(run_id="order-{number}", fingerprint=True)
def ship_once(number: int, *, amount: int) -> int:
    return current_run().call("charge", _charge, amount)


@step("charge", run_id="order-{number}", fingerprint=lambda given: given["amount"])
def charge_by_amount(number: int, *, amount: int, note: str) -> int:
    return amount


@step("times")
def times(first: datetime, *more: list[tuple[datetime]], **others: Any) -> list[str]:
    found = [first, *(each for items in more for (each,) in items), others["at"], *others["others"].values()]
    return [each.isoformat() for each in found]


@step("times")
async def times_asyncio(first: datetime, *more: list[tuple[datetime]], **others: Any) -> list[str]:
    return times.__wrapped__(first, *more, **others)


def _log_in(user: str, password: str) -> str:
    effect("log in")
    return f"{user} {password[:1]}"


@step("log-in", run_id="user-{user}", exclude=("password",), fingerprint=True)
def log_in(user: str, password: str) -> str:
    return _log_in(user, password)


@step("log-in", run_id="user-{user}", exclude=("password",), fingerprint=True)
async def log_in_asyncio(user: str, password: str) -> str:
    return _log_in(user, password)


@steps(run_id="user-{user}", exclude=("password",), fingerprint=True)
def log_in_with_steps(user: str, password: str) -> str:
    run = current_run()
    run.call("log-in", _log_in, user, password)
    return run.call("log-in", _log_in, user, "another")


def log_in_with_current_run(user: str, password: str) -> str:
    run = current_run(f"user-{user}", exclude=("password",), fingerprint=True)
    run.call("log-in", _log_in, user, password=password)
    return run.call("log-in", _log_in, user, password="another")


class Account:
    """A class with a method that is a step."""

    def __init__(self, user: str) -> None:
        self.user = user

    @step("log-in", run_id=lambda self, password: f"user-{self.user}", exclude=("self", "password"), fingerprint=True)
    def log_in(self, password: str) -> str:
        return _log_in(self.user, password)


@step("ship", labels={"tenant": "{tenant}"})
def ship_labelled(tenant: str, amount: int) -> int:
    return amount


@step("ship again")
def ship_without_labels(amount: int) -> int:
    return amount


@steps(labels={"tenant": "{tenant}"})
def ship_in_labelled_run(tenant: str, amount: int) -> int:
    return ship_without_labels(amount)


def ship_in_current_run(tenant: str, amount: int) -> int:
    return current_run(labels={"tenant": tenant}).call("ship", reserve_quietly, amount)
