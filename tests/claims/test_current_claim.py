"""`current_claim`: the claim under which the running code executes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest
from support.claims import DeclinedError, Worker, asyncio_only, blocking_only, charge, claim_of_the_work, decline

from squidstep_redis import (
    AsyncStepRunStore,
    StepRunStore,
    current_claim,
)


class TestCurrentClaim:
    def test_current_claim_is_set_inside_the_work_only(self, worker: Worker, others: StepRunStore) -> None:
        seen: list[Any] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = claim_of_the_work()
            seen.append(claim.step_run)
            return {}

        assert current_claim() is None
        worker.execute(work)
        assert current_claim() is None
        with pytest.raises(DeclinedError):
            worker.execute(decline, "ship")
        assert current_claim() is None

        assert [(claimed.run_id, claimed.step, claimed.attempt) for claimed in seen] == [("run", "pay", 1)]

    @blocking_only
    def test_innermost_block_is_the_current_claim(self, worker: Worker) -> None:
        with worker.claim() as outer:
            with worker.claim("ship") as inner:
                assert current_claim() is inner.claim
                inner.complete({})
            assert current_claim() is outer.claim
            outer.complete({})
        assert current_claim() is None

    @blocking_only
    def test_interleaved_generators_restore_the_current_claim(self, worker: Worker) -> None:
        def generate(step: str) -> Iterator[Any]:
            with worker.claim(step) as claim:
                yield claim.claim
                claim.complete({})

        with worker.claim() as outer:
            first, second = generate("first"), generate("second")
            next(first)
            inner = next(second)
            assert list(first) == []
            assert current_claim() is inner
            assert list(second) == []
            assert current_claim() is outer.claim
            outer.complete({})
        assert current_claim() is None

    @blocking_only
    def test_skipped_block_is_the_current_claim_too(self, worker: Worker) -> None:
        worker.execute(charge)

        with worker.claim() as claim:
            assert current_claim() is claim.claim

    @asyncio_only
    def test_each_task_has_its_own_current_claim(self, worker: Worker) -> None:
        steps = [f"step-{number}" for number in range(5)]
        barrier = asyncio.Barrier(5)

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            await barrier.wait()
            claim = claim_of_the_work()
            return {"step": claim.step_run.step, **claim.input}

        async def main() -> list[dict[str, Any]]:
            store: AsyncStepRunStore = worker.plain_store
            return await asyncio.gather(*(store.run_step("run", step, work, {"of": step}) for step in steps))

        outputs = cast("asyncio.Runner", worker.runner).run(main())
        assert outputs == [{"step": step, "of": step} for step in steps]
