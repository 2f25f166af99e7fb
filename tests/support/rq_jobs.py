"""The job functions that the workers of `test_rq` run."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from rq import Queue, get_current_job
from rq.job import Job
from rq.timeouts import JobTimeoutException

import squidstep_redis.rq
from squidstep_redis import StepBusyError, StepStatus, UndecodablePayloadError, current_claim
from squidstep_redis.rq import configure, current_run, queue_completion, step, steps, store
from support.internals import idle_connections


def effect(name: str) -> None:
    """Takes effect, outside of any store."""
    with Path(os.environ["RQ_JOBS_EFFECTS"]).open("a", encoding="utf-8") as file:
        file.write(f"{name}\n")


def meet(what: str) -> None:
    """Tells the test where this job is, and goes on when it says so."""
    with socket.create_connection(("127.0.0.1", int(os.environ["RQ_JOBS_DESK"]))) as desk:
        desk.sendall(f"{os.getpid()} {what}\n".encode())
        if not desk.recv(1):
            os._exit(1)  # the test is over


def this_job() -> Job:
    job = get_current_job()
    assert job is not None
    return job


def this_attempt() -> int:
    claim = current_claim()
    assert claim is not None
    return claim.step_run.attempt


# One step


@step("charge", lease=3)
def charge(amount: int) -> dict[str, int]:
    meet("charging")
    effect("charge")
    return {"charged": amount}


@step("charge", lease=60)
def charge_with_a_long_lease(amount: int) -> dict[str, int]:
    meet("charging")
    effect("charge")
    return {"charged": amount}


@step("charge", lease=60)
def charge_and_meet(amount: int) -> dict[str, int]:
    effect("charge")
    meet("charged")
    return {"charged": amount}


@step("charge", lease=1)
def charge_at_once(amount: int) -> dict[str, int]:
    effect("charge")
    return {"charged": amount}


@step("charge", on_busy="wait")
def charge_or_wait(amount: int) -> dict[str, int]:
    meet("charging")
    effect("charge")
    return {"charged": amount}


@step("charge", on_busy="raise")
def charge_or_raise(amount: int) -> dict[str, int]:
    effect("charge")
    return {"charged": amount}


@step("charge", lease=2)
def overstay(amount: int) -> dict[str, int]:
    if this_attempt() == 1:
        meet("overstaying")
    effect("charge")
    return {"charged": amount}


@step("charge", lease=2)
async def overstay_asyncio(amount: int) -> dict[str, int]:
    if this_attempt() == 1:
        await asyncio.sleep(60)
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


@step("charge", run_id="order-{number}-{region}")
def charge_order(number: int, *, region: str = "eu") -> str:
    effect(f"charge {number} {region}")
    return f"{number} {region}"


@step("charge", run_id=lambda order, amount: f"order-{order['number']}")
def charge_order_of(order: dict[str, int], amount: int = 1) -> int:
    effect("charge")
    return order["number"]


@step("charge", run_id=lambda order: order["id"])
def charge_nobody(order: dict[str, Any]) -> None:
    effect("charge")


@step("measure", run_id="measured-{length}-{unit.stem}")
def measure(length: int, *more: int, unit: Any = Path("cm"), **others: int) -> str:
    return f"{length} {unit.stem}"


def passed_on(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return function(*args)

    return wrapped


@step("charge")
@passed_on
async def charge_wrapped(amount: int) -> None:
    effect("charge")


@passed_on
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


@step("answer")
def answer_what_cannot_be_kept() -> object:
    return object()


@step("tell")
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
    meet("between")
    return [parcel, announce(parcel)]


@steps(lease=60)
def ship_impatiently(amount: int) -> list[str]:
    """With a store that gives up on a server which is away for a second."""
    where = this_job().connection.connection_pool.connection_kwargs
    configure(f"redis://{where['host']}:{where['port']}", timeout=1)
    parcel = current_run().call("reserve", reserve, amount)
    meet("between")
    return [parcel, announce(parcel)]


@steps(lease=60)
async def ship_asyncio(amount: int) -> list[str]:
    run = current_run()
    parcel = await run.call("reserve", reserve_asyncio, amount=amount)
    meet("between")
    return [parcel, announce(parcel)]


@steps(lease=60)
def ship_and_meet(amount: int) -> str:
    parcel = current_run().call("reserve", reserve, amount)
    meet("shipped")
    return parcel


@steps(run_id="order-{amount}")
def ship_order(amount: int) -> list[str]:
    parcel = current_run().call("reserve", reserve, amount)
    return [parcel, announce(parcel)]


@steps(lease=1)
def ship_at_once(amount: int) -> str:
    return current_run().call("reserve", reserve, amount)


def without_decorator(amount: int) -> list[str]:
    """Its steps are the job's; but who would reschedule it?"""
    return [current_run().call("reserve", reserve, amount), str(charge_at_once(amount))]


@steps(run_id=lambda order: order["id"])
def ship_to_nobody(order: dict[str, Any]) -> None:
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


def reserve_for_ever(amount: int) -> str:
    return current_run(on_busy="wait").call("reserve", reserve_for_ever, amount)


class Shop:
    """Its methods are jobs, too."""

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
        meet("before the commit")
        replies = pipeline.execute()
        meet("after the commit")
        queued.result(replies)
    return {"the function's answer": -1}  # that of the transaction counts


@step("deliver", run_id="order-{number}")
def deliver(number: int) -> str:
    effect("deliver")
    return f"{number} is on its way"


# What a job sees of its store


def clients() -> dict[str, Any]:
    own, theirs = store().client, this_job().connection
    ours = own.connection_pool.connection_kwargs
    pid = os.fork()
    if pid == 0:
        client = store().client
        os._exit(0 if client is not own and client.ping() else 1)
    return {
        "is RQ's": own.connection_pool is theirs.connection_pool,
        "RQ's time-out": theirs.connection_pool.connection_kwargs["socket_timeout"],
        "time-out": ours["socket_timeout"],
        "protocol": ours["protocol"],
        "the same in this process": store().client is own,
        "another in a fork": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0,
    }


# A storm of alarms

_doubled: Counter[int] = Counter()


def _double(number: int) -> int:
    _doubled[number] += 1
    return 2 * number


@step("double", run_id="storm-{number}")
def _storm_step(number: int) -> int:
    return _double(number)


@steps(run_id="storm-of-{number}")
def _storm_steps(number: int) -> int:
    return current_run().call("double", _double, number)


def _storm_call(number: int) -> int:
    return current_run().call(f"double-{number}", _double, number)


@step("held", run_id="storm-held")
def _held(number: int) -> int:
    return number


def _storm_busy(number: int) -> int:
    try:
        return _held(number)
    except StepBusyError as error:
        return 2 * error.current.input["number"] * number


def _storm_get(number: int) -> int:
    step_run = store().get_step_run("storm-known", f"step-{number % 10}")
    assert step_run is not None
    return step_run.input["number"] + 2 * number - number % 10


def _storm_begin(number: int) -> int:
    step_run = store().begin_step("storm-begun", f"step-{number}", {"number": number}).step_run
    return 2 * step_run.input["number"]


def _storm_batch(number: int) -> int:
    own = store()
    calls = [own.calls.get_step_run("storm-known", f"step-{(number + index) % 10}") for index in range(3)]
    seen = [cast("Any", result).input["number"] for result in own.batch(calls)]
    return 2 * number if seen == [(number + index) % 10 for index in range(3)] else -1


STORMED: list[Callable[[int], int]] = [
    _storm_step,
    _storm_steps,
    _storm_call,
    _storm_busy,
    _storm_get,
    _storm_begin,
    _storm_batch,
]
_ONCE = {_storm_step, _storm_steps, _storm_call}


def storm(alarms: int) -> dict[str, Any]:
    """So many alarms, as RQ's time-out makes one, at any instant of calls to the store; and what came of them."""
    own, this_run = store(), current_run().id
    own.schedule_steps("storm-known", {f"step-{number}": {"number": number} for number in range(10)})
    own.begin_step("storm-held", "held", {"number": 1})
    seconds = {function: _time(function) for function in STORMED}
    connections = len(own.client.client_list())
    raises: Any = signal.getsignal(signal.SIGALRM)  # RQ's own handler
    raised = caught = 0
    struck: Counter[str] = Counter()
    wrong: list[str] = []
    begin = time.perf_counter()

    def alarm(number: int, frame: Any) -> None:
        nonlocal raised
        raised += 1
        raises(number, frame)

    def until_the_alarm() -> None:  # not in the `try` itself: Python 3.13 guards not every jump there
        while raised <= number:
            pass

    signal.signal(signal.SIGALRM, alarm)
    for number in range(alarms):
        function = STORMED[number % len(STORMED)]
        answer: int | None = None
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.000_001, 1.4 * seconds[function]))
            answer = function(number)
            until_the_alarm()
        except JobTimeoutException:
            caught += 1
        except UndecodablePayloadError as error:
            wrong.append(f"{function.__name__}({number}) took the alarm for another error: {error}")
        if answer is None:
            struck[function.__name__] += 1
            answer = function(number)
        if function in _ONCE:
            times = _doubled[number]
            if (function(number), _doubled[number]) != (2 * number, times):
                wrong.append(f"{function.__name__}({number}) was executed after it had answered")
        if answer != 2 * number:
            wrong.append(f"{function.__name__}({number}) answered {answer}")
        if (left := (current_claim(), current_run().id, squidstep_redis.rq._inside.get())) != (None, this_run, False):
            wrong.append(f"{function.__name__}({number}) left {left} behind")
            break
    return {
        "raised": raised,
        "caught": caught,
        "wrong": wrong,
        "struck": struck,
        "seconds": time.perf_counter() - begin,
        "in use": len(cast("Any", own.client.connection_pool)._in_use_connections) - idle_connections(own),
        "more connections": len(own.client.client_list()) - connections,
        "held": [step for step, status in own.step_statuses(str(this_run)).items() if status is StepStatus.RUNNING],
    }


def _time(function: Callable[[int], int]) -> float:
    """About how long a call takes, in seconds."""
    start = time.perf_counter()
    for number in range(-20, 0):
        function(number)
    return (time.perf_counter() - start) / 20
