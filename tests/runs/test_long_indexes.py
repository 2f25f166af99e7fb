"""Listings across runs find every entry, however many there are in one bucket, and whatever changes meanwhile."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.backends import Bench
from support.internals import run_workflow
from support.records import begun, runs_of_one_bucket
from support.servers import wait_until

from squidstep_redis import Call, StepRun, StepRunList, StepRunStore
from squidstep_redis.operations.pacing import load
from squidstep_redis.operations.step_index import Bucket, Mode
from squidstep_redis.protocol.workflow import Workflow

pytestmark = pytest.mark.slow


def pages_of(read: Callable[..., StepRunList], limit: int, **options: Any) -> list[StepRunList]:
    """Reads all pages of a listing."""
    pages = [read(limit, **options)]
    while pages[-1].cursor is not None:
        pages.append(read(limit, cursor=pages[-1].cursor, **options))
    return pages


class TestLongIndexes:
    """One bucket has more entries than one call of the script lists."""

    def begin_many(self, store: StepRunStore, run: str, number: int, **options: Any) -> dict[str, StepRun]:
        """Begins the steps of a run, in groups whose leases end within the same millisecond."""
        steps = [f"step-{index}" for index in range(number)]
        claims: dict[str, StepRun] = {}
        for first in range(0, number, 1_000):
            results = store.begin_steps(run, {step: {} for step in steps[first : first + 1_000]}, **options)
            claims |= {step: begun(result) for step, result in results.items()}
        return claims

    def lapse_many(self, bench: Bench, store: StepRunStore, run: str, number: int) -> dict[str, StepRun]:
        claims = self.begin_many(store, run, number, lease=0.001)
        bench.lapse(list(claims.values())[-1])
        return claims

    def begin_neighbor(self, bench: Bench, store: StepRunStore, **options: Any) -> StepRun:
        """Begins a step of another run of the same bucket."""
        (other,) = runs_of_one_bucket(1)
        assert bench.keys(other)[2] == bench.keys("run")[2]
        return begun(store.begin_step(other, "pay", {}, **options))

    def test_every_lapsed_claim_of_a_long_run_is_listed(self, bench: Bench, store: StepRunStore) -> None:
        steps = set(self.lapse_many(bench, store, "run", 2_500))
        neighbor = self.begin_neighbor(bench, store, lease=0.001)
        bench.lapse(neighbor)

        pages = pages_of(store.lapsed_claims, 1_000, payloads=False)

        assert [len(page) for page in pages] == [1_000, 1_000, 501]
        found = [each for page in pages for each in page]
        assert {each.step for each in found[:-1]} == steps
        assert found[-1].run_id == neighbor.run_id
        ranks = [(each.lease_ends_at, each.step) for each in found[:-1]]
        assert ranks == sorted(ranks)

    def test_filter_selects_behind_a_long_run(self, bench: Bench, store: StepRunStore) -> None:
        self.lapse_many(bench, store, "run", 1_100)
        neighbor = self.begin_neighbor(bench, store, lease=0.001)
        bench.lapse(neighbor)

        assert store.lapsed_claims(1, run_id_prefix=neighbor.run_id) == [neighbor]
        assert store.lapsed_claims(1, step="pay") == [neighbor]

    def test_listing_since_a_time_reads_no_earlier_claims(self, bench: Bench, store: StepRunStore) -> None:
        older = self.lapse_many(bench, store, "run", 1_100)
        newer = self.begin_neighbor(bench, store, lease=0.001)
        bench.lapse(newer)
        sent: list[Call[Any]] = []

        def listing(since: datetime | None) -> Workflow[list[StepRun]]:
            workflow = store.calls.lapsed_claims(1_000, since=since)
            replies: Any = None
            while True:
                try:
                    effect = workflow.send(replies)
                except StopIteration as end:
                    return end.value
                sent.extend(effect.calls)
                replies = yield effect

        assert run_workflow(store, listing(newer.lease_ends_at)) == [newer]
        indexes = {call.keys for call in sent if call.script.name == "list_index"}
        assert Counter(call.script.name for call in sent) == {"list_index": len(indexes), "confirm_entry": 1}
        first = min(older.values(), key=lambda claim: (claim.lease_ends_at, claim.step))
        assert run_workflow(store, listing(first.lease_ends_at))[0] == first  # ended at that time

    def test_long_corrupt_run_does_not_hide_the_others(self, bench: Bench, store: StepRunStore) -> None:
        self.lapse_many(bench, store, "run", 1_100)
        neighbor = self.begin_neighbor(bench, store, lease=0.001)
        bench.lapse(neighbor)
        bench.backend.raw.hset(bench.keys("run")[0], "r", "corrupt")

        assert store.lapsed_claims() == [neighbor]
        assert [each.run_id for each in store.overview().lapsed_claims] == [neighbor.run_id]

    def test_claims_of_other_owners_do_not_hide_own_ones(self, bench: Bench, store: StepRunStore) -> None:
        self.begin_many(store, "run", 1_100, lease=60, owner="other")
        own = self.begin_neighbor(bench, store, lease=70, owner="own")

        assert store.live_claims(owner="own") == [own]

    def test_purge_drops_stale_entries_behind_many_others(self, bench: Bench, store: StepRunStore) -> None:
        self.lapse_many(bench, store, "run", 1_100)
        neighbor = self.begin_neighbor(bench, store, lease=0.001)
        bench.lapse(neighbor)
        bench.backend.raw.delete(*bench.keys(neighbor.run_id)[:2])

        store.purge(3_600)

        assert bench.backend.raw.zcard(bench.keys("run")[2]) == 1_100

    def test_failures_of_one_millisecond_are_listed_once_each(self, bench: Bench, store: StepRunStore) -> None:
        steps = self.begin_many(store, "run", 30)
        for claim in steps.values():
            store.fail_step(claim, {})
        bench.backend.raw.zadd(bench.keys("run")[3], {f"3:run{step}".encode(): 9e12 for step in steps})

        assert [each.step for each in store.failed_steps()] == sorted(steps, reverse=True)

    def test_claim_that_is_extended_between_pages_is_listed_once(self, bench: Bench, store: StepRunStore) -> None:
        claims = self.begin_many(store, "run", 4, lease=60)

        def listing() -> Workflow[list[StepRun]]:
            workflow = store.calls.live_claims(10)
            replies: Any = None
            for batches in itertools.count():
                try:
                    effect = workflow.send(replies)
                except StopIteration as end:
                    return end.value
                if batches == 2:  # two of the four entries are read and verified
                    store.extend_claim(claims["step-0"], 90)
                replies = yield effect

        assert sorted(each.step for each in run_workflow(store, listing())) == sorted(claims)

    @pytest.mark.parametrize("mode", ["lapsed", "live", "failed"])
    @pytest.mark.parametrize("score", [8e12 + 0.1, 8e12, inf])
    def test_page_continues_after_an_entry_that_is_gone(
        self, bench: Bench, store: StepRunStore, mode: Mode, score: float
    ) -> None:
        raw, index = bench.backend.raw, bench.keys("run")[2]
        score = score if mode != "lapsed" else -inf if score == inf else score - 7e12
        # A locale could order them differently, and some begin with others.
        members = sorted([b"a", b"B", b"b", b"a\x00", b"a\xff", b"ab", b"\xc3\xa4", b"\xfe", b"zz", b"_", b"Z"])
        raw.zadd(index, {member: score + position // 8 for position, member in enumerate(members)})
        if mode != "failed":
            raw.zadd(index, {b"not listed": 1 if mode == "live" else 8e12})
        bucket = Bucket(index, mode, 1)
        found: list[bytes] = []
        while bucket.has_more:
            run_workflow(store, load([bucket], "listing"))
            bucket.size = 1
            assert len(bucket.entries) <= 1
            for _, member in bucket.entries:
                found.append(member)
                if len(found) % 3:
                    raw.zrem(index, member)
            bucket.entries.clear()

        assert found == (members[::-1] if mode == "failed" else members)


_ENTRIES = st.lists(st.tuples(st.sampled_from([1_000, 2_000]), st.booleans()), max_size=14)
_STEPS = [f"step-{number:02}" for number in range(14)]


class TestEntriesThatAreDroppedMeanwhile:
    """A listing drops entries without a record, also the last one of a part, from which the next part continues."""

    def arrange(self, bench: Bench, index: int, entries: list[tuple[int, bool]]) -> list[str]:
        """Writes an index; returns its steps that have a record, ordered by score and name."""
        steps = [
            (score, f"{'step' if is_valid else 'gone'}-{number:02}") for number, (score, is_valid) in enumerate(entries)
        ]
        key = bench.keys("run")[index]
        bench.backend.raw.delete(key)
        if steps:
            bench.backend.raw.zadd(key, {f"3:run{step}".encode(): score for score, step in steps})
        return [step for _, step in sorted(steps) if step.startswith("step")]

    @given(entries=_ENTRIES, limit=st.integers(1, 6))
    def test_lapsed_claims_are_complete(
        self, bench: Bench, store: StepRunStore, entries: list[tuple[int, bool]], limit: int
    ) -> None:
        store.begin_steps("run", {step: {} for step in _STEPS}, lease=0.001)
        wait_until(lambda: store.count_claims().live == 0)
        steps = self.arrange(bench, 2, entries)

        pages = pages_of(store.lapsed_claims, limit)
        assert [each.step for page in pages for each in page] == steps
        assert {len(page) for page in pages[:-1]} <= {limit}

    @given(entries=_ENTRIES, limit=st.integers(1, 6))
    def test_failed_steps_are_complete(
        self, bench: Bench, store: StepRunStore, entries: list[tuple[int, bool]], limit: int
    ) -> None:
        for result in store.begin_steps("run", {step: {} for step in _STEPS}).values():
            if result.decision == "execute":
                store.fail_step(result.step_run, {})
        steps = self.arrange(bench, 3, entries)[::-1]

        pages = pages_of(store.failed_steps, limit)
        assert [each.step for page in pages for each in page] == steps
        assert {len(page) for page in pages[:-1]} <= {limit}


class TestPages:
    """Each page continues exactly where the one before has ended."""

    @pytest.fixture
    def runs(self) -> list[str]:
        return ["run", *runs_of_one_bucket(2), "other-1", "other-2", "other-3"]

    @pytest.mark.parametrize("limit", [1, 2, 4])
    def test_failures_that_are_retried_between_pages_hide_no_other(
        self, store: StepRunStore, runs: list[str], limit: int
    ) -> None:
        for run in runs:
            store.fail_step(begun(store.begin_step(run, "pay", {})), {})

        seen: list[str] = []
        page = store.failed_steps(limit)
        while page:
            seen += [each.run_id for each in page]
            for each in page:
                store.retry_step(each.run_id, each.step)
            page = store.failed_steps(limit, cursor=page.cursor) if page.cursor else StepRunList()

        assert sorted(seen) == sorted(runs)
        assert store.failed_steps() == []

    def test_failures_that_happen_between_pages_are_not_on_later_ones(
        self, store: StepRunStore, runs: list[str]
    ) -> None:
        for run in runs:
            store.fail_step(begun(store.begin_step(run, "pay", {})), {})
        expected = store.failed_steps()

        first = store.failed_steps(3)
        for run in runs:
            store.fail_step(begun(store.begin_step(run, "later", {})), {})

        assert first + store.failed_steps(100, cursor=first.cursor) == expected

    def test_claims_that_are_taken_over_between_pages_hide_no_other(
        self, bench: Bench, store: StepRunStore, runs: list[str]
    ) -> None:
        for run in runs:
            bench.lapse(begun(store.begin_step(run, "pay", {}, lease=0.001)))
        expected = store.lapsed_claims()

        first = store.lapsed_claims(3)
        for each in first:
            begun(store.begin_step(each.run_id, each.step, {}, lease=60))

        assert first + store.lapsed_claims(100, cursor=first.cursor) == expected

    def test_pages_of_live_claims_are_complete(self, store: StepRunStore, runs: list[str]) -> None:
        for run in runs:
            for owner in ("own", "other"):
                begun(store.begin_step(run, owner, {}, lease=60, owner=owner))

        for options in ({}, {"owner": "own"}):
            pages = pages_of(store.live_claims, 4, **options)
            assert [each for page in pages for each in page] == store.live_claims(**options)
            assert [len(page) for page in pages] == ([4, 2] if options else [4, 4, 4])

    @pytest.mark.parametrize("options", [{}, {"step": "pay"}, {"run_id_prefix": "r"}])
    def test_only_the_last_page_has_no_cursor(self, store: StepRunStore, options: dict[str, Any]) -> None:
        assert store.failed_steps(**options).cursor is None
        for number in range(4):
            store.fail_step(begun(store.begin_step(f"run-{number}", "pay", {})), {})

        assert [page.cursor is None for page in pages_of(store.failed_steps, 2, **options)] == [False, True]
        assert store.failed_steps(4, **options).cursor is None

    def test_times_that_no_clock_has_are_positions_too(self, bench: Bench, store: StepRunStore) -> None:
        scores = [-inf, -1.5, 0.1, 1e300, inf]
        for number in range(len(scores)):
            store.fail_step(begun(store.begin_step("run", f"step-{number}", {})), {})
        members = {f"3:runstep-{number}": score for number, score in enumerate(scores)}
        bench.backend.raw.zadd(bench.keys("run")[3], members)

        pages = pages_of(store.failed_steps, 1)

        assert [each.step for page in pages for each in page] == [f"step-{number}" for number in (4, 3, 2, 1, 0)]

    def test_failures_before_a_time_are_not_read(self, bench: Bench, store: StepRunStore) -> None:
        failed = store.fail_step(begun(store.begin_step("run", "pay", {})), {})
        older = {f"3:runolder-{number}": number for number in range(900)}
        bench.backend.raw.zadd(bench.keys("run")[3], older)

        assert store.failed_steps(since=failed.ended_at) == [failed]

        assert bench.backend.raw.zcard(bench.keys("run")[3]) == 901  # none was verified and dropped
