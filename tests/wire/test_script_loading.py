"""When a batch loads scripts: at first, after the server lost them, and if its calls depend on their order."""

from __future__ import annotations

from typing import Any

import pytest
from support.backends import Bench
from support.proxy import Proxy
from support.records import begun

from squidstep_redis import Call, StepRunStore
from squidstep_redis.model import step_run_id

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")

RUNS = range(20)


def begins(store: StepRunStore, step: str) -> list[Call[Any]]:
    return [store.calls.begin_step(f"run-{number}", step, {}) for number in RUNS]


def sent_by(proxy: Proxy, store: StepRunStore, calls: list[Call[Any]]) -> list[str]:
    """Sends a batch, whose calls succeed; returns the names of its commands."""
    proxy.clear()
    assert [begun(result).attempt for result in store.batch(calls)] == [1] * len(calls)
    return proxy.names()


def test_a_batch_loads_its_script_once(proxy: Proxy, proxied: StepRunStore) -> None:
    first = sent_by(proxy, proxied, begins(proxied, "first"))
    second = sent_by(proxy, proxied, begins(proxied, "second"))

    assert first == ["MULTI", "SCRIPT", "EXEC"] + ["EVALSHA"] * len(RUNS)
    assert second == ["EVALSHA"] * len(RUNS)


def test_a_batch_loads_the_scripts_that_earlier_ones_did_not(proxy: Proxy, proxied: StepRunStore) -> None:
    claims = [begun(result) for result in proxied.batch(begins(proxied, "pay"))]
    calls: list[Call[Any]] = [proxied.calls.complete_step(claim, {}) for claim in claims[:5]]
    proxy.clear()

    proxied.batch([*calls, proxied.calls.begin_step("another", "pay", {})])

    assert proxy.names().count("SCRIPT") == 1
    assert proxy.commands[1][2] == calls[0].script.source


def test_a_batch_whose_calls_depend_on_their_order_loads_all(proxy: Proxy, proxied: StepRunStore) -> None:
    """If the server has lost one of the scripts, a later call must not run before an earlier one."""
    make = proxied.calls
    for run in ("first", "second"):
        pay = step_run_id(make.prefix, run, "pay")
        proxy.clear()

        outcomes = proxied.batch([make.begin_step(run, "pay", {}), make.complete_step(pay, {"receipt": 7})])

        assert proxy.names().count("SCRIPT") == 2
        assert outcomes[1].output == {"receipt": 7}


def test_batch_after_a_flush_is_resent_in_one_round_trip(bench: Bench, proxy: Proxy, proxied: StepRunStore) -> None:
    sent_by(proxy, proxied, begins(proxied, "before"))
    bench.backend.flush_scripts()

    with proxy.batches(len(RUNS), len(RUNS)):
        names = sent_by(proxy, proxied, begins(proxied, "after"))

    assert names == ["EVALSHA"] * len(RUNS) + ["MULTI", "SCRIPT", "EXEC"] + ["EVALSHA"] * len(RUNS)
    assert proxy.round_trips == 2
    assert sent_by(proxy, proxied, begins(proxied, "later")) == ["EVALSHA"] * len(RUNS)


def test_a_flush_after_the_load_costs_one_more_batch(bench: Bench, proxy: Proxy, proxied: StepRunStore) -> None:
    load = ["MULTI", "SCRIPT", "EXEC"]
    proxy.after(len(load) + 5, bench.backend.flush_scripts)

    names = sent_by(proxy, proxied, begins(proxied, "pay"))

    assert names == load + ["EVALSHA"] * len(RUNS) + load + ["EVALSHA"] * (len(RUNS) - 5)


@pytest.mark.parametrize("after", range(len(RUNS)))
def test_a_flush_at_any_point_repeats_no_call(bench: Bench, proxy: Proxy, proxied: StepRunStore, after: int) -> None:
    sent_by(proxy, proxied, begins(proxied, "before"))
    proxy.clear()
    proxy.after(after, bench.backend.flush_scripts)

    outcomes = proxied.batch(begins(proxied, "pay"))

    assert [begun(outcome).attempt for outcome in outcomes] == [1] * len(RUNS)
    assert [len(proxied.attempts(f"run-{number}", "pay")) for number in RUNS] == [1] * len(RUNS)


def test_script_that_failed_to_load_is_loaded_by_next_batch(proxy: Proxy, proxied: StepRunStore) -> None:
    proxy.translate = lambda real: b"-NOPERM no\r\n" if proxy.commands[-1][0].upper() == b"EXEC" else real
    proxied.batch(begins(proxied, "first"))

    assert "SCRIPT" in sent_by(proxy, proxied, begins(proxied, "second"))
