"""Run ids and steps: distinct pairs are distinct records, whatever their characters; invalid names are rejected."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from redis.crc import key_slot
from support.backends import Bench, offline_store
from support.records import begun, in_batch, stored

from squidstep_redis import InvalidArgumentError, NotSentError, StepRun, StepRunStore, StepStatus
from squidstep_redis.ids import parse_step_run_id, step_run_id
from squidstep_redis.protocol.keys import Keys


@pytest.fixture
def offline() -> Iterator[StepRunStore]:
    """A store without a server: every send raises NotSentError."""
    with offline_store() as store:
        yield store


# Names that a careless key layout would confuse with a hash tag, a separator, or another key or field.
HOSTILE = [
    *("{", "}", "{}", "{0}", "a{b}c", "}{", "squidstep:{0}:claims", "claims", "failed", ":", "::", ":steps", ":done"),
    *("a:steps", "a:done", "r", "s", "i", "o", "e", "a", "x", "1x", "s:steps", "1:x", "a1:x", "11:x", "3:abc", "1"),
    *(" ", "  ", "a b", " a", "a ", "\t", "\n", "a\nb", "\r\n", "\0", "a\0", "\0a", "\x1f", "\x7f", "\x85", "\xa0"),
    *("é", "e\u0301", "A", "\u0410", "\uff21", "ß", "ss", "\ufb01", "fi", "\u200b", "\ufeff", "\u202e", "\u2028"),
    *("😀", "👩\u200d👧", "\U0010ffff", "\ufffd", "*", "?", "[a]", "\\", "%s", "$1", "'", '"', "-1", "nil", "null"),
    *("x" * 512, "x" * 511, "é" * 256, "😀" * 128, "{" * 512, ":" * 512, "\0" * 512),
]

names = st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=40) | st.text("{}:a1\n\0 é", min_size=1, max_size=6)


@st.composite
def split_names(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Splits one string into run id and step in every possible way: ("a", "bc"), ("ab", "c")."""
    text = draw(st.text("ab:{}1 \0é", min_size=3, max_size=6) | st.just(":steps") | st.just("1:x1:x"))
    return [(text[:end], text[end:]) for end in range(1, len(text))]


pairs = split_names() | st.lists(st.tuples(names, names), min_size=2, max_size=5, unique=True)


class TestDistinctPairs:
    @pytest.mark.slow
    @pytest.mark.not_on("fakeredis")  # it has the same keys, and takes seconds
    def test_distinct_pairs_have_distinct_records(self, bench: Bench, store: StepRunStore) -> None:
        """All steps are begun, failed and begun again before any is completed, so that any overlap shows."""

        @settings(max_examples=settings.default.max_examples // 5)
        @given(pairs=pairs)
        @example(
            pairs=[("a", "bc"), ("ab", "c"), ("abc", "r"), ("a", ":steps"), ("a", "1:x"), ("a", "x"), ("a:steps", "x")]
        )
        @example(pairs=list(zip(HOSTILE, HOSTILE, strict=True)))
        @example(pairs=[("run", name) for name in HOSTILE])
        @example(pairs=[(name, "step") for name in HOSTILE])
        def check(pairs: list[tuple[str, str]]) -> None:
            for key in bench.backend.keys(bench.prefix):
                bench.backend.raw.delete(key)
            calls = store.calls
            for turn in ("first", "second"):
                begins = [calls.begin_step(*pair, {turn: pair}, lease=60, owner=turn) for pair in pairs]
                claims = [begun(result) for result in in_batch(store, begins)]
                if turn == "first":
                    in_batch(store, [calls.fail_step(claim.id, {"of": claim.step}) for claim in claims])
            assert len({claim.id for claim in claims}) == len(pairs)
            in_batch(store, [calls.complete_step(claim.id, {"of": [claim.run_id, claim.step]}) for claim in claims])

            for (run, step), found in zip(pairs, in_batch(store, [calls.get_step_run(*p) for p in pairs]), strict=True):
                assert (found.run_id, found.step, found.status, found.attempt) == (run, step, "completed", 2)
                assert (found.input, found.output) == ({"second": [run, step]}, {"of": [run, step]})
            by_run = {run: [step for other, step in pairs if other == run] for run, _ in pairs}
            for run, steps in by_run.items():
                assert store.completed_steps(run) == steps
                assert list(store.step_statuses(run)) == steps
                assert [each.step for each in store.get_run(run)] == steps
                assert sorted(each.step for each in store.scan_steps(run, limit=1_000).step_runs) == sorted(steps)
            for run, step in pairs[:5]:
                assert [(each.number, each.error) for each in store.attempts(run, step)] == [
                    (1, {"of": step}),
                    (2, None),
                ]

        check()

    def test_indexes_distinguish_pairs_of_the_same_concatenation(self, bench: Bench, store: StepRunStore) -> None:
        pairs = [("a", "bc"), ("ab", "c"), ("run", "\0"), ("{", "}"), ("é" * 256, "1:x"), ("1:x", "😀" * 128)]
        for pair in pairs:
            store.fail_step(begun(store.begin_step(*pair, {})), {"of": pair})

        store.complete_step(begun(store.begin_step(*pairs[0], {})), {})

        assert {(each.run_id, each.step) for each in store.failed_steps()} == set(pairs[1:])

    @given(runs=st.lists(names, min_size=2, unique=True), prefix=st.sampled_from(["squidstep", ":", "a:b", "é", "\0"]))
    def test_keys_of_a_run_are_unique_and_in_one_slot(self, runs: list[str], prefix: str) -> None:
        keys = Keys(prefix.encode())

        for run in runs:
            assert len({key_slot(key) for key in keys.run(run).keys}) == 1
        own = [key for run in runs for key in keys.run(run).keys[:2]]
        assert len(set(own)) == len(own)
        assert not set(own) & {*keys.claims(), *keys.failed()}


class TestStepRunId:
    @given(pairs=pairs)
    def test_id_can_be_parsed_into_run_and_step(self, pairs: list[tuple[str, str]]) -> None:
        ids = [step_run_id("squidstep", *pair) for pair in pairs]

        assert [parse_step_run_id("squidstep", id) for id in ids] == pairs
        assert len(set(ids)) == len(ids)
        assert all(id.isascii() and id.replace("-", "").replace("_", "").isalnum() for id in ids)

    def test_id_stays_the_same_from_schedule_to_completion(self, store: StepRunStore) -> None:
        scheduled = store.schedule_step("run", "pay", {}).step_run
        claim = begun(store.begin_step("run", "pay", {}))
        released = store.release_step(claim)
        completed = store.complete_step(begun(store.begin_step("run", "pay", {})), {})

        assert len({step_run.id for step_run in (scheduled, claim, released, completed, stored(store))}) == 1

    @given(pair=st.tuples(names, names), prefix=st.sampled_from(["other", "squidste", "squidstep2", ":", "\0"]))
    def test_id_of_another_prefix_is_rejected(self, pair: tuple[str, str], prefix: str) -> None:
        with offline_store() as store:
            for end in endings(store, step_run_id(prefix, *pair)):
                with pytest.raises(
                    InvalidArgumentError, match="not the id of a step run of prefix 'squidstep'"
                ) as caught:
                    end()
                assert caught.value.argument == "step_run"

    def test_step_run_of_another_prefix_is_rejected(self, bench: Bench, store: StepRunStore) -> None:
        claim = begun(bench.store(prefix=f"{bench.prefix}-other").begin_step("run", "pay", {}))
        before = bench.dump()

        for end in endings(store, claim):
            with pytest.raises(InvalidArgumentError, match=f"prefix '{bench.prefix}-other'") as caught:
                end()
            assert caught.value.argument == "step_run"
        assert bench.dump() == before

    @settings(max_examples=max(1, settings.default.max_examples // 2))
    @given(id=st.text() | st.text("ABab01-_=", max_size=40))
    @example(id="")
    @example(id="A")
    @example(id=step_run_id("squidstep", "run", "pay") + "=")
    @example(id=step_run_id("squidstep", "run", "pay") + "\n")
    @example(id=step_run_id("squidstep", "run", "pay")[:-1])
    @example(id=step_run_id("squidstep", "run", "pay").lower())
    @example(id="x" * 1_000_000)
    @example(id="caf\udce9")
    def test_string_that_is_not_an_id_is_rejected(self, id: str) -> None:
        with offline_store() as store:
            for end in endings(store, id):
                with pytest.raises(InvalidArgumentError, match=r"^step_run: is not the id of a step run") as caught:
                    end()
                assert len(str(caught.value)) < 300

    @pytest.mark.parametrize("id", [None, 1, b"id", ("run", "pay"), UUID(int=1)])
    def test_value_that_is_not_a_string_is_rejected(self, offline: StepRunStore, id: Any) -> None:
        for end in endings(offline, id):
            with pytest.raises(InvalidArgumentError, match="must be a StepRun or a StepRun.id") as caught:
                end()
            assert caught.value.argument == "step_run"
            assert type(id).__name__ in str(caught.value)


def endings(store: StepRunStore, step_run: StepRun | str) -> list[Callable[[], object]]:
    """Returns a call of each operation that takes a step run or its id."""
    return [
        lambda: store.complete_step(step_run, {}),
        lambda: store.fail_step(step_run, {}),
        lambda: store.extend_claim(step_run, 60),
        lambda: store.release_step(step_run),
    ]


# Invalid names

INVALID: dict[str, Any] = {
    "empty": "",
    "513 bytes": "x" * 513,
    "513 bytes of UTF-8": "é" * 256 + "x",
    "1 MB": "x" * 1_000_000,
    "bytes": b"run",
    "None": None,
    "int": 7,
    "float": 1.5,
    "bool": True,
    "tuple": ("run",),
    "lone surrogate": "caf\udce9",
    "half an emoji": "\ud83d",
}
TAKES_A_RUN: dict[str, Callable[[StepRunStore, Any], object]] = {
    "schedule_step": lambda store, run: store.schedule_step(run, "pay", {}),
    "schedule_steps": lambda store, run: store.schedule_steps(run, {"pay": {}}),
    "begin_step": lambda store, run: store.begin_step(run, "pay", {}),
    "begin_steps": lambda store, run: store.begin_steps(run, {"pay": {}}),
    "delete_pending_steps": lambda store, run: store.delete_pending_steps(run, ["pay"]),
    "get_step_run": lambda store, run: store.get_step_run(run, "pay"),
    "get_run": lambda store, run: store.get_run(run),
    "scan_steps": lambda store, run: store.scan_steps(run),
    "attempts": lambda store, run: store.attempts(run, "pay"),
    "completed_steps": lambda store, run: store.completed_steps(run),
    "completed_outputs": lambda store, run: store.completed_outputs(run),
    "step_statuses": lambda store, run: store.step_statuses(run),
    "expire_run": lambda store, run: store.expire_run(run, 60),
    "delete_run": lambda store, run: store.delete_run(run),
}
ID = step_run_id("squidstep", "run", "pay")
# The argument that an error names. If there are several steps, it names all of them or the invalid one.
TAKES_A_STEP: dict[str, tuple[str, Callable[[StepRunStore, Any], object]]] = {
    "schedule_step": ("step", lambda store, step: store.schedule_step("run", step, {})),
    "begin_step": ("step", lambda store, step: store.begin_step("run", step, {})),
    "begin_steps": ("steps", lambda store, step: store.begin_steps("run", {"a": {}, step: {}})),
    "get_step_run": ("step", lambda store, step: store.get_step_run("run", step)),
    "attempts": ("step", lambda store, step: store.attempts("run", step)),
    "delete_pending_steps": ("steps", lambda store, step: store.delete_pending_steps("run", ["a", step])),
    "schedule_steps": ("steps", lambda store, step: store.schedule_steps("run", {"a": {}, step: {}})),
    "complete_step": ("schedule", lambda store, step: store.complete_step(ID, {}, schedule={"a": {}, step: {}})),
}


def assert_explains(error: InvalidArgumentError, value: object) -> None:
    """Asserts that the message has the type and start of the value, says what is allowed, and is short."""
    message = str(error)
    assert f"{type(value).__name__} {repr(value)[:50]}" in message
    assert len(message) < 300
    if isinstance(value, str) and value.isascii():
        assert f"must be 1 to 512 bytes of UTF-8, not {len(value):,}" in message
    elif not isinstance(value, str):
        assert "must be a non-empty str" in message


class TestInvalidNames:
    @pytest.mark.parametrize("operation", TAKES_A_RUN)
    def test_invalid_run_id_is_rejected(self, offline: StepRunStore, operation: str) -> None:
        for run_id in INVALID.values():
            with pytest.raises(InvalidArgumentError) as caught:
                TAKES_A_RUN[operation](offline, run_id)

            assert caught.value.argument == "run_id"
            assert_explains(caught.value, run_id)

    @pytest.mark.parametrize("operation", TAKES_A_STEP)
    def test_invalid_step_is_rejected(self, offline: StepRunStore, operation: str) -> None:
        argument, call = TAKES_A_STEP[operation]
        invalid: list[Any] = [*INVALID.values(), UUID(int=1)]
        for step in invalid:
            with pytest.raises(InvalidArgumentError) as caught:
                call(offline, step)

            assert argument in caught.value.argument
            assert_explains(caught.value, step)

    @pytest.mark.parametrize("steps", [None, 7, "pay", b"pay", {"pay": {}}, [None], object()])
    def test_steps_to_delete_must_be_a_list_of_names(self, offline: StepRunStore, steps: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^steps"):
            offline.delete_pending_steps("run", steps)

    @pytest.mark.parametrize("steps", [None, 7, "pay", ["pay"], [("pay", {})]])
    def test_steps_to_schedule_must_be_a_dict(self, offline: StepRunStore, steps: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^steps: must be a dict"):
            offline.schedule_steps("run", steps)
        if steps is not None:
            with pytest.raises(InvalidArgumentError, match="^schedule: must be a dict"):
                offline.complete_step(ID, {}, schedule=steps)

    @pytest.mark.parametrize("name", ["x" * 512, "é" * 256, "😀" * 128, "\0", " ", "\n", "{}"])
    def test_unusual_but_valid_name_is_accepted(self, offline: StepRunStore, name: str) -> None:
        """Without a server, an accepted call raises NotSentError."""
        for call in TAKES_A_RUN.values():
            with pytest.raises(NotSentError):
                call(offline, name)
        for _, call in TAKES_A_STEP.values():
            with pytest.raises(NotSentError):
                call(offline, name)


# UUIDs and enum members


class Word(enum.StrEnum):
    PAY = "pay"


class Plain(enum.Enum):
    PAY = "pay"
    SHIP = 2
    MAIL = ("mail", 3)
    EMPTY = ""


class Number(enum.IntEnum):
    PAY = 1


class Flags(enum.Flag):
    PAY = 1
    SHIP = 2


class StrSubclass(str):
    __slots__ = ()


class TestUuidsAndEnumMembers:
    @given(uuid=st.uuids())
    def test_uuid_and_its_text_are_the_same_run_id(self, uuid: UUID) -> None:
        with offline_store() as store:
            call, other = store.calls.get_step_run(uuid, "pay"), store.calls.get_step_run(str(uuid), "pay")

        assert (call.run_id, call.keys, call.args[1:]) == (other.run_id, other.keys, other.args[1:])
        assert call.run_id == str(uuid)

    def test_run_begun_by_uuid_can_be_read_by_text(self, store: StepRunStore) -> None:
        uuid = UUID("12345678-1234-5678-1234-567812345678")

        claim = begun(store.begin_step(uuid, "pay", {}))

        assert claim.run_id == str(uuid)
        assert store.get_run(str(uuid)) == store.get_run(uuid) == [claim]
        assert store.complete_step(claim.id, {}).status is StepStatus.COMPLETED

    @pytest.mark.parametrize(
        ("member", "name"),
        [
            (Word.PAY, "pay"),
            (Plain.PAY, "pay"),
            (Plain.SHIP, "SHIP"),
            (Plain.MAIL, "MAIL"),
            (Number.PAY, "PAY"),
            (Flags.SHIP, "SHIP"),
            (StrSubclass("pay"), "pay"),
        ],
    )
    def test_enum_member_names_a_step_by_value_or_name(self, store: StepRunStore, member: Any, name: str) -> None:
        result = store.schedule_step("run", member, {"by": name})

        assert type(result.step_run.step) is str
        assert result.step_run.step == name
        assert store.get_step_run("run", member) == store.get_step_run("run", name) == result.step_run
        assert store.schedule_steps("run", {name: {}}) == []
        assert store.schedule_steps("run", {member: {}}) == []
        claim = begun(store.begin_step("run", member, {}))
        store.complete_step(claim, {}, schedule={member: {}})
        assert store.completed_steps("run") == [name]
        assert [each.number for each in store.attempts("run", member)] == [1]
        assert store.delete_pending_steps("run", [member]) == []

    def test_enum_member_with_an_invalid_value_is_rejected(self, offline: StepRunStore) -> None:
        with pytest.raises(InvalidArgumentError, match=r"^step: must be 1 to 512 bytes of UTF-8, not 0"):
            offline.begin_step("run", Plain.EMPTY, {})

    def test_only_a_string_enum_member_can_be_a_run_id(self, offline: StepRunStore) -> None:
        assert offline.calls.get_run(Word.PAY).keys == offline.calls.get_run("pay").keys
        with pytest.raises(InvalidArgumentError, match="^run_id: must be a non-empty str, not Plain"):
            offline.get_run(Plain.PAY)

    def test_step_that_is_named_twice_is_rejected(self, offline: StepRunStore) -> None:
        for one, other in itertools.permutations(["pay", Plain.PAY]):
            twice: dict[Any, Any] = {one: {"a": 1}, other: {"a": 2}}
            with pytest.raises(InvalidArgumentError, match=r"^steps: names the step 'pay' twice"):
                offline.schedule_steps("run", twice)
            with pytest.raises(InvalidArgumentError, match=r"^schedule: names the step 'pay' twice"):
                offline.complete_step(ID, {}, schedule=twice)
            with pytest.raises(InvalidArgumentError, match=r"^steps: names the step 'pay' twice"):
                offline.delete_pending_steps("run", [one, other])

    def test_payload_error_of_an_enum_member_names_the_step(self, offline: StepRunStore) -> None:
        with pytest.raises(InvalidArgumentError, match=r"^steps\['pay'\]\['price'\]: complex"):
            offline.schedule_steps("run", {Plain.PAY: {"price": 1j}})
