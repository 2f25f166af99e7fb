"""The number of round trips of each operation."""

from __future__ import annotations

import pytest
from support.backends import Bench
from support.operations import (
    ACROSS_RUNS,
    CALLS,
    EXAMPLES,
    OPERATIONS,
    mixed,
    perform,
    prepare,
    seen,
    state,
)
from support.proxy import Proxy
from support.records import begun

from squidstep_redis import (
    StepRunStore,
)

pytestmark = [pytest.mark.all_buckets, pytest.mark.servers("valkey", "redis-7", "redis-6")]

INDEX = [32, 250, 249, 250, 243]  # the batches that read an index with one entry


class TestRoundTrips:
    @pytest.mark.parametrize("operation", CALLS)
    def test_an_operation_costs_one_round_trip(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None, operation: str
    ) -> None:
        claim = prepare(bench, proxied)
        proxy.clear()

        perform(proxied, operation, claim)

        assert (proxy.round_trips, proxy.names()) == (1, ["EVALSHA"])

    @pytest.mark.parametrize("operation", CALLS)
    def test_an_operation_with_an_unknown_script_costs_two_round_trips(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, twin: StepRunStore, operation: str
    ) -> None:
        expected = perform(twin, operation, prepare(bench, twin))
        claim = prepare(bench, proxied)
        bench.backend.flush_scripts()
        proxy.clear()

        outcome = perform(proxied, operation, claim)

        assert (proxy.round_trips, proxy.names()) == (2, ["EVALSHA", "EVAL"])
        assert seen(outcome) == seen(expected)
        assert state(proxied) == state(twin)

    @pytest.mark.parametrize("flushed", [False, True])
    def test_a_batch_of_100_costs_one_round_trip(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None, flushed: bool
    ) -> None:
        if flushed:
            bench.backend.flush_scripts()

        with proxy.batches(100):
            outcomes = proxied.batch(mixed(proxied, 100))

        assert proxy.round_trips == 1
        assert len(outcomes) == 100

    @pytest.mark.parametrize("operation", ACROSS_RUNS)
    def test_listing_across_runs_costs_one_round_trip_per_250_buckets(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, operation: str
    ) -> None:
        claim = prepare(bench, proxied)
        proxy.clear()

        with proxy.batches(*INDEX, 1):
            (found,) = perform(proxied, operation, claim)

        assert proxy.round_trips == 6
        assert found.step == ACROSS_RUNS[operation]

    def test_a_fork_costs_two_round_trips(self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None) -> None:
        claim = prepare(bench, proxied)
        proxy.clear()

        perform(proxied, "fork_run", claim)

        assert (proxy.round_trips, proxy.names()) == (2, ["EVALSHA", "EVALSHA"])

    def test_every_operation_has_a_test_of_its_round_trips(self) -> None:
        others = {
            "batch",
            "complete_steps",
            "count_claims",
            "count_failed",
            "count_runs",
            "explain_run",
            "explain_step",
            "fork_run",
            "overview",
            "purge",
            "retry_run",
            "runs",
            "summarize_run",
        }
        counted = {*CALLS, *others, *ACROSS_RUNS}
        assert set(OPERATIONS) == set(EXAMPLES) == counted

    def test_summarizing_a_small_run_costs_one_round_trip(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None
    ) -> None:
        claim = prepare(bench, proxied)
        proxy.clear()

        with proxy.batches(1):
            summary = perform(proxied, "summarize_run", claim)

        assert (proxy.round_trips, summary.steps) == (1, 5)

    @pytest.mark.parametrize(("operation", "batches"), [("explain_step", [4]), ("explain_run", [1, 5])])
    def test_explaining_costs_one_round_trip_per_batch(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None, operation: str, batches: list[int]
    ) -> None:
        claim = prepare(bench, proxied)
        proxy.clear()

        with proxy.batches(*batches):
            perform(proxied, operation, claim)

        assert proxy.round_trips == len(batches)

    def test_filtering_by_owner_costs_one_round_trip_per_page(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None
    ) -> None:
        for number in range(5):
            begun(proxied.begin_step("run", f"others-{number}", {}, lease=60 + number, owner="other"))
        own = begun(proxied.begin_step("run", "own", {}, lease=120, owner="own"))
        proxy.clear()

        with proxy.batches(*INDEX, 2, 2, 2):
            assert proxied.live_claims(2, owner="own") == [own]

        assert proxy.round_trips == 8

    @pytest.mark.parametrize(
        ("operation", "batches"),
        [
            ("runs", [*INDEX, 1]),
            ("count_runs", [32, 250, 250, 250, 242]),
            ("count_claims", [250, 250, 250, 250, 24]),
            ("count_failed", [250, 250, 250, 250, 24]),
            ("overview", [32, *9 * [100], 92, 1, 1, 1, 1]),
            # It scans, reads the run, reads the claims and verifies one, does the same with the failures, and reads the
            # index of runs.
            # CLUSTER, with which it looks for other servers, is not counted.
            ("purge", [1, 1, *INDEX, 1, *INDEX, 1, *INDEX]),
            ("retry_run", [1, 1]),
        ],
    )
    def test_reading_one_small_run_costs_one_round_trip_per_batch(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, known: None, operation: str, batches: list[int]
    ) -> None:
        bench.backend.raw.flushdb()  # a scan passes the keys of every prefix
        direct = bench.store()  # loads their scripts
        direct.runs()
        direct.purge(60)
        claim = prepare(bench, proxied)
        proxy.clear()

        with proxy.batches(*batches):
            perform(proxied, operation, claim)

        assert proxy.round_trips == len(batches)
