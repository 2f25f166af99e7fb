"""Limits of payloads: depth of nesting and encoded size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from support.backends import Bench, offline_store
from support.payloads import ARGUMENTS, at_stack_depth, payloads, rejection
from support.records import begun, stored

from squidstep_redis import (
    MsgpackCodec,
    PayloadTooLargeError,
    StepRunStore,
)
from squidstep_redis.operations.payload_json import from_json, to_json


def nested(levels: int, wrap: Callable[[Any], Any]) -> Any:
    """A payload with that many levels of nesting, including itself."""
    value: Any = {}
    for _ in range(levels - 2):
        value = wrap(value)
    return {"x": value}


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
    """500 levels are supported with every msgpack. The limit itself is that of msgpack: 511 or 1,024 by its version."""

    @pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
    def test_500_levels_are_supported(self, wrap: Callable[[Any], Any]) -> None:
        payload = nested(500, wrap)

        assert MsgpackCodec().decode(MsgpackCodec().encode(payload)) == payload

    @pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
    def test_500_levels_can_be_exported_and_imported(self, wrap: Callable[[Any], Any]) -> None:
        payload = nested(500, wrap)
        assert from_json(to_json(payload)) == payload

    @pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
    @pytest.mark.parametrize("levels", [2_000, 5_000])
    def test_2000_or_more_levels_are_rejected(
        self, offline: StepRunStore, wrap: Callable[[Any], Any], levels: int
    ) -> None:
        error = rejection(offline, "input", nested(levels, wrap))

        assert error.argument.startswith("input['x']")
        assert "500 levels" in str(error)

    @pytest.mark.parametrize("make", [circular_dict, circular_list])
    @pytest.mark.parametrize("frames", [0, 500])
    def test_circular_payload_is_rejected(
        self, offline: StepRunStore, make: Callable[[], dict[str, Any]], frames: int
    ) -> None:
        error = at_stack_depth(frames, lambda: rejection(offline, "input", make()))

        assert error.argument.startswith("input['x']")


class TestSize:
    @settings(max_examples=max(1, settings.default.max_examples // 5))
    @given(payload=payloads)
    def test_size_limit_is_exact(self, payload: dict[str, Any]) -> None:
        size = len(MsgpackCodec().encode(payload))
        with offline_store(max_payload_bytes=size) as roomy:
            roomy.calls.begin_step("run", "pay", payload)
        if size > 1:
            with offline_store(max_payload_bytes=size - 1) as tight, pytest.raises(PayloadTooLargeError) as caught:
                tight.begin_step("run", "pay", payload)
            assert caught.value.argument == "input"
            assert f"{size:,} bytes" in str(caught.value)

    @pytest.mark.parametrize("where", ARGUMENTS)
    def test_size_limit_applies_to_every_payload(self, where: str) -> None:
        with offline_store(max_payload_bytes=100) as store, pytest.raises(PayloadTooLargeError) as caught:
            ARGUMENTS[where](store, {"data": b"a" * 100})

        assert caught.value.argument == where

    def test_default_size_limit_is_four_mebibytes(self, offline: StepRunStore) -> None:
        overhead = len(MsgpackCodec().encode({"data": bytes(100_000)})) - 100_000

        offline.calls.begin_step("run", "pay", {"data": bytes(4 * 1024 * 1024 - overhead)})
        rejection(offline, "input", {"data": bytes(4 * 1024 * 1024 - overhead + 1)})

    def test_payload_of_exactly_the_limit_is_stored(self, bench: Bench) -> None:
        payload = {"data": bytes(range(256)) * 4}
        store = bench.store(max_payload_bytes=len(MsgpackCodec().encode(payload)))

        store.complete_step(begun(store.begin_step("run", "pay", payload)), payload)

        assert (stored(store).input, stored(store).output) == (payload, payload)

    def test_size_limit_does_not_apply_to_the_stores_own_errors(self) -> None:
        """With max_attempts, the store sends an error payload of its own, which is no payload of the caller."""
        with offline_store(max_payload_bytes=50) as store:
            store.calls.begin_step("run", "pay", {}, max_attempts=1)
