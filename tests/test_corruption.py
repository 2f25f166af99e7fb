"""What cannot be trusted is refused by a typed error that names the key, is never executed, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import Call, CorruptRunError, NewerFormatError, StepRun, StepRunStore

# A run lies in one slot, so a cluster adds nothing here.
pytestmark = pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")


def writes(store: StepRunStore, step_run: StepRun) -> list[Call[Any]]:
    """Every write, with arguments that would make it write."""
    calls = store.calls
    return [
        calls.schedule_step("run", "new", {}),
        calls.schedule_steps("run", {"new": {}}),
        calls.begin_step("run", "new", {}, lease=60),
        calls.begin_step("run", "failed", {}, lease=60),
        calls.begin_step("run", "lapsed", {}),
        calls.begin_step("run", "lapsed", {}, max_attempts=1),
        calls.complete_step(step_run, {}),
        calls.complete_step(step_run, {}, schedule={"new": {}}),
        calls.advance_step(step_run, {}, "new", {}, lease=60),
        calls.advance_step(step_run, {}, "lapsed", {}),
        calls.fail_step(step_run, {}),
        calls.extend_claim(step_run, 60),
        calls.release_step(step_run),
    ]


def housekeeping(store: StepRunStore) -> list[Call[Any]]:
    return [store.calls.delete_pending_steps("run", ["pending"]), store.calls.expire_run("run", 60)]


def reads(store: StepRunStore) -> list[Call[Any]]:
    calls = store.calls
    return [
        calls.get_step_run("run", "held"),
        calls.get_run("run"),
        calls.scan_steps("run"),
        calls.attempts("run", "held"),
        calls.completed_steps("run"),
        calls.completed_outputs("run"),
        calls.step_statuses("run"),
        calls.export_run("run"),
    ]


@pytest.fixture
def held(bench: Bench, store: StepRunStore) -> StepRun:
    """A run with a step in every state; the one that is held."""
    store.schedule_step("run", "pending", {})
    store.fail_step(begun(store.begin_step("run", "failed", {})), {"reason": "declined"})
    store.complete_step(begun(store.begin_step("run", "completed", {})), {"receipt": 7})
    bench.lapse(begun(store.begin_step("run", "lapsed", {}, lease=0.01)))
    return begun(store.begin_step("run", "held", {}, lease=60))


def assert_refused(
    bench: Bench, store: StepRunStore, calls: list[Call[Any]], error: type[Exception], key: bytes
) -> None:
    before = bench.dump()
    for call in calls:
        with pytest.raises(error, match=key.decode().replace("{", r"\{")) as caught:
            store.send(call)
        assert getattr(caught.value, "key") == key.decode(), call.script.name  # noqa: B009 -- of several types
        assert bench.dump() == before, call.script.name


class TestAKeyOfAnotherType:
    def test_steps(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.delete(key)
        bench.backend.raw.set(key, "a string")

        calls = writes(store, held) + housekeeping(store) + reads(store) + [store.calls.delete_run("run")]
        assert_refused(bench, store, calls, CorruptRunError, key)

    def test_done(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[1]
        bench.backend.raw.delete(key)
        bench.backend.raw.set(key, "a string")

        calls = writes(store, held) + housekeeping(store) + reads(store) + [store.calls.delete_run("run")]
        assert_refused(bench, store, calls, CorruptRunError, key)

    def test_claims(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[2]
        bench.backend.raw.delete(key)
        bench.backend.raw.set(key, "a string")

        calls = [call for call in writes(store, held) if not call.script.name.startswith("schedule")]
        assert_refused(bench, store, [*calls, store.calls.delete_run("run")], CorruptRunError, key)
        with pytest.raises(CorruptRunError):
            store.lapsed_claims()

    def test_failed(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[3]
        bench.backend.raw.delete(key)
        bench.backend.raw.set(key, "a string")

        calls = [store.calls.begin_step("run", "failed", {}), store.calls.begin_step("run", "lapsed", {})]
        calls += [store.calls.begin_step("run", "lapsed", {}, max_attempts=1), store.calls.fail_step(held, {})]
        assert_refused(bench, store, [*calls, store.calls.delete_run("run")], CorruptRunError, key)
        with pytest.raises(CorruptRunError):
            store.failed_steps()


class TestARunOfWhichOneKeyIsGone:
    def test_done_evicted(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        bench.backend.raw.delete(bench.keys("run")[1])

        calls = writes(store, held) + housekeeping(store) + reads(store)
        assert_refused(bench, store, calls, CorruptRunError, bench.keys("run")[1])

    def test_steps_evicted(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        bench.backend.raw.delete(bench.keys("run")[0])

        calls = writes(store, held) + housekeeping(store) + reads(store)
        assert_refused(bench, store, calls, CorruptRunError, bench.keys("run")[0])

    @pytest.mark.parametrize("evicted", [0, 1])
    def test_delete_run_is_the_cure(self, bench: Bench, store: StepRunStore, held: StepRun, evicted: int) -> None:
        bench.backend.raw.delete(bench.keys("run")[evicted])

        assert store.delete_run("run", tombstone=0.001) is True
        assert store.get_run("run") == []


class TestALineThatDoesNotParse:
    @pytest.mark.parametrize(
        "line", [b"", b"nonsense", b"1", b"1p 0 x", b"1z 1      1790000000000 1  ", b"1r one  t    1 1  "]
    )
    def test_of_a_step(self, bench: Bench, store: StepRunStore, held: StepRun, line: bytes) -> None:
        key = bench.keys("run")[0]
        for step in ("held", "new", "failed", "lapsed", "pending"):
            bench.backend.raw.hset(key, f"s{step}", line)

        calls = [call for call in writes(store, held) if call.script.name != "schedule_steps" and len(call.args) < 7]
        calls += [
            store.calls.get_step_run("run", "held"),
            store.calls.get_run("run"),
            store.calls.scan_steps("run"),
            store.calls.expire_run("run", 60),
        ]
        calls += [store.calls.step_statuses("run"), *housekeeping(store), store.calls.attempts("run", "held")]
        assert_refused(bench, store, calls, CorruptRunError, key)
        assert store.delete_run("run") is True

    @pytest.mark.parametrize("line", [b"", b"nonsense", b"1", b"1 x y", b"1 5 1 60000"])
    def test_of_the_run(self, bench: Bench, store: StepRunStore, held: StepRun, line: bytes) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.hset(key, "r", line)

        calls = writes(store, held) + housekeeping(store) + reads(store)
        assert_refused(bench, store, calls, CorruptRunError, key)
        assert store.delete_run("run") is True

    def test_no_line_of_the_run(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "held", {}))
        key = bench.keys("run")[0]
        bench.backend.raw.hdel(key, "r")

        assert_refused(bench, store, writes(store, step_run) + reads(store), CorruptRunError, key)

    def test_a_payload_is_missing(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.hdel(key, "iheld", "ocompleted")
        calls = store.calls
        broken = [calls.get_step_run("run", "held"), calls.get_step_run("run", "completed"), calls.get_run("run")]
        broken += [calls.scan_steps("run"), calls.completed_outputs("run"), calls.begin_step("run", "completed", {})]

        assert_refused(bench, store, broken, CorruptRunError, key)


class TestAStepNameThatIsNotUTF8:
    def test_in_the_completion_order(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[1]
        bench.backend.raw.delete(key)
        bench.backend.raw.zadd(key, {b"\xff": 1})

        assert_refused(
            bench, store, [store.calls.completed_steps("run"), store.calls.export_run("run")], CorruptRunError, key
        )

    @pytest.mark.parametrize("field", [b"s", b"s\xff"])
    def test_among_the_records(self, bench: Bench, store: StepRunStore, held: StepRun, field: bytes) -> None:
        key = bench.keys("run")[0]
        line = bench.field("run", "sheld")
        assert line is not None
        bench.backend.raw.hset(key, mapping={field: line, b"i" + field[1:]: b"\x80"})
        calls = store.calls

        broken = [calls.get_run("run"), calls.scan_steps("run"), calls.step_statuses("run"), calls.export_run("run")]
        assert_refused(bench, store, broken, CorruptRunError, key)
        with pytest.raises(CorruptRunError):
            store.retry_run("run")

    def test_hides_no_other_run_from_a_listing(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        bench.backend.raw.hset(bench.keys("run")[0], b"s\xff", bench.field("run", "sheld"))
        store.complete_step(begun(store.begin_step("sound", "pay", {})), {})
        bench.lapse(begun(store.begin_step("timer", "pay", {}, lease=0.005)))  # the server's clock moves on

        problems = {summary.run_id: summary.problem for summary in store.runs().runs}

        assert problems.pop("run") is not None
        assert set(problems.values()) == {None}
        assert [summary.run_id for summary in store.purge(0.001)] == ["sound"]


class TestALaterFormat:
    """A record written by a newer format is an error, never a guess; what both know works side by side."""

    def test_of_a_step(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[0]
        line = bench.field("run", "sheld")
        assert line is not None
        bench.backend.raw.hset(key, "sheld", b"2" + line[1:] + b" and more")

        broken: list[Callable[[], object]] = [
            lambda: store.begin_step("run", "held", {}),
            lambda: store.schedule_step("run", "held", {}),
            lambda: store.complete_step(held, {}),
            lambda: store.get_step_run("run", "held"),
            lambda: store.get_run("run"),
            lambda: store.step_statuses("run"),
        ]
        before = bench.dump()
        for call in broken:
            with pytest.raises(NewerFormatError, match=r"format 2.*upgrade this process"):
                call()
        assert bench.dump() == before
        assert stored(store, "run", "completed").output == {"receipt": 7}
        assert begun(store.begin_step("run", "failed", {})).attempt == 2

    def test_of_a_run(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.hset(key, "r", b"2 5 1 and more")

        calls = writes(store, held) + housekeeping(store) + reads(store)
        assert_refused(bench, store, calls, NewerFormatError, key)
