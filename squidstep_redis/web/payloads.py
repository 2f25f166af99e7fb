"""Payloads as JSON: the beginning for a page, and the whole payload for a download. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, cast

from squidstep_redis import StepRun, UndecodablePayloadError
from squidstep_redis.formatting import cut, readable_scalar, traceback_lines
from squidstep_redis.operations.payload_json import to_json

SHOWN_CHARACTERS: Final = 16_384
NAMES: Final = ("input", "output", "last_error", "progress")
_INDENT: Final = "  "
_TRACEBACK_LINES: Final = 100
_TRACEBACK_COLUMNS: Final = 500


class ShownPayload(NamedTuple):
    """One payload of a step, as a page shows it.

    Attributes:
        name: the attribute of the step run.
        lines: the beginning of the payload as indented JSON; or why it cannot be decoded.
        is_cut: whether there is more.
        is_decoded: whether it can be downloaded.
    """

    name: str
    lines: list[str]
    is_cut: bool
    is_decoded: bool


def shown_payloads(step_run: StepRun) -> list[ShownPayload]:
    """Returns the payloads that a step has. Apart from decoding, the work for each is bounded."""
    found: list[ShownPayload] = []
    for name in NAMES:
        try:
            value = getattr(step_run, name)
        except UndecodablePayloadError as error:
            found.append(ShownPayload(name, [str(error)], False, False))
            continue
        if value is not None:
            text, is_cut = _beginning(value)
            found.append(ShownPayload(name, text.split("\n"), is_cut, True))
    return found


def shown_traceback(step_run: StepRun) -> list[str]:
    """Returns the end of the traceback of a step's error, which names the error; empty without a traceback."""
    lines = traceback_lines(step_run)[-_TRACEBACK_LINES:]
    return [cut(line, _TRACEBACK_COLUMNS) for line in lines]


def whole_payload(step_run: StepRun, name: str) -> bytes | None:
    """Returns a payload as JSON. Values that JSON cannot represent are encoded as in `export_run`.

    Returns:
        None if the step has no such payload.

    Raises:
        UndecodablePayloadError: the store's codec cannot read it.
    """
    value = getattr(step_run, name)
    if value is None:
        return None
    try:
        return json.dumps(to_json(value)).encode()
    except TypeError:  # another codec may decode to any type
        return json.dumps(value, default=repr, skipkeys=True).encode()


def _beginning(value: Any) -> tuple[str, bool]:
    """Returns the first characters of a payload, and whether there are more."""
    parts: list[str] = []
    length = 0
    for part in _parts(value):
        parts.append(part)
        length += len(part)
        if length > SHOWN_CHARACTERS:
            return "".join(parts)[:SHOWN_CHARACTERS], True
    return "".join(parts), False


def _parts(value: Any) -> Iterator[str]:
    """Yields indented JSON in small parts. It uses no recursion, because payloads may have hundreds of levels."""
    stack = [_elements(value, 0)]
    while stack:
        for part in stack[-1]:
            if isinstance(part, str):
                yield part
            else:
                stack.append(_elements(*part))
                break
        else:
            stack.pop()


def _elements(value: Any, depth: int) -> Iterator[str | tuple[Any, int]]:
    """Yields the text of a value, and each value in it with its depth."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in cast("Mapping[Any, Any]", value).items()]
        brackets = "{}"
    elif isinstance(value, list):
        items = [("", item) for item in cast("list[Any]", value)]
        brackets = "[]"
    else:
        yield _scalar(value)
        return
    is_mapping = brackets == "{}"
    yield brackets[0]
    for index, (key, item) in enumerate(items):
        yield ("," if index else "") + "\n" + _INDENT * (depth + 1)
        if is_mapping:
            yield f"{_scalar(key)}: "
        yield item, depth + 1
    yield ("\n" + _INDENT * depth if items else "") + brackets[1]


def _scalar(value: Any) -> str:
    # More of a long text is never shown; the rest need not be converted.
    if isinstance(value, str):
        value = value[: SHOWN_CHARACTERS + 1]
    return json.dumps(readable_scalar(value), ensure_ascii=False)
