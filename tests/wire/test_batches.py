"""Batches: results in order, on one server and on a cluster."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.crc import key_slot
from support.backends import Bench
from support.operations import (
    mixed,
    seen,
)
from support.proxy import Proxy
from support.records import begun
from support.servers import SLOTS, wait_until

from squidstep_redis import (
    BatchError,
    BeginResult,
    Call,
    InvalidArgumentError,
    OutcomeUnknownError,
    RefusedError,
    ScheduleResult,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
)
from squidstep_redis.model import step_run_id

pytestmark = [
    pytest.mark.servers("valkey", "redis-7", "redis-6"),
    # redis-py 6.0 to 6.2 warns about how it makes a cluster's pipeline itself.
    pytest.mark.filterwarnings("ignore:.*cluster_error_retry_attempts:DeprecationWarning"),
]


class TestBatch:
    def test_results_and_errors_come_in_order(self, store: StepRunStore) -> None:
        calls = store.calls
        pay = begun(store.begin_step("run", "pay", {}))
        ship = begun(store.begin_step("run", "ship", {}))
        unknown = step_run_id(calls.prefix, "run", "unknown")
        store.fail_step(ship.id, {})

        outcomes = store.batch(
            [
                calls.get_step_run("run", "unknown"),
                calls.complete_step(ship, {}),
                calls.complete_step(pay, {"receipt": 7}),
                calls.complete_step(unknown, {}),
                calls.completed_outputs("run"),
            ]
        )

        assert outcomes[0] is None
        assert isinstance(outcomes[1], StaleStepRunError)
        assert outcomes[1].current.step == "ship"
        assert isinstance(outcomes[2], StepRun)
        assert isinstance(outcomes[3], StepRunNotFoundError)
        assert outcomes[4] == [{"receipt": 7}]

    def test_raise_errors_returns_the_results_if_all_succeed(self, store: StepRunStore) -> None:
        calls = [store.calls.schedule_step("run", f"step-{number}", {}) for number in range(3)]

        assert [result.decision for result in store.batch(calls, raise_errors=True)] == ["schedule"] * 3
        assert store.batch([], raise_errors=True) == []

    def test_raise_errors_raises_one_error_that_holds_all(self, store: StepRunStore) -> None:
        pay, ship = begun(store.begin_step("run", "pay", {})), begun(store.begin_step("run", "ship", {}))
        unknown = step_run_id(store.calls.prefix, "run", "unknown")
        store.release_step(ship)

        with pytest.raises(BatchError) as caught:
            store.batch([store.calls.complete_step(each, {}) for each in (pay, ship, unknown)], raise_errors=True)

        completed, *errors = caught.value.results
        assert isinstance(completed, StepRun)
        assert [type(error) for error in errors] == [StaleStepRunError, StepRunNotFoundError]
        assert caught.value.errors == errors
        assert caught.value.__cause__ is errors[0]
        assert str(caught.value).startswith(
            "batch: 2 of 3 calls failed. The first is results[1], StaleStepRunError: run"
        )
        assert "1 succeeded, 2 wrote nothing, and 0 may have taken effect" in str(caught.value)
        assert store.step_statuses("run") == {"pay": "completed", "ship": "pending"}
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (str(copy), copy.results[0]) == (str(caught.value), completed)

    def test_an_empty_batch_sends_nothing(self, proxy: Proxy, proxied: StepRunStore) -> None:
        assert proxied.batch([]) == []
        assert proxy.commands == []

    def test_a_batch_takes_any_iterable(self, store: StepRunStore) -> None:
        calls = (store.calls.schedule_step("run", f"step-{number}", {}) for number in range(3))

        assert [outcome.decision for outcome in cast("list[ScheduleResult]", store.batch(calls))] == ["schedule"] * 3

    @pytest.mark.parametrize("item", [None, "call", ("run", "pay")])
    def test_item_that_is_not_a_call_is_rejected_before_sending(
        self, proxy: Proxy, proxied: StepRunStore, item: object
    ) -> None:
        with pytest.raises(InvalidArgumentError, match=r"calls\[1\]: must be a Call from store\.calls"):
            proxied.batch([proxied.calls.begin_step("run", "pay", {}), cast("Any", item)])

        assert proxy.commands == []

    def test_a_call_that_the_server_rejects_fails_alone(self, bench: Bench, store: StepRunStore) -> None:
        """The ACL denies a user one of two runs, so the server stops the script."""
        allowed, forbidden = (bench.keys(run)[0].rpartition(b":")[0].decode() for run in ("allowed", "forbidden"))
        assert allowed != forbidden
        raw = bench.backend.raw
        keys = [f"~{allowed}:*", *(f"~{bench.prefix}:*{index}" for index in ("claims", "failed", "runs"))]
        raw.execute_command("ACL SETUSER", bench.prefix, "on", ">secret", "+@all", *keys)
        try:
            limited = bench.store(client_options={"username": bench.prefix, "password": "secret"})
            outcomes = limited.batch([limited.calls.schedule_step(run, "pay", {}) for run in ("forbidden", "allowed")])
        finally:
            raw.execute_command("ACL DELUSER", bench.prefix)

        assert isinstance(outcomes[0], RefusedError | OutcomeUnknownError)  # depends on the message of the server
        assert isinstance(outcomes[1], ScheduleResult)
        assert store.get_run("forbidden") == []


@pytest.mark.servers("cluster")
class TestBatchOnACluster:
    """A proxy stands before each of the three nodes."""

    @pytest.fixture
    def proxies(self, bench: Bench) -> Iterator[list[Proxy]]:
        nodes = sorted(bench.backend.raw.nodes_manager.slots_cache.items())
        primaries = dict.fromkeys((node.host, node.port) for _, (node, *_) in nodes)
        assert len(primaries) == 3
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(Proxy(address)) for address in primaries]

    @pytest.fixture
    def proxied(self, bench: Bench, proxies: list[Proxy]) -> StepRunStore:
        ports = {cast("Any", proxy.server)[1]: proxy.port for proxy in proxies}

        def through_proxy(address: tuple[str, int]) -> tuple[str, int]:
            return address[0], ports.get(address[1], address[1])

        store = bench.store(client_options={"address_remap": through_proxy})
        store.batch(store.calls.get_run(f"run-{number}") for number in range(20))  # connects to every node
        for proxy in proxies:
            proxy.clear()
        return store

    def spread(self, calls: list[Call[Any]]) -> list[int]:
        """How many of the calls go to each node: the slots are shared out evenly."""
        nodes = [key_slot(call.keys[0]) * 3 // SLOTS for call in calls]
        return [nodes.count(node) for node in range(3)]

    def test_a_batch_costs_one_round_trip_per_node(
        self, proxies: list[Proxy], proxied: StepRunStore, twin: StepRunStore
    ) -> None:
        calls = mixed(proxied, 100)
        counts = self.spread(calls)
        assert min(counts) > 10

        with contextlib.ExitStack() as stack:
            for proxy, count in zip(proxies, counts, strict=True):
                stack.enter_context(proxy.batches(count))
            outcomes = proxied.batch(calls)

        assert [proxy.round_trips for proxy in proxies] == [1, 1, 1]
        assert seen(outcomes) == seen(twin.batch(mixed(twin, 100)))

    def test_every_node_has_its_calls_before_one_replies(self, proxies: list[Proxy], proxied: StepRunStore) -> None:
        releases = [proxy.hold_replies() for proxy in proxies]
        with ThreadPoolExecutor(1) as threads:
            outcomes = threads.submit(proxied.batch, [proxied.calls.get_run(f"run-{number}") for number in range(20)])
            try:
                wait_until(lambda: all(proxy.commands for proxy in proxies))
            finally:
                for release in releases:
                    release.set()
            assert outcomes.result() == [[]] * 20

    def test_an_operation_costs_one_round_trip(self, proxies: list[Proxy], proxied: StepRunStore) -> None:
        step_run = begun(proxied.begin_step("run-1", "pay", {}))
        proxied.complete_step(step_run, {})
        for proxy in proxies:
            proxy.clear()

        step_run = begun(proxied.begin_step("run-1", "ship", {}))
        proxied.complete_step(step_run, {})

        assert sum(proxy.round_trips for proxy in proxies) == 2

    @pytest.mark.parametrize("lost", ["all of it", "its tail"])
    def test_calls_lost_on_one_node_are_sent_again(
        self, proxies: list[Proxy], proxied: StepRunStore, twin: StepRunStore, lost: str
    ) -> None:
        def calls(store: StepRunStore) -> list[Call[Any]]:
            return [store.calls.begin_step(f"run-{number}", "pay", {"n": number}) for number in range(30)]

        counts = self.spread(calls(proxied))
        if lost == "all of it":
            proxies[1].drop()
            with proxies[1].batches(counts[1]):
                outcomes = proxied.batch(calls(proxied))
        else:
            proxies[1].after(3, proxies[1].drop)
            outcomes = proxied.batch(calls(proxied))

        assert seen(outcomes) == seen(twin.batch(calls(twin)))
        assert all(len(proxied.attempts(f"run-{number}", "pay")) == 1 for number in range(30))

    def test_calls_on_one_run_take_effect_in_order(self, store: StepRunStore) -> None:
        runs = [f"run-{number}" for number in range(12)]
        steps = [f"step-{number}" for number in range(5)]
        store.batch(store.calls.begin_step(run, step, {}) for step in steps for run in runs)
        ids = {(run, step): step_run_id(store.calls.prefix, run, step) for run in runs for step in steps}

        store.batch(store.calls.complete_step(ids[run, step], {}) for step in reversed(steps) for run in runs)

        assert [store.completed_steps(run) for run in runs] == [steps[::-1]] * 12

    def test_scripts_that_one_node_forgot_are_loaded_again(self, proxies: list[Proxy], proxied: StepRunStore) -> None:
        with redis.Redis(port=cast("Any", proxies[1].server)[1]) as node:
            proxies[1].after(2, node.script_flush)
            outcomes = proxied.batch(proxied.calls.begin_step(f"run-{number}", "pay", {}) for number in range(30))

        assert [begun(cast("BeginResult", outcome)).attempt for outcome in outcomes] == [1] * 30
