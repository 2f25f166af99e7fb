"""`run_step`: one delivery executes the step, and every delivery returns its output."""

from __future__ import annotations

import asyncio
import math
import os
import socket
from typing import Any, cast

import pytest
from support.backends import Bench
from support.claims import (
    Block,
    DeclinedError,
    Worker,
    asyncio_only,
    blocking_only,
    charge,
    decline,
    fakeredis_only,
    outcomes,
    real_server,
)
from support.proxy import Proxy
from support.records import begun, stored

from squidstep_redis import (
    AsyncClaim,
    AsyncStepRunStore,
    Claim,
    InvalidArgumentError,
    Outcome,
    RunDeletedError,
    StaleStepRunError,
    StepExhaustedError,
    StepRunStore,
    StepStatus,
    current_claim,
)


class TestRunStep:
    def test_one_delivery_executes_and_all_return_its_output(self, store: StepRunStore) -> None:
        given: list[dict[str, Any]] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            given.append(input)
            return {"charged": input["amount"]}

        outputs = [store.run_step("run", "pay", work, {"amount": number}) for number in range(5)]

        assert outputs == [{"charged": 0}] * 5
        assert given == [{"amount": 0}]
        assert (stored(store).status, stored(store).output) == (StepStatus.COMPLETED, {"charged": 0})
        assert outcomes(store) == [Outcome.COMPLETED]

    def test_work_receives_the_scheduled_input(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {"amount": 1})

        assert store.run_step("run", "pay", charge, {"amount": 2}) == {"charged": 1}

    def test_first_delivery_returns_the_output_as_stored(self, store: StepRunStore) -> None:
        first = store.run_step("run", "pay", lambda _: {"items": (1, 2)}, {})

        assert first == {"items": [1, 2]}
        assert store.run_step("run", "pay", lambda _: {"items": (1, 2)}, {}) == first

    def test_empty_output_is_returned(self, store: StepRunStore) -> None:
        assert [store.run_step("run", "pay", lambda _: {}, {}) for _ in range(2)] == [{}, {}]

    def test_exception_is_recorded_and_raised_and_the_step_retried(self, store: StepRunStore) -> None:
        declined = DeclinedError("no funds")

        def work(input: dict[str, Any]) -> dict[str, Any]:
            raise declined

        with pytest.raises(DeclinedError) as caught:
            store.run_step("run", "pay", work, {"amount": 1})

        assert caught.value is declined
        assert stored(store).status is StepStatus.FAILED
        assert stored(store).last_error is not None
        assert stored(store).last_error["type"].endswith("DeclinedError")
        assert stored(store).last_error["message"] == "no funds"
        assert "in work" in stored(store).last_error["traceback"]
        assert store.run_step("run", "pay", charge, {"amount": 2}) == {"charged": 2}
        assert stored(store).attempt == 2
        assert outcomes(store) == [Outcome.FAILED, Outcome.COMPLETED]

    def test_step_without_attempts_left_is_exhausted(self, store: StepRunStore) -> None:
        for _ in range(2):
            with pytest.raises(DeclinedError):
                store.run_step("run", "pay", decline, {}, max_attempts=2)

        with pytest.raises(
            StepExhaustedError, match="run 'run', step 'pay': max_attempts reached after attempt"
        ) as caught:
            store.run_step("run", "pay", charge, {}, max_attempts=2)

        assert caught.value.current == stored(store)
        assert caught.value.current.last_error is not None
        assert caught.value.current.last_error["message"] == "no funds"

    def test_expired_claim_without_attempts_left_is_exhausted(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.01, max_attempts=1)))

        with pytest.raises(StepExhaustedError) as caught:
            store.run_step("run", "pay", charge, {}, max_attempts=1, on_busy="wait")

        assert caught.value.current.last_error is not None
        assert caught.value.current.last_error["type"] == "LeaseExpired"

    def test_expired_claim_is_taken_over(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.01)))

        assert store.run_step("run", "pay", charge, {"amount": 2}) == {"charged": 2}
        assert outcomes(store) == [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]

    def test_deleted_run_is_rejected(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {})
        store.delete_run("run")

        with pytest.raises(RunDeletedError):
            store.run_step("run", "pay", charge, {}, on_busy="wait")

    def test_owner_defaults_to_host_and_process_id(self, store: StepRunStore) -> None:
        store.run_step("run", "pay", lambda _: {}, {})
        store.run_step("run", "mail", lambda _: {}, {}, owner="worker-1")

        owners = [step_run.owner for step_run in store.get_run("run")]
        assert owners == [f"{socket.gethostname()}:{os.getpid()}", "worker-1"]

    @real_server
    def test_execution_costs_two_round_trips_and_a_skip_one(self, proxied: tuple[Worker, Proxy]) -> None:
        worker, proxy = proxied
        worker.execute(charge, "before")  # connects
        proxy.clear()

        worker.execute(charge)
        assert proxy.names() == ["EVALSHA"] * 2
        worker.execute(charge)
        assert proxy.names() == ["EVALSHA"] * 3


class TestArguments:
    @fakeredis_only
    @pytest.mark.parametrize(
        ("problem", "options"),
        [
            ("fn: must be callable, not str 'work'", {"fn": "work"}),
            ("on_busy: must be 'raise' or 'wait', not str 'skip'", {"on_busy": "skip"}),
            ("on_busy: must be", {"on_busy": None}),
            ("lease: must be seconds", {"lease": 0}),
            ("lease: must be seconds", {"lease": "30"}),
            ("lease: must be seconds", {"lease": math.nan}),
            ("max_attempts: must be an int", {"max_attempts": 0}),
            ("owner: must not contain control characters", {"owner": "a\nb"}),
            ("run_id: must be a non-empty str", {"run_id": 7}),
            ("step: must be", {"step": ""}),
            (r"input\['amount'\]", {"input": {"amount": object()}}),
        ],
    )
    def test_invalid_arguments_are_rejected_before_anything_is_sent(
        self, bench: Bench, worker: Worker, problem: str, options: dict[str, Any]
    ) -> None:
        arguments: dict[str, Any] = {"run_id": "run", "step": "pay", "fn": charge, "input": {"amount": 1}, **options}

        with pytest.raises(InvalidArgumentError, match=problem):
            worker.store.run_step(**arguments)
        if "fn" not in options:
            del arguments["fn"]
            with (
                pytest.raises(InvalidArgumentError, match=problem),
                Block(worker.store.claim_step(**arguments), worker.runner),
            ):
                pass

        assert bench.dump() == {}

    @blocking_only
    def test_coroutine_function_of_a_blocking_store_can_be_replaced(self, store: StepRunStore) -> None:
        """It has done nothing, so its step may be executed again."""

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            raise NotImplementedError

        function: Any = work
        with pytest.raises(InvalidArgumentError, match="^fn: .* returned a coroutine: use an AsyncStepRunStore"):
            store.run_step("run", "pay", function, {"amount": 7})
        assert store.run_step("run", "pay", charge, {"amount": 7}) == {"charged": 7}

    @asyncio_only
    def test_work_may_be_a_coroutine_function_or_a_plain_function(self, worker: Worker) -> None:
        async def awaited(input: dict[str, Any]) -> dict[str, Any]:
            await asyncio.sleep(0)
            return charge(input)

        async def main() -> list[dict[str, Any]]:
            works = (awaited, charge)
            store: AsyncStepRunStore = worker.plain_store
            return [await store.run_step("run", f"{n}", work, {"amount": n}) for n, work in enumerate(works)]

        assert cast("asyncio.Runner", worker.runner).run(main()) == [{"charged": 0}, {"charged": 1}]


class TestWorkThatEndsItsOwnClaim:
    @blocking_only
    def test_completed_output_is_returned(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            cast("Claim", current_claim()).complete({"by": "work"}, schedule={"ship": {}})
            return {"not": "kept"}

        assert worker.execute(work) == {"by": "work"}
        assert others.step_statuses("run") == {"pay": StepStatus.COMPLETED, "ship": StepStatus.PENDING}

    @asyncio_only
    def test_output_completed_by_a_coroutine_is_returned(self, worker: Worker, others: StepRunStore) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            await cast("AsyncClaim", current_claim()).complete({"by": "work"}, schedule={"ship": {}})
            return {"not": "kept"}

        assert worker.store.run_step("run", "pay", cast("Any", work), {}) == {"by": "work"}
        assert others.step_statuses("run") == {"pay": StepStatus.COMPLETED, "ship": StepStatus.PENDING}

    @pytest.mark.parametrize("on_busy", ["raise", "wait"])
    @pytest.mark.parametrize("ending", ["fail", "release"])
    def test_claim_that_ends_without_output_is_stale(
        self, worker: Worker, others: StepRunStore, ending: str, on_busy: Any
    ) -> None:
        async def work_asyncio(input: dict[str, Any]) -> dict[str, Any]:
            claim = cast("AsyncClaim", current_claim())
            await (claim.release() if ending == "release" else claim.fail({"reason": "declined"}))
            return {"not": "kept"}

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = cast("Claim", current_claim())
            claim.release() if ending == "release" else claim.fail({"reason": "declined"})
            return {"not": "kept"}

        fn = cast("Any", work if worker.runner is None else work_asyncio)
        with pytest.raises(StaleStepRunError, match="the work ended its own claim") as caught:
            worker.store.run_step("run", "pay", fn, {}, on_busy=on_busy)

        assert caught.value.current == stored(others)
        assert outcomes(others) == [Outcome.RELEASED if ending == "release" else Outcome.FAILED]
