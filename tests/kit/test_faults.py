"""The faults of a kit, on each server and for both stores."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support.backends import Backend
from support.records import begun, stored

from squidstep_redis import (
    NotSentError,
    Outcome,
    OutcomeUnknownError,
    RefusedError,
    StaleStepRunError,
    StepBusyError,
    StepRunStore,
)
from squidstep_redis.testing import StepKit, WorkerKilled, assert_completed, assert_executed_once

# Not on a cluster, because redis-py's cluster client takes seconds to rediscover its nodes.
pytestmark = pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")

OPERATIONS: dict[str, Callable[[StepRunStore], Any]] = {
    "begin_step": lambda store: begun(store.begin_step("run", "pay", {}, lease=60)).attempt,
    "complete_step": lambda store: store.complete_step(begun(store.begin_step("run", "pay", {})), {"paid": 1}).status,
    "fail_step": lambda store: store.fail_step(begun(store.begin_step("run", "pay", {})), {"no": 1}).status,
    "schedule_step": lambda store: store.schedule_step("run", "pay", {}).decision,
    "get_run": lambda store: store.get_run("run"),
}


class TestLostMessages:
    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("fault", ["lose_reply", "lose_request"])
    def test_store_resends_after_a_lost_message(
        self, kit: StepKit, store: StepRunStore, fault: str, operation: str, backend: Backend
    ) -> None:
        getattr(kit.faults, fault)(operation)
        result = OPERATIONS[operation](store)

        assert kit.faults.pending() == []
        with StepKit(backend.url or "fakeredis") as other:
            assert OPERATIONS[operation](other.store) == result
        assert [len(kit.observer.attempts("run", "pay"))] == [operation not in ("schedule_step", "get_run")]

    def test_lost_reply_was_executed_and_lost_request_was_not(self, kit: StepKit, store: StepRunStore) -> None:
        seen = list[object]()

        def look() -> None:
            seen.append(kit.observer.get_step_run("run", "pay"))

        kit.faults.lose_request("begin_step")
        kit.faults.lose_reply("begin_step")
        kit.faults.before("begin_step", look, times=3)

        begun(store.begin_step("run", "pay", {}))

        assert [step_run is None for step_run in seen] == [True, True, False]

    @pytest.mark.slow
    def test_losing_every_reply_raises_outcome_unknown(self, kit: StepKit, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        kit.faults.lose_reply("complete_step", times=1_000)

        with pytest.raises(OutcomeUnknownError) as caught:
            store.complete_step(step_run, {"paid": 1})
        kit.faults.heal()

        assert caught.value.call is not None
        assert store.send(caught.value.call).output == {"paid": 1}
        assert_executed_once(kit.store, "run", "pay")

    def test_fault_applies_only_to_the_named_run_and_step(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.refuse("begin_step", run="b", step="pay")

        begun(store.begin_step("a", "pay", {}))
        begun(store.begin_step("b", "mail", {}))
        with pytest.raises(RefusedError):
            store.begin_step("b", "pay", {})
        begun(store.begin_step("b", "pay", {}))

    def test_messages_of_a_batch_can_be_lost(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.lose_reply("begin_step", step="two")
        kit.faults.lose_request("begin_step", step="three")
        steps = ["one", "two", "three"]

        results = store.batch([store.calls.begin_step("run", step, {}) for step in steps])

        assert [begun(result).attempt for result in results] == [1, 1, 1]
        assert kit.faults.pending() == []


class TestRefusals:
    def test_refused_operation_writes_nothing(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.refuse("begin_step")

        with pytest.raises(RefusedError, match="memory"):
            store.begin_step("run", "pay", {})

        assert kit.observer.get_run("run") == []

    def test_transient_error_is_retried(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.refuse("begin_step", "READONLY You can't write against a read only replica.", times=2)

        assert begun(store.begin_step("run", "pay", {})).attempt == 1
        assert kit.faults.pending() == []


class TestServerAway:
    @pytest.mark.slow
    def test_call_raises_not_sent_and_the_store_recovers(self, kit: StepKit, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        with kit.faults.server_away():
            with pytest.raises(NotSentError):
                store.complete_step(step_run, {})
            assert stored(kit.observer).status == "running"  # the observer is not affected

        assert store.complete_step(step_run, {}).status == "completed"


class TestTakeOver:
    def test_takeover_happens_at_once_by_default(self, kit: StepKit, store: StepRunStore) -> None:
        zombie = begun(store.begin_step("run", "pay", {"amount": 1}))

        winner = kit.faults.take_over("run", "pay", owner="worker-2")

        assert winner is not None
        assert (winner.attempt, winner.input, winner.owner) == (2, {"amount": 1}, "worker-2")
        with pytest.raises(StaleStepRunError):
            store.complete_step(zombie, {})
        assert store.complete_step(winner, {}).status == "completed"

    def test_takeover_can_happen_before_an_operation(self, kit: StepKit, store: StepRunStore) -> None:
        assert kit.faults.take_over("run", "pay", before="complete_step", output={"by": "another"}) is None

        def work(input: dict[str, Any]) -> dict[str, Any]:
            return {"by": "me"}

        assert store.run_step("run", "pay", work, {}) == {"by": "another"}
        assert [attempt.outcome for attempt in store.attempts("run", "pay")] == [
            Outcome.LEASE_EXPIRED,
            Outcome.COMPLETED,
        ]

    def test_without_an_output_the_other_worker_stays_busy(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.take_over("run", "pay", before="complete_step")

        with pytest.raises(StepBusyError):
            store.run_step("run", "pay", lambda _: {}, {})

    def test_step_that_is_not_running_cannot_be_taken_over(self, kit: StepKit, store: StepRunStore) -> None:
        with pytest.raises(AssertionError, match="step 'pay' of run 'run' is not running: None"):
            kit.faults.take_over("run", "pay")
        store.schedule_step("run", "pay", {})
        with pytest.raises(AssertionError, match="is not running: .*pending"):
            kit.faults.take_over("run", "pay")


class TestBefore:
    def test_hook_can_deliver_the_step_a_second_time(self, kit: StepKit, store: StepRunStore) -> None:
        worked = list[str]()

        def deliver(who: str) -> dict[str, Any]:
            def work(input: dict[str, Any]) -> dict[str, Any]:
                worked.append(who)
                return {"by": who}

            return kit.store.run_step("run", "pay", work, {}, lease=30)

        def meanwhile() -> None:
            kit.clock.advance(31)
            assert deliver("second") == {"by": "second"}

        kit.faults.before("complete_step", meanwhile)

        assert deliver("first") == {"by": "second"}
        assert worked == ["first", "second"]

    def test_hook_of_the_asyncio_store_may_be_a_coroutine_function(self, kit: StepKit, runner: asyncio.Runner) -> None:
        async def meanwhile() -> None:
            assert (await kit.async_store.begin_step("run", "pay", {})).busy

        async def main() -> None:
            kit.faults.before("complete_step", meanwhile)
            step_run, _ = await kit.async_store.begin_step("run", "pay", {})
            await kit.async_store.complete_step(step_run, {})

        runner.run(main())
        assert_completed(kit.async_store, "run", "pay", {})

    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
    def test_blocking_store_rejects_a_coroutine_function(self, kit: StepKit) -> None:
        async def meanwhile() -> None: ...

        kit.faults.before("begin_step", meanwhile)
        with pytest.raises(TypeError, match="is asynchronous"):
            kit.store.begin_step("run", "pay", {})


class TestKilledAt:
    def test_killed_worker_records_nothing_and_keeps_its_claim(self, kit: StepKit, store: StepRunStore) -> None:
        worked = list[int]()

        def work(input: dict[str, Any]) -> dict[str, Any]:
            worked.append(1)
            return {}

        with kit.faults.killed_at("complete_step"):
            store.run_step("run", "pay", work, {}, lease=30)
            raise NotImplementedError  # unreachable

        assert stored(kit.observer).status == "running"  # and no failure was recorded
        with pytest.raises(StepBusyError):
            store.run_step("run", "pay", work, {}, lease=30)
        kit.clock.advance(30)
        assert store.run_step("run", "pay", work, {}, lease=30) == {}
        assert len(worked) == 2

    def test_worker_killed_at_begin_step_leaves_no_record(self, kit: StepKit, store: StepRunStore) -> None:
        with kit.faults.killed_at("begin_step"):
            store.run_step("run", "pay", lambda _: {}, {})

        assert store.get_run("run") == []

    def test_block_that_never_sends_the_operation_is_an_error(self, kit: StepKit, store: StepRunStore) -> None:
        with pytest.raises(AssertionError, match="never sent complete_step"), kit.faults.killed_at("complete_step"):
            store.begin_step("run", "pay", {})

        with pytest.raises(KeyError), kit.faults.killed_at("complete_step"):
            raise KeyError
        assert kit.faults.pending() == []

    def test_except_exception_does_not_catch_the_kill(self, kit: StepKit, store: StepRunStore) -> None:
        assert not issubclass(WorkerKilled, Exception)
        survived = False
        with kit.faults.killed_at("begin_step"):
            try:
                store.begin_step("run", "pay", {})
            except Exception:
                survived = True
        assert not survived

    def test_task_of_a_group_is_killed_with_its_group(self, kit: StepKit, runner: asyncio.Runner) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(kit.async_store.begin_step("run", "part", {}))
            return {}

        async def worker() -> None:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(kit.async_store.run_step("run", "pay", work, {}, lease=30))

        with kit.faults.killed_at("begin_step", step="part"):
            runner.run(worker())
            raise NotImplementedError  # unreachable

        assert stored(kit.observer).status == "running"  # and no failure was recorded

    @pytest.mark.slow  # retries until the timeout
    def test_other_threads_lose_the_server_but_are_not_killed(self, kit: StepKit) -> None:
        errors = list[Exception]()

        def other() -> None:
            try:
                kit.store.get_run("run")
            except Exception as error:
                errors.append(error)

        with kit.faults.killed_at("begin_step"):
            try:
                kit.store.begin_step("run", "pay", {})
            finally:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()

        assert [type(error) for error in errors] == [NotSentError]


class TestRequests:
    def test_invalid_requests_raise_value_error(self, kit: StepKit) -> None:
        with pytest.raises(ValueError, match="'complete' does not exist; use one of .*complete_step"):
            kit.faults.lose_reply("complete")
        with pytest.raises(ValueError, match="expire_claim is sent as extend_claim"):
            kit.faults.refuse("expire_claim")
        with pytest.raises(ValueError, match="times"):
            kit.faults.refuse("begin_step", times=0)

    def test_pending_faults_are_listed_and_can_be_canceled(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.lose_reply("begin_step", times=2, step="pay")
        assert kit.faults.pending() == ["lose_reply('begin_step') of step 'pay': 2 left"]

        kit.faults.heal()

        assert kit.faults.pending() == []
        begun(store.begin_step("run", "pay", {}))

    def test_faults_occur_in_the_order_of_their_requests(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.refuse("begin_step", "OOM first")
        kit.faults.refuse("begin_step", "OOM second")

        for message in ("first", "second"):
            with pytest.raises(RefusedError, match=message):
                store.begin_step("run", "pay", {})

    @pytest.mark.slow
    def test_faults_apply_to_heartbeats(self, kit: StepKit) -> None:
        extended = threading.Event()
        kit.faults.before("extend_claim", extended.set)

        def work(input: dict[str, Any]) -> dict[str, Any]:
            assert extended.wait(30)
            return {}

        assert kit.store.run_step("run", "pay", work, {}, lease=1) == {}
