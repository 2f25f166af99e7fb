"""What a kit lets go wrong, on each server and for both stores."""

from __future__ import annotations

import asyncio
import threading
import time
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

# Not on a cluster: redis-py's client of a cluster takes seconds to find its nodes again.
pytestmark = pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")

ROUND: dict[str, Callable[[StepRunStore], Any]] = {
    "begin_step": lambda store: begun(store.begin_step("run", "pay", {}, lease=60)).attempt,
    "complete_step": lambda store: store.complete_step(begun(store.begin_step("run", "pay", {})), {"paid": 1}).status,
    "fail_step": lambda store: store.fail_step(begun(store.begin_step("run", "pay", {})), {"no": 1}).status,
    "schedule_step": lambda store: store.schedule_step("run", "pay", {}).decision,
    "get_run": lambda store: store.get_run("run"),
}

# Of a cluster, redis-py looks for another node, and does not say whether it has sent anything.
NOT_SENT = (NotSentError, OutcomeUnknownError)


class TestLosses:
    @pytest.mark.parametrize("operation", ROUND)
    @pytest.mark.parametrize("fault", ["lose_reply", "lose_request"])
    def test_the_store_sends_it_again(
        self, kit: StepKit, store: StepRunStore, fault: str, operation: str, backend: Backend
    ) -> None:
        getattr(kit.faults, fault)(operation)
        answered = ROUND[operation](store)

        assert kit.faults.pending() == []
        with StepKit(backend.url or "fakeredis") as undisturbed:
            assert ROUND[operation](undisturbed.store) == answered
        assert [len(kit.observer.attempts("run", "pay"))] == [operation not in ("schedule_step", "get_run")]

    def test_a_lost_reply_was_carried_out_and_a_lost_request_was_not(self, kit: StepKit, store: StepRunStore) -> None:
        seen = list[object]()

        def look() -> None:
            seen.append(kit.observer.get_step_run("run", "pay"))

        kit.faults.lose_request("begin_step")
        kit.faults.lose_reply("begin_step")
        kit.faults.before("begin_step", look, times=3)

        begun(store.begin_step("run", "pay", {}))

        assert [step_run is None for step_run in seen] == [True, True, False]

    def test_too_many_are_an_unknown_outcome_and_the_call_can_be_sent_again(
        self, kit: StepKit, store: StepRunStore
    ) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        kit.faults.lose_reply("complete_step", times=1_000)

        with pytest.raises(OutcomeUnknownError) as caught:
            store.complete_step(step_run, {"paid": 1})
        kit.faults.heal()

        assert caught.value.call is not None
        assert store.send(caught.value.call).output == {"paid": 1}
        assert_executed_once(kit.store, "run", "pay")

    def test_of_one_run_and_step_alone(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.refuse("begin_step", run="b", step="pay")

        begun(store.begin_step("a", "pay", {}))
        begun(store.begin_step("b", "mail", {}))
        with pytest.raises(RefusedError):
            store.begin_step("b", "pay", {})
        begun(store.begin_step("b", "pay", {}))

    def test_in_a_batch(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.lose_reply("begin_step", step="two")
        kit.faults.lose_request("begin_step", step="three")
        steps = ["one", "two", "three"]

        results = store.batch([store.calls.begin_step("run", step, {}) for step in steps])

        assert [begun(result).attempt for result in results] == [1, 1, 1]
        assert kit.faults.pending() == []


class TestRefusals:
    def test_nothing_is_written(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.refuse("begin_step")

        with pytest.raises(RefusedError, match="memory"):
            store.begin_step("run", "pay", {})

        assert kit.observer.get_run("run") == []

    def test_what_may_pass_within_seconds_is_sent_again(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.refuse("begin_step", "READONLY You can't write against a read only replica.", times=2)

        assert begun(store.begin_step("run", "pay", {})).attempt == 1
        assert kit.faults.pending() == []


class TestServerAway:
    def test_it_is_not_sent_and_the_store_comes_back(self, kit: StepKit, store: StepRunStore, backend: Backend) -> None:
        step_run = begun(store.begin_step("run", "pay", {}))
        with kit.faults.server_away():
            began = time.monotonic()
            with pytest.raises(NOT_SENT[backend.name == "cluster"]):
                store.complete_step(step_run, {})
            assert time.monotonic() - began < 20
            assert stored(kit.observer).status == "running"  # who looks on is spared

        assert store.complete_step(step_run, {}).status == "completed"


class TestTakeOver:
    def test_now(self, kit: StepKit, store: StepRunStore) -> None:
        zombie = begun(store.begin_step("run", "pay", {"amount": 1}))

        winner = kit.faults.take_over("run", "pay", owner="worker-2")

        assert winner is not None
        assert (winner.attempt, winner.input, winner.owner) == (2, {"amount": 1}, "worker-2")
        with pytest.raises(StaleStepRunError):
            store.complete_step(zombie, {})
        assert store.complete_step(winner, {}).status == "completed"

    def test_before_an_operation(self, kit: StepKit, store: StepRunStore) -> None:
        assert kit.faults.take_over("run", "pay", before="complete_step", output={"by": "another"}) is None

        def work(input: dict[str, Any]) -> dict[str, Any]:
            return {"by": "me"}

        assert store.run_step("run", "pay", work, {}) == {"by": "another"}
        assert [attempt.outcome for attempt in store.attempts("run", "pay")] == [
            Outcome.LEASE_EXPIRED,
            Outcome.COMPLETED,
        ]

    def test_who_is_still_at_it(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.take_over("run", "pay", before="complete_step")

        with pytest.raises(StepBusyError):
            store.run_step("run", "pay", lambda _: {}, {})

    def test_of_what_nobody_holds(self, kit: StepKit, store: StepRunStore) -> None:
        with pytest.raises(AssertionError, match="nobody holds step 'pay' of run 'run'"):
            kit.faults.take_over("run", "pay")
        store.schedule_step("run", "pay", {})
        with pytest.raises(AssertionError, match="pending"):
            kit.faults.take_over("run", "pay")


class TestBefore:
    def test_a_second_delivery_in_the_middle_of_the_first(self, kit: StepKit, store: StepRunStore) -> None:
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

    def test_a_coroutine_function_for_the_asyncio_store(self, kit: StepKit, runner: asyncio.Runner) -> None:
        async def meanwhile() -> None:
            assert (await kit.async_store.begin_step("run", "pay", {})).busy

        async def main() -> None:
            kit.faults.before("complete_step", meanwhile)
            step_run, _ = await kit.async_store.begin_step("run", "pay", {})
            await kit.async_store.complete_step(step_run, {})

        runner.run(main())
        assert_completed(kit.async_store, "run", "pay", {})

    @pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
    def test_but_not_for_the_blocking_one(self, kit: StepKit) -> None:
        async def meanwhile() -> None: ...

        kit.faults.before("begin_step", meanwhile)
        with pytest.raises(TypeError, match="is asynchronous"):
            kit.store.begin_step("run", "pay", {})


class TestKilledAt:
    def test_nothing_more_is_heard_of_it(self, kit: StepKit, store: StepRunStore) -> None:
        worked = list[int]()

        def work(input: dict[str, Any]) -> dict[str, Any]:
            worked.append(1)
            return {}

        with kit.faults.killed_at("complete_step"):
            store.run_step("run", "pay", work, {}, lease=30)
            raise NotImplementedError  # nobody gets here

        assert stored(kit.observer).status == "running"  # and no failure was recorded
        with pytest.raises(StepBusyError):
            store.run_step("run", "pay", work, {}, lease=30)
        kit.clock.advance(30)
        assert store.run_step("run", "pay", work, {}, lease=30) == {}
        assert len(worked) == 2

    def test_before_it_has_begun(self, kit: StepKit, store: StepRunStore) -> None:
        with kit.faults.killed_at("begin_step"):
            store.run_step("run", "pay", lambda _: {}, {})

        assert store.get_run("run") == []

    def test_a_block_that_ends_by_itself_is_an_error(self, kit: StepKit, store: StepRunStore) -> None:
        with pytest.raises(AssertionError, match="never sent complete_step"), kit.faults.killed_at("complete_step"):
            store.begin_step("run", "pay", {})

        with pytest.raises(KeyError), kit.faults.killed_at("complete_step"):
            raise KeyError
        assert kit.faults.pending() == []

    def test_no_except_exception_survives_it(self, kit: StepKit, store: StepRunStore) -> None:
        assert not issubclass(WorkerKilled, Exception)
        survived = False
        with kit.faults.killed_at("begin_step"):
            try:
                store.begin_step("run", "pay", {})
            except Exception:  # noqa: BLE001 -- the very thing
                survived = True
        assert not survived

    def test_other_threads_live_on_without_a_server(self, kit: StepKit, backend: Backend) -> None:
        errors = list[Exception]()

        def other() -> None:
            try:
                kit.store.get_run("run")
            except Exception as error:  # noqa: BLE001 -- asserted below
                errors.append(error)

        with kit.faults.killed_at("begin_step"):
            try:
                kit.store.begin_step("run", "pay", {})
            finally:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()

        assert [type(error) for error in errors] == [NOT_SENT[backend.name == "cluster"]]


class TestWhatIsAskedFor:
    def test_an_operation_that_is_none(self, kit: StepKit) -> None:
        with pytest.raises(ValueError, match="'complete' is none; there are .*complete_step"):
            kit.faults.lose_reply("complete")
        with pytest.raises(ValueError, match="sent as an extend_claim"):
            kit.faults.refuse("expire_claim")
        with pytest.raises(ValueError, match="times"):
            kit.faults.refuse("begin_step", times=0)

    def test_what_has_not_struck_is_told(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.lose_reply("begin_step", times=2, step="pay")
        assert kit.faults.pending() == ["lose_reply('begin_step') of step 'pay': 2 to go"]

        kit.faults.heal()

        assert kit.faults.pending() == []
        begun(store.begin_step("run", "pay", {}))

    def test_several_at_once_strike_in_the_order_they_were_asked_for(self, kit: StepKit, store: StepRunStore) -> None:
        kit.faults.refuse("begin_step", "OOM first")
        kit.faults.refuse("begin_step", "OOM second")

        for wanted in ("first", "second"):
            with pytest.raises(RefusedError, match=wanted):
                store.begin_step("run", "pay", {})

    def test_a_heartbeat_is_struck_as_well(self, kit: StepKit) -> None:
        lost = threading.Event()
        kit.faults.before("extend_claim", lost.set)

        def work(input: dict[str, Any]) -> dict[str, Any]:
            assert lost.wait(10)
            return {}

        assert kit.store.run_step("run", "pay", work, {}, lease=0.1) == {}
