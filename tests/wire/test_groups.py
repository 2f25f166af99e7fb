"""Groups of a batch: one script call for each, also after lost replies, redirects and refusals."""

from __future__ import annotations

from typing import Any

import pytest
from support.backends import Bench
from support.operations import seen, state
from support.proxy import Proxy
from support.records import begun, in_batch

from squidstep_redis import BeginResult, Call, CorruptRunError, RunDeletedError, StepRunStore

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")

STEPS = ("a", "b", "c")


def begin(store: StepRunStore) -> list[Call[Any]]:
    return [store.calls.begin_step(run, step, {"of": step}) for step in STEPS for run in ("run", "other")]


def test_a_group_is_one_script_call(proxy: Proxy, proxied: StepRunStore) -> None:
    results = in_batch(proxied, begin(proxied))
    assert proxy.names() == ["MULTI", "SCRIPT", "EXEC", "EVALSHA", "EVALSHA"]
    proxy.clear()

    in_batch(proxied, [proxied.calls.complete_step(begun(result), {}) for result in results])

    assert proxy.names() == ["MULTI", "SCRIPT", "EXEC", "EVALSHA", "EVALSHA"]


@pytest.mark.parametrize("replies", [3, 4])  # the transaction that loads the script, and none or one of two groups
def test_a_group_without_a_reply_is_sent_again(
    proxy: Proxy, proxied: StepRunStore, twin: StepRunStore, replies: int
) -> None:
    proxy.after(replies, proxy.drop)
    results = in_batch(proxied, begin(proxied))
    proxy.clear()
    proxy.after(replies, proxy.drop)
    completed = in_batch(proxied, [proxied.calls.complete_step(begun(result), {}) for result in results])

    expected = in_batch(twin, begin(twin))
    assert seen(results) == seen(expected)
    assert seen(completed) == seen(in_batch(twin, [twin.calls.complete_step(begun(result), {}) for result in expected]))
    assert state(proxied) == state(twin)


def test_a_group_on_a_deleted_run_is_sent_once(proxy: Proxy, proxied: StepRunStore) -> None:
    proxied.schedule_step("run", "a", {})
    proxied.delete_run("run")
    proxy.clear()

    outcomes = proxied.batch([proxied.calls.begin_step("run", step, {}) for step in STEPS])

    assert [type(outcome) for outcome in outcomes] == [RunDeletedError] * 3
    assert proxy.names() == ["MULTI", "SCRIPT", "EXEC", "EVALSHA"]


def test_calls_of_a_refused_group_are_resent_separately(bench: Bench, proxy: Proxy, proxied: StepRunStore) -> None:
    proxied.begin_step("run", "a", {})
    bench.backend.raw.hset(bench.keys("run")[0], "sa", "no state line")
    proxy.clear()

    outcomes = proxied.batch([proxied.calls.begin_step("run", step, {}) for step in STEPS])

    assert [type(outcome) for outcome in outcomes] == [CorruptRunError, BeginResult, BeginResult]
    assert proxy.names() == ["MULTI", "SCRIPT", "EXEC", "EVALSHA"] + ["EVALSHA"] * len(STEPS)
