"""Helpers for tests of payloads: what to send, through which argument, and how to compare what comes back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import strategies as st

from squidstep_redis import PayloadError, StepRunStore
from squidstep_redis.model import step_run_id

ID = step_run_id("squidstep", "run", "pay")

# Each argument that is a payload, under the name that an error gives it.
ARGUMENTS: dict[str, Callable[[StepRunStore, Any], object]] = {
    "input": lambda store, payload: store.begin_step("run", "pay", payload),
    "output": lambda store, payload: store.complete_step(ID, payload),
    "error": lambda store, payload: store.fail_step(ID, payload),
    "steps['pay']": lambda store, payload: store.schedule_steps("run", {"mail": {}, "pay": payload}),
    "schedule['pay']": lambda store, payload: store.complete_step(ID, {}, schedule={"mail": {}, "pay": payload}),
}


def in_range(moment: datetime) -> bool:
    """Whether it has a UTC equivalent in the years 1 to 9999, and equals it.

    In Python, a time within an hour that its zone repeats or skips equals no time of another zone; such times have a
    test of their own.
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
    """The payload as it comes back: tuples are lists, and times are in UTC; nothing else may differ."""
    if isinstance(value, dict):
        return {key: returned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [returned(item) for item in value]
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def assert_same(one: object, other: object) -> None:
    """Equal, and of the same types: 1 is not 1.0 nor True, -0.0 is not 0.0. Their reprs differ."""
    assert one == other
    assert repr(one) == repr(other)


def rejection(store: StepRunStore, where: str, payload: object) -> PayloadError:
    """The error that is raised for a payload in that argument."""
    with pytest.raises(PayloadError) as caught:
        ARGUMENTS[where](store, payload)
    return caught.value


def on_a_stack(frames: int, call: Callable[[], Any]) -> Any:
    """The result of a call made with so many more frames on the stack, as inside a framework's middleware."""
    return call() if frames == 0 else on_a_stack(frames - 1, call)
