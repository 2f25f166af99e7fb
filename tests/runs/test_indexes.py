"""The indexes that span runs: live claims, expired claims (`lapsed_claims`) and failed steps."""

from __future__ import annotations

import pickle
from datetime import datetime, tzinfo
from typing import Any, cast

import pytest
from support.backends import Bench, offline_store
from support.records import begun, stored
from support.servers import wait_until

from squidstep_redis import (
    InvalidArgumentError,
    PayloadNotReadError,
    StaleStepRunError,
    StepRun,
    StepRunStore,
)


class TestLiveClaims:
    def test_live_claims_come_in_order_of_lease_end(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("unleased", "pay", {}))
        store.schedule_step("pending", "pay", {})
        store.complete_step(begun(store.begin_step("completed", "pay", {}, lease=60)), {})
        store.fail_step(begun(store.begin_step("failed", "pay", {}, lease=60)), {})
        store.release_step(begun(store.begin_step("released", "pay", {}, lease=60)))
        bench.lapse(begun(store.begin_step("lapsed", "pay", {}, lease=0.01)))
        for run, lease in (("b", 70), ("c", 80), ("a", 60)):
            begun(store.begin_step(run, "pay", {"of": run}, lease=lease, owner=f"worker {run}"))

        live = store.live_claims()

        assert live == [stored(store, run) for run in "abc"]
        assert [(each.input, each.owner) for each in live] == [({"of": run}, f"worker {run}") for run in "abc"]
        assert store.live_claims(limit=2) == live[:2]
        assert [each.run_id for each in store.lapsed_claims()] == ["lapsed"]

    def test_listed_step_runs_carry_no_claim_token(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}, lease=60))

        (live,) = store.live_claims()

        with pytest.raises(StaleStepRunError, match="carries no claim"):
            store.complete_step(live, {})

    def test_extended_claim_moves_back_in_the_order(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("first", "pay", {}, lease=60))
        begun(store.begin_step("second", "pay", {}, lease=70))

        store.extend_claim(first, 80)

        assert [each.run_id for each in store.live_claims()] == ["second", "first"]

    def test_owner_selects_the_claims_of_that_owner(self, store: StepRunStore) -> None:
        for number in range(12):
            begun(store.begin_step(f"run-{number}", "pay", {}, lease=60 + number, owner=f"w{number % 3}"))
        begun(store.begin_step("without-owner", "pay", {}, lease=60))

        assert [each.run_id for each in store.live_claims(owner="w1")] == ["run-1", "run-4", "run-7", "run-10"]
        assert [each.run_id for each in store.live_claims(2, owner="w2")] == ["run-2", "run-5"]
        assert store.live_claims(owner="w") == store.live_claims(owner="w1 ") == []

    def test_limit_counts_only_the_claims_of_the_owner(self, store: StepRunStore) -> None:
        for number, owner in enumerate(["own", "other", "own", "own"]):
            begun(store.begin_step("run", f"step-{number}", {}, lease=60 + number, owner=owner))

        assert [each.step for each in store.live_claims(2, owner="own")] == ["step-0", "step-2"]

    def test_expired_claims_do_not_hide_live_ones(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "lapsed", {}, lease=0.01)))
        live = begun(store.begin_step("run", "live", {}, lease=60))

        assert store.live_claims(limit=1) == [live]

    def test_owner_is_that_of_the_latest_claim(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.01, owner="w1")))
        taken_over = begun(store.begin_step("run", "pay", {}, lease=60, owner="w2"))

        assert (store.live_claims(owner="w1"), store.live_claims(owner="w2")) == ([], [taken_over])

    def test_entries_without_a_record_do_not_hide_live_claims(self, bench: Bench, store: StepRunStore) -> None:
        good = begun(store.begin_step("run", "good", {}, lease=60))
        claims = bench.keys("run")[2]
        soon = bench.backend.now() * 1000 + 30_000
        bench.backend.raw.zadd(claims, {f"3:run{number}".encode(): soon + number for number in range(10)})

        assert store.live_claims(limit=3) == [good]
        assert bench.backend.raw.zcard(claims) == 1

    def test_entry_with_a_wrong_lease_end_is_repaired(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))
        claims = bench.keys("run")[2]
        bench.backend.raw.zadd(claims, {b"3:runpay": 9e12})

        assert store.live_claims() == [step_run]

        assert step_run.lease_ends_at is not None
        assert bench.backend.raw.zscore(claims, b"3:runpay") == round(step_run.lease_ends_at.timestamp() * 1000)

    @pytest.mark.parametrize("owner", ["", "a\nb", 7, "w" * 257])
    def test_invalid_owner_is_rejected(self, owner: object) -> None:
        with offline_store() as store, pytest.raises(InvalidArgumentError, match="owner: must"):
            store.live_claims(owner=cast("Any", owner))


def wait_past(bench: Bench, time: datetime | None) -> None:
    """Waits until the server's clock is past the millisecond: the indexes order by milliseconds."""
    assert time is not None
    wait_until(lambda: bench.backend.now() > time.timestamp() + 0.001)


class TestLapsedClaimsAndFailedSteps:
    def test_lapsed_claims_come_in_order_of_lease_end(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("live", "pay", {}, lease=60))
        begun(store.begin_step("unleased", "pay", {}))
        for run in "bac":
            begun(store.begin_step(run, "pay", {"of": run}, lease=60, owner=f"worker {run}"))
        for run in "cab":
            expired = store.expire_claim(stored(store, run))
            wait_past(bench, expired.lease_ends_at)

        lapsed = store.lapsed_claims()

        assert lapsed == [stored(store, run) for run in "cab"]
        assert store.lapsed_claims(limit=2) == lapsed[:2]

    def test_failed_steps_come_newest_first(self, bench: Bench, store: StepRunStore) -> None:
        for number in range(3):
            step_run = begun(store.begin_step(f"run-{number}", "pay", {}))
            failed = store.fail_step(step_run, {"of": number})
            wait_past(bench, failed.ended_at)

        assert [each.last_error for each in store.failed_steps()] == [{"of": 2}, {"of": 1}, {"of": 0}]
        assert [each.run_id for each in store.failed_steps(limit=1)] == ["run-2"]

    @pytest.mark.parametrize(
        ("ending", "lapsed", "failed"),
        [
            ("complete", False, False),
            ("fail", False, True),
            ("release", False, False),
            ("extend", False, False),
            ("take over", False, False),
            ("exhaust", False, True),
            ("nothing", True, False),
        ],
    )
    def test_index_entries_follow_the_claim(
        self, bench: Bench, store: StepRunStore, ending: str, lapsed: bool, failed: bool
    ) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=0.01))
        bench.lapse(step_run)

        match ending:
            case "complete":
                store.complete_step(step_run, {})
            case "fail":
                store.fail_step(step_run, {})
            case "release":
                store.release_step(step_run)
            case "extend":
                store.extend_claim(step_run, 60)
            case "take over":
                begun(store.begin_step("run", "pay", {}, lease=60))
            case "exhaust":
                assert store.begin_step("run", "pay", {}, max_attempts=1).exhausted
            case _:
                pass

        current = stored(store)
        assert store.lapsed_claims() == ([current] if lapsed else [])
        assert store.failed_steps() == ([current] if failed else [])

    def test_failed_step_that_is_begun_again_leaves_the_index(self, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("run", "pay", {})), {})
        begun(store.begin_step("run", "pay", {}))

        assert store.failed_steps() == []

    def test_entry_without_a_record_is_dropped_and_never_returned(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("gone", "pay", {}, lease=0.01)))
        store.fail_step(begun(store.begin_step("gone", "ship", {})), {})
        bench.backend.raw.delete(*bench.keys("gone")[:2])
        _, _, claims, failed = bench.keys("gone")
        assert bench.backend.raw.zcard(claims) == bench.backend.raw.zcard(failed) == 1

        assert store.lapsed_claims() == store.failed_steps() == store.runs().runs == []

        assert bench.backend.keys(bench.prefix) == set()

    def test_entries_without_a_record_do_not_hide_failed_steps(self, bench: Bench, store: StepRunStore) -> None:
        # All in one bucket, so that a page of the size of the limit holds only entries without a record.
        store.fail_step(begun(store.begin_step("run", "good", {})), {})
        failed = bench.keys("run")[3]
        bench.backend.raw.zadd(failed, {f"3:run{number}".encode(): 9e12 + number for number in range(10)})

        assert [each.step for each in store.failed_steps(limit=3)] == ["good"]
        assert bench.backend.raw.zcard(failed) == 1

    def test_entry_with_an_old_lease_end_is_repaired(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))
        claims = bench.keys("run")[2]
        bench.backend.raw.zadd(claims, {b"3:runpay": 1})

        assert store.lapsed_claims() == []

        assert step_run.lease_ends_at is not None
        assert bench.backend.raw.zscore(claims, b"3:runpay") == round(step_run.lease_ends_at.timestamp() * 1000)

    @pytest.mark.slow
    def test_filters_and_pages_select_entries(self, bench: Bench, store: StepRunStore) -> None:
        for number in range(12):
            run, step = f"order-{number}" if number % 2 else f"crawl-{number}", f"step-{number % 3}"
            store.fail_step(begun(store.begin_step(run, step, {})), {})
            bench.lapse(begun(store.begin_step(run, f"{step}-dead", {}, lease=0.001)))

        for read, suffix in ((store.failed_steps, ""), (store.lapsed_claims, "-dead")):
            everything = read()
            assert len(everything) == 12
            first = read(5)
            assert first + read(7, cursor=first.cursor) == everything
            orders = [each for each in everything if each.run_id.startswith("order-")]
            assert read(run_id_prefix="order-") == orders
            assert read(2, run_id_prefix="order-", cursor=read(1, run_id_prefix="order-").cursor) == orders[1:3]
            assert read(step=f"step-1{suffix}") == [each for each in everything if each.step == f"step-1{suffix}"]
            times = [each.ended_at or each.lease_ends_at for each in everything]
            recent = [each for each, time in zip(everything, times, strict=True) if time >= times[6]]
            assert read(since=times[6]) == recent
            start = read(2, since=times[6])
            assert start + read(since=times[6], cursor=start.cursor) == recent
        assert (store.count_failed(), store.count_claims().lapsed) == (12, 12)

    def test_filters_find_entries_behind_many_others(self, bench: Bench, store: StepRunStore) -> None:
        wanted = store.fail_step(begun(store.begin_step("run", "pay", {})), {})
        failed = bench.keys("run")[3]
        bench.backend.raw.zadd(failed, {f"3:runother{number}".encode(): 4e12 + number for number in range(900)})

        assert store.failed_steps(1, step="pay", run_id_prefix="r") == [wanted]
        assert store.failed_steps(1, step="pay", run_id_prefix="x") == []

    @pytest.mark.parametrize(
        "arguments",
        [
            {"cursor": "x"},
            {"cursor": 3},
            {"cursor": "1.2.3:YQ=="},
            {"cursor": "1:YQ"},
            {"run_id_prefix": 7},
            {"step": ""},
            {"since": 3},
            {"since": datetime.fromordinal(1)},
            {"since": datetime(2026, 1, 1, tzinfo=tzinfo())},
        ],
    )
    def test_invalid_filter_is_rejected(self, arguments: dict[str, Any]) -> None:
        with offline_store() as store:
            for read in (store.lapsed_claims, store.failed_steps):
                with pytest.raises(InvalidArgumentError, match=f"^{next(iter(arguments))}: "):
                    read(**arguments)

    def test_failed_index_is_bounded(self, bench: Bench, store: StepRunStore) -> None:
        failed = bench.keys("run")[3]
        bench.backend.raw.zadd(failed, {f"3:old{number}".encode(): number for number in range(1_500)})

        store.fail_step(begun(store.begin_step("run", "pay", {})), {})

        assert bench.backend.raw.zcard(failed) == 1_000
        assert bench.backend.raw.zscore(failed, b"3:runpay") is not None

    @pytest.mark.parametrize("limit", [0, -1, 1_001, 2.0, True, "10", None])
    def test_invalid_limit_is_rejected(self, limit: object) -> None:
        with offline_store() as store:
            for read in (store.lapsed_claims, store.live_claims, store.failed_steps):
                with pytest.raises(InvalidArgumentError, match="limit: must be an int from 1 to 1,000"):
                    read(cast("Any", limit))


class TestWithoutPayloads:
    """`payloads=False` reads the states and the errors alone."""

    def lists(self, store: StepRunStore) -> list[StepRun]:
        seen = store.overview()
        found = [
            *store.live_claims(payloads=False),
            *store.lapsed_claims(payloads=False),
            *store.failed_steps(payloads=False),
        ]
        assert [*seen.live_claims, *seen.lapsed_claims, *seen.failed_steps] == found
        return found

    def fill(self, bench: Bench, store: StepRunStore, payload: dict[str, Any]) -> None:
        live = begun(store.begin_step("live", "pay", payload, lease=60, owner="worker"))
        store.checkpoint_step(live, payload)
        bench.lapse(begun(store.begin_step("lapsed", "pay", payload, lease=0.01)))
        store.fail_step(begun(store.begin_step("failed", "pay", payload)), {"type": "Declined"}, final=True)

    def test_state_and_error_are_read(self, bench: Bench, store: StepRunStore) -> None:
        self.fill(bench, store, {"amount": 7})

        for found in self.lists(store):
            full = stored(store, found.run_id)
            assert (found.status, found.attempt, found.final, found.owner) == (
                *(full.status, full.attempt, full.final, full.owner),
            )
            assert (found.lease_ends_at, found.ended_at) == (full.lease_ends_at, full.ended_at)
            assert found.last_error == full.last_error
            assert found != full

    def test_reading_another_payload_says_where_it_is(self, bench: Bench, store: StepRunStore) -> None:
        self.fill(bench, store, {"amount": 7})

        for found in self.lists(store):
            for each in (found, pickle.loads(pickle.dumps(found))):
                with pytest.raises(PayloadNotReadError, match=f"'{found.run_id}', step 'pay': .* input; get_step_run"):
                    _ = each.input
                with pytest.raises(PayloadNotReadError, match="progress"):
                    _ = each.progress

    def test_claim_that_is_shown_can_be_expired(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}, lease=60))

        (live,) = store.live_claims(payloads=False)
        store.expire_claim(live)

        assert [each.run_id for each in store.lapsed_claims()] == ["run"]

    @pytest.mark.servers("valkey", "redis-7", "redis-6")
    def test_large_payloads_are_not_sent(self, bench: Bench, store: StepRunStore) -> None:
        self.fill(bench, store, {"text": "x" * 1_000_000})
        before = bench.backend.raw.info("stats")["total_net_output_bytes"]

        self.lists(store)

        assert bench.backend.raw.info("stats")["total_net_output_bytes"] - before < 1_000_000
