"""Whole runs: reading them, scheduling in bulk, expiry, deletion, and the two indexes that span runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.backends import Bench
from support.records import begun, in_batch, stored
from support.servers import wait_until

from squidstep_redis import (
    InvalidArgumentError,
    Outcome,
    RunDeletedError,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
    StepStatus,
)


class TestReading:
    def test_a_run_that_is_not_there_is_empty(self, store: StepRunStore) -> None:
        assert store.get_step_run("run", "pay") is None
        assert store.get_run("run") == []
        assert store.attempts("run", "pay") == []
        assert store.completed_steps("run") == []
        assert store.completed_outputs("run") == []
        assert store.step_statuses("run") == {}

    def test_statuses_and_step_runs_come_in_the_order_they_came_to_be(self, store: StepRunStore) -> None:
        store.schedule_steps("run", {"zeta": {}, "alpha": {}})
        begun(store.begin_step("run", "mid", {"n": 1}))
        store.complete_step(begun(store.begin_step("run", "alpha", {})), {"n": 2}, schedule={"beta": {}})
        store.fail_step(begun(store.begin_step("run", "zeta", {})), {"n": 3})

        assert list(store.step_statuses("run").items()) == [
            ("zeta", StepStatus.FAILED),
            ("alpha", StepStatus.COMPLETED),
            ("mid", StepStatus.RUNNING),
            ("beta", StepStatus.PENDING),
        ]
        step_runs = store.get_run("run")
        assert [step_run.step for step_run in step_runs] == ["zeta", "alpha", "mid", "beta"]
        assert step_runs == [store.get_step_run("run", step_run.step) for step_run in step_runs]

    def test_a_large_run(self, store: StepRunStore) -> None:
        names = [f"step-{number}" for number in range(2_500)]

        assert store.schedule_steps("run", {name: {"n": index} for index, name in enumerate(names)}) == names
        claims = store.batch([store.calls.begin_step("run", name, {}) for name in reversed(names)])
        store.batch([store.calls.complete_step(begun(claim), {"of": claim[0].step}) for claim in claims])

        assert list(store.step_statuses("run")) == names
        assert [step_run.input["n"] for step_run in store.get_run("run")] == list(range(2_500))
        assert store.completed_steps("run") == names[::-1]
        assert store.completed_outputs("run") == [{"of": name} for name in reversed(names)]
        found = {each.step: each for page in pages(store, limit=500) for each in page}
        assert sorted(found.values(), key=lambda each: each.position) == store.get_run("run")
        assert store.completed_steps("run", after=1_000, limit=1_200) == names[1_499:299:-1]
        assert store.completed_outputs("run", after=1_000, limit=1_200) == [
            {"of": name} for name in names[1_499:299:-1]
        ]


def pages(store: StepRunStore, limit: int) -> Iterator[list[StepRun]]:
    cursor: str | None = None
    while True:
        page = store.scan_steps("run", limit=limit, cursor=cursor)
        yield page.step_runs
        cursor = page.cursor
        if cursor is None:
            return


class TestReadingBitByBit:
    def test_a_run_that_is_not_there_is_one_empty_page(self, store: StepRunStore) -> None:
        assert store.scan_steps("run") == ([], None)
        store.schedule_step("run", "pay", {})
        store.delete_run("run")
        assert store.scan_steps("run") == ([], None)

    def test_a_small_run_is_one_page_with_all_there_is_of_a_step(self, store: StepRunStore) -> None:
        store.schedule_steps("run", {"zeta": {}, "alpha": {}, "mid": {"n": 1}})
        store.complete_step(begun(store.begin_step("run", "alpha", {})), {"n": 2})
        store.fail_step(begun(store.begin_step("run", "zeta", {})), {"n": 3})
        begun(store.begin_step("run", "zeta", {}))  # whose past attempt is a field that is no step
        begun(store.begin_step("run", "seen", {}, owner="s"))

        page = store.scan_steps("run")

        assert page.cursor is None
        assert sorted(page.step_runs, key=lambda each: each.position) == store.get_run("run")

    def test_pages_are_about_as_large_as_asked_for(self, bench: Bench, store: StepRunStore) -> None:
        names = {f"step-{number}" for number in range(1_000)}
        store.schedule_steps("run", {name: {} for name in names})

        found = list(pages(store, limit=100))

        assert {each.step for page in found for each in page} == names
        # A pending step has two fields, where three are reckoned with; and servers pass a few more or fewer.
        assert len(found) >= 4

    def test_each_step_is_as_it_was_when_its_page_was_read(self, store: StepRunStore) -> None:
        store.schedule_steps("run", {f"step-{number}": {} for number in range(500)})
        first = store.scan_steps("run", limit=50)
        assert first.cursor is not None
        seen = {each.step for each in first.step_runs}
        claims = in_batch(store, [store.calls.begin_step("run", f"step-{number}", {}) for number in range(500)])

        rest: dict[str, StepRun] = {}
        cursor: str | None = first.cursor
        while cursor is not None:
            page = store.scan_steps("run", limit=50, cursor=cursor)
            rest |= {each.step: each for each in page.step_runs}
            cursor = page.cursor

        assert all(each.status is StepStatus.PENDING for each in first.step_runs)
        assert all(each.status is StepStatus.RUNNING for each in rest.values())
        assert seen | rest.keys() == {claim.step_run.step for claim in claims}

    def test_the_order_of_completion_can_be_followed(self, store: StepRunStore) -> None:
        followed: list[str] = []
        for name in ("a", "b", "c", "d", "e"):
            store.complete_step(begun(store.begin_step("run", name, {})), {"of": name})
            if name in "bde":
                followed += store.completed_steps("run", after=len(followed))

        assert followed == store.completed_steps("run") == ["a", "b", "c", "d", "e"]
        assert store.completed_outputs("run", after=3) == [{"of": "d"}, {"of": "e"}]
        assert store.completed_outputs("run", limit=2) == [{"of": "a"}, {"of": "b"}]
        assert store.completed_steps("run", after=1, limit=1) == ["b"]
        assert store.completed_steps("run", after=5) == store.completed_outputs("run", after=7, limit=2) == []


class TestAttempts:
    def test_each_is_told_with_owner_outcome_and_error(self, bench: Bench, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("run", "pay", {}, owner="w1")), {"reason": "declined"})
        bench.lapse(begun(store.begin_step("run", "pay", {}, owner="w2", lease=0.01)))
        store.release_step(begun(store.begin_step("run", "pay", {}, owner="w3")))
        store.complete_step(begun(store.begin_step("run", "pay", {}, owner="w4")), {})

        attempts = store.attempts("run", "pay")

        assert [(each.number, each.owner, each.outcome, each.error) for each in attempts] == [
            (1, "w1", Outcome.FAILED, {"reason": "declined"}),
            (2, "w2", Outcome.LEASE_EXPIRED, None),
            (3, "w3", Outcome.RELEASED, None),
            (4, "w4", Outcome.COMPLETED, None),
        ]
        times = [time for each in attempts for time in (each.started_at, each.ended_at) if time is not None]
        assert len(times) == 8
        assert times == sorted(times)

    def test_the_last_eight_and_the_latest_are_kept(self, bench: Bench, store: StepRunStore) -> None:
        for number in range(1, 13):
            store.fail_step(begun(store.begin_step("run", "pay", {})), {"of": number})

        assert [(each.number, each.error) for each in store.attempts("run", "pay")] == [
            (number, {"of": number}) for number in range(4, 13)
        ]
        kept = [field for field in bench.backend.raw.hkeys(bench.keys("run")[0]) if field.startswith(b"a")]
        assert len(kept) == 8

    def test_a_pending_step_has_none(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {})

        assert store.attempts("run", "pay") == []


class TestBulk:
    def test_schedule_steps_answers_the_new_ones_in_the_callers_order(self, store: StepRunStore) -> None:
        store.schedule_step("run", "b", {"old": True})
        begun(store.begin_step("run", "d", {"old": True}))

        assert store.schedule_steps("run", {name: {"new": True} for name in "edcba"}) == ["e", "c", "a"]
        assert [(each.step, each.input) for each in store.get_run("run")] == [
            ("b", {"old": True}),
            ("d", {"old": True}),
            ("e", {"new": True}),
            ("c", {"new": True}),
            ("a", {"new": True}),
        ]

    def test_schedule_steps_of_nothing(self, bench: Bench, store: StepRunStore) -> None:
        assert store.schedule_steps("run", {}) == []
        assert bench.dump() == {}

    @pytest.mark.parametrize("losing", [1, 11])
    def test_schedule_sent_again_answers_the_same(self, bench: Bench, losing: int) -> None:
        store = bench.store(losing=losing)

        assert store.schedule_step("run", "a", {}).decision == "schedule"
        assert store.schedule_steps("run", {"a": {}, "b": {}, "c": {}}) == ["b", "c"]
        assert [each.position for each in store.get_run("run")] == [1, 2, 3]

    def test_schedule_sent_again_after_a_claim_answers_the_same(self, store: StepRunStore) -> None:
        one = store.calls.schedule_step("run", "a", {"by": "one"})
        many = store.calls.schedule_steps("run", {"b": {}, "c": {}})
        store.send(one)
        store.send(many)
        store.complete_step(begun(store.begin_step("run", "a", {})), {})
        store.fail_step(begun(store.begin_step("run", "b", {})), {"reason": "declined"})

        assert store.send(one).decision == "schedule"
        assert store.send(many) == ["b", "c"]

    def test_delete_pending_steps_forgets_those_alone(self, store: StepRunStore) -> None:
        store.schedule_steps("run", {name: {} for name in ("pending", "released", "running", "failed", "completed")})
        store.release_step(begun(store.begin_step("run", "released", {})))
        begun(store.begin_step("run", "running", {}))
        store.fail_step(begun(store.begin_step("run", "failed", {})), {"reason": "declined"})
        store.complete_step(begun(store.begin_step("run", "completed", {})), {})

        gone = store.delete_pending_steps("run", ["completed", "released", "absent", "failed", "pending", "running"])

        assert gone == ["released", "absent", "pending"]
        assert list(store.step_statuses("run")) == ["running", "failed", "completed"]
        assert store.attempts("run", "released") == []
        assert store.delete_pending_steps("run", ["pending"]) == ["pending"]
        assert store.delete_pending_steps("run", []) == []

    def test_delete_pending_steps_leaves_nothing_of_a_step_that_was_imported(
        self, bench: Bench, store: StepRunStore
    ) -> None:
        """A pending step that nobody has begun has no last error, but a document may say otherwise."""
        store.schedule_step("run", "pay", {})
        document = store.export_run("run")
        document["steps"][0]["last_error"] = {"why": "it says so"}
        store.import_run({**document, "run_id": "copy"})

        assert store.delete_pending_steps("copy", ["pay"]) == ["pay"]

        assert set(bench.backend.raw.hkeys(bench.keys("copy")[0])) == {b"r", b"m"}

    def test_a_deleted_pending_step_can_come_again(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {"amount": 1})
        store.delete_pending_steps("run", ["pay"])

        assert begun(store.begin_step("run", "pay", {"amount": 2})).input == {"amount": 2}


class TestDeletion:
    def test_a_deleted_run_is_gone_and_late_writes_are_refused(self, bench: Bench, store: StepRunStore) -> None:
        running = begun(store.begin_step("run", "pay", {}, lease=60))
        store.fail_step(begun(store.begin_step("run", "ship", {})), {"reason": "declined"})
        store.complete_step(begun(store.begin_step("run", "mail", {})), {})

        assert store.delete_run("run") is True

        before = bench.dump()
        assert store.get_run("run") == store.completed_steps("run") == store.completed_outputs("run") == []
        assert store.get_step_run("run", "pay") is None
        assert store.step_statuses("run") == {}
        assert store.attempts("run", "pay") == []
        assert store.delete_pending_steps("run", ["pay"]) == ["pay"]
        assert store.expire_run("run", 60) is False
        assert store.failed_steps() == store.lapsed_claims() == store.live_claims() == []
        for write in (
            lambda: store.complete_step(running, {}),
            lambda: store.complete_step(running.id, {}),
            lambda: store.fail_step(running, {}),
            lambda: store.extend_claim(running, 60),
            lambda: store.release_step(running),
            lambda: store.begin_step("run", "pay", {}),
            lambda: store.schedule_step("run", "pay", {}),
            lambda: store.schedule_steps("run", {"pay": {}}),
        ):
            with pytest.raises(RunDeletedError, match="run 'run'"):
                write()
        assert bench.dump() == before
        assert set(before) == {bench.keys("run")[0]}  # the tombstone alone

    def test_the_tombstone_goes_by_itself(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))
        store.delete_run("run", tombstone=0.02)

        wait_until(lambda: not bench.backend.raw.exists(bench.keys("run")[0]))

        assert begun(store.begin_step("run", "pay", {})).attempt == 1

    def test_a_run_that_is_not_there_leaves_no_tombstone(self, bench: Bench, store: StepRunStore) -> None:
        assert store.delete_run("run") is False
        assert bench.dump() == {}

    @pytest.mark.parametrize("losing", [1, 11])
    def test_sent_again_it_answers_the_same(self, bench: Bench, losing: int) -> None:
        begun(bench.store().begin_step("run", "pay", {}))

        assert bench.store(losing=losing).delete_run("run") is True
        assert bench.store().delete_run("run") is False

    @pytest.mark.parametrize("steps", [10, 700])
    def test_no_entry_of_a_deleted_run_stays_in_the_indexes(
        self, store: StepRunStore, bench: Bench, steps: int
    ) -> None:
        """Those of a long run go when somebody reads the indexes: looking for them would hold up the server."""
        calls = store.calls
        begun_steps = store.batch([calls.begin_step("run", f"step-{number}", {}, lease=60) for number in range(steps)])
        store.batch([calls.fail_step(result.step_run, {}) for result in begun_steps[::2]])
        store.batch([calls.expire_claim(result.step_run) for result in begun_steps[1::4]])

        assert store.delete_run("run") is True

        assert store.failed_steps(1_000) == store.live_claims(1_000) == store.lapsed_claims(1_000) == []
        assert bench.backend.keys(bench.prefix) == {bench.keys("run")[0]}  # the tombstone

    def test_other_runs_stay(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))
        begun(store.begin_step("other", "pay", {}))

        store.delete_run("run")

        assert stored(store, "other").status is StepStatus.RUNNING


class TestExpiry:
    """Both keys of a run expire together, after its last write, and never under a live claim."""

    def ttls(self, bench: Bench) -> list[int]:
        """What is left of each of the run's keys, in ms; -1 for ever, -2 not there."""
        return [bench.backend.raw.pttl(key) for key in bench.keys("run")[:2]]

    def test_without_a_ttl_nothing_expires(self, bench: Bench, store: StepRunStore) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})

        assert self.ttls(bench) == [-1, -1]

    @pytest.mark.parametrize(
        "write",
        [
            lambda store: store.schedule_step("run", "new", {}),
            lambda store: store.schedule_steps("run", {"new": {}}),
            lambda store: store.begin_step("run", "pay", {}, lease=1),
            lambda store: store.delete_pending_steps("run", ["pay"]),
            lambda store: store.complete_step(begun(store.begin_step("run", "pay", {})), {}),
            lambda store: store.fail_step(begun(store.begin_step("run", "pay", {})), {}),
            lambda store: store.release_step(begun(store.begin_step("run", "pay", {}))),
            lambda store: store.extend_claim(begun(store.begin_step("run", "pay", {})), 1),
            lambda store: store.expire_claim(begun(store.begin_step("run", "pay", {}))),
        ],
    )
    def test_each_write_renews_it_on_both_keys(self, bench: Bench, write: object) -> None:
        assert callable(write)
        store = bench.store(run_ttl=1_000)
        store.complete_step(begun(store.begin_step("run", "first", {})), {})
        store.schedule_step("run", "pay", {})
        for key in bench.keys("run")[:2]:
            bench.backend.raw.pexpire(key, 10_000)

        write(store)

        assert all(990_000 < ttl <= 1_002_000 for ttl in self.ttls(bench))

    def test_a_refused_write_and_a_read_renew_nothing(self, bench: Bench) -> None:
        store = bench.store(run_ttl=1_000)
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})
        for key in bench.keys("run")[:2]:
            bench.backend.raw.pexpire(key, 10_000)

        store.begin_step("run", "pay", {})
        store.schedule_step("run", "pay", {})
        store.get_run("run")

        assert all(0 < ttl <= 10_000 for ttl in self.ttls(bench))

    def test_a_live_lease_holds_the_run(self, bench: Bench) -> None:
        store = bench.store(run_ttl=10)
        begun(store.begin_step("run", "pay", {}, lease=1_000))
        store.complete_step(begun(store.begin_step("run", "mail", {}, lease=5)), {})

        assert all(1_005_000 < ttl <= 1_010_000 for ttl in self.ttls(bench))

    def test_a_claim_without_lease_holds_the_run_until_it_is_ended(self, bench: Bench) -> None:
        store = bench.store(run_ttl=10)
        one = begun(store.begin_step("run", "one", {}))
        two = begun(store.begin_step("run", "two", {}))
        assert self.ttls(bench) == [-1, -2]
        store.complete_step(one, {})
        assert self.ttls(bench) == [-1, -1]
        store.extend_claim(two, 5)
        assert all(10_000 < ttl <= 15_000 for ttl in self.ttls(bench))
        store.extend_claim(two, None)
        assert self.ttls(bench) == [-1, -1]

        store.fail_step(two, {"reason": "declined"})

        assert all(9_000 < ttl <= 15_000 for ttl in self.ttls(bench))

    def test_expire_run_sets_it_for_a_run_at_work(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "leased", {}, lease=50))
        unleased = begun(store.begin_step("run", "unleased", {}))
        store.complete_step(begun(store.begin_step("run", "done", {})), {})

        assert store.expire_run("run", 10) is True

        assert self.ttls(bench) == [-1, -1]
        store.complete_step(unleased, {})
        assert all(50_000 < ttl <= 60_000 for ttl in self.ttls(bench))

    def test_expire_run_none_keeps_it_for_ever(self, bench: Bench) -> None:
        store = bench.store(run_ttl=10)
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})

        assert store.expire_run("run", None) is True
        store.schedule_step("run", "mail", {})

        assert self.ttls(bench) == [-1, -1]

    def test_expire_run_of_no_run(self, bench: Bench, store: StepRunStore) -> None:
        assert store.expire_run("run", 10) is False
        assert bench.dump() == {}

    def test_no_key_outlives_its_run(self, bench: Bench) -> None:
        """All that is left once runs have expired are index entries, and a look at the indexes drops them."""
        store = bench.store(run_ttl=0.05)
        for run in ("one", "two"):
            store.complete_step(begun(store.begin_step(run, "done", {}, lease=0.01)), {}, schedule={"next": {}})
            store.fail_step(begun(store.begin_step(run, "next", {}, lease=0.01)), {"reason": "declined"})
            begun(store.begin_step(run, "crashed", {}, lease=0.01))

        run_keys = {key for run in ("one", "two") for key in bench.keys(run)[:2]}
        wait_until(lambda: not run_keys & bench.backend.keys(bench.prefix))

        assert store.lapsed_claims() == store.failed_steps() == []
        assert bench.backend.keys(bench.prefix) == set()


class TestLiveClaims:
    def test_they_come_soonest_over_first(self, bench: Bench, store: StepRunStore) -> None:
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

    def test_they_carry_no_claim(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}, lease=60))

        (live,) = store.live_claims()

        with pytest.raises(StaleStepRunError, match="carries no claim"):
            store.complete_step(live, {})

    def test_an_extended_claim_moves_back(self, store: StepRunStore) -> None:
        first = begun(store.begin_step("first", "pay", {}, lease=60))
        begun(store.begin_step("second", "pay", {}, lease=70))

        store.extend_claim(first, 80)

        assert [each.run_id for each in store.live_claims()] == ["second", "first"]

    def test_those_of_one_owner(self, store: StepRunStore) -> None:
        for number in range(12):
            begun(store.begin_step(f"run-{number}", "pay", {}, lease=60 + number, owner=f"w{number % 3}"))
        begun(store.begin_step("nobodys", "pay", {}, lease=60))

        assert [each.run_id for each in store.live_claims(owner="w1")] == ["run-1", "run-4", "run-7", "run-10"]
        assert [each.run_id for each in store.live_claims(2, owner="w2")] == ["run-2", "run-5"]
        assert store.live_claims(owner="w") == store.live_claims(owner="w1 ") == []

    def test_the_limit_counts_those_of_the_owner(self, store: StepRunStore) -> None:
        for number, owner in enumerate(["own", "other", "own", "own"]):
            begun(store.begin_step("run", f"step-{number}", {}, lease=60 + number, owner=owner))

        assert [each.step for each in store.live_claims(2, owner="own")] == ["step-0", "step-2"]

    def test_lapsed_ones_do_not_hide_them(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "lapsed", {}, lease=0.01)))
        live = begun(store.begin_step("run", "live", {}, lease=60))

        assert store.live_claims(limit=1) == [live]

    def test_the_owner_is_of_the_latest_claim(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.01, owner="w1")))
        taken_over = begun(store.begin_step("run", "pay", {}, lease=60, owner="w2"))

        assert (store.live_claims(owner="w1"), store.live_claims(owner="w2")) == ([], [taken_over])

    def test_entries_without_their_record_do_not_hide_good_ones(self, bench: Bench, store: StepRunStore) -> None:
        good = begun(store.begin_step("run", "good", {}, lease=60))
        claims = bench.keys("run")[2]
        soon = bench.backend.now() * 1000 + 30_000
        bench.backend.raw.zadd(claims, {f"3:run{number}".encode(): soon + number for number in range(10)})

        assert store.live_claims(limit=3) == [good]
        assert bench.backend.raw.zcard(claims) == 1

    def test_an_entry_with_another_end_of_the_lease_is_mended(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))
        claims = bench.keys("run")[2]
        bench.backend.raw.zadd(claims, {b"3:runpay": 9e12})

        assert store.live_claims() == [step_run]

        assert step_run.lease_ends_at is not None
        assert bench.backend.raw.zscore(claims, b"3:runpay") == round(step_run.lease_ends_at.timestamp() * 1000)

    @pytest.mark.parametrize("owner", ["", "a\nb", 7, "w" * 257])
    def test_absurd_owners_are_refused(self, store: StepRunStore, owner: object) -> None:
        with pytest.raises(InvalidArgumentError, match="owner: must be"):
            store.live_claims(owner=owner)  # pyright: ignore[reportArgumentType]: what is refused is the point


class TestExpireClaim:
    def test_the_claim_can_be_taken_over_at_once(self, store: StepRunStore) -> None:
        holder = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60, owner="w1"))
        (live,) = store.live_claims()

        expired = store.expire_claim(live)

        assert (expired.status, expired.input, expired.attempt) == (StepStatus.RUNNING, {"amount": 1}, 1)
        assert expired == stored(store)
        assert store.live_claims() == []
        assert store.lapsed_claims() == [expired]
        winner = begun(store.begin_step("run", "pay", {"amount": 2}, owner="w2"))
        assert [(each.owner, each.outcome) for each in store.attempts("run", "pay")] == [
            ("w1", Outcome.LEASE_EXPIRED),
            ("w2", Outcome.RUNNING),
        ]
        with pytest.raises(StaleStepRunError, match="was taken over: attempt 2"):
            store.complete_step(holder, {})
        assert stored(store) == winner

    @pytest.mark.parametrize("observed", ["get_step_run", "get_run", "begin_step", "the claim", "id"])
    def test_however_it_was_observed(self, store: StepRunStore, observed: str) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        step_run = {
            "get_step_run": lambda: stored(store),
            "get_run": lambda: store.get_run("run")[0],
            "begin_step": lambda: store.begin_step("run", "pay", {}).step_run,
            "the claim": lambda: claim,
            "id": lambda: claim.id,
        }[observed]()

        store.expire_claim(step_run)

        assert begun(store.begin_step("run", "pay", {})).attempt == 2

    def test_a_claim_without_lease_is_ended_too(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))

        store.expire_claim(stored(store))

        assert begun(store.begin_step("run", "pay", {})).attempt == 2

    def test_it_uses_the_attempt_up(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}, lease=60))
        store.expire_claim(stored(store))

        assert store.begin_step("run", "pay", {}, max_attempts=1).exhausted
        assert stored(store).last_error is not None

    def test_a_holder_that_is_alive_after_all_goes_on_unless_it_was_taken_over(self, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        store.expire_claim(stored(store))

        assert store.extend_claim(claim, 60) == stored(store)
        assert store.live_claims() == [stored(store)]
        assert store.complete_step(claim, {}).status is StepStatus.COMPLETED

    @pytest.mark.parametrize("since", ["taken over", "failed", "released", "begun again", "completed"])
    def test_a_later_claim_is_never_touched(self, bench: Bench, store: StepRunStore, since: str) -> None:
        first = begun(store.begin_step("run", "pay", {}, lease=60))
        observed = stored(store)
        match since:
            case "taken over":
                store.expire_claim(observed)
                begun(store.begin_step("run", "pay", {}, lease=60))
            case "failed":
                store.fail_step(first, {})
            case "released":
                store.release_step(first)
            case "begun again":
                store.release_step(first)
                begun(store.begin_step("run", "pay", {}, lease=60))
            case _:
                store.complete_step(first, {})
        before = bench.dump()

        with pytest.raises(StaleStepRunError) as caught:
            store.expire_claim(observed)

        assert caught.value.current == stored(store)
        assert bench.dump() == before

    @pytest.mark.parametrize("losing", [1, 11])
    def test_sent_again_it_ends_no_later_claim(self, bench: Bench, losing: int) -> None:
        begun(bench.store().begin_step("run", "pay", {}, lease=60))
        observed = stored(bench.store())
        bench.store(losing=losing).expire_claim(observed)
        winner = begun(bench.store().begin_step("run", "pay", {}, lease=60))

        with pytest.raises(StaleStepRunError):
            bench.store().expire_claim(observed)

        assert stored(bench.store()) == winner

    def test_a_step_that_was_never_claimed_is_stale(self, bench: Bench, store: StepRunStore) -> None:
        scheduled = store.schedule_step("run", "pay", {}).step_run
        before = bench.dump()

        for step_run in (scheduled, scheduled.id):
            with pytest.raises(StaleStepRunError):
                store.expire_claim(step_run)

        assert bench.dump() == before

    def test_a_run_of_another_prefix_is_refused(self, bench: Bench, store: StepRunStore) -> None:
        other = bench.store(prefix=f"{bench.prefix}-other")
        begun(store.begin_step("run", "pay", {}, lease=60))
        theirs = begun(other.begin_step("run", "pay", {}, lease=60))
        before = bench.dump()

        for step_run in (theirs, stored(other), theirs.id):
            with pytest.raises(InvalidArgumentError, match="prefix"):
                store.expire_claim(step_run)

        assert bench.dump() == before
        assert stored(other) == theirs

    def test_without_a_record_it_is_not_found(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}, lease=60))
        observed = stored(store)
        bench.backend.raw.delete(*bench.keys("run")[:2])
        begun(store.begin_step("gone", "pay", {}, lease=60))
        deleted = stored(store, "gone")
        store.delete_run("gone")

        with pytest.raises(StepRunNotFoundError):
            store.expire_claim(observed)
        with pytest.raises(RunDeletedError):
            store.expire_claim(deleted)


class TestIndexes:
    def test_lapsed_claims_come_longest_over_first(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("live", "pay", {}, lease=60))
        begun(store.begin_step("unleased", "pay", {}))
        for run, lease in (("b", 0.02), ("a", 0.03), ("c", 0.01)):
            last = begun(store.begin_step(run, "pay", {"of": run}, lease=lease, owner=f"worker {run}"))
        for run in "bac":
            bench.lapse(stored(store, run))

        lapsed = store.lapsed_claims()

        by_end = sorted("abc", key=lambda run: stored(store, run).lease_ends_at or last.created_at)
        assert [step_run.run_id for step_run in lapsed] == by_end
        assert lapsed == [stored(store, run) for run in by_end]
        assert store.lapsed_claims(limit=2) == lapsed[:2]

    def test_failed_steps_come_newest_first(self, bench: Bench, store: StepRunStore) -> None:
        for number in range(3):
            step_run = begun(store.begin_step(f"run-{number}", "pay", {}))
            failed = store.fail_step(step_run, {"of": number})
            assert failed.ended_at is not None
            end = failed.ended_at.timestamp()
            wait_until(lambda end=end: bench.backend.now() > end + 0.001)

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
    def test_entries_follow_the_claim(
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

    def test_a_failed_step_that_is_begun_again_leaves_the_index(self, store: StepRunStore) -> None:
        store.fail_step(begun(store.begin_step("run", "pay", {})), {})
        begun(store.begin_step("run", "pay", {}))

        assert store.failed_steps() == []

    def test_an_entry_without_its_record_is_dropped_never_reported(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("gone", "pay", {}, lease=0.01)))
        store.fail_step(begun(store.begin_step("gone", "ship", {})), {})
        bench.backend.raw.delete(*bench.keys("gone")[:2])
        _, _, claims, failed = bench.keys("gone")
        assert bench.backend.raw.zcard(claims) == bench.backend.raw.zcard(failed) == 1

        assert store.lapsed_claims() == store.failed_steps() == []

        assert bench.backend.keys(bench.prefix) == set()

    def test_dropped_entries_do_not_hide_good_ones(self, bench: Bench, store: StepRunStore) -> None:
        # All in one bucket, so that the page that the limit allows is full of entries without a record.
        store.fail_step(begun(store.begin_step("run", "good", {})), {})
        failed = bench.keys("run")[3]
        bench.backend.raw.zadd(failed, {f"3:run{number}".encode(): 9e12 + number for number in range(10)})

        assert [each.step for each in store.failed_steps(limit=3)] == ["good"]
        assert bench.backend.raw.zcard(failed) == 1

    def test_an_entry_with_an_old_end_of_the_lease_is_mended(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))
        claims = bench.keys("run")[2]
        bench.backend.raw.zadd(claims, {b"3:runpay": 1})

        assert store.lapsed_claims() == []

        assert step_run.lease_ends_at is not None
        assert bench.backend.raw.zscore(claims, b"3:runpay") == round(step_run.lease_ends_at.timestamp() * 1000)

    def test_the_failed_index_is_bounded(self, bench: Bench, store: StepRunStore) -> None:
        failed = bench.keys("run")[3]
        bench.backend.raw.zadd(failed, {f"3:old{number}".encode(): number for number in range(1_500)})

        store.fail_step(begun(store.begin_step("run", "pay", {})), {})

        assert bench.backend.raw.zcard(failed) == 1_000
        assert bench.backend.raw.zscore(failed, b"3:runpay") is not None

    @pytest.mark.parametrize("limit", [0, -1, 1_001, 2.0, True, "10", None])
    def test_absurd_limits_are_refused(self, store: StepRunStore, limit: object) -> None:
        for read in (store.lapsed_claims, store.live_claims, store.failed_steps):
            with pytest.raises(InvalidArgumentError, match="limit: must be an int from 1 to 1,000"):
                read(limit)  # pyright: ignore[reportArgumentType]: what is refused is the point
