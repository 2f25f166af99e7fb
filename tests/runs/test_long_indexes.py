"""Listings across runs find every entry, however many there are in one bucket of an index."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.backends import Bench
from support.records import begun
from support.servers import wait_until

from squidstep_redis import StepRun, StepRunStore

pytestmark = pytest.mark.slow

LONG = 1_300  # more than one part of a bucket
NAMES = [f"step-{number:04}" for number in range(LONG)]


def begin_all(store: StepRunStore, steps: list[str], **options: Any) -> None:
    """Begins steps of one run; those of one call have the same lease end."""
    for first in range(0, len(steps), 650):
        store.begin_steps("run", {step: {} for step in steps[first : first + 650]}, **options)


def lapsed(store: StepRunStore, steps: list[str]) -> None:
    begin_all(store, steps, lease=0.001)
    wait_until(lambda: store.count_claims().live == 0)


def lapse_another(bench: Bench, store: StepRunStore) -> str:
    """Lets a claim of another run lapse, whose claims are in the same bucket; returns the id of that run."""
    ids = (f"other-{number}" for number in itertools.count())
    run_id = next(each for each in ids if bench.keys(each)[2] == bench.keys("run")[2])
    bench.lapse(begun(store.begin_step(run_id, "pay", {}, lease=0.001)))
    return run_id


def pages(store: StepRunStore) -> list[StepRun]:
    found: list[StepRun] = []
    while page := store.lapsed_claims(1_000, after=len(found), payloads=False):
        found += page
    return found


def test_every_lapsed_claim_is_listed_once(store: StepRunStore) -> None:
    lapsed(store, NAMES)

    found = pages(store)

    assert sorted(each.step for each in found) == NAMES
    assert found == sorted(found, key=lambda each: (each.lease_ends_at, each.step))


def test_long_run_hides_no_later_claim_of_its_bucket(bench: Bench, store: StepRunStore) -> None:
    lapsed(store, NAMES)
    other = lapse_another(bench, store)

    assert [each.run_id for each in store.lapsed_claims(1, run_id_prefix="other-")] == [other]


def test_corrupt_run_hides_no_later_claim_of_its_bucket(bench: Bench, store: StepRunStore) -> None:
    lapsed(store, NAMES)
    bench.backend.raw.hset(bench.keys("run")[0], "r", "corrupt")
    other = lapse_another(bench, store)

    assert [each.run_id for each in store.lapsed_claims()] == [other]


def test_owner_is_found_behind_the_claims_of_others(store: StepRunStore) -> None:
    begin_all(store, NAMES, lease=60, owner="other")
    wanted = begun(store.begin_step("run", "pay", {}, lease=600, owner="own"))

    assert store.live_claims(owner="own") == [wanted]


def test_purge_drops_every_entry_without_a_record(bench: Bench, store: StepRunStore) -> None:
    lapsed(store, NAMES)
    claims = bench.keys("run")[2]
    bench.backend.raw.zadd(claims, {f"3:rungone-{number}".encode(): 10**12 + number for number in range(LONG)})
    bench.backend.raw.zadd(claims, {f"3:rungone-again-{number}".encode(): number for number in range(LONG)})

    store.purge(86_400)

    assert bench.backend.raw.zcard(claims) == LONG


_ENTRIES = st.lists(st.tuples(st.sampled_from([1_000, 2_000]), st.booleans()), max_size=14)


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
        lapsed(store, [f"step-{number:02}" for number in range(14)])
        steps = self.arrange(bench, 2, entries)

        assert [each.step for each in store.lapsed_claims(limit)] == steps[:limit]
        assert [each.step for each in store.lapsed_claims(limit, after=limit)] == steps[limit : 2 * limit]

    @given(entries=_ENTRIES, limit=st.integers(1, 6))
    def test_failed_steps_are_complete(
        self, bench: Bench, store: StepRunStore, entries: list[tuple[int, bool]], limit: int
    ) -> None:
        begin_all(store, [f"step-{number:02}" for number in range(14)])
        for step_run in store.get_run("run"):
            if step_run.status == "running":
                store.fail_step(step_run.id, {})
        steps = self.arrange(bench, 3, entries)[::-1]

        assert [each.step for each in store.failed_steps(limit)] == steps[:limit]
        assert [each.step for each in store.failed_steps(limit, after=limit)] == steps[limit : 2 * limit]
