"""Unsupported payloads: rejected with the path to the offending value, before anything is sent."""

from __future__ import annotations

import array
import enum
import math
from collections import OrderedDict, defaultdict, namedtuple
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import Bench
from support.payloads import ARGUMENTS, rejection
from support.records import begun

from squidstep_redis import (
    MsgpackCodec,
    NotSentError,
    PayloadError,
    StepRunStore,
    StepStatus,
)
from squidstep_redis.operations import payload_json
from squidstep_redis.protocol import codec, kinds


def test_offline_store_raises_not_sent_error_on_every_send(offline: StepRunStore) -> None:
    for send in ARGUMENTS.values():
        with pytest.raises(NotSentError):
            send(offline, {})


class FrozenTime(datetime):
    """As a library that freezes time puts it in the place of datetime, in all modules."""


@pytest.mark.parametrize("extended", [False, True])
def test_path_leads_to_a_datetime_of_frozen_time(monkeypatch: pytest.MonkeyPatch, extended: bool) -> None:
    monkeypatch.setattr(codec, "datetime", FrozenTime)
    with pytest.raises(PayloadError, match="FrozenTime") as caught:
        MsgpackCodec(extended=extended).encode({"items": [{"at": FrozenTime.now(UTC)}]})
    assert caught.value.argument == "payload['items'][0]['at']"


def test_frozen_time_hides_no_real_datetime(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (codec, kinds, payload_json):
        monkeypatch.setattr(module, "datetime", FrozenTime, raising=False)
    payload = {"real": [datetime(2026, 1, 1, tzinfo=UTC)]}

    assert MsgpackCodec().encode({"pair": (1, 2), **payload})
    assert payload_json.from_json(payload_json.to_json(payload)) == payload
    assert type(payload_json.from_json({"$datetime": "2026-01-01T00:00:00+00:00"})) is datetime
    with pytest.raises(PayloadError) as caught:
        MsgpackCodec().encode({**payload, "odd": object()})
    assert caught.value.argument == "payload['odd']"


class Zone(tzinfo):
    """A time zone of the user's, which has no offset or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def utcoffset(self, _moment: datetime | None, /) -> None:
        if self.error is not None:
            raise self.error

    def tzname(self, _moment: datetime | None, /) -> str:
        return "nowhere"

    dst = utcoffset


def test_key_without_an_offset_is_rejected() -> None:
    with pytest.raises(PayloadError, match="without an offset"):
        MsgpackCodec().encode({"at": {datetime(2026, 1, 1, tzinfo=Zone()): 1}})


@pytest.mark.parametrize("zone", [Zone(), Zone(KeyError("no data")), tzinfo()])
@pytest.mark.parametrize("extended", [False, True])
def test_datetime_without_an_offset_is_rejected(zone: tzinfo, extended: bool) -> None:
    moment = datetime(2026, 1, 1, tzinfo=zone)
    for payload in ({"at": moment}, {"at": (moment,)}, {"at": [1, {"x": moment}]}):
        with pytest.raises(PayloadError, match=r"payload\['at'\].*datetime"):
            MsgpackCodec(extended=extended).encode(payload)


class Text(str):
    __slots__ = ()


class Flag(int):
    """An int subclass, as numpy's bool once was."""


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


UNSUPPORTED: dict[str, object] = {
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
    "naive datetime": datetime(2024, 1, 1),
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
    "value whose repr raises": Unprintable(),
}

parts = st.text(max_size=8) | st.integers(0, 3)
paths = st.builds(lambda first, rest: [first, *rest], st.text(max_size=8), st.lists(parts, max_size=5))


def buried(offender: object, path: list[str | int]) -> Any:
    """A payload with the offending value at the path, and valid values around it."""
    if not path:
        return offender
    part, *rest = path
    inner = buried(offender, rest)
    return {"": 0, "z": [1], part: inner} if isinstance(part, str) else (*range(part), inner, "after")


def subscripts(path: list[Any]) -> str:
    return "".join(f"[{part!r}]" for part in path)


class TestUnsupportedValues:
    @pytest.mark.parametrize("offender", UNSUPPORTED.values(), ids=UNSUPPORTED)
    def test_error_names_the_path_to_the_offending_value(self, offline: StepRunStore, offender: object) -> None:
        @settings(max_examples=max(1, settings.default.max_examples // 5))
        @given(path=paths, where=st.sampled_from(sorted(ARGUMENTS)))
        def check(path: list[str | int], where: str) -> None:
            assert rejection(offline, where, buried(offender, path)).argument == where + subscripts(path)

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
            datetime(2024, 1, 1),
            Word.RED,
            Color.RED,
            Text("a"),
            Point(1, 2),
        ],
        ids=repr,
    )
    def test_error_names_the_path_to_the_offending_key(self, offline: StepRunStore, key: Any) -> None:
        """The path leads to the item with that key; "key " may stand in front of it."""

        @settings(max_examples=max(1, settings.default.max_examples // 5))
        @given(path=paths, where=st.sampled_from(sorted(ARGUMENTS)))
        def check(path: list[str | int], where: str) -> None:
            error = rejection(offline, where, buried({"good": 1, key: 1}, path))
            assert error.argument.removeprefix("key ") == where + subscripts([*path, key])

        check()

    @pytest.mark.parametrize("payload", [None, [], "a", b"a", 1, OrderedDict(a=1), defaultdict(list), {1}, Point(1, 2)])
    @pytest.mark.parametrize("where", ARGUMENTS)
    def test_payload_itself_must_be_a_dict(self, offline: StepRunStore, where: str, payload: object) -> None:
        error = rejection(offline, where, payload)

        assert error.argument == where
        assert type(payload).__name__ in str(error)

    @pytest.mark.parametrize("offender", [Decimal("9.99"), Color.RED, {1}, 1j])
    def test_message_names_the_value_and_the_supported_types(self, offline: StepRunStore, offender: object) -> None:
        message = str(rejection(offline, "input", {"items": [{"price": 1}, {"price": offender}]}))

        assert message.startswith(f"input['items'][1]['price']: {type(offender).__name__} {offender!r}; allowed are")
        for allowed in ("None", "bool", "int", "float", "str", "bytes", "datetime", "list", "tuple", "dict"):
            assert allowed in message

    def test_keys_that_would_collide_are_rejected(self, offline: StepRunStore) -> None:
        """Both are the same instant, but unequal in Python within the hour that Berlin repeats: one would be lost."""
        repeated = datetime(2021, 10, 31, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))
        payload = {repeated: "one", repeated.astimezone(UTC): "other"}
        assert len(payload) == 2

        assert rejection(offline, "input", {"at": payload}).argument.removeprefix("key ").startswith("input['at']")

    def test_large_value_does_not_make_a_large_message(self, offline: StepRunStore) -> None:
        assert len(str(rejection(offline, "input", {"k" * 1_000_000: {1: set(range(100_000))}}))) < 1_000

    def test_payload_error_is_a_value_error(self, offline: StepRunStore) -> None:
        assert isinstance(rejection(offline, "input", {"price": 1j}), ValueError)

    def test_rejected_payload_leaves_the_claim_held(self, bench: Bench, store: StepRunStore) -> None:
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
