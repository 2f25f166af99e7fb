"""The job functions that the workers of the RQ tests run."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rq import Queue, get_current_job
from rq.job import Job

from squidstep_redis import PermanentError, RetryLater, current_claim
from squidstep_redis.rq import configure, current_run, queue_completion, step, steps, store


def effect(name: str) -> None:
    """Records a side effect outside of the store; `Harness.effects` counts them."""
    with Path(os.environ["RQ_JOBS_EFFECTS"]).open("a", encoding="utf-8") as file:
        file.write(f"{name}\n")


def pause(checkpoint: str) -> None:
    """Reports to the test that this job has reached a checkpoint, and waits until the test resumes it."""
    with socket.create_connection(("127.0.0.1", int(os.environ["RQ_JOBS_PORT"]))) as connection:
        connection.sendall(f"{os.getpid()} {checkpoint}\n".encode())
        if not connection.recv(1):
            os._exit(1)  # the test has ended


def this_job() -> Job:
    job = get_current_job()
    assert job is not None
    return job


def this_attempt() -> int:
    claim = current_claim()
    assert claim is not None
    return claim.step_run.attempt


# One step


@step("charge", lease=2)
def charge_with_a_short_lease(amount: int) -> dict[str, int]:
    pause("charging")
    effect("charge")
    return {"charged": amount}


@step("charge", lease=60)
def charge(amount: int) -> dict[str, int]:
    pause("charging")
    effect("charge")
    return {"charged": amount}


@step("charge", run_id="order-{number}", lease=600)
def charge_slowly(number: int) -> int:
    pause("charging")
    effect("charge")
    return number


@step("charge", lease=60)
def charge_and_pause(amount: int) -> dict[str, int]:
    effect("charge")
    pause("charged")
    return {"charged": amount}


@step("charge", lease=1)
def charge_at_once(amount: int) -> dict[str, int]:
    effect("charge")
    return {"charged": amount}


@step("charge", on_busy="wait")
def charge_or_wait(amount: int) -> dict[str, int]:
    pause("charging")
    effect("charge")
    return {"charged": amount}


@step("charge", on_busy="raise")
def charge_or_raise(amount: int) -> dict[str, int]:
    effect("charge")
    return {"charged": amount}


@step("charge", permanent=LookupError, backoff=lambda attempt: 600 * attempt)
def charge_or_fail(error: str) -> dict[str, int]:
    """Fails in its first attempt."""
    errors = {"later": RetryLater(600), "permanent": PermanentError(), "lookup": KeyError(7), "other": OSError()}
    effect("charge")
    if this_attempt() == 1:
        raise errors[error]
    return {"charged": 7}


@step("charge", permanent=LookupError, backoff=lambda attempt: 600 * attempt)
async def charge_or_fail_asyncio(error: str) -> dict[str, int]:
    return charge_or_fail.__wrapped__(error)


@steps(permanent=LookupError, backoff=lambda attempt: 600 * attempt)
def ship_or_fail(error: str) -> dict[str, int]:
    return current_run().call("charge", charge_or_fail.__wrapped__, error)


@step("charge")
def charge_set(amount: int) -> set[int]:
    """Has an effect, and a result that cannot be stored."""
    effect("charge")
    return {amount}


def advance_timeout() -> None:
    """Lets RQ's alarm, which enforces the job timeout, go off now."""
    signal.setitimer(signal.ITIMER_REAL, 0.05)


@step("charge", lease=60)
def overstay(amount: int) -> dict[str, int]:
    if this_attempt() == 1:
        advance_timeout()
        for _ in range(600):
            time.sleep(1)  # Python does not run a signal's handler during a sleep that began just after the signal
    effect("charge")
    return {"charged": amount}


@step("charge", lease=2)
async def overstay_asyncio(amount: int) -> dict[str, int]:
    if this_attempt() == 1:
        advance_timeout()
        for _ in range(600):
            await asyncio.sleep(1)  # as above
    effect("charge")
    return {"charged": amount}


@step("charge", max_attempts=2)
def stumble(amount: int, times: int) -> dict[str, int]:
    if this_attempt() <= times:
        raise LookupError("no such card")
    effect("charge")
    return {"charged": amount}


@step("charge")
async def charge_asyncio(amount: int) -> dict[str, int]:
    await asyncio.sleep(0)
    effect("charge")
    return {"charged": amount}


class Charge:
    async def __call__(self, amount: int) -> dict[str, int]:
        return await charge_asyncio(amount)


def charge_by_object(amount: int) -> Any:
    return current_run().call("by object", Charge(), amount)


@step("charge", run_id="order-{number}-{region}")
def charge_order(number: int, *, region: str = "eu") -> str:
    effect(f"charge {number} {region}")
    return f"{number} {region}"


@step("charge", run_id=lambda order, amount: f"order-{order['number']}")
def charge_order_of(order: dict[str, int], amount: int = 1) -> int:
    effect("charge")
    return order["number"]


@step("charge", run_id=lambda order: order["id"])
def charge_without_run_id(order: dict[str, Any]) -> None:
    effect("charge")


@step("measure", run_id="measured-{length}-{unit.stem}")
def measure(length: int, *more: int, unit: Any = Path("cm"), **others: int) -> str:
    return f"{length} {unit.stem}"


def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return function(*args)

    return wrapped


@step("charge")
@wrap
async def charge_wrapped(amount: int) -> None:
    effect("charge")


@wrap
@step("charge")
async def wrapped_charge(amount: int) -> dict[str, int]:
    effect("charge")
    return {"charged": amount}


@step("mix")
def mix(first: int, /, second: int, *rest: int, named: int = 4, **others: int) -> list[Any]:
    effect("mix")
    return [first, second, list(rest), named, others]


@step("pair")
def pair(name: str) -> tuple[str, tuple[int, ...]]:
    effect("pair")
    return name, (1, 2)


@step("make")
def make_object() -> object:
    return object()


@step("owner")
def owner() -> str | None:
    claim = current_claim()
    assert claim is not None
    return claim.step_run.owner


def succeeded(job: Job, connection: object, result: object) -> None:
    effect(f"succeeded with {result}")


def failed(job: Job, connection: object, *error: object) -> None:
    effect("failed")


# Several steps


def reserve(amount: int) -> str:
    effect("reserve")
    return f"parcel of {amount}"


async def reserve_asyncio(amount: int) -> str:
    await asyncio.sleep(0)
    return reserve(amount)


@step("announce")
def announce(parcel: str) -> str:
    effect("announce")
    return f"{parcel}, announced"


@steps(lease=60)
def ship(amount: int) -> list[str]:
    run = current_run()
    parcel = run.call("reserve", reserve, amount)
    pause("between")
    return [parcel, announce(parcel)]


@steps(lease=60)
def ship_impatiently(amount: int) -> list[str]:
    """Uses a store that times out after a second without the server."""
    options = this_job().connection.connection_pool.connection_kwargs
    configure(f"redis://{options['host']}:{options['port']}", timeout=1)
    parcel = current_run().call("reserve", reserve, amount)
    pause("between")
    return [parcel, announce(parcel)]


@steps(lease=60)
async def ship_asyncio(amount: int) -> list[str]:
    run = current_run()
    parcel = await run.call("reserve", reserve_asyncio, amount=amount)
    pause("between")
    return [parcel, announce(parcel)]


@steps(on_busy="wait")
async def reserve_side_by_side(amount: int) -> list[str]:
    run = current_run()
    return list(await asyncio.gather(*(run.call("reserve", reserve_asyncio, amount) for _ in range(3))))


@steps(run_id="order-{amount}")
@wrap
async def ship_wrapped(amount: int) -> str:
    return current_run().call("reserve", reserve, amount)


@steps(lease=60)
def ship_and_pause(amount: int) -> str:
    parcel = current_run().call("reserve", reserve, amount)
    pause("shipped")
    return parcel


@steps(run_id="order-{amount}")
def ship_order(amount: int) -> list[str]:
    parcel = current_run().call("reserve", reserve, amount)
    return [parcel, announce(parcel)]


@steps(lease=1)
def ship_at_once(amount: int) -> str:
    return current_run().call("reserve", reserve, amount)


def without_decorator(amount: int) -> list[str]:
    """Its steps belong to the job's run, but it cannot be rescheduled."""
    return [current_run().call("reserve", reserve, amount), str(charge_at_once(amount))]


@steps(run_id=lambda order: order["id"])
def ship_without_run_id(order: dict[str, Any]) -> None:
    effect("ship")


@steps(lease=1)
def ship_several(amounts: list[int]) -> list[Any]:
    queue = Queue("others", is_async=False, connection=this_job().connection)
    return [queue.enqueue(charge_at_once, amount).return_value() for amount in amounts]


@steps()
def reserve_in_threads(amounts: list[int]) -> list[str]:
    run = current_run()
    with ThreadPoolExecutor(len(amounts)) as pool:
        return list(pool.map(lambda amount: run.call(f"reserve {amount}", reserve, amount), amounts))


def reserve_forever(amount: int) -> str:
    return current_run(on_busy="wait").call("reserve", reserve_forever, amount)


@step("charge", run_id="order-{number}")
def charge_recursively(number: int) -> int:
    effect("charge")
    return charge_recursively(number)


@step("charge", run_id="order-{number}")
async def charge_recursively_asyncio(number: int) -> int:
    effect("charge")
    return await charge_recursively_asyncio(number)


class Shop:
    """A class whose methods are job functions."""

    def __init__(self, region: str) -> None:
        self.region = region

    @steps()
    def sell(self, amount: int) -> str:
        return current_run().call("sell", self._sell, amount)

    def _sell(self, amount: int) -> str:
        effect("sell")
        return f"{amount} {self.region}"

    @step("sell")
    def sell_at_once(self, amount: int) -> str:
        return self._sell(amount)

    @step("sell")
    def __call__(self, amount: int) -> str:
        return self._sell(amount)

    @classmethod
    @step("open")
    def open(cls, amount: int) -> None:
        effect("open")


# The outbox


@step("order", run_id="order-{number}", lease=60)
def order(number: int) -> dict[str, int]:
    job = this_job()
    with store().client.pipeline(transaction=True) as pipeline:
        Queue(job.origin, connection=job.connection).enqueue(deliver, number, pipeline=pipeline)
        queued = queue_completion(pipeline, {"ordered": number}, schedule={"bill": {"number": number}})
        pause("before the commit")
        replies = pipeline.execute()
        pause("after the commit")
        queued.result(replies)
    return {"ordered": -1}  # ignored: the transaction has stored the result


@step("deliver", run_id="order-{number}")
def deliver(number: int) -> str:
    effect("deliver")
    return f"{number} is on its way"


# The client of a job's store


def clients() -> dict[str, Any]:
    own, rq_client = store().client, this_job().connection
    options = own.connection_pool.connection_kwargs
    pid = os.fork()
    if pid == 0:
        client = store().client
        os._exit(0 if client is not own and client.ping() else 1)
    return {
        "is RQ's": own.connection_pool is rq_client.connection_pool,
        "RQ's timeout": rq_client.connection_pool.connection_kwargs["socket_timeout"],
        "timeout": options["socket_timeout"],
        "protocol": options["protocol"],
        "the same in this process": store().client is own,
        "another one in a fork": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0,
    }
