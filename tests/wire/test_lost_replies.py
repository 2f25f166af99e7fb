"""Lost replies and lost requests: a re-sent call takes effect once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from support.backends import Bench, Driven
from support.operations import (
    CALLS,
    PAYLOAD,
    WORKFLOWS,
    finish,
    perform,
    prepare,
    seen,
    state,
)
from support.proxy import Proxy
from support.records import begun

from squidstep_redis import (
    AsyncStepRunStore,
    Call,
    OutcomeUnknownError,
    StepRunStore,
)

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")


class TestLostReplies:
    """The server runs the call, the connection breaks before the reply, and the call is sent again."""

    @pytest.mark.parametrize("lost_replies", [1, 3])
    def test_begin_executes_once(self, proxy: Proxy, proxied: StepRunStore, known: None, lost_replies: int) -> None:
        proxy.drop(lost_replies)

        step_run = begun(proxied.begin_step("run", "pay", PAYLOAD, lease=60))

        assert proxy.names() == ["EVALSHA"] * (lost_replies + 1)
        assert step_run.attempt == 1
        assert [attempt.number for attempt in proxied.attempts("run", "pay")] == [1]
        assert proxied.complete_step(step_run, PAYLOAD).output == PAYLOAD

    @pytest.mark.parametrize("lost_replies", [1, 3])
    def test_complete_takes_one_place_in_the_order(
        self, proxy: Proxy, proxied: StepRunStore, known: None, lost_replies: int
    ) -> None:
        step_run = begun(proxied.begin_step("run", "pay", {}))
        proxy.clear()
        proxy.drop(lost_replies)

        completed = proxied.complete_step(step_run, PAYLOAD, schedule={"mail": {}})

        assert proxy.names() == ["EVALSHA"] * (lost_replies + 1)
        assert completed.output == PAYLOAD
        assert proxied.completed_steps("run") == ["pay"]
        assert proxied.completed_outputs("run") == [PAYLOAD]
        assert [step_run.step for step_run in proxied.get_run("run")] == ["pay", "mail"]

    @pytest.mark.parametrize("lost_replies", [1, 3])
    @pytest.mark.parametrize("operation", CALLS)
    def test_every_operation_returns_the_same_as_without_loss(
        self,
        bench: Bench,
        proxy: Proxy,
        proxied: StepRunStore,
        twin: StepRunStore,
        known: None,
        operation: str,
        lost_replies: int,
    ) -> None:
        expected = perform(twin, operation, prepare(bench, twin))
        claim = prepare(bench, proxied)
        proxy.clear()
        proxy.drop(lost_replies)

        outcome = perform(proxied, operation, claim)

        assert proxy.names() == ["EVALSHA"] * (lost_replies + 1)
        assert seen(outcome) == seen(expected)
        assert state(proxied) == state(twin)

    @pytest.mark.parametrize("operation", WORKFLOWS)
    def test_every_workflow_returns_the_same_as_without_loss(
        self,
        bench: Bench,
        proxy: Proxy,
        proxied: StepRunStore,
        twin: StepRunStore,
        operation: str,
    ) -> None:
        expected = perform(twin, operation, prepare(bench, twin))
        claim = prepare(bench, proxied)
        proxy.drop(2)

        outcome = perform(proxied, operation, claim)

        assert seen(outcome) == seen(expected)
        assert state(proxied) == state(twin)

    @pytest.mark.parametrize("lost", ["the whole batch", "the end of the batch"])
    def test_a_batch_that_is_sent_again_returns_the_same(
        self, proxy: Proxy, proxied: StepRunStore, twin: StepRunStore, no_pauses: None, lost: str
    ) -> None:
        def calls(store: StepRunStore) -> list[Call[Any]]:
            make = store.calls
            return [
                make.schedule_steps("run", {"scheduled": {}, "deleted": {}}),
                make.delete_pending_steps("run", ["deleted"]),
                make.complete_step(completing[store], PAYLOAD),
                make.fail_step(failing[store], PAYLOAD),
                make.release_step(releasing[store]),
                make.begin_step("run", "begun", PAYLOAD, lease=60),
                make.delete_run("deleted"),
            ]

        stores = (proxied, twin)
        completing = {store: begun(store.begin_step("run", "completed", {})) for store in stores}
        failing = {store: begun(store.begin_step("run", "failed", {})) for store in stores}
        releasing = {store: begun(store.begin_step("run", "released", {})) for store in stores}
        for store in stores:
            store.schedule_step("deleted", "step", {})
        expected = twin.batch(calls(twin))
        sent = calls(proxied)

        if lost == "the whole batch":
            proxy.drop()
            with proxy.batches(len(sent), len(sent)):
                outcomes = proxied.batch(sent)
        else:
            proxy.after(4, proxy.drop)
            outcomes = proxied.batch(sent)

        assert seen(outcomes) == seen(expected)
        assert state(proxied) == state(twin)

    @pytest.mark.parametrize("operation", CALLS)
    def test_a_call_that_never_arrived_is_sent_again(
        self,
        bench: Bench,
        proxy: Proxy,
        proxied: StepRunStore,
        twin: StepRunStore,
        operation: str,
    ) -> None:
        expected = perform(twin, operation, prepare(bench, twin))
        claim = prepare(bench, proxied)
        proxy.cut(2)

        assert seen(perform(proxied, operation, claim)) == seen(expected)
        assert state(proxied) == state(twin)

    def test_after_the_deadline_the_same_call_can_be_sent_again(
        self, proxy: Proxy, connect: Callable[..., StepRunStore], known: None
    ) -> None:
        store = connect(timeout=1)
        proxy.drop(1_000)

        with pytest.raises(OutcomeUnknownError, match="begin_step, run 'run', step 'pay': no reply within") as caught:
            store.begin_step("run", "pay", {})

        assert len(proxy.commands) > 2
        proxy.heal()
        assert caught.value.call is not None
        assert begun(store.send(caught.value.call)).attempt == 1

    @pytest.mark.parametrize("lost_replies", [1, 3, 10])
    def test_retries_of_redis_py_itself_take_effect_once(
        self, bench: Bench, proxy: Proxy, known: None, no_pauses: None, lost_replies: int
    ) -> None:
        """Depending on its version, redis-py re-sends up to ten times, or never.

        The store retries on top of that, but not in this test.
        """
        if bench.runner is None:
            client: Any = redis.Redis(host="127.0.0.1", port=proxy.port)
            store = StepRunStore(client, prefix=bench.prefix)
        else:
            client = redis.asyncio.Redis(host="127.0.0.1", port=proxy.port)
            store = cast("Any", Driven(AsyncStepRunStore(client, prefix=bench.prefix), bench.runner))

        def once(call: Call[Any]) -> Any:
            return store.send(call._replace(retryable=False))

        def retry(call: Call[Any]) -> Any:
            proxy.clear()
            proxy.drop(lost_replies)
            for _ in range(lost_replies):
                with contextlib.suppress(OutcomeUnknownError):
                    return once(call)
            return once(call)

        step_run = begun(retry(store.calls.begin_step("run", "pay", {}, lease=60)))
        assert len(proxy.commands) == lost_replies + 1
        assert step_run.attempt == 1
        completed = retry(store.calls.complete_step(step_run, PAYLOAD))
        assert completed.output == PAYLOAD
        assert store.completed_steps("run") == ["pay"]
        finish(bench, client.close() if bench.runner is None else client.aclose())
