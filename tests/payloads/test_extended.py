"""`MsgpackCodec(extended=True)`: Decimal, UUID, dates, times and enum members come back equal, or are rejected."""

from __future__ import annotations

import copy
import enum
import json
import pickle
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal, localcontext
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.backends import Bench, offline_store
from support.payloads import ARGUMENTS, EDGES, assert_same, keys, rejection, returned, scalars
from support.records import begun, stored

from squidstep_redis import InvalidArgumentError, MsgpackCodec, PayloadError, UndecodablePayloadError
from squidstep_redis.operations.payload_json import from_json, to_json

CODEC = MsgpackCodec(extended=True)


class Color(enum.Enum):
    RED = "red"
    PAIR = (1, Decimal("2.50"))
    NESTED = enum.IntEnum("Inner", {"ONE": 1}).ONE
    OBJECT = object()


class Word(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Bits(enum.Flag):
    READ = 1
    WRITE = 2


class Price(Decimal):
    pass


class Id(UUID):
    pass


class Day(date):
    pass


class Broken(tzinfo):
    def utcoffset(self, moment: datetime | None) -> timedelta | None:
        raise RuntimeError("no offset")


class Subclass(timedelta):
    pass


offsets = st.builds(
    timezone,
    st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).filter(lambda span: abs(span) > timedelta(seconds=1)),
)
times = st.builds(
    lambda value, zone, fold: value.replace(tzinfo=zone, fold=fold),
    st.times(),
    st.none() | offsets,
    st.integers(0, 1),
)
extended_scalars = (
    st.decimals(allow_nan=False)
    | st.uuids()
    | st.dates()
    | times
    | st.timedeltas()
    | st.sampled_from([Word.RED, Number.ONE, Bits.READ, Bits.READ | Bits.WRITE, Color.RED, Color.NESTED])
)
extended_payloads = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        scalars | extended_scalars,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(keys | st.uuids() | st.dates(), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=4,
)
EXTENDED_EDGES: dict[str, Any] = {
    **EDGES,
    "decimals": [Decimal(text) for text in ("0", "-0", "1.10", "-1E+30", "Infinity", "-Infinity", "0E-7", "1" * 5_000)],
    "exponents": [Decimal("1E+999999999999999999"), Decimal("-1E-1999999999999999997"), Decimal("9.99E+400")],
    "uuids": [UUID(int=0), UUID(int=2**128 - 1), uuid4()],
    "dates": [date.min, date.max],
    "times": [
        time.min,
        time.max,
        time(2, 30, fold=1),
        time(1, tzinfo=UTC),
        time(1, tzinfo=timezone(timedelta(hours=-5, microseconds=1))),
        time(1, tzinfo=timezone.min),
    ],
    "spans": [timedelta.min, timedelta.max, timedelta.resolution, -timedelta.resolution],
    "members": [Word.RED, Number.ONE, Bits.READ | Bits.WRITE, Color.RED, Color.NESTED],
    "keyed": {Decimal("1.5"): 1, date.min: 2, time.min: 3, timedelta(1): 4, UUID(int=1): 5, Color.RED: 6, (1.0): 7},
}


def by_value(value: object) -> object:
    """Returns the payload as it comes back: as from the default codec, and with members as their values."""
    if isinstance(value, dict):
        return {by_value(key): by_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [by_value(item) for item in value]
    return by_value(value.value) if isinstance(value, enum.Enum) else value


class TestRoundTrip:
    @given(payload=extended_payloads)
    @example(payload=EXTENDED_EDGES)
    def test_extended_payload_comes_back_equal(self, payload: dict[str, Any]) -> None:
        assert_same(CODEC.decode(CODEC.encode(payload)), returned(by_value(payload)))

    @pytest.mark.slow
    @given(payload=extended_payloads)
    @example(payload=EXTENDED_EDGES)
    def test_extended_payload_survives_json(self, payload: dict[str, Any]) -> None:
        back = CODEC.decode(CODEC.encode(payload))

        assert_same(from_json(json.loads(json.dumps(to_json(back), allow_nan=False))), back)

    def test_member_with_a_tuple_comes_back_as_list(self) -> None:
        assert_same(CODEC.decode(CODEC.encode({"pair": Color.PAIR})), {"pair": [1, Decimal("2.50")]})

    @given(value=st.decimals(allow_nan=False))
    def test_precision_of_the_context_does_not_matter(self, value: Decimal) -> None:
        with localcontext(prec=2):
            assert_same(CODEC.decode(CODEC.encode({"price": value})), {"price": value})

    def test_store_returns_an_equal_payload(self, bench: Bench) -> None:
        store = bench.store(codec=CODEC)
        payload = returned(by_value(EXTENDED_EDGES))

        store.fail_step(begun(store.begin_step("run", "pay", EXTENDED_EDGES)), EXTENDED_EDGES)
        claim = begun(store.begin_step("run", "pay", EXTENDED_EDGES))
        assert_same(store.complete_step(claim, EXTENDED_EDGES).output, payload)
        assert store.complete_step(claim, EXTENDED_EDGES).output == payload

        assert_same((stored(store).input, store.attempts("run", "pay")[0].error), (payload, payload))

    def test_every_default_codec_reads_extended_payloads(self, bench: Bench) -> None:
        claim = begun(bench.store(codec=CODEC).begin_step("run", "pay", {"price": Decimal("1.10")}))

        assert_same(stored(bench.store()).input, {"price": Decimal("1.10")})
        assert pickle.loads(pickle.dumps(claim)).input == {"price": Decimal("1.10")}


REJECTED: dict[str, tuple[object, str]] = {
    "NaN": (Decimal("NaN"), "NaN"),
    "sNaN": (Decimal("sNaN"), "NaN"),
    "time in a zone": (time(12, tzinfo=ZoneInfo("Europe/Berlin")), "without a fixed offset"),
    "time in a broken zone": (time(12, tzinfo=Broken()), "without a fixed offset"),
    "subclass of Decimal": (Price("1"), "allowed are"),
    "subclass of UUID": (Id(int=1), "allowed are"),
    "subclass of date": (Day(2024, 1, 1), "allowed are"),
    "subclass of timedelta": (Subclass(1), "allowed are"),
    "naive datetime": (datetime(2024, 1, 1), "without a time zone"),
    "member with an object": (Color.OBJECT, "allowed are"),
    "large int": (2**64, "more than 64 bits"),
    "set": ({Decimal(1)}, "allowed are"),
}


class TestRejected:
    @pytest.mark.parametrize(("value", "problem"), REJECTED.values(), ids=REJECTED)
    @pytest.mark.parametrize("where", ARGUMENTS)
    def test_value_that_would_not_come_back_is_rejected(self, where: str, value: object, problem: str) -> None:
        with offline_store(codec=CODEC) as store:
            error = rejection(store, where, {"items": [Decimal(1), {"at": value}]})

        assert error.argument == f"{where}['items'][1]['at']"
        assert problem in error.problem

    @pytest.mark.parametrize("key", [Decimal("NaN"), Color.PAIR, Price(1)])  # an sNaN has no hash
    def test_key_that_would_not_come_back_is_rejected(self, key: Any) -> None:
        with pytest.raises(PayloadError, match=r"^key payload\['keyed'\]\["):
            CODEC.encode({"keyed": {key: 1}})

    def test_two_keys_that_become_equal_are_rejected(self) -> None:
        with pytest.raises(PayloadError, match=r"^key payload\[.*the same value as another key"):
            CODEC.encode({Color.RED: 1, "red": 2})

    @pytest.mark.parametrize(
        "value", [Decimal(1), UUID(int=1), date.min, time.min, timedelta(1), Word.RED, Color.RED], ids=repr
    )
    def test_values_are_rejected_unless_asked_for(self, value: object) -> None:
        with pytest.raises(PayloadError, match=r"^payload\['a'\]: .*MsgpackCodec\(extended=True\)"):
            MsgpackCodec().encode({"a": value})

    @pytest.mark.parametrize(
        "extension",
        [(1, b"x"), (2, b"1"), (3, b"\xff"), (4, b"25:00"), (5, b"1 2"), (5, b"999999999 86400 0"), (6, b"")],
    )
    def test_unknown_extension_is_undecodable(self, bench: Bench, extension: tuple[int, bytes]) -> None:
        begun(bench.store().begin_step("run", "pay", {}))
        data = msgpack.packb({"a": msgpack.ExtType(*extension)})
        bench.backend.raw.hset(bench.keys("run")[0], "ipay", data)

        with pytest.raises(UndecodablePayloadError):
            _ = stored(bench.store()).input


class TestTransfer:
    def test_import_needs_a_store_that_was_asked(self, bench: Bench) -> None:
        store = bench.store(codec=CODEC)
        store.complete_step(begun(store.begin_step("run", "pay", {})), {"price": Decimal("1.10")})
        document = json.loads(json.dumps(bench.store().export_run("run")))

        other = bench.store(prefix=f"{bench.prefix}-other")
        with pytest.raises(PayloadError, match=r"document\['steps'\]\[0\]\['output'\]\['price'\]: Decimal .*extended"):
            other.import_run(document)
        assert other.get_run("run") == []

        asked = bench.store(prefix=f"{bench.prefix}-other", codec=CODEC)
        asked.import_run(document)
        assert_same(stored(asked).output, {"price": Decimal("1.10")})

    @pytest.mark.parametrize(
        "value",
        [
            {"$decimal": "x"},
            {"$decimal": 1.5},
            {"$uuid": "x"},
            {"$date": "2024-13-01"},
            {"$time": "25:00"},
            {"$timedelta": "1 2"},
            {"$timedelta": "999999999 99999 999999"},
            {"$timedelta": "1 ٢ 3"},
        ],
        ids=str,
    )
    def test_malformed_value_in_a_document_is_rejected(self, bench: Bench, value: Any) -> None:
        store = bench.store(codec=CODEC)
        store.schedule_step("run", "pay", {"a": Decimal(1)})
        document = copy.deepcopy(store.export_run("run"))
        document["steps"][0]["input"] = {"a": value}

        with pytest.raises(InvalidArgumentError, match=r"^document\['steps'\]\[0\]\['input'\]"):
            bench.store(prefix=f"{bench.prefix}-other", codec=CODEC).import_run(document)


class TestCodec:
    def test_equality_and_repr_show_the_option(self) -> None:
        assert MsgpackCodec(extended=True) == CODEC
        assert hash(MsgpackCodec(extended=True)) == hash(CODEC)
        assert MsgpackCodec() != CODEC
        assert (repr(MsgpackCodec()), repr(CODEC)) == ("MsgpackCodec()", "MsgpackCodec(extended=True)")

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda codec: pickle.loads(pickle.dumps(codec))])
    def test_codec_can_be_copied_and_pickled(self, copied: Callable[[MsgpackCodec], MsgpackCodec]) -> None:
        assert copied(CODEC) == CODEC
