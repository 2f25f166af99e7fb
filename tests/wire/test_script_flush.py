"""SCRIPT FLUSH, a restart or a failover: the server forgets the scripts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from support.backends import Bench
from support.operations import (
    PAYLOAD,
    finish,
    mixed,
    seen,
    state,
)
from support.proxy import Proxy
from support.records import begun

from squidstep_redis import (
    Call,
    StepRunStore,
)
from squidstep_redis.model import step_run_id

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")


class TestScriptFlush:
    """SCRIPT FLUSH, a restart or a failover in the middle of calls."""

    def test_a_batch_after_a_flush_returns_the_same(
        self, bench: Bench, store: StepRunStore, twin: StepRunStore
    ) -> None:
        expected = twin.batch(mixed(twin, 40))
        bench.backend.flush_scripts()

        outcomes = store.batch(mixed(store, 40))

        assert seen(outcomes) == seen(expected)

    @pytest.mark.parametrize("after", range(1, 6))
    def test_a_flush_within_a_batch_runs_nothing_twice(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, after: int
    ) -> None:
        calls = proxied.calls
        claims = [begun(proxied.begin_step("run", f"step-{number}", {})) for number in range(3)]
        proxy.clear()
        proxy.after(after, bench.backend.flush_scripts)

        outcomes = proxied.batch(
            [calls.begin_step(f"run-{number}", "pay", {}) for number in range(3)]
            + [calls.complete_step(claim, {"of": claim.step}) for claim in claims]
        )

        assert [begun(outcome).attempt for outcome in outcomes[:3]] == [1, 1, 1]
        assert [len(proxied.attempts(f"run-{number}", "pay")) for number in range(3)] == [1, 1, 1]
        assert [outcome.output for outcome in outcomes[3:]] == [{"of": claim.step} for claim in claims]
        assert sorted(proxied.completed_steps("run")) == [claim.step for claim in claims]

    @pytest.mark.parametrize("after", range(1, 15))
    def test_a_flush_within_a_batch_keeps_the_order_of_calls(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, twin: StepRunStore, after: int
    ) -> None:
        def calls(store: StepRunStore) -> list[Call[Any]]:
            make, id = store.calls, partial(step_run_id, store.calls.prefix, "run")
            return [
                make.begin_step("run", "a", {}),
                make.begin_step("run", "b", {}),
                make.complete_step(id("a"), {}),
                make.complete_step(id("b"), {}),
                make.schedule_step("run", "c", {"first": True}),
                make.begin_step("run", "c", {"first": False}),
                make.fail_step(id("c"), {"why": 1}),
                make.begin_step("run", "c", {}),
                make.get_run("run"),
            ]

        expected = twin.batch(calls(twin))
        proxy.after(after, bench.backend.flush_scripts)

        outcomes = proxied.batch(calls(proxied))

        assert seen(outcomes) == seen(expected)
        assert state(proxied) == state(twin)

    @pytest.mark.parametrize("transaction", [True, False])
    @pytest.mark.parametrize("after", range(5))
    def test_a_flush_within_a_users_pipeline_runs_nothing_twice(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, transaction: bool, after: int
    ) -> None:
        pipeline = proxied.client.pipeline(transaction=transaction)
        pipeline.set(f"{bench.prefix}:own", "1")
        began = proxied.queue(pipeline, proxied.calls.begin_step("run", "pay", PAYLOAD))
        again = proxied.queue(pipeline, proxied.calls.begin_step("run", "pay", PAYLOAD))
        proxy.after(after, bench.backend.flush_scripts)  # also between MULTI and EXEC

        replies = finish(bench, pipeline.execute())

        assert begun(began.result(replies)).attempt == 1
        assert again.result(replies).busy
        assert bench.backend.raw.get(f"{bench.prefix}:own") == b"1"
