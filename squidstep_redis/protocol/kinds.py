"""Values beyond msgpack's own types: Decimal, UUID, date, time and timedelta, as text. Enum members as their values.

Each type is a msgpack extension. Its text form is also what an exported document contains.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Final, NamedTuple, TypeGuard
from uuid import UUID

_FOLD: Final = " fold=1"  # marks a time that clocks show twice; ISO 8601 cannot express it
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_TIMEDELTA: Final = re.compile(r"(-?\d{1,9}) (\d{1,5}) (\d{1,6})", re.ASCII)


class Kind(NamedTuple):
    """How values of one type are stored.

    Attributes:
        code: the code of the msgpack extension.
        tag: the key of the object that stands for a value in a document.
        to_text: formats a value.
        from_text: parses what `to_text` returned; raises ValueError or ArithmeticError for other text.
    """

    code: int
    tag: str
    to_text: Callable[[Any], str]
    from_text: Callable[[str], Any]


def _time_text(value: time) -> str:
    return value.isoformat() + _FOLD * value.fold


def _time_of(text: str) -> time:
    iso = text.removesuffix(_FOLD)
    return time.fromisoformat(iso).replace(fold=int(iso != text))


def _timedelta_text(value: timedelta) -> str:
    return f"{value.days} {value.seconds} {value.microseconds}"


def _timedelta_of(text: str) -> timedelta:
    match = _TIMEDELTA.fullmatch(text)
    if match is None:
        raise ValueError("a timedelta is days, seconds and microseconds")
    return timedelta(*map(int, match.groups()))


_KINDS: Final[dict[object, Kind]] = {
    Decimal: Kind(1, "$decimal", str, Decimal),
    UUID: Kind(2, "$uuid", str, UUID),
    date: Kind(3, "$date", date.isoformat, date.fromisoformat),
    time: Kind(4, "$time", _time_text, _time_of),
    timedelta: Kind(5, "$timedelta", _timedelta_text, _timedelta_of),
}
BY_TAG: Final = {kind.tag: kind for kind in _KINDS.values()}
_BY_CODE: Final = {kind.code: kind for kind in _KINDS.values()}


def kind_of(value: object) -> Kind | None:
    """Returns how a value is stored; None if it has none of these types. Subclasses are not of these types."""
    return _KINDS.get(type(value))


def is_datetime(value: object) -> TypeGuard[datetime]:
    """Returns whether a value is a datetime, not an instance of a subclass.

    A library that freezes time binds another class to the name `datetime` in all modules.
    """
    return type(value) is type(_EPOCH)


def datetime_of(text: str) -> datetime:
    """Returns the datetime of a text in ISO 8601; raises ValueError or TypeError for anything else."""
    return type(_EPOCH).fromisoformat(text)


def from_extension(code: int, data: bytes) -> Any:
    """Returns the value of a msgpack extension; raises ValueError or ArithmeticError if it is none of these types."""
    if (kind := _BY_CODE.get(code)) is None:
        raise ValueError(f"unknown msgpack extension {code}")
    return kind.from_text(data.decode())


def plain(value: Any) -> Any:
    """Returns the value of an enum member; any other value as it is."""
    while isinstance(value, Enum):
        value = value.value
    return value


def problem_of(value: Any) -> str | None:
    """Returns why a value of one of these types could not be read back equal; None if it could."""
    if type(value) is Decimal and value.is_nan():
        return "NaN is not equal to itself, so it would not come back equal"
    if type(value) is time and value.tzinfo is not None:
        offset = _offset(value)
        # Some Python versions read an offset of less than a second as none.
        if offset is None or _time_of(_time_text(value)).utcoffset() != offset:
            return "time in a zone without a fixed offset, so the zone would be lost; use a datetime"
    return None


def _offset(value: time) -> timedelta | None:
    try:
        return value.utcoffset()
    except Exception:  # noqa: BLE001 -- a time zone may raise anything
        return None
