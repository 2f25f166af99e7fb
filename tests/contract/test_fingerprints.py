"""A delivery with a different input is refused, by the fingerprints of the inputs, in every state of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import (
    BeginResult,
    InputMismatchError,
    InvalidArgumentError,
    PayloadError,
    StaleStepRunError,
    StepRun,
    StepRunStore,
    StepStatus,
)
from squidstep_redis.model import step_run_id

FIRST: dict[str, Any] = {"amount": 1, "card": 7}
SAME: dict[str, Any] = {"card": 7, "amount": 1}
OTHER: dict[str, Any] = {"amount": 2, "card": 7}


def complete(bench: Bench, store: StepRunStore, **options: Any) -> None:
    store.complete_step(begun(store.begin_step("run", "pay", FIRST, **options)), {})


def fail(bench: Bench, store: StepRunStore, **options: Any) -> None:
    store.fail_step(begun(store.begin_step("run", "pay", FIRST, **options)), {})


def fail_finally(bench: Bench, store: StepRunStore, **options: Any) -> None:
    store.fail_step(begun(store.begin_step("run", "pay", FIRST, **options)), {}, final=True)


def delay(bench: Bench, store: StepRunStore, **options: Any) -> None:
    store.fail_step(begun(store.begin_step("run", "pay", FIRST, **options)), {}, retry_after=60)


def begin(bench: Bench, store: StepRunStore, **options: Any) -> None:
    begun(store.begin_step("run", "pay", FIRST, lease=60, **options))


def lapse(bench: Bench, store: StepRunStore, **options: Any) -> None:
    bench.lapse(begun(store.begin_step("run", "pay", FIRST, lease=0.01, **options)))


def release(bench: Bench, store: StepRunStore, **options: Any) -> None:
    store.release_step(begun(store.begin_step("run", "pay", FIRST, **options)))


def schedule(bench: Bench, store: StepRunStore, **options: Any) -> None:
    store.schedule_step("run", "pay", FIRST, **options)


def retry(bench: Bench, store: StepRunStore, **options: Any) -> None:
    fail(bench, store, **options)
    store.retry_step("run", "pay")


Reach = Callable[..., None]
STATES = (complete, fail, fail_finally, delay, begin, lapse, release, schedule, retry)
any_state = pytest.mark.parametrize("reach", STATES, ids=lambda reach: reach.__name__)


class TestBeginStep:
    @any_state
    def test_a_different_input_is_refused_in_every_state(self, bench: Bench, store: StepRunStore, reach: Reach) -> None:
        reach(bench, store, fingerprint=True)
        before = bench.dump()

        with pytest.raises(InputMismatchError) as caught:
            store.begin_step("run", "pay", OTHER, fingerprint=True, lease=60, max_attempts=1)

        error = caught.value
        assert (error.run_id, error.step, error.stored.encode()) == ("run", "pay", bench.field("run", "fpay"))
        assert error.given != error.stored
        assert all(
            part in str(error) for part in ("'run', step 'pay'", error.given, error.stored, "Nothing was written")
        )
        assert bench.dump() == before

    @any_state
    def test_the_same_input_has_the_result_without_fingerprints(
        self, bench: Bench, store: StepRunStore, reach: Reach
    ) -> None:
        reach(bench, store, fingerprint=True)
        with_it = store.begin_step("run", "pay", SAME, fingerprint=True)
        store.delete_run("run", tombstone=0.001)
        bench.backend.raw.delete(*bench.keys("run")[:1])
        reach(bench, store)
        without_it = store.begin_step("run", "pay", SAME)

        assert (with_it.decision, with_it.reason, with_it.takeover) == (
            without_it.decision,
            without_it.reason,
            without_it.takeover,
        )
        assert (with_it.step_run.attempt, with_it.step_run.status) == (
            without_it.step_run.attempt,
            without_it.step_run.status,
        )

    @any_state
    def test_a_step_without_a_fingerprint_accepts_any(self, bench: Bench, store: StepRunStore, reach: Reach) -> None:
        reach(bench, store)

        result = store.begin_step("run", "pay", OTHER, fingerprint="other")

        granted = result.decision == "execute"
        assert bench.field("run", "fpay") == (b"other" if granted else None)

    @any_state
    def test_a_call_without_a_fingerprint_is_never_refused(
        self, bench: Bench, store: StepRunStore, reach: Reach
    ) -> None:
        reach(bench, store, fingerprint="first")

        result = store.begin_step("run", "pay", OTHER)

        # The fingerprint stays as long as its input does.
        replaced = result.step_run.input == OTHER
        assert replaced == (reach in (fail, lapse))
        assert bench.field("run", "fpay") == (None if replaced else b"first")

    def test_a_new_step_stores_the_fingerprint(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", FIRST, fingerprint="first", lease=60, owner="worker", max_attempts=3))
        begun(store.begin_step("run", "ship", FIRST, fingerprint=lambda given: given["amount"]))

        assert bench.field("run", "fpay") == b"first"
        assert len(bench.field("run", "fship") or b"") == 24

    def test_a_resent_call_is_never_refused(self, bench: Bench, store: StepRunStore) -> None:
        call = store.calls.begin_step("run", "pay", OTHER, lease=60, fingerprint="first")
        store.fail_step(begun(store.send(call)), {})
        store.fail_step(begun(store.begin_step("run", "pay", OTHER, fingerprint=False)), {})  # drops the fingerprint
        store.fail_step(begun(store.begin_step("run", "pay", FIRST, fingerprint="second")), {})
        before = bench.dump()

        assert store.send(call).reason == "superseded"

        assert bench.dump() == before

    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_lost_replies_change_nothing(self, bench: Bench, lost_replies: int) -> None:
        losing, store = bench.store(lost_replies=lost_replies), bench.store()

        claim = begun(losing.begin_step("run", "pay", FIRST, lease=60, fingerprint=True))
        with pytest.raises(InputMismatchError):
            losing.begin_step("run", "pay", OTHER, fingerprint=True)

        assert store.complete_step(claim, {}).attempt == 1

    def test_it_is_checked_in_a_run_that_expires(self, bench: Bench) -> None:
        store = bench.store(run_ttl=60)
        begun(store.begin_step("run", "pay", FIRST, fingerprint=True))

        with pytest.raises(InputMismatchError):
            store.begin_step("run", "pay", OTHER, fingerprint=True)

    def test_a_bad_fingerprint_is_rejected_before_anything_is_sent(self, bench: Bench, store: StepRunStore) -> None:
        for bad in (7, "", lambda given: given["missing"], lambda given: None):
            with pytest.raises(InvalidArgumentError, match="^fingerprint: "):
                store.begin_step("run", "pay", FIRST, fingerprint=bad)
        with pytest.raises(PayloadError, match=r"^fingerprint of steps\['pay'\]\['x'\]: "):
            store.begin_steps("run", {"pay": FIRST}, fingerprint=lambda given: {"x": {1}})
        assert bench.dump() == {}


class TestSchedule:
    @any_state
    def test_a_different_input_is_refused_in_every_state(self, bench: Bench, store: StepRunStore, reach: Reach) -> None:
        reach(bench, store, fingerprint=True)
        before = bench.dump()

        with pytest.raises(InputMismatchError):
            store.schedule_step("run", "pay", OTHER, fingerprint=True)
        with pytest.raises(InputMismatchError) as caught:
            store.schedule_steps("run", {"new": OTHER, "pay": OTHER}, fingerprint=True)

        assert (caught.value.step, caught.value.stored.encode()) == ("pay", bench.field("run", "fpay"))
        assert bench.dump() == before
        assert store.schedule_step("run", "pay", SAME, fingerprint=True).decision == "skip"
        assert store.schedule_step("run", "pay", OTHER).decision == "skip"
        assert store.schedule_steps("run", {"new": OTHER, "pay": SAME}, fingerprint=True) == ["new"]

    def test_a_resent_call_is_never_refused(self, bench: Bench, store: StepRunStore) -> None:
        one = store.calls.schedule_step("run", "pay", FIRST, fingerprint="first")
        many = store.calls.schedule_steps("run", {"a": FIRST, "b": FIRST}, fingerprint="first")
        for call in (one, many):
            store.send(call)
        for step in ("pay", "a", "b"):
            store.fail_step(begun(store.begin_step("run", step, {})), {})
            begun(store.begin_step("run", step, {}))
            store.fail_step(store.begin_step("run", step, {}).step_run.id, {})
            begun(store.begin_step("run", step, {}, fingerprint="second"))

        assert store.send(one).decision == "schedule"
        assert store.send(many) == ["a", "b"]

    def test_the_scheduled_input_keeps_its_fingerprint(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_steps("run", {"pay": FIRST, "ship": FIRST}, fingerprint=True)

        with pytest.raises(InputMismatchError):
            store.begin_step("run", "pay", OTHER, fingerprint=True)

        assert begun(store.begin_step("run", "pay", SAME, fingerprint=True)).input == FIRST
        assert begun(store.begin_step("run", "ship", {})).input == FIRST
        assert bench.field("run", "fpay") == bench.field("run", "fship") is not None

    def test_deleted_steps_leave_no_fingerprint(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_steps("run", {"pay": FIRST, "ship": FIRST}, fingerprint=True)

        assert store.delete_pending_steps("run", ["pay"]) == ["pay"]

        assert bench.field("run", "fpay") is None
        assert begun(store.begin_step("run", "pay", OTHER, fingerprint=True)).input == OTHER
        store.delete_pending_steps("run", ["ship"])
        store.release_step(stored(store).id)
        store.delete_pending_steps("run", ["pay"])
        assert not any(b":steps" in key for key in bench.dump())


class TestAdvanceStep:
    def test_a_refused_next_step_leaves_both_unchanged(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "ship", FIRST, fingerprint=True)
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        before = bench.dump()

        with pytest.raises(InputMismatchError) as caught:
            store.advance_step(claim, {}, "ship", OTHER, fingerprint=True, lease=60)

        assert caught.value.step == "ship"
        assert bench.dump() == before
        assert begun(store.advance_step(claim, {}, "ship", SAME, fingerprint=True, lease=60)).input == FIRST

    def test_a_new_step_stores_the_fingerprint(self, bench: Bench, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "pay", {}))
        call = store.calls.advance_step(claim, {}, "ship", FIRST, fingerprint="first", lease=60)

        assert begun(store.send(call)) == begun(store.send(call))

        assert bench.field("run", "fship") == b"first"
        assert stored(store).status is StepStatus.COMPLETED

    def test_a_lost_claim_is_reported_first(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "ship", FIRST, fingerprint=True)
        claim = begun(store.begin_step("run", "pay", {}))
        store.release_step(claim)

        with pytest.raises(StaleStepRunError):
            store.advance_step(claim, {}, "ship", OTHER, fingerprint=True)

    def test_an_exhausted_next_step_notifies_waiters(self, bench: Bench, store: StepRunStore) -> None:
        """`settle_mark` was unknown here: the script failed after it had written."""
        bench.lapse(begun(store.begin_step("run", "ship", {}, lease=0.01)))
        bench.backend.raw.hset(bench.keys("run")[0], "wship", "w")
        claim = begun(store.begin_step("run", "pay", {}))

        assert store.advance_step(claim, {}, "ship", {}, max_attempts=1).exhausted

        assert bench.field("run", "wship") is None


class TestSeveralSteps:
    def test_begin_steps_claims_all_or_none(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "b", FIRST, fingerprint=True))
        before = bench.dump()

        with pytest.raises(InputMismatchError) as caught:
            store.begin_steps("run", {"a": OTHER, "b": OTHER, "c": OTHER}, fingerprint=True, lease=60)

        assert (caught.value.step, caught.value.stored.encode()) == ("b", bench.field("run", "fb"))
        assert bench.dump() == before

    def test_begin_steps_stores_a_fingerprint_for_each(self, bench: Bench, store: StepRunStore) -> None:
        inputs = {step: {"n": number} for number, step in enumerate("abc")}
        call = store.calls.begin_steps("run", inputs, fingerprint=True, lease=60)

        results, again = store.send(call), store.send(call)

        assert [begun(each).token for each in results.values()] == [begun(each).token for each in again.values()]
        assert len({bench.field("run", f"f{step}") for step in inputs}) == 3
        assert {each.reason for each in store.begin_steps("run", inputs, fingerprint=True).values()} == {"busy"}
        assert store.count_claims().live == 3
        with pytest.raises(InputMismatchError, match="step 'a'"):
            store.begin_steps("run", {"a": {}}, fingerprint=True)

    def test_a_mismatch_does_not_affect_other_calls_of_a_batch(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "b", FIRST, fingerprint=True))
        begins = [store.calls.begin_step("run", step, OTHER, fingerprint=True, lease=60) for step in "abc"]
        completion = store.calls.complete_step(step_run_id(store.calls.prefix, "run", "a"), {})

        results: list[Any] = store.batch([*begins, completion])

        assert [type(each) for each in results] == [BeginResult, InputMismatchError, BeginResult, StepRun]
        assert results[1].step == "b"
        assert [each.input for each in store.get_run("run")] == [FIRST, OTHER, OTHER]

    def test_calls_with_and_without_fingerprints_share_a_batch(self, bench: Bench, store: StepRunStore) -> None:
        options: list[Any] = [None, True, "third", None, lambda given: given["amount"]]
        begins = [
            store.calls.begin_step("run", f"step-{number}", FIRST, fingerprint=each, lease=60, max_attempts=2)
            for number, each in enumerate(options)
        ]

        assert all(begun(each).input == FIRST for each in store.batch(begins))

        fields = [bench.field("run", f"fstep-{number}") for number in range(5)]
        assert [field and len(field) for field in fields] == [None, 24, 5, None, 24]


class TestStoreSetting:
    def test_it_holds_for_every_call_that_stores_an_input(self, bench: Bench) -> None:
        store = bench.store(fingerprint=lambda given: given["amount"])
        store.schedule_step("run", "a", FIRST)
        store.schedule_steps("run", {"b": FIRST})
        claim = begun(store.begin_step("run", "c", FIRST))
        claim = begun(store.advance_step(claim, {}, "d", FIRST))
        store.begin_steps("run", {"e": FIRST, "f": FIRST})
        store.complete_step(claim, {}, schedule={"g": FIRST, "h": FIRST})

        assert len({bench.field("run", f"f{step}") for step in "abcdefgh"} - {None}) == 1
        for step in "abcdefgh":
            with pytest.raises(InputMismatchError):
                store.begin_step("run", step, OTHER)
            store.begin_step("run", step, {**FIRST, "card": 8})
            store.begin_step("run", step, OTHER, fingerprint=False)

    def test_a_completion_is_not_refused_for_its_successors(self, bench: Bench) -> None:
        """The work is done. A successor that exists stays as it is."""
        store = bench.store(fingerprint=True)
        store.schedule_step("run", "next", FIRST)
        claim = begun(store.begin_step("run", "pay", {}))

        store.complete_step(claim, {}, schedule={"next": OTHER, "new": OTHER})

        assert stored(store, step="next").input == FIRST
        assert stored(store, step="new").input == OTHER

    @pytest.mark.parametrize("bad", [7, b"x", "", "\n"])
    def test_a_malformed_one_is_rejected(self, bench: Bench, bad: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^fingerprint: "):
            bench.store(fingerprint=bad)

    def test_the_doctor_ignores_it(self, bench: Bench) -> None:
        store = bench.store(fingerprint=lambda given: given["order_id"])

        messages = {each.message for each in store.doctor().findings if each.check == "self-test"}
        assert messages == {"a scratch run went through every transition"}


class TestCopies:
    def test_an_export_carries_the_fingerprints(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("run", "a", FIRST, fingerprint="of a")
        store.schedule_step("run", "b", FIRST)
        document = store.export_run("run")
        assert [each["fingerprint"] for each in document["steps"]] == ["of a", None]

        store.import_run({**document, "run_id": "copy"})

        assert bench.field("copy", "fa") == b"of a"
        assert bench.field("copy", "fb") is None
        with pytest.raises(InputMismatchError):
            store.begin_step("copy", "a", FIRST, fingerprint=True)

    @pytest.mark.parametrize("bad", [7, "", "x" * 257, "a\nb", ["x"]])
    def test_a_malformed_one_is_not_imported(self, bench: Bench, store: StepRunStore, bad: Any) -> None:
        store.schedule_step("run", "a", FIRST)
        document = store.export_run("run")
        document["steps"][0]["fingerprint"] = bad

        with pytest.raises(InvalidArgumentError, match=r"^document\['steps'\]\[0\]\['fingerprint'\]: "):
            store.import_run({**document, "run_id": "copy"})
