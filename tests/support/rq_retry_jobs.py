"""Job functions that return RQ's Retry, and job functions with a decorator of their own around `step`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rq import Retry

from squidstep_redis import current_claim
from squidstep_redis.rq import current_run, step, steps, store
from support.rq_jobs import effect, this_attempt, this_job

# RQ's Retry as a result


@step("fetch", max_attempts=1)
def fetch(times: int, most: int, interval: int) -> str | Retry:
    """Asks for another run this many times."""
    effect("fetch")
    return Retry(max=most, interval=interval) if this_attempt() <= times else "the page"


@step("fetch", max_attempts=1)
async def fetch_asyncio(times: int, most: int, interval: int) -> str | Retry:
    return fetch.__wrapped__(times, most, interval)


@steps(max_attempts=1)
def fetch_in_run(times: int, most: int, interval: int) -> str | Retry:
    run = current_run()
    run.call("prepare", effect, "prepare")
    return run.call("fetch", fetch.__wrapped__, times, most, interval)


@step("fetch", lease=600)
def fetch_after_a_wait(most: int) -> str | Retry:
    """Asks for another run until the attempt after `most` others of its own; the first attempt was another worker's."""
    effect("fetch")
    return Retry(max=most) if this_attempt() <= 1 + most else "the page"


@step("fetch", run_id="page-{page}")
def fetch_page(page: int) -> Retry:
    effect("fetch")
    return Retry(max=5)


@step("fetch")
def fetch_too_late() -> Retry:
    """Loses its claim to a worker that completes the step."""
    claim = current_claim()
    assert claim is not None
    run_id = claim.step_run.run_id
    store().expire_claim(claim.step_run)
    other, _ = store().begin_step(run_id, "fetch", {})
    store().complete_step(other, {"result": "the winner's page"})
    return Retry(max=5)


# Decorators around `step`


def drop_result(function: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(function)
    def dropping(*args: Any) -> None:
        function(*args)

    return dropping


def drop_result_asyncio(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def dropping(*args: Any) -> None:
        await function(*args)

    return dropping


def replace_result(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def replacing(*args: Any) -> dict[str, Any]:
        return {"took": 7, "result": str(function(*args))}

    return replacing


@drop_result
@step("charge", lease=600)
def charge_dropped(amount: int) -> int:
    effect("charge")
    return amount


@drop_result_asyncio
@step("charge", lease=600)
async def charge_dropped_asyncio(amount: int) -> int:
    effect("charge")
    return amount


@replace_result
@drop_result
@steps(lease=600)
def charge_replaced(amount: int) -> int:
    return current_run().call("charge", charge_dropped.__wrapped__.__wrapped__, amount)


# Jobs that rq-scheduler repeats


@steps()
def report_twice() -> str | Retry:
    """Asks for another run after its first step, once."""
    run = current_run()
    run.call("collect", effect, "collect")
    return run.call("report", _report)


def _report() -> str | Retry:
    effect("report")
    return Retry(max=5) if this_attempt() == 1 else "the report"


@steps()
def report_refreshed() -> str | Retry:
    """Reads its job again after its first step, and asks for another run after the second one, once."""
    current_run().call("collect", effect, "collect")
    this_job().refresh()
    return report_after_refresh()


@step("report")
def report_after_refresh() -> str | Retry:
    return _report()
