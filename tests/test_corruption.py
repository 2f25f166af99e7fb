"""Corrupt data raises a typed error that names the key; nothing is executed or written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import Call, CorruptRunError, NewerFormatError, StepRun, StepRunStore

# A run is in one slot, so a cluster adds nothing here.
pytestmark = pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")


def write_calls(store: StepRunStore, step_run: StepRun) -> list[Call[Any]]:
    """Returns calls of all operations that write; on a sound run each of them would write."""
    calls = store.calls
    return [
        calls.schedule_step("run", "new", {}),
        calls.schedule_steps("run", {"new": {}}),
        calls.begin_step("run", "new", {}, lease=60),
        calls.begin_steps("run", {"new": {}, "newer": {}}, lease=60),
        calls.begin_steps("run", {"new": {}, "failed": {}}, lease=60),
        calls.begin_step("run", "failed", {}, lease=60),
        calls.begin_step("run", "lapsed", {}),
        calls.begin_step("run", "lapsed", {}, max_attempts=1),
        calls.complete_step(step_run, {}),
        calls.complete_step(step_run, {}, schedule={"new": {}}),
        calls.advance_step(step_run, {}, "new", {}, lease=60),
        calls.advance_step(step_run, {}, "lapsed", {}),
        calls.fail_step(step_run, {}),
        calls.extend_claim(step_run, 60),
        calls.extend_claim(step_run, 60, progress={}),
        calls.checkpoint_step(step_run, {}),
        calls.release_step(step_run),
    ]


def calls_with_the_claim(store: StepRunStore, held: StepRun) -> list[Call[Any]]:
    """Returns calls that read the line of the step `held`, most of them with its claim."""
    calls = store.calls
    return [
        calls.begin_step("run", "held", {}),
        calls.schedule_step("run", "held", {}),
        calls.complete_step(held, {}),
        calls.complete_step(held, {}, schedule={"new": {}}),
        calls.complete_step(held.id, {}),
        calls.advance_step(held, {}, "new", {}, lease=60),
        calls.advance_step(held, {}, "lapsed", {}),
        calls.fail_step(held, {}),
        calls.extend_claim(held, 60),
        calls.checkpoint_step(held, {}),
        calls.release_step(held),
    ]


def housekeeping_calls(store: StepRunStore) -> list[Call[Any]]:
    return [store.calls.delete_pending_steps("run", ["pending"]), store.calls.expire_run("run", 60)]


def calls_on_the_run(store: StepRunStore) -> list[Call[Any]]:
    """Returns calls that read no step."""
    return [store.calls.cancel_run("run", "stop"), store.calls.resume_run("run")]


def read_calls(store: StepRunStore) -> list[Call[Any]]:
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
    """Creates a run with a step in every state; returns the claim of the running one."""
    store.schedule_step("run", "pending", {})
    store.fail_step(begun(store.begin_step("run", "failed", {})), {"reason": "declined"})
    store.complete_step(begun(store.begin_step("run", "completed", {})), {"receipt": 7})
    bench.lapse(begun(store.begin_step("run", "lapsed", {}, lease=0.01)))
    return begun(store.begin_step("run", "held", {}, lease=60))


def assert_rejected(
    bench: Bench, store: StepRunStore, calls: list[Call[Any]], error: type[Exception], key: bytes
) -> None:
    """Asserts that each call raises the error, which names the key, and writes nothing."""
    before = bench.dump()
    for call in calls:
        with pytest.raises(error, match=key.decode().replace("{", r"\{")) as caught:
            store.send(call)
        assert getattr(caught.value, "key") == key.decode(), call.script.name  # noqa: B009 -- of several types
        assert bench.dump() == before, call.script.name


class TestKeyOfAnotherType:
    def test_every_call_rejects_steps_key_of_another_type(
        self, bench: Bench, store: StepRunStore, held: StepRun
    ) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.delete(key)
        bench.backend.raw.set(key, "a string")

        calls = (
            write_calls(store, held)
            + housekeeping_calls(store)
            + calls_on_the_run(store)
            + read_calls(store)
            + [store.calls.delete_run("run")]
        )
        assert_rejected(bench, store, calls, CorruptRunError, key)

    def test_every_call_rejects_done_key_of_another_type(
        self, bench: Bench, store: StepRunStore, held: StepRun
    ) -> None:
        key = bench.keys("run")[1]
        bench.backend.raw.delete(key)
        bench.backend.raw.set(key, "a string")

        calls = (
            write_calls(store, held)
            + housekeeping_calls(store)
            + calls_on_the_run(store)
            + read_calls(store)
            + [store.calls.delete_run("run")]
        )
        assert_rejected(bench, store, calls, CorruptRunError, key)

    def test_claims_key_of_another_type_is_rejected(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[2]
        bench.backend.raw.delete(key)
        bench.backend.raw.set(key, "a string")

        calls = [call for call in write_calls(store, held) if not call.operation.startswith(("schedule", "checkpoint"))]
        assert_rejected(bench, store, [*calls, store.calls.delete_run("run")], CorruptRunError, key)
        with pytest.raises(CorruptRunError):
            store.lapsed_claims()

    def test_failed_key_of_another_type_is_rejected(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[3]
        bench.backend.raw.delete(key)
        bench.backend.raw.set(key, "a string")

        calls = [store.calls.begin_step("run", "failed", {}), store.calls.begin_step("run", "lapsed", {})]
        calls += [store.calls.begin_step("run", "lapsed", {}, max_attempts=1), store.calls.fail_step(held, {})]
        assert_rejected(bench, store, [*calls, store.calls.delete_run("run")], CorruptRunError, key)
        with pytest.raises(CorruptRunError):
            store.failed_steps()


class TestMissingKey:
    def test_every_call_rejects_a_run_without_its_done_key(
        self, bench: Bench, store: StepRunStore, held: StepRun
    ) -> None:
        bench.backend.raw.delete(bench.keys("run")[1])

        calls = write_calls(store, held) + housekeeping_calls(store) + calls_on_the_run(store) + read_calls(store)
        assert_rejected(bench, store, calls, CorruptRunError, bench.keys("run")[1])

    def test_every_call_rejects_a_run_without_its_steps_key(
        self, bench: Bench, store: StepRunStore, held: StepRun
    ) -> None:
        bench.backend.raw.delete(bench.keys("run")[0])

        calls = write_calls(store, held) + housekeeping_calls(store) + calls_on_the_run(store) + read_calls(store)
        assert_rejected(bench, store, calls, CorruptRunError, bench.keys("run")[0])

    @pytest.mark.parametrize("missing", [0, 1], ids=["steps", "done"])
    def test_delete_run_removes_a_run_with_a_missing_key(
        self, bench: Bench, store: StepRunStore, held: StepRun, missing: int
    ) -> None:
        bench.backend.raw.delete(bench.keys("run")[missing])

        assert store.delete_run("run", tombstone=0.001) is True
        assert store.get_run("run") == []


class TestInvalidLine:
    @pytest.mark.parametrize(
        "line", [b"", b"nonsense", b"1", b"1p 0 x", b"1z 1      1790000000000 1  ", b"1r one  t    1 1  "]
    )
    def test_invalid_step_line_is_rejected_but_can_be_deleted(
        self, bench: Bench, store: StepRunStore, held: StepRun, line: bytes
    ) -> None:
        key = bench.keys("run")[0]
        for step in ("held", "new", "failed", "lapsed", "pending"):
            bench.backend.raw.hset(key, f"s{step}", line)

        calls = [
            call for call in write_calls(store, held) if call.script.name != "schedule_steps" and len(call.args) < 7
        ]
        calls += [
            store.calls.get_step_run("run", "held"),
            store.calls.get_run("run"),
            store.calls.scan_steps("run"),
            store.calls.expire_run("run", 60),
        ]
        calls += [store.calls.step_statuses("run"), *housekeeping_calls(store), store.calls.attempts("run", "held")]
        assert_rejected(bench, store, calls, CorruptRunError, key)
        assert store.delete_run("run") is True

    @pytest.mark.parametrize("line", [b"", b"nonsense", b"1", b"1 x y", b"1 5 1 60000"])
    def test_invalid_run_line_is_rejected_but_can_be_deleted(
        self, bench: Bench, store: StepRunStore, held: StepRun, line: bytes
    ) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.hset(key, "r", line)

        calls = write_calls(store, held) + housekeeping_calls(store) + calls_on_the_run(store) + read_calls(store)
        assert_rejected(bench, store, calls, CorruptRunError, key)
        assert store.delete_run("run") is True

    def test_missing_run_line_is_rejected(self, bench: Bench, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "held", {}))
        key = bench.keys("run")[0]
        bench.backend.raw.hdel(key, "r")

        assert_rejected(bench, store, write_calls(store, step_run) + read_calls(store), CorruptRunError, key)

    def test_missing_payload_is_rejected(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.hdel(key, "iheld", "ocompleted")
        calls = store.calls
        broken = [calls.get_step_run("run", "held"), calls.get_step_run("run", "completed"), calls.get_run("run")]
        broken += [calls.scan_steps("run"), calls.completed_outputs("run"), calls.begin_step("run", "completed", {})]
        broken += [calls.export_run("run")]

        assert_rejected(bench, store, broken, CorruptRunError, key)

    @pytest.mark.parametrize("step", [b"gone", b"held"])
    def test_order_that_names_another_step_is_rejected(
        self, bench: Bench, store: StepRunStore, held: StepRun, step: bytes
    ) -> None:
        key, done, *_ = bench.keys("run")
        bench.backend.raw.zrem(done, "completed")
        bench.backend.raw.zadd(done, {step: 1})

        assert_rejected(bench, store, [store.calls.export_run("run")], CorruptRunError, key)

    @pytest.mark.parametrize("line", [b"1r 1  t %b %b  %b 1  ", b"1x 1  t %b %b %b %b 1  ", b"1f 1  t  %b %b %b 1  "])
    def test_times_whose_sum_is_no_date_are_rejected(
        self, bench: Bench, store: StepRunStore, held: StepRun, line: bytes
    ) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.hset(key, "sheld", line.replace(b"%b", b"9" * 14))
        calls = [store.calls.get_step_run("run", "held"), store.calls.get_run("run"), store.calls.export_run("run")]
        calls += [store.calls.begin_step("run", "held", {}), store.calls.fail_step(held.id, {})]

        assert_rejected(bench, store, calls, CorruptRunError, key)
        (summary,) = store.runs().runs
        assert "field 'sheld' is missing, or squidstep_redis did not write it" in (summary.problem or "")

    @pytest.mark.parametrize(
        "part", [1, 2, 4, 5, 7, 8], ids=["attempt", "released", "lease", "started", "created", "position"]
    )
    @pytest.mark.parametrize("digits", [14, 5_000])
    def test_number_with_too_many_digits_in_a_step_line_is_rejected(
        self, bench: Bench, store: StepRunStore, held: StepRun, part: int, digits: int
    ) -> None:
        key = bench.keys("run")[0]
        parts = bench.backend.raw.hget(key, "sheld").split(b" ")
        parts[part] = b"9" * digits
        bench.backend.raw.hset(key, "sheld", b" ".join(parts))

        assert_rejected(bench, store, calls_with_the_claim(store, held), CorruptRunError, key)

        sound = stored(store, "run", "lapsed").with_claim()
        calls = store.calls
        for group in (
            [calls.begin_step("run", "new", {}), calls.begin_step("run", "held", {})],
            [calls.extend_claim(sound, 60), calls.extend_claim(held, 60)],
            [calls.complete_step(sound, {}), calls.complete_step(held, {})],
        ):
            of_sound, of_held = store.batch(group)
            assert not isinstance(of_sound, Exception)
            assert isinstance(of_held, CorruptRunError)
        assert bench.field("run", "sheld") == b" ".join(parts)

    @pytest.mark.parametrize("digits", [14, 5_000])
    def test_number_with_too_many_digits_in_the_run_line_is_rejected(
        self, bench: Bench, store: StepRunStore, held: StepRun, digits: int
    ) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.hset(key, "r", b"1 " + b"9" * digits + b" 1")

        calls = write_calls(store, held) + housekeeping_calls(store) + calls_on_the_run(store)
        assert_rejected(bench, store, calls, CorruptRunError, key)

    @pytest.mark.parametrize("part", [3, 9, 10], ids=["token", "scheduled by", "owner"])
    def test_text_that_is_not_utf8_in_a_step_line_is_reported(
        self, bench: Bench, store: StepRunStore, held: StepRun, part: int
    ) -> None:
        raw, keys = bench.backend.raw, bench.keys("run")[:3]
        parts = raw.hget(keys[0], "sheld").split(b" ")
        parts[part] = b"\xff"
        raw.hset(keys[0], "sheld", b" ".join(parts))
        before = {key: raw.dump(key) for key in keys}
        for call in calls_with_the_claim(store, held):
            reply, read = store.batch([call, store.calls.get_step_run("run", "held")])
            error = read if call.script.name == "advance_step" else reply  # whose reply is about the next step
            assert isinstance(error, CorruptRunError), call.script.name
            assert "field 'sheld'" in str(error)
            for key in keys:  # scripts do not check text, so the call may have written
                raw.restore(key, 0, before[key], replace=True)

    def test_largest_times_of_a_line_are_dates(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        line = b"1f 1  t %b %b %b %b 1  ".replace(b"%b", b"9" * 13)
        bench.backend.raw.hset(bench.keys("run")[0], "sheld", line)

        read = stored(store, "run", "held")
        assert read.retry_at == read.ended_at
        assert store.begin_step("run", "held", {}).delayed
        assert store.export_run("run")["steps"]

    def test_attempt_without_a_beginning_is_rejected(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.hset(key, "sheld", b"1r 1  t    1790000000000 1  ")

        assert_rejected(bench, store, [store.calls.attempts("run", "held")], CorruptRunError, key)

    def test_field_of_an_attempt_beyond_any_number_is_ignored(
        self, bench: Bench, store: StepRunStore, held: StepRun
    ) -> None:
        bench.backend.raw.hset(bench.keys("run")[0], "a" + "9" * 5_000 + ":held", b"nonsense")

        assert [step["history"] for step in store.export_run("run")["steps"]] == [[]] * 5


class TestInvalidStepName:
    def test_step_in_the_order_that_is_not_utf8_is_reported(
        self, bench: Bench, store: StepRunStore, held: StepRun
    ) -> None:
        key = bench.keys("run")[1]
        bench.backend.raw.delete(key)
        bench.backend.raw.zadd(key, {b"\xff": 1})

        assert_rejected(
            bench, store, [store.calls.completed_steps("run"), store.calls.export_run("run")], CorruptRunError, key
        )

    @pytest.mark.parametrize("field", [b"s", b"s\xff"])
    def test_record_whose_step_is_not_utf8_is_reported(
        self, bench: Bench, store: StepRunStore, held: StepRun, field: bytes
    ) -> None:
        key = bench.keys("run")[0]
        line = bench.field("run", "sheld")
        assert line is not None
        bench.backend.raw.hset(key, mapping={field: line, b"i" + field[1:]: b"\x80"})
        calls = store.calls

        broken = [calls.get_run("run"), calls.scan_steps("run"), calls.step_statuses("run"), calls.export_run("run")]
        assert_rejected(bench, store, broken, CorruptRunError, key)
        with pytest.raises(CorruptRunError):
            store.retry_run("run")

    def test_run_with_an_invalid_step_name_hides_no_other_run(
        self, bench: Bench, store: StepRunStore, held: StepRun
    ) -> None:
        bench.backend.raw.hset(bench.keys("run")[0], b"s\xff", bench.field("run", "sheld"))
        store.complete_step(begun(store.begin_step("sound", "pay", {})), {})
        bench.lapse(begun(store.begin_step("timer", "pay", {}, lease=0.005)))  # the server's clock moves on

        problems = {summary.run_id: summary.problem for summary in store.runs().runs}

        assert problems.pop("run") is not None
        assert set(problems.values()) == {None}
        assert [summary.run_id for summary in store.purge(0.001)] == ["sound"]


class TestNewerFormat:
    """A record in a newer format raises an error; records in the known format still work."""

    def test_step_in_a_newer_format_is_rejected(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
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

    def test_run_in_a_newer_format_is_rejected(self, bench: Bench, store: StepRunStore, held: StepRun) -> None:
        key = bench.keys("run")[0]
        bench.backend.raw.hset(key, "r", b"2 5 1 and more")

        calls = write_calls(store, held) + housekeeping_calls(store) + calls_on_the_run(store) + read_calls(store)
        assert_rejected(bench, store, calls, NewerFormatError, key)
