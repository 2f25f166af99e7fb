"""Fingerprints of inputs: equal inputs have equal ones, in any order of their keys and on any Python."""

from __future__ import annotations

import enum
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from support.payloads import payloads

from squidstep_redis import InvalidArgumentError, MsgpackCodec, PayloadError
from squidstep_redis.protocol.fingerprints import Fingerprint, Fingerprints

CEST = timezone(timedelta(hours=2))


class Color(enum.StrEnum):
    RED = "red"


def of(input: dict[str, Any], fingerprint: Fingerprint = True) -> str:
    return Fingerprints(None).of(fingerprint, "input", input).decode()


def reordered(value: Any) -> Any:
    """The same value, with the keys of its dicts in the reverse order."""
    if isinstance(value, dict):
        return {key: reordered(item) for key, item in reversed(value.items())}
    return [reordered(item) for item in value] if isinstance(value, list) else value


class TestCanonicalForm:
    def test_it_is_the_same_on_every_version(self) -> None:
        """A changed form would refuse the redeliveries of steps that an earlier version has stored."""
        plain = {"b": [1, -2.5, None, True], "a": {"text": "naïve ☃", "bytes": b"\0"}, 7: 2**64 - 1}
        instant = {"at": datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)}
        others = {"price": Decimal("9.90"), "id": UUID(int=7), "day": date(2026, 1, 2), "for": timedelta(days=1)}
        assert (of(plain), of(instant), of(others)) == (
            "zi10d2c0aWkNfOotbHTQGGF_",
            "1Af3esVnw3nzyrZMmghkObwc",
            "4xJnNrCkoAhHqXDnOwrpNhqv",
        )

    @pytest.mark.slow
    @given(payload=payloads)
    def test_returned_input_has_the_fingerprint_of_the_given_input(self, payload: Any) -> None:
        codec = MsgpackCodec()
        assert of(codec.decode(codec.encode(payload))) == of(reordered(payload)) == of(payload)

    @pytest.mark.slow
    @given(first=payloads, second=payloads)
    def test_different_inputs_have_different_fingerprints(self, first: Any, second: Any) -> None:
        assert first == second or of(first) != of(second)

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ((1, 2), [1, 2]),
            (bytearray(b"x"), b"x"),
            (-0.0, 0.0),
            (Color.RED, "red"),
            (datetime(2026, 1, 2, 3, tzinfo=CEST), datetime(2026, 1, 2, 1, tzinfo=UTC)),
        ],
        ids=repr,
    )
    def test_values_that_are_stored_alike_are_the_same(self, first: Any, second: Any) -> None:
        assert of({"value": first}) == of({"value": second})

    @pytest.mark.parametrize(
        "values",
        [
            (1, 1.0, True, "1", b"1", Decimal(1)),
            (None, False, 0, "", b"", [], {}),
            (["ab"], ["a", "b"], [["a", "b"]], {"a": "b"}),
            (
                date(2026, 1, 2),
                "2026-01-02",
                datetime(2026, 1, 2, tzinfo=UTC).replace(tzinfo=None),
                datetime(2026, 1, 2, tzinfo=UTC),
                time(2),
            ),
        ],
    )
    def test_values_of_other_types_differ(self, values: tuple[Any, ...]) -> None:
        assert len({of({"value": value}) for value in values}) == len(values)

    def test_five_hundred_levels_are_accepted(self) -> None:
        nested: Any = 7
        for _ in range(499):
            nested = [nested]
        MsgpackCodec().encode({"nested": nested})
        assert len(of({"nested": nested})) == 24


class TestKinds:
    INPUT: dict[str, Any] = {"order": 7, "at": 1, "items": [{"price": 2}]}

    def test_a_function_picks_the_fields(self) -> None:
        def pick(input: dict[str, Any]) -> object:
            return input["order"], input["items"]

        assert of(self.INPUT, pick) == of({**self.INPUT, "at": 2}, pick) != of({**self.INPUT, "order": 8}, pick)

    def test_a_function_that_returns_the_input_equals_true(self) -> None:
        assert of(self.INPUT, lambda given: given) == of(self.INPUT)

    def test_a_function_may_return_any_text(self) -> None:
        assert len(of(self.INPUT, lambda given: "\n" * 10_000)) == 24

    def test_a_str_is_the_fingerprint_itself(self) -> None:
        assert of(self.INPUT, "sha-256 of é") == "sha-256 of é"

    @pytest.mark.parametrize("value", ["", "x" * 257, "\ud800", "a\nb", "\x7f", 1, 0, b"x", ["x"], {}])
    def test_other_values_are_rejected(self, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^fingerprint: (must|has a lone surrogate)"):
            of(self.INPUT, value)
        if value != 0:
            with pytest.raises(InvalidArgumentError, match="^fingerprint: (must|has a lone surrogate)"):
                Fingerprints(value).of(None, "input", self.INPUT)

    def test_a_function_that_raises_is_named_with_its_error(self) -> None:
        with pytest.raises(
            InvalidArgumentError, match="^fingerprint: its function raised KeyError for input: 'id'"
        ) as e:
            of(self.INPUT, lambda given: given["id"])
        assert isinstance(e.value.__cause__, KeyError)

    def test_none_of_a_function_is_rejected(self) -> None:
        with pytest.raises(InvalidArgumentError, match="^fingerprint: its function returned None for input$"):
            of(self.INPUT, lambda given: given.get("id"))

    def test_a_coroutine_function_is_rejected(self) -> None:
        async def pick(input: dict[str, Any]) -> object:
            return input

        with pytest.raises(InvalidArgumentError, match="^fingerprint: must not be a coroutine function"):
            of(self.INPUT, pick)

    def test_value_without_a_fingerprint_is_rejected_with_its_path(self) -> None:
        with pytest.raises(PayloadError, match=r"has no fingerprint: set \{7\}; pass a function") as caught:
            of({"items": [1, {"tags": {7}}]})
        assert caught.value.argument == "input['items'][1]['tags']"
        with pytest.raises(PayloadError) as caught:
            of(self.INPUT, lambda given: {"x": object()})
        assert caught.value.argument == "fingerprint of input['x']"

    def test_deeper_nesting_is_rejected(self) -> None:
        nested: Any = 7
        for _ in range(10_000):
            nested = [nested]
        with pytest.raises(PayloadError, match="^input: is nested too deep"):
            of({"nested": nested})
