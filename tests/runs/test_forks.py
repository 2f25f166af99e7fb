"""`fork_run`: a new run with the completed steps of another one, which stays as it is."""

from __future__ import annotations

import asyncio
import enum
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.backends import Bench
from support.internals import plain_store
from support.records import begun, in_batch

from squidstep_redis import (
    CorruptRunError,
    Event,
    InvalidArgumentError,
    MsgpackCodec,
    NewerFormatError,
    RunDeletedError,
    RunExistsError,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
    UndecodablePayloadError,
)

FIELDS = (
    *("status", "attempt", "attempts_used", "owner", "input", "output", "last_error", "current_token"),
    *("created_at", "started_at", "ended_at", "lease_ends_at", "retry_at", "final"),
)
PREPARED = ["ship ☃", "3:charge", "reserve", "charge"]  # in completion order


class Step(enum.Enum):
    CHARGE = "3:charge"


class CompressingCodec:
    def encode(self, payload: dict[str, Any]) -> bytes:
        return zlib.compress(MsgpackCodec().encode(payload))

    def decode(self, data: bytes) -> dict[str, Any]:
        return MsgpackCodec().decode(zlib.decompress(data))


def complete(store: StepRunStore, run: str, step: str, output: dict[str, Any] | None = None) -> StepRun:
    return store.complete_step(begun(store.begin_step(run, step, {"of": step}, lease=60, owner="w")), output or {})


def prepare(store: StepRunStore, run: str = "run") -> StepRun:
    """Creates a run with a step in every state; returns the claim of the running one. One step looks like a history."""
    store.schedule_steps(run, {"charge": {"amount": 42}, "pending": {}, "deleted": {}, "reserve": {}})
    store.delete_pending_steps(run, ["deleted"])
    complete(store, run, "ship ☃", {"parcel": b"\0"})
    for number in range(11):
        store.fail_step(begun(store.begin_step(run, "3:charge", {}, owner="x y")), {"number": number})
    complete(store, run, "3:charge", {"charged": 3})
    store.release_step(begun(store.begin_step(run, "reserve", {})))
    complete(store, run, "reserve", {"reserved": 1})
    store.fail_step(begun(store.begin_step(run, "failed", {})), {})
    complete(store, run, "charge", {"charged": 42})
    begun(store.begin_step(run, "unleased", {}))
    return begun(store.begin_step(run, "running", {}, lease=60))


def seen(store: StepRunStore, run: str, steps: list[str]) -> dict[str, Any]:
    """Returns everything about these steps that a fork keeps."""
    step_runs = {each.step: each for each in store.get_run(run)}
    attempts = {step: store.attempts(run, step) for step in steps}
    return {step: ([getattr(step_runs[step], name) for name in FIELDS], attempts[step]) for step in steps}


class TestForked:
    def test_fork_has_the_completed_steps_of_the_original(self, bench: Bench, store: StepRunStore) -> None:
        prepare(store)
        before = bench.dump()

        assert store.fork_run("run", "new") == PREPARED

        assert store.completed_steps("new") == PREPARED
        assert seen(store, "new", PREPARED) == seen(store, "run", PREPARED)
        assert store.completed_outputs("new") == store.completed_outputs("run")
        assert set(store.step_statuses("new").values()) == {"completed"}
        assert len(store.attempts("new", "3:charge")) == 9
        assert {key: value for key, value in bench.dump().items() if key in before} == before
        assert bench.backend.raw.zrange(bench.keys("new")[1], 0, -1, withscores=True) == [
            (step.encode(), float(position)) for position, step in enumerate(PREPARED, 1)
        ]

    def test_positions_of_a_fork_start_at_one(self, store: StepRunStore) -> None:
        prepare(store)
        store.fork_run("run", "new")

        created = [each.step for each in store.get_run("run") if each.step in PREPARED]
        assert [each.step for each in store.get_run("new")] == created
        assert [each.position for each in store.get_run("new")] == [1, 2, 3, 4]
        assert begun(store.begin_step("new", "pending", {})).position == 5
        assert [page.counts["completed"] for page in store.runs(run_id_prefix="new").runs] == [4]

    @pytest.mark.parametrize(
        ("choice", "copied"),
        [
            ({"through": "ship ☃"}, PREPARED[:1]),
            ({"through": Step.CHARGE}, PREPARED[:2]),
            ({"through": "charge"}, PREPARED),
            ({"steps": ["charge", "ship ☃"]}, ["ship ☃", "charge"]),
            ({"steps": {Step.CHARGE}}, ["3:charge"]),
            ({"steps": ("charge",)}, ["charge"]),
        ],
    )
    def test_chosen_steps_are_copied_in_completion_order(
        self, store: StepRunStore, choice: dict[str, Any], copied: list[str]
    ) -> None:
        prepare(store)

        assert store.fork_run("run", "new", **choice) == copied

        assert store.completed_steps("new") == copied
        assert seen(store, "new", copied) == seen(store, "run", copied)

    def test_dry_run_returns_the_same_and_writes_nothing(self, bench: Bench, store: StepRunStore) -> None:
        prepare(store)
        before = bench.dump()
        assert store.fork_run("run", "new", through="reserve", dry_run=True) == PREPARED[:3]
        assert bench.dump() == before

    def test_forked_run_continues_where_it_was_forked(self, store: StepRunStore) -> None:
        claim = prepare(store)
        store.fork_run("run", "new", through="3:charge")

        skipped = store.begin_step("new", "3:charge", {})
        assert (skipped.reason, skipped.step_run.output) == ("completed", {"charged": 3})
        assert store.begin_step("new", "running", {"other": 1}).step_run.input == {"other": 1}
        complete(store, "new", "failed")
        assert store.completed_steps("new") == ["ship ☃", "3:charge", "failed"]
        store.complete_step(claim, {"by": "the holder of the original"})
        assert store.step_statuses("new")["running"] == "running"
        assert store.completed_steps("run")[-1] == "running"

    def test_repeated_completion_is_recognized_in_the_fork(self, store: StepRunStore) -> None:
        prepare(store)
        store.fork_run("run", "new")
        copy = next(each for each in store.get_run("new") if each.step == "charge")

        assert store.complete_step(copy.id, {"charged": 42}).output == {"charged": 42}
        with pytest.raises(StaleStepRunError):
            store.complete_step(copy.id, {"charged": 43})
        assert store.completed_steps("new") == PREPARED

    def test_fork_can_be_forked_and_exported(self, bench: Bench, store: StepRunStore) -> None:
        prepare(store)
        store.fork_run("run", "new", through="reserve")
        store.fork_run("new", "newer", steps=["reserve", "ship ☃"])
        other = bench.store(prefix=f"{bench.prefix}-other")

        other.import_run(store.export_run("newer"))

        copied = ["ship ☃", "reserve"]
        assert other.completed_steps("newer") == copied
        assert seen(other, "newer", copied) == seen(store, "run", copied)

    def test_payloads_that_cannot_be_decoded_are_copied_unchanged(self, bench: Bench, store: StepRunStore) -> None:
        other = bench.store(codec=CompressingCodec())
        prepare(other)

        bench.store(max_payload_bytes=1).fork_run("run", "new")

        assert seen(other, "new", PREPARED) == seen(other, "run", PREPARED)
        with pytest.raises(UndecodablePayloadError):
            _ = store.get_run("new")[0].input

    def test_all_fields_of_a_step_except_waiter_marks_are_copied(self, bench: Bench, store: StepRunStore) -> None:
        complete(store, "run", "a")
        complete(store, "run", "1:a")
        complete(store, "run", "not chosen")
        fields = {"wa": "1", "fa": "a fingerprint", "c": "of the run", "m": "of an import", "fno": "of no step"}
        bench.backend.raw.hset(bench.keys("run")[0], mapping=fields)

        store.fork_run("run", "new", steps=["a", "1:a"])

        copied = set(bench.backend.raw.hkeys(bench.keys("new")[0]))
        assert copied == {b"r", b"m", b"fa", *(kind + step for kind in (b"s", b"i", b"o") for step in (b"a", b"1:a"))}
        assert bench.field("new", "fa") == b"a fingerprint"
        assert bench.field("new", "m") != b"of an import"

    def test_fork_expires_by_the_ttl_of_its_store(self, bench: Bench) -> None:
        prepare(bench.store(run_ttl=100))  # a claim without a lease is live, so the original does not expire
        bench.store().fork_run("run", "kept")
        bench.store(run_ttl=200).fork_run("run", "new")

        def ttls(run: str) -> list[int]:
            return [bench.backend.raw.ttl(key) for key in bench.keys(run)[:2]]

        assert ttls("kept") == [-1, -1]
        assert all(190 < ttl <= 200 for ttl in ttls("new"))
        claim = begun(bench.store().begin_step("new", "more", {}))
        assert ttls("new") == [-1, -1]
        bench.store().complete_step(claim, {})
        assert all(190 < ttl <= 200 for ttl in ttls("new"))

    @pytest.mark.slow
    def test_run_of_2100_steps_is_forked_completely(self, store: StepRunStore) -> None:
        steps = [f"step-{number}" for number in range(2_100)]
        claims = in_batch(store, [store.calls.begin_step("run", step, {}) for step in steps])
        store.batch([store.calls.complete_step(claim.step_run, {}) for claim in reversed(claims)])

        assert store.fork_run("run", "new", through="step-50") == steps[:49:-1]

        assert store.completed_steps("new") == steps[:49:-1]
        assert list(store.step_statuses("new")) == steps[50:]

    def test_fork_emits_one_event_about_the_new_run(self, store: StepRunStore) -> None:
        complete(store, "run", "a")
        events: list[Event] = []
        store.on_event(events.append)

        store.fork_run("run", "new", dry_run=True)
        store.fork_run("run", "new")
        with pytest.raises(RunExistsError):
            store.fork_run("run", "new")

        assert [(event.kind, event.operation, event.run_id, event.reason) for event in events] == [
            ("fork", "fork_run", "new", None),
            ("error", "fork_run", "new", "RunExistsError"),
        ]


class TestRefused:
    @pytest.mark.parametrize("dry_run", [False, True])
    @pytest.mark.parametrize(
        ("choice", "error", "message"),
        [
            ({"steps": ["charge", "pending"]}, StaleStepRunError, "step 'pending': .* is pending, not completed"),
            ({"steps": ["running"]}, StaleStepRunError, "is running, not completed"),
            ({"through": "failed"}, StaleStepRunError, "is failed, not completed"),
            ({"steps": ["charge", "none"]}, StepRunNotFoundError, "step 'none': there is no such step run"),
            ({"through": "none"}, StepRunNotFoundError, "step 'none': there is no such step run"),
        ],
    )
    def test_step_that_is_not_completed_is_refused(
        self,
        bench: Bench,
        store: StepRunStore,
        choice: dict[str, Any],
        error: type[Exception],
        message: str,
        dry_run: bool,
    ) -> None:
        prepare(store)
        before = bench.dump()

        with pytest.raises(error, match=f"{message}.*[Nn]othing was written") as caught:
            store.fork_run("run", "new", **choice, dry_run=dry_run)

        if isinstance(caught.value, StaleStepRunError):
            assert caught.value.current == store.get_step_run("run", caught.value.current.step)
        assert bench.dump() == before

    def test_missing_run_and_run_without_completed_steps_are_refused(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_step("pending", "a", {})
        before = bench.dump()
        with pytest.raises(StepRunNotFoundError, match="run 'none': there is no such run; nothing was written"):
            store.fork_run("none", "new")
        with pytest.raises(StepRunNotFoundError, match="run 'pending': no step of it is completed"):
            store.fork_run("pending", "new")
        assert bench.dump() == before

    def test_existing_run_is_not_overwritten(self, bench: Bench, store: StepRunStore) -> None:
        complete(store, "run", "a")
        store.schedule_step("new", "b", {})
        before = bench.dump()
        for dry_run in (False, True):
            with pytest.raises(RunExistsError, match="run 'new': already exists"):
                store.fork_run("run", "new", dry_run=dry_run)
        assert bench.dump() == before

    @pytest.mark.parametrize("deleted", ["run", "new"])
    def test_deleted_runs_are_refused(self, bench: Bench, store: StepRunStore, deleted: str) -> None:
        for run in ("run", "new"):
            complete(store, run, "a")
        store.delete_run("new", tombstone=3_600 if deleted == "new" else 0.001)
        if deleted == "run":
            bench.backend.raw.delete(bench.keys("new")[0])
            store.delete_run("run")
        before = bench.dump()
        for dry_run in (True, False):
            with pytest.raises(RunDeletedError, match=f"run {deleted!r}: was deleted recently; nothing was written"):
                store.fork_run("run", "new", dry_run=dry_run)
        assert bench.dump() == before

    @pytest.mark.servers("fakeredis")
    @pytest.mark.parametrize(
        ("args", "choice", "argument"),
        [
            (("", "new"), {}, "run_id"),
            (("run", ""), {}, "new_run_id"),
            (("run", None), {}, "new_run_id"),
            (("run", "run"), {}, "new_run_id"),
            (("run", "new"), {"steps": ["a"], "through": "a"}, "through"),
            (("run", "new"), {"steps": []}, "steps"),
            (("run", "new"), {"steps": "a"}, "steps"),
            (("run", "new"), {"steps": {"a": {}}}, "steps"),
            (("run", "new"), {"steps": 7}, "steps"),
            (("run", "new"), {"steps": ["a", "a"]}, "steps"),
            (("run", "new"), {"steps": ["a", ""]}, "steps[1]"),
            (("run", "new"), {"through": ""}, "through"),
            (("run", "new"), {"through": ["a"]}, "through"),
        ],
    )
    def test_invalid_argument_is_rejected_before_anything_is_sent(
        self, store: StepRunStore, args: tuple[Any, Any], choice: dict[str, Any], argument: str
    ) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            store.calls.fork_run(*args, **choice)  # not run: an operation rejects its arguments at once
        assert caught.value.argument == argument

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            (lambda raw, steps, done: raw.hset(steps, "sa", "1c 1"), CorruptRunError),
            (lambda raw, steps, done: raw.hset(steps, "sa", "2c 1"), NewerFormatError),
            (lambda raw, steps, done: raw.hset(steps, "sa", raw.hget(steps, "sb")), CorruptRunError),
            (lambda raw, steps, done: raw.hset(steps, "a1:a", "nonsense\n"), CorruptRunError),
            (lambda raw, steps, done: raw.hdel(steps, "ia"), CorruptRunError),
            (lambda raw, steps, done: raw.hdel(steps, "oa"), CorruptRunError),
            (lambda raw, steps, done: raw.hdel(steps, "sa"), CorruptRunError),
            (lambda raw, steps, done: raw.delete(done), CorruptRunError),
            (lambda raw, steps, done: (raw.zrem(done, "a"), raw.zadd(done, {b"\xff": 1})), CorruptRunError),
            (lambda raw, steps, done: (raw.zrem(done, "a"), raw.zadd(done, {"b": 1})), CorruptRunError),
        ],
    )
    def test_corrupt_run_is_refused(
        self, bench: Bench, store: StepRunStore, change: Callable[..., object], error: type[Exception]
    ) -> None:
        complete(store, "run", "a")
        store.schedule_step("run", "b", {})
        change(bench.backend.raw, *bench.keys("run")[:2])
        before = bench.dump()

        with pytest.raises(error):
            store.fork_run("run", "new")

        assert bench.dump() == before

    def test_corrupt_step_that_is_not_chosen_is_ignored(self, bench: Bench, store: StepRunStore) -> None:
        for step in ("a", "b"):
            complete(store, "run", step)
        bench.backend.raw.hset(bench.keys("run")[0], "sb", "nonsense")

        assert store.fork_run("run", "new", through="a") == ["a"]
        with pytest.raises(CorruptRunError, match="'sb'"):
            store.fork_run("run", "newer", steps=["b"])


class TestSentAgain:
    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_fork_whose_replies_are_lost_takes_effect_once(self, bench: Bench, lost_replies: int) -> None:
        prepare(bench.store())

        assert bench.store(lost_replies=lost_replies).fork_run("run", "new") == PREPARED

        assert bench.store().completed_steps("new") == PREPARED
        with pytest.raises(RunExistsError):
            bench.store().fork_run("run", "new")

    def test_one_of_several_forks_at_once_creates_the_run(self, bench: Bench, store: StepRunStore) -> None:
        prepare(store)
        choices = [["charge"], ["reserve"], ["3:charge"], ["ship ☃"]]
        plain = plain_store(store)

        async def at_once() -> list[Any]:
            forks = [plain.fork_run("run", "new", steps=steps) for steps in choices]
            return await asyncio.gather(*forks, return_exceptions=True)

        def fork(steps: list[str]) -> Any:
            try:
                return plain.fork_run("run", "new", steps=steps)
            except RunExistsError as error:
                return error

        if bench.runner is not None:
            results = bench.runner.run(at_once())
        else:
            with ThreadPoolExecutor(4) as threads:
                results = list(threads.map(fork, choices))

        (created,) = (result for result in results if isinstance(result, list))
        assert [type(result) for result in results].count(RunExistsError) == 3
        assert store.completed_steps("new") == created
        assert set(store.step_statuses("new")) == set(created)
