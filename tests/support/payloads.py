"""Helpers for tests of payloads: example payloads, the arguments that take one, and comparison of the returned ones."""

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

# A call for each argument that is a payload. The key is the name of the argument in errors.
ARGUMENTS: dict[str, Callable[[StepRunStore, Any], object]] = {
    "input": lambda store, payload: store.begin_step("run", "pay", payload),
    "output": lambda store, payload: store.complete_step(ID, payload),
    "error": lambda store, payload: store.fail_step(ID, payload),
    "steps['pay']": lambda store, payload: store.schedule_steps("run", {"mail": {}, "pay": payload}),
    "schedule['pay']": lambda store, payload: store.complete_step(ID, {}, schedule={"mail": {}, "pay": payload}),
}


def in_range(moment: datetime) -> bool:
    """Returns whether the moment has an equal UTC time in the years 1 to 9999.

    In Python, a time within an hour that its zone repeats or skips equals no time of another zone. A separate test
    covers such times.
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
    """Returns the payload as a store returns it: tuples are lists, and times are in UTC; nothing else differs."""
    if isinstance(value, dict):
        return {key: returned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [returned(item) for item in value]
    return value.astimezone(UTC) if isinstance(value, datetime) else value


def assert_same(one: object, other: object) -> None:
    """Asserts that two values are equal and of equal types; the reprs distinguish 1, 1.0 and True, and 0.0 and -0.0."""
    assert one == other
    assert repr(one) == repr(other)


def rejection(store: StepRunStore, where: str, payload: object) -> PayloadError:
    """Returns the error that is raised for a payload in this argument."""
    with pytest.raises(PayloadError) as caught:
        ARGUMENTS[where](store, payload)
    return caught.value


def at_stack_depth(frames: int, call: Callable[[], Any]) -> Any:
    """Makes a call with this many more frames on the stack, as inside a framework's middleware."""
    return call() if frames == 0 else at_stack_depth(frames - 1, call)
