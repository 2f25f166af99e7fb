"""Checks arguments before anything is sent, and converts them to bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from enum import Enum
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast
from uuid import UUID

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.escaping import has_controls

RunId = str | UUID
Step = str | Enum
# A format string over a function's arguments, or a function of them that returns the run id.
RunIdOf = str | Callable[..., str]
Seconds = float | timedelta
Labels = Mapping[str, str]
# Format strings over a function's arguments by label, or a function of the arguments that returns the labels.
LabelsOf = Mapping[str, str] | Callable[..., Mapping[str, str] | None]
# Input by step. Any, because Mapping is invariant in its keys: a dict[str, …] is not a Mapping[Step, …].
StepInputs = Mapping[Any, Mapping[str, Any]]

MAX_IDENTIFIER_BYTES: Final = 512
MAX_PREFIX_BYTES: Final = 128
MAX_OWNER_BYTES: Final = 256
MAX_FINGERPRINT_BYTES: Final = 256
MAX_ATTEMPTS: Final = 1_000_000
MAX_LEASE: Final = timedelta(days=366)
MAX_TTL: Final = timedelta(days=3_660)
MAX_WAIT: Final = timedelta(days=1)
MAX_TIMEOUT: Final = timedelta(hours=1)
MAX_REPLICAS: Final = 100


class Name(NamedTuple):
    """A checked identifier, as text and as the UTF-8 that is sent."""

    text: str
    data: bytes


def identifier(argument: str, value: object, max_bytes: int = MAX_IDENTIFIER_BYTES) -> Name:
    """Returns an identifier: a str of 1 to `max_bytes` bytes of UTF-8, any characters."""
    if not isinstance(value, str):
        raise InvalidArgumentError(argument, f"must be a non-empty str, not {described(value)}")
    try:
        data = value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(argument, f"has a lone surrogate at {error.start}: {described(value)}") from None
    if not 0 < len(data) <= max_bytes:
        raise InvalidArgumentError(
            argument, f"must be 1 to {max_bytes} bytes of UTF-8, not {len(data):,}: {described(value)}"
        )
    return Name(value if type(value) is str else data.decode(), data)


def run_id(value: object) -> Name:
    """Returns a run id: an identifier or a UUID."""
    return identifier("run_id", str(value) if isinstance(value, UUID) else value)


def run_id_prefix(value: object) -> bytes:
    """Returns a prefix of run ids: a str of up to 512 bytes of UTF-8; empty: of all run ids."""
    return b"" if isinstance(value, str) and not value else identifier("run_id_prefix", value).data


def step(value: object, argument: str = "step") -> Name:
    """Returns a step's name: an identifier, or an enum member (its value if that is a str, else its name)."""
    if type(value) is str:
        try:
            return _known_step(value)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(argument, error.problem) from None
    if isinstance(value, Enum):
        value = value.value if isinstance(value.value, str) else value.name
    return identifier(argument, value)


@lru_cache(1_024)
def _known_step(value: str) -> Name:
    """Cached, because a program uses the same few steps repeatedly."""
    return identifier("step", value)


def steps(value: object) -> list[Name]:
    """Returns the steps of an iterable, each once."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise InvalidArgumentError("steps", f"must be an iterable of steps, not {described(value)}")
    items = cast("Iterable[object]", value)
    return distinct("steps", (step(item, f"steps[{index}]") for index, item in enumerate(items)))


def distinct(argument: str, names: Iterable[Name]) -> list[Name]:
    """Returns the names; rejects duplicates. `"pay"` and `Step.PAY` may be the same step."""
    seen: set[Name] = set()
    found = list(names)
    for name in found:
        if name in seen:
            raise InvalidArgumentError(argument, f"names the step {name.text!r} twice")
        seen.add(name)
    return found


def prefix(value: object) -> bytes:
    """Returns a key prefix: an identifier without braces, which would change the hash tag."""
    text, data = identifier("prefix", value, MAX_PREFIX_BYTES)
    if "{" in text or "}" in text:
        raise InvalidArgumentError("prefix", f"must not contain braces: {described(value)}")
    return data


def owner(value: object) -> bytes:
    """Returns an owner: None, or an identifier without control characters, because terminals show it."""
    if value is None:
        return b""
    return _known_owner(value) if type(value) is str else _owner(value)


@lru_cache(64)
def _known_owner(value: str) -> bytes:
    """Cached, because a process has few owners."""
    return _owner(value)


def _owner(value: object) -> bytes:
    return without_controls("owner", value, MAX_OWNER_BYTES)


def fingerprint(value: object) -> bytes:
    """Returns a fingerprint: an identifier without control characters, because terminals show it."""
    return without_controls("fingerprint", value, MAX_FINGERPRINT_BYTES)


def reason(value: object) -> bytes:
    """Returns a reason: None, or a text without control characters, because terminals show it."""
    return b"" if value is None else without_controls("reason", value, MAX_IDENTIFIER_BYTES)


def without_controls(argument: str, value: object, max_bytes: int) -> bytes:
    """Returns an identifier without control characters, because terminals show it."""
    name = identifier(argument, value, max_bytes)
    if has_controls(name.text):
        raise InvalidArgumentError(argument, f"must not contain control characters: {described(value)}")
    return name.data


def integer(argument: str, value: object, maximum: int, minimum: int = 1) -> int:
    """Returns an int from `minimum` to `maximum`."""
    if type(value) is not int or not minimum <= value <= maximum:
        raise InvalidArgumentError(argument, f"must be an int from {minimum} to {maximum:,}, not {described(value)}")
    return value


def max_attempts(value: object) -> int:
    """Returns a number of attempts."""
    return integer("max_attempts", value, MAX_ATTEMPTS)


def milliseconds(argument: str, value: object, maximum: timedelta = MAX_TTL) -> bytes:
    """Returns a time span in whole milliseconds; empty for None."""
    return b"" if value is None else b"%d" % round(seconds(argument, value, maximum) * 1_000)


def lease_ms(value: object) -> bytes:
    """Returns a lease in whole milliseconds; empty for None."""
    if value is None:
        return b""
    return _known_lease(value) if type(value) in (int, float) else milliseconds("lease", value, MAX_LEASE)


@lru_cache(256, typed=True)  # True equals 1, but is rejected
def _known_lease(value: object) -> bytes:
    """Cached, because a program uses the same few leases for every step."""
    return milliseconds("lease", value, MAX_LEASE)


def lease_seconds(value: object) -> float:
    """Returns a lease in seconds, with whole milliseconds; 0 for None."""
    return _known_lease_seconds(value) if type(value) in (int, float) else int(lease_ms(value) or 0) / 1_000


@lru_cache(256, typed=True)
def _known_lease_seconds(value: object) -> float:
    return int(_known_lease(value)) / 1_000


def seconds(argument: str, value: object, maximum: timedelta) -> float:
    """Returns a time span from a millisecond to `maximum`, in seconds."""
    span = value.total_seconds() if isinstance(value, timedelta) else value
    # NaN fails every comparison, so it is rejected.
    if isinstance(span, bool) or not isinstance(span, int | float) or not 0.001 <= span <= maximum.total_seconds():
        raise InvalidArgumentError(
            argument,
            f"must be seconds from 0.001 to {maximum.total_seconds():,.0f} or a timedelta, not {described(value)}",
        )
    return span


def moment_ms(argument: str, value: object) -> float | None:
    """Returns a datetime with a time zone in milliseconds since 1970; None for None."""
    if value is None:
        return None
    if not isinstance(value, datetime) or not _has_offset(value):
        raise InvalidArgumentError(argument, f"must be a datetime with a time zone, not {described(value)}")
    return value.timestamp() * 1_000


def _has_offset(value: datetime) -> bool:
    try:
        return value.utcoffset() is not None
    except Exception:  # noqa: BLE001 -- a time zone may raise anything
        return False
