"""Payloads as JSON, and back. Pure.

A value that JSON cannot represent is an object with one key that begins with a dollar sign.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from datetime import UTC
from typing import Any, Final, cast

from squidstep_redis.errors import described
from squidstep_redis.protocol.kinds import BY_TAG, datetime_of, is_datetime, kind_of

_FLOATS: Final = ("inf", "-inf", "nan")  # JSON has all others


def to_json(value: Any) -> Any:
    """Returns a part of a payload as JSON.

    Raises:
        TypeError: it has a type that the store's own codec does not support.
    """
    # Loops, because a comprehension is a frame of its own, and payloads of 500 levels are stored.
    if type(value) is dict:
        items = cast("dict[Any, Any]", value)
        if all(type(key) is str for key in items) and not (len(items) == 1 and next(iter(items)).startswith("$")):
            converted: dict[str, Any] = {}
            for key, item in items.items():
                converted[key] = to_json(item)
            return converted
        pairs: list[Any] = []
        for key, item in items.items():
            pairs.append([to_json(key), to_json(item)])
        return {"$dict": pairs}
    if type(value) is list:
        elements: list[Any] = []
        for item in cast("list[Any]", value):
            elements.append(to_json(item))
        return elements
    if type(value) is bytes:
        return {"$bytes": b64encode(value).decode()}
    if is_datetime(value):
        return {"$datetime": value.astimezone(UTC).isoformat()}
    if type(value) is float and not math.isfinite(value):
        return {"$float": str(value)}
    if (kind := kind_of(value)) is not None:
        return {kind.tag: kind.to_text(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(type(value).__name__)


def bytes_from_text(text: object) -> bytes:
    """Returns the bytes of a base64 text; raises ValueError or TypeError for anything else."""
    if not isinstance(text, str):
        raise TypeError(f"base64 must be a str, not {described(text)}")
    return b64decode(text, validate=True)


def from_json(value: Any) -> Any:
    """Returns the value that `to_json` was given.

    Raises:
        ValueError: `to_json` would not return this value; TypeError for a wrong type.
    """
    if isinstance(value, list):
        elements: list[Any] = []
        for item in cast("list[Any]", value):
            elements.append(from_json(item))
        return elements
    if not isinstance(value, dict):
        return value
    items = cast("dict[str, Any]", value)
    if not all(isinstance(key, str) for key in cast("dict[object, Any]", items)):
        raise TypeError("a key of an object must be a str")
    if len(items) != 1 or not (tag := next(iter(items))).startswith("$"):
        converted: dict[str, Any] = {}
        for key, item in items.items():
            converted[key] = from_json(item)
        return converted
    inner = items[tag]
    if tag != "$dict":
        return _scalar_from_json(tag, inner)
    pairs: dict[Any, Any] = {}
    for key, item in inner:
        pairs[from_json(key)] = from_json(item)
    if len(pairs) != len(inner):
        raise ValueError("two keys of a $dict are equal")
    return pairs


def _scalar_from_json(tag: str, inner: Any) -> Any:
    if tag == "$bytes":
        return bytes_from_text(inner)
    if tag == "$datetime":
        return datetime_of(inner)
    if tag == "$float" and inner in _FLOATS:
        return float(inner)
    if tag in BY_TAG and isinstance(inner, str):
        return BY_TAG[tag].from_text(inner)
    raise ValueError(f"unknown tag {tag!r}, or a value that it does not have: {described(inner)}")
