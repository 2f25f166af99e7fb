"""Payloads: what is carried comes back equal; what is not is refused, with the path to it, and nothing is sent."""

from __future__ import annotations

import array
import contextlib
import enum
import itertools
import math
import zlib
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.backends import Bench, offline_store
from support.records import begun, stored

from squidstep_redis import (
    InvalidArgumentError,
    MsgpackCodec,
    NotSentError,
    PayloadError,
    PayloadTooLargeError,
    StepRunStore,
    StepStatus,
    UndecodablePayloadError,
)
from squidstep_redis.model import step_run_id
from squidstep_redis.protocol.codec import error_payload


@pytest.fixture
def offline() -> Iterator[StepRunStore]:
    with offline_store() as store:
        yield store


ID = step_run_id("squidstep", "run", "pay")

# Wherever a payload is handed over, and what an error calls it there.
HANDED_OVER: dict[str, Callable[[StepRunStore, Any], object]] = {
    "input": lambda store, payload: store.begin_step("run", "pay", payload),
    "output": lambda store, payload: store.complete_step(ID, payload),
    "error": lambda store, payload: store.fail_step(ID, payload),
    "steps['pay']": lambda store, payload: store.schedule_steps("run", {"mail": {}, "pay": payload}),
    "schedule['pay']": lambda store, payload: store.complete_step(ID, {}, schedule={"mail": {}, "pay": payload}),
}


def test_offline_means_that_what_is_sent_fails(offline: StepRunStore) -> None:
    for hand_over in HANDED_OVER.values():
        with pytest.raises(NotSentError):
            hand_over(offline, {})


# What is carried


def in_range(moment: datetime) -> bool:
    """Whether it has a UTC equivalent in the years 1 to 9999, and equals it.

    Python lets no time in an hour that its zone repeats or skips equal one of another zone: see below.
    """
    with contextlib.suppress(OverflowError):
        return moment.astimezone(UTC) == moment
    return False


ZONES = ["Europe/Berlin", "America/St_Johns", "Asia/Kathmandu", "Pacific/Kiritimati", "Australia/Lord_Howe"]
zones = st.sampled_from([ZoneInfo(name) for name in ZONES]) | st.builds(
    timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23))
)
moments = st.datetimes(timezones=zones).filter(in_range)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | moments
)
keys = st.text(max_size=8) | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)
payloads = st.dictionaries(st.text(max_size=8), values, max_size=4)

EDGES = {
    "ints": [0, -1, 127, 128, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)],
    "floats": [0.0, -0.0, 1.0, math.inf, -math.inf, 5e-324, 1.7976931348623157e308],
    "texts": ["", "\0", "\n", "é", "e\u0301", "\U0010ffff", "a" * 70_000],
    "bytes": [b"", b"\0", bytes(range(256))],
    "truths": [True, False, None],
    "moments": [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC), datetime(1969, 12, 31, tzinfo=UTC)],
    "zones": [datetime(2024, 2, 29, 12, tzinfo=ZoneInfo("Asia/Kathmandu")), datetime.max.replace(tzinfo=timezone.max)],
    "empty": [[], {}, ()],
    "nested": {"a": {"b": [{"c": ({"d": 1},)}]}},
    "keys": {1: "int", -1: "int", b"1": "bytes", "1": "str", "": "empty", None: "none", True + 1: "int", 0.5: "float"},
}


def returned(value: object) -> object:
    """What is to come back: tuples are lists, and moments are in UTC; nothing else may differ."""
    if isinstance(value, dict):
        return {key: returned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [returned(item) for item in value]
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def assert_same(one: object, other: object) -> None:
    """Equal, and of the same types: 1 is not 1.0 nor True, -0.0 is not 0.0. A repr tells all of these apart."""
    assert one == other
    assert repr(one) == repr(other)


class TestWhatIsCarried:
    @given(payload=payloads)
    @example(payload=EDGES)
    def test_it_comes_back_from_the_codec(self, payload: dict[str, Any]) -> None:
        assert_same(MsgpackCodec().decode(MsgpackCodec().encode(payload)), returned(payload))

    @given(payload=payloads)
    def test_the_same_payload_gives_the_same_bytes(self, payload: dict[str, Any]) -> None:
        assert MsgpackCodec().encode(payload) == MsgpackCodec().encode(dict(payload.items()))

    def test_it_comes_back_from_the_store(self, bench: Bench, store: StepRunStore) -> None:
        runs = (f"run {number}" for number in itertools.count())

        @settings(max_examples=max(1, settings.default.max_examples // 5))
        @given(scheduled=payloads, error=payloads, input=payloads, output=payloads)
        @example(scheduled=EDGES, error=EDGES, input=EDGES, output=EDGES)
        def round_trip(scheduled: Any, error: Any, input: Any, output: Any) -> None:
            run = next(runs)
            store.schedule_step(run, "pay", scheduled)
            claim = begun(store.begin_step(run, "pay", {}))
            assert_same(claim.input, returned(scheduled))
            assert_same(store.fail_step(claim, error).last_error, returned(error))
            assert_same(stored(store, run).last_error, returned(error))
            claim = begun(store.begin_step(run, "pay", input))
            assert_same(claim.input, returned(input))
            assert_same(store.complete_step(claim, output).output, returned(output))
            assert_same(store.begin_step(run, "pay", {}).step_run.output, returned(output))
            assert_same((stored(store, run).input, stored(store, run).output), (returned(input), returned(output)))
            assert_same(store.completed_outputs(run), [returned(output)])
            assert_same(store.attempts(run, "pay")[0].error, returned(error))

        round_trip()

    @pytest.mark.parametrize(
        "moment",
        [
            datetime(2021, 10, 31, 2, 30, fold=0, tzinfo=ZoneInfo("Europe/Berlin")),
            datetime(2021, 10, 31, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
            datetime(2021, 3, 28, 2, 30, tzinfo=ZoneInfo("Europe/Berlin")),
        ],
        ids=["repeated, first", "repeated, second", "skipped"],
    )
    def test_so_does_a_moment_in_the_hour_in_which_clocks_are_set(self, moment: datetime) -> None:
        """Such as datetime.now(ZoneInfo(...)), once a year. == is false for it and any UTC time; the instant is not."""
        (back,) = MsgpackCodec().decode(MsgpackCodec().encode({"at": moment})).values()

        assert back.timestamp() == moment.timestamp()

    @pytest.mark.parametrize("value", [bytearray(b"a"), memoryview(b"a")])
    def test_what_equals_bytes_comes_back_as_bytes(self, value: object) -> None:
        (back,) = MsgpackCodec().decode(MsgpackCodec().encode({"data": value})).values()

        assert type(back) is bytes
        assert back == value

    def test_what_was_answered_is_no_longer_the_callers(self, store: StepRunStore) -> None:
        input: dict[str, Any] = {"items": [1]}
        claim = begun(store.begin_step("run", "pay", input))
        input["items"].append(2)

        assert claim.input == stored(store).input == {"items": [1]}


# What is not carried


class Text(str):
    __slots__ = ()


class Flag(int):
    """An int that passes for a bool, as numpy's once did."""


class Color(enum.Enum):
    RED = "red"


class Word(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("detached")


Point = namedtuple("Point", "x y")

NOT_CARRIED: dict[str, object] = {
    "Decimal": Decimal("9.99"),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "complex": 1j,
    "object": object(),
    "function": len,
    "generator": (each for each in ()),
    "range": range(3),
    "date": date(2024, 1, 1),
    "timedelta": timedelta(1),
    "naive datetime": datetime(2024, 1, 1),  # noqa: DTZ001 -- what is refused is the point
    "datetime before the year 1 in UTC": datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
    "datetime after the year 9999 in UTC": datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
    "NaN": math.nan,
    "int above 64 bits": 2**64,
    "int below 64 bits": -(2**63) - 1,
    "lone surrogate": "caf\udce9",
    "str subclass": Text("a"),
    "int subclass": Flag(1),
    "enum member": Color.RED,
    "StrEnum member": Word.RED,
    "IntEnum member": Number.ONE,
    "named tuple": Point(1, 2),
    "OrderedDict": OrderedDict(a=1),
    "defaultdict": defaultdict(list),
    "memoryview of ints": memoryview(array.array("i", [1, 2])),
    "memoryview with gaps": memoryview(b"abcd")[::2],
    "what has no repr": Unprintable(),
}

parts = st.text(max_size=8) | st.integers(0, 3)
paths = st.builds(lambda first, rest: [first, *rest], st.text(max_size=8), st.lists(parts, max_size=5))


def buried(culprit: object, path: list[str | int]) -> Any:
    """A payload with the culprit at the path, and good things around it."""
    if not path:
        return culprit
    part, *rest = path
    inner = buried(culprit, rest)
    return {"": 0, "z": [1], part: inner} if isinstance(part, str) else (*range(part), inner, "after")


def subscripts(path: list[Any]) -> str:
    return "".join(f"[{part!r}]" for part in path)


def refused(store: StepRunStore, where: str, payload: object) -> PayloadError:
    with pytest.raises(PayloadError) as caught:
        HANDED_OVER[where](store, payload)
    return caught.value


class TestWhatIsRefused:
    @pytest.mark.parametrize("culprit", NOT_CARRIED.values(), ids=NOT_CARRIED)
    def test_it_is_named_by_its_path(self, offline: StepRunStore, culprit: object) -> None:
        @settings(max_examples=max(1, settings.default.max_examples // 5))
        @given(path=paths, where=st.sampled_from(sorted(HANDED_OVER)))
        def check(path: list[str | int], where: str) -> None:
            assert refused(offline, where, buried(culprit, path)).argument == where + subscripts(path)

        check()

    @pytest.mark.parametrize(
        "key",
        [
            (1, 2),
            (),
            "caf\udce9",
            math.nan,
            2**64,
            Decimal(1),
            frozenset({1}),
            datetime(2024, 1, 1),  # noqa: DTZ001 -- what is refused is the point
            Word.RED,
            Color.RED,
            Text("a"),
            Point(1, 2),
        ],
        ids=repr,
    )
    def test_so_is_a_key(self, offline: StepRunStore, key: Any) -> None:
        """The path is to the item whose key it is; that the key is at fault may be said in front."""

        @settings(max_examples=max(1, settings.default.max_examples // 5))
        @given(path=paths, where=st.sampled_from(sorted(HANDED_OVER)))
        def check(path: list[str | int], where: str) -> None:
            error = refused(offline, where, buried({"good": 1, key: 1}, path))
            assert error.argument.removeprefix("key ") == where + subscripts([*path, key])

        check()

    @pytest.mark.parametrize("payload", [None, [], "a", b"a", 1, OrderedDict(a=1), defaultdict(list), {1}, Point(1, 2)])
    @pytest.mark.parametrize("where", HANDED_OVER)
    def test_the_payload_itself_is_a_dict(self, offline: StepRunStore, where: str, payload: object) -> None:
        error = refused(offline, where, payload)

        assert error.argument == where
        assert type(payload).__name__ in str(error)

    @pytest.mark.parametrize("culprit", [Decimal("9.99"), Color.RED, {1}, 1j])
    def test_the_message_says_what_it_is_and_what_is_allowed(self, offline: StepRunStore, culprit: object) -> None:
        message = str(refused(offline, "input", {"items": [{"price": 1}, {"price": culprit}]}))

        assert message.startswith(f"input['items'][1]['price']: {type(culprit).__name__} {culprit!r}; allowed are")
        for allowed in ("None", "bool", "int", "float", "str", "bytes", "datetime", "list", "tuple", "dict"):
            assert allowed in message

    def test_so_are_two_keys_that_would_fall_together(self, offline: StepRunStore) -> None:
        """The same instant, but unequal to Python in the hour that Berlin repeats: one of the two would be lost."""
        repeated = datetime(2021, 10, 31, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))
        payload = {repeated: "one", repeated.astimezone(UTC): "other"}
        assert len(payload) == 2

        assert refused(offline, "input", {"at": payload}).argument.removeprefix("key ").startswith("input['at']")

    def test_a_huge_culprit_makes_no_huge_message(self, offline: StepRunStore) -> None:
        assert len(str(refused(offline, "input", {"k" * 1_000_000: {1: set(range(100_000))}}))) < 1_000

    def test_it_is_a_value_error(self, offline: StepRunStore) -> None:
        assert isinstance(refused(offline, "input", {"price": 1j}), ValueError)

    def test_a_claim_in_hand_stays_held(self, bench: Bench, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        before = bench.dump()

        with pytest.raises(PayloadError):
            store.complete_step(claim, {"price": Decimal(1)})
        with pytest.raises(PayloadError):
            store.complete_step(claim, {}, schedule={"ship": {"price": Decimal(1)}})
        with pytest.raises(PayloadError):
            store.fail_step(claim, {"price": Decimal(1)})

        assert bench.dump() == before
        assert store.complete_step(claim, {}).status is StepStatus.COMPLETED


def nested(levels: int, wrap: Callable[[Any], Any]) -> Any:
    """A payload of so many levels, itself the first."""
    value: Any = {}
    for _ in range(levels - 2):
        value = wrap(value)
    return {"x": value}


def on_a_stack(frames: int, call: Callable[[], Any]) -> Any:
    """What the call answers where so many frames are on the stack already: a worker inside a framework's middleware."""
    return call() if frames == 0 else on_a_stack(frames - 1, call)


WRAPS: dict[str, Callable[[Any], Any]] = {"dict": lambda value: {"x": value}, "list": lambda value: [value]}


def circular_dict() -> dict[str, Any]:
    circle: dict[str, Any] = {}
    circle["x"] = circle
    return circle


def circular_list() -> dict[str, Any]:
    circle: list[Any] = []
    circle.append(circle)
    return {"x": circle}


class TestDepth:
    """500 levels are carried by every msgpack; the limit itself is msgpack's, 511 or 1,024 by its version."""

    @pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
    def test_500_levels_are_carried(self, wrap: Callable[[Any], Any]) -> None:
        payload = nested(500, wrap)

        assert MsgpackCodec().decode(MsgpackCodec().encode(payload)) == payload

    @pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
    @pytest.mark.parametrize("levels", [2_000, 5_000])
    def test_many_more_are_refused(self, offline: StepRunStore, wrap: Callable[[Any], Any], levels: int) -> None:
        error = refused(offline, "input", nested(levels, wrap))

        assert error.argument.startswith("input['x']")
        assert "500 levels" in str(error)

    @pytest.mark.parametrize("make", [circular_dict, circular_list])
    @pytest.mark.parametrize("frames", [0, 500])
    def test_so_is_what_contains_itself(
        self, offline: StepRunStore, make: Callable[[], dict[str, Any]], frames: int
    ) -> None:
        error = on_a_stack(frames, lambda: refused(offline, "input", make()))

        assert error.argument.startswith("input['x']")


class TestSize:
    @settings(max_examples=max(1, settings.default.max_examples // 5))
    @given(payload=payloads)
    def test_the_limit_is_exact(self, payload: dict[str, Any]) -> None:
        size = len(MsgpackCodec().encode(payload))
        with offline_store(max_payload_bytes=size) as roomy:
            roomy.calls.begin_step("run", "pay", payload)
        if size > 1:
            with offline_store(max_payload_bytes=size - 1) as tight, pytest.raises(PayloadTooLargeError) as caught:
                tight.begin_step("run", "pay", payload)
            assert caught.value.argument == "input"
            assert f"{size:,} bytes" in str(caught.value)

    @pytest.mark.parametrize("where", HANDED_OVER)
    def test_it_holds_for_every_payload(self, where: str) -> None:
        with offline_store(max_payload_bytes=100) as store, pytest.raises(PayloadTooLargeError) as caught:
            HANDED_OVER[where](store, {"data": b"a" * 100})

        assert caught.value.argument == where

    def test_it_is_four_mebibytes_unless_said_otherwise(self, offline: StepRunStore) -> None:
        overhead = len(MsgpackCodec().encode({"data": bytes(100_000)})) - 100_000

        offline.calls.begin_step("run", "pay", {"data": bytes(4 * 1024 * 1024 - overhead)})
        refused(offline, "input", {"data": bytes(4 * 1024 * 1024 - overhead + 1)})

    def test_what_just_fits_comes_back(self, bench: Bench) -> None:
        payload = {"data": bytes(range(256)) * 4}
        store = bench.store(max_payload_bytes=len(MsgpackCodec().encode(payload)))

        store.complete_step(begun(store.begin_step("run", "pay", payload)), payload)

        assert (stored(store).input, stored(store).output) == (payload, payload)

    def test_it_does_not_stand_in_the_way_of_the_stores_own_errors(self) -> None:
        """max_attempts comes with an error that the store words by itself: no payload of the caller's."""
        with offline_store(max_payload_bytes=50) as store:
            store.calls.begin_step("run", "pay", {}, max_attempts=1)


# Codecs


class Zlib:
    """A codec of one's own, around the default one."""

    def __init__(self) -> None:
        self.inner = MsgpackCodec()

    def encode(self, payload: dict[str, Any]) -> bytes:
        return zlib.compress(self.inner.encode(payload))

    def decode(self, data: bytes) -> dict[str, Any]:
        return self.inner.decode(zlib.decompress(data))


class Answering:
    """A codec that encodes everything to the same answer, or raises it."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def encode(self, payload: dict[str, Any]) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def decode(self, data: bytes) -> dict[str, Any]:
        return {}


class TestCodecs:
    def test_one_of_ones_own_carries_all_payloads(self, bench: Bench) -> None:
        store = bench.store(codec=Zlib())
        payload = {"text": "abc" * 1_000, **EDGES}

        store.fail_step(begun(store.begin_step("run", "pay", payload)), payload)
        store.complete_step(begun(store.begin_step("run", "pay", payload)), payload)

        assert_same(stored(store).input, returned(payload))
        assert_same(store.completed_outputs("run"), [returned(payload)])
        assert_same(store.attempts("run", "pay")[0].error, returned(payload))
        assert len(bench.field("run", "opay") or b"") < len(MsgpackCodec().encode(payload)) / 10

    def test_what_it_wraps_still_names_the_path(self) -> None:
        with offline_store(codec=Zlib()) as store:
            assert refused(store, "steps['pay']", {"a": [1j]}).argument == "steps['pay']['a'][0]"

    def test_the_limit_is_on_what_it_makes(self) -> None:
        with offline_store(codec=Zlib(), max_payload_bytes=1_000) as store:
            store.calls.begin_step("run", "pay", {"data": bytes(100_000)})

    @pytest.mark.parametrize("error", [ValueError("no key"), TypeError("no key")])
    @pytest.mark.parametrize("where", HANDED_OVER)
    def test_what_it_refuses_is_refused(self, where: str, error: Exception) -> None:
        with offline_store(codec=Answering(error)) as store:
            refusal = refused(store, where if where in ("input", "output", "error") else "input", {})

        assert refusal.__cause__ is error
        assert "refused by Answering: no key" in str(refusal)

    def test_what_else_it_raises_passes_through_and_nothing_is_sent(self) -> None:
        with offline_store(codec=Answering(RuntimeError("key server is down"))) as store:
            for hand_over in HANDED_OVER.values():
                with pytest.raises(RuntimeError, match="key server is down"):
                    hand_over(store, {})

    @pytest.mark.parametrize("answer", ["text", b"", bytearray(b"a"), memoryview(b"a"), None, {}])
    def test_it_must_make_bytes_and_at_least_one(self, answer: object) -> None:
        with offline_store(codec=Answering(answer)) as store:
            error = refused(store, "input", {})

        assert error.argument == "input"
        assert "Answering must encode to non-empty bytes, not " + type(answer).__name__ in str(error)

    @pytest.mark.parametrize("codec", ["zlib", object(), zlib])
    def test_it_must_be_one(self, codec: Any) -> None:
        with pytest.raises(InvalidArgumentError, match=r"^codec: must have encode\(\) and decode\(\)"):
            StepRunStore(redis.Redis(), codec=codec)


class TestTheWrongCodec:
    """What another codec wrote: only who looks at a payload is told, for all else does without."""

    def test_only_a_look_at_the_payload_raises(self, bench: Bench) -> None:
        writer, reader = bench.store(codec=Zlib()), bench.store()
        writer.complete_step(begun(writer.begin_step("run", "pay", {"amount": 1})), {"receipt": 7})
        writer.fail_step(begun(writer.begin_step("run", "mail", {})), {"reason": "bounced"})

        assert reader.step_statuses("run") == {"pay": "completed", "mail": "failed"}
        assert reader.completed_steps("run") == ["pay"]
        pay, mail = reader.get_run("run")
        assert (pay.status, pay.attempt, mail.status) == ("completed", 1, "failed")
        assert reader.begin_step("run", "pay", {}).reason == "completed"
        assert reader.schedule_step("run", "pay", {}).decision == "skip"
        assert "pay" in repr(pay)
        for look, name in (
            (lambda: pay.input, "input"),
            (lambda: pay.output, "output"),
            (lambda: mail.last_error, "last_error"),
            (lambda: reader.completed_outputs("run"), "output"),
            (lambda: reader.attempts("run", "mail"), "last_error"),
        ):
            with pytest.raises(UndecodablePayloadError) as caught:
                look()
            step = "mail" if name == "last_error" else "pay"
            assert (caught.value.run_id, caught.value.step, caught.value.name) == ("run", step, name)
            assert str(caught.value) == f"run 'run', step '{step}': MsgpackCodec cannot decode the stored {name}"
            assert caught.value.__cause__ is not None

    def test_a_claim_can_be_ended_without_looking(self, bench: Bench) -> None:
        writer, reader = bench.store(codec=Zlib()), bench.store()
        writer.schedule_step("run", "pay", {"amount": 1})

        claim = begun(reader.begin_step("run", "pay", {}))
        with pytest.raises(UndecodablePayloadError):
            _ = claim.input
        reader.extend_claim(claim, 60)
        completed = reader.complete_step(claim, {"receipt": 7})

        assert completed.output == {"receipt": 7}

    def test_what_decodes_to_something_else_than_a_dict_is_no_payload(self, bench: Bench) -> None:
        """b"\\x07" is msgpack for 7: bytes of another codec may be what this one can read."""
        begun(bench.store(codec=Answering(b"\x07")).begin_step("run", "pay", {}))

        with pytest.raises(UndecodablePayloadError):
            _ = stored(bench.store()).input


# Exceptions as payloads


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


class NumericError(Exception):
    def __str__(self) -> Any:
        return 5  # noqa: PLE0307 -- that is what is tried


class ProxyError(Exception):
    """Hands on to something else what it has not itself, as database drivers' exceptions do."""

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


class NotedError(Exception):
    @property
    def __notes__(self) -> list[str]:
        raise RuntimeError("no notes")


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The exception as it is caught, with a traceback."""
    try:
        raise error from cause
    except BaseException as caught:  # noqa: BLE001 -- of any kind
        return caught


def chained(links: int) -> BaseException:
    error = ValueError("link 0")
    for number in range(1, links):
        error = raised(ValueError(f"link {number}"), error)
    return error


def recursed(frames: int) -> BaseException:
    try:
        on_a_stack(frames, lambda: 1 / 0)
    except ZeroDivisionError as error:
        return error
    raise AssertionError


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "plain": lambda: raised(ValueError("declined")),
    "never raised": lambda: ValueError("declined"),
    "without arguments": lambda: raised(ValueError()),
    "KeyboardInterrupt": lambda: raised(KeyboardInterrupt()),
    "SystemExit": lambda: raised(SystemExit(1)),
    "huge message": lambda: raised(ValueError("x" * 5_000_000)),
    "huge traceback": lambda: recursed(700),
    "chain": lambda: chained(3),
    "long chain": lambda: chained(500),
    "group": lambda: raised(ExceptionGroup("many", [ValueError(number) for number in range(1_000)])),
    "surrogates": lambda: raised(ValueError("caf\udce9")),
    "surrogate in its name": lambda: raised(type("Odd", (Exception,), {"__module__": "caf\udce9"})()),
    "__str__ raises": lambda: raised(MuteError()),
    "__str__ answers no str": lambda: raised(NumericError()),
    "__getattr__ raises": lambda: raised(ProxyError()),
    "__notes__ raises": lambda: raised(NotedError()),
    "SyntaxError of bytes": lambda: raised(SyntaxError("bad", ("file", 1, 1, b"source"))),  # pyright: ignore[reportArgumentType]: no str
}


class TestExceptions:
    @pytest.mark.parametrize("make", EXCEPTIONS.values(), ids=EXCEPTIONS)
    def test_any_becomes_a_bounded_payload(self, make: Callable[[], BaseException]) -> None:
        payload = error_payload(make())

        assert {key: type(value) for key, value in payload.items()} == {"type": str, "message": str, "traceback": str}
        assert len(payload["message"]) <= 2_000
        assert len(payload["traceback"]) <= 8_000
        MsgpackCodec().encode(payload)

    def test_it_says_what_was_raised_and_where(self) -> None:
        payload = error_payload(raised(MuteError(), ZeroDivisionError("the cause")))

        assert payload["type"] == "test_payloads.MuteError"
        assert payload["message"] == "(str() of this MuteError raised)"
        assert 'test_payloads.py", line' in payload["traceback"]
        assert "in raised" in payload["traceback"]
        assert "ZeroDivisionError: the cause" in payload["traceback"]
        assert error_payload(ValueError())["type"] == "ValueError"

    def test_of_a_long_traceback_the_end_is_kept(self) -> None:
        assert "1 / 0" in error_payload(recursed(700))["traceback"]
        assert "link 499" in error_payload(chained(500))["traceback"]

    def test_what_cannot_be_written_in_utf_8_is_replaced(self) -> None:
        assert error_payload(ValueError("caf\udce9"))["message"] == "caf\ufffd"

    @pytest.mark.parametrize("make", EXCEPTIONS.values(), ids=EXCEPTIONS)
    def test_a_step_can_be_failed_with_any(self, store: StepRunStore, make: Callable[[], BaseException]) -> None:
        error = make()

        failed = store.fail_step(begun(store.begin_step("run", "pay", {})), error)

        assert failed.status is StepStatus.FAILED
        assert stored(store).last_error == error_payload(error)
