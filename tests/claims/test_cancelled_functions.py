"""`cancel_when_lost` and `cancel_with_run` of `store.step` and `store.run`, on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from support.backends import Bench
from support.claims import SHORT_LEASE, asyncio_only, take_over
from support.records import stored

from squidstep_redis import RunCancelledError, StepRunStore, StepStatus, current_claim

Function = Callable[[], Coroutine[Any, Any, Any]]


def as_decorated(store: Any, fn: Function, **options: Any) -> Coroutine[Any, Any, Any]:
    decorate = store.step("pay", run_id="run", lease=SHORT_LEASE, **options)
    return decorate(fn)()


def as_call_of_a_run(store: Any, fn: Function, **options: Any) -> Coroutine[Any, Any, Any]:
    return store.run("run", lease=SHORT_LEASE, **options).call("pay", fn)


@asyncio_only
@pytest.mark.parametrize("call", [as_decorated, as_call_of_a_run], ids=["step", "run"])
class TestCancelledFunctions:
    def result(self, bench: Bench, call: Any, fn: Function, **options: Any) -> Any:
        """Returns what the call of the function as a step returns or raises."""
        store: Any = bench.store()

        async def as_task() -> Any:
            return (await asyncio.gather(call(store.store, fn, **options), return_exceptions=True))[0]

        assert bench.runner is not None
        return bench.runner.run(as_task())

    def test_lost_claim_cancels_the_function(self, bench: Bench, others: StepRunStore, call: Any) -> None:
        cancelled: list[bool] = []

        async def pay() -> str:
            others.complete_step(take_over(others), {"result": "the winner's"})
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
            return "late"

        assert self.result(bench, call, pay, cancel_when_lost=True) == "the winner's"
        assert cancelled == [True]

    def test_cancelled_run_cancels_the_function(self, bench: Bench, others: StepRunStore, call: Any) -> None:
        async def pay() -> str:
            others.cancel_run("run", "wrong address")
            await asyncio.Event().wait()
            return "late"

        error = self.result(bench, call, pay, cancel_with_run=True)
        assert isinstance(error, RunCancelledError)
        assert error.reason == "wrong address"
        assert stored(others).status is StepStatus.FAILED

    def test_function_continues_by_default(self, bench: Bench, others: StepRunStore, call: Any) -> None:
        async def pay() -> str:
            others.cancel_run("run")
            claim: Any = current_claim()
            await claim.cancelled.wait()
            return "charged"

        assert self.result(bench, call, pay) == "charged"
