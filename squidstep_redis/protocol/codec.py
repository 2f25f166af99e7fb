"""Encodes and decodes payloads. A payload is returned equal, or is rejected with the path to the offending value."""

from __future__ import annotations

import math
import re
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final, Literal, NamedTuple, Protocol, cast, runtime_checkable

import msgpack as untyped_msgpack

from squidstep_redis.errors import (
    InvalidArgumentError,
    PayloadError,
    PayloadTooLargeError,
    UndecodablePayloadError,
    described,
)
from squidstep_redis.escaping import escaped
from squidstep_redis.protocol.kinds import from_extension, is_datetime, kind_of, plain, problem_of
from squidstep_redis.signals import defer_sigalrm, is_raised_by_handler

Payload = dict[str, Any]

msgpack: Any = untyped_msgpack  # it ships no types

_ALLOWED: Final = "None, bool, int (64 bits), float, str, bytes, aware datetime, and lists, tuples and dicts of these"
_EXTENDED: Final = f"{_ALLOWED}; Decimal, UUID, date, time, timedelta, and enum members with such a value"
_WITH_OPTION: Final = "; with codec=MsgpackCodec(extended=True) it is stored"
# Limits the search for the offending value. msgpack itself fails at 511 or 1,024 levels, depending on its version.
_MAX_DEPTH: Final = 500
_PACKER_BYTES: Final = 64 * 1024
_KEY_CHARS: Final = 500
_SCALARS: Final = (type(None), bool, int, float, str, bytes, datetime)  # as which an enum member is packed
_MESSAGE_CHARS: Final = 2_000
_TRACEBACK_CHARS: Final = 8_000
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@runtime_checkable
class Codec(Protocol):
    """Converts payloads to bytes and back. `squidstep_redis.codecs` has codecs that compress and encrypt.

    All processes that share a prefix need the same codec: the bytes do not say which codec wrote them. Equal payloads
    may be encoded to different bytes: a repeated call is compared with the decoded payload.
    """

    def encode(self, payload: Payload) -> bytes:
        """Returns the bytes to store; raises ValueError or TypeError for a payload that it does not support."""
        ...

    def decode(self, data: bytes) -> Payload:
        """Returns the payload that `encode` was given."""
        ...


PayloadField = Literal["input", "output", "error", "progress"]


class Place(NamedTuple):
    """Where a payload is stored. The error of an attempt keeps its place when the attempt moves into the history.

    Attributes:
        prefix: the store's prefix.
        run_id: the run.
        step: the step.
        field: "input", "output", "error" or "progress".
    """

    prefix: str
    run_id: str
    step: str
    field: PayloadField


@runtime_checkable
class PlacedCodec(Protocol):
    """A codec whose bytes depend on where a payload is stored, so that they cannot be read in another place."""

    def encode_at(self, payload: Payload, place: Place) -> bytes:
        """Returns the bytes to store; raises ValueError or TypeError for a payload that it does not support."""
        ...

    def decode_at(self, data: bytes, place: Place) -> Payload:
        """Returns the payload that `encode_at` was given for the same place, and no other.

        Raises:
            PayloadError: the data cannot be decoded; it gives the reason. Any other exception means the same, without a
                reason.
        """
        ...


class MsgpackCodec:
    """The default codec: msgpack, strict.

    A payload is either returned equal or rejected. Tuples are returned as lists, aware datetimes in UTC, bytearrays as
    bytes. Subclasses of the allowed types (named tuples, numpy scalars) are rejected, not flattened.

    Args:
        extended: whether to store Decimal, UUID, date, time and timedelta, too, and enum members, which are returned as
            their values. Every MsgpackCodec reads what one with this option wrote.
    """

    extended: bool = False  # as a class attribute, for subclasses that do not call __init__

    def __init__(self, *, extended: bool = False) -> None:
        self.extended = extended

    def encode(self, payload: Payload) -> bytes:
        """Encodes a payload and checks that it decodes to an equal one.

        Raises:
            PayloadError: a value in the payload could not be read back equal; its path starts at `payload`.
        """
        try:
            try:
                data = _pack(payload, self.extended)
            except TypeError:  # tuples, or an unsupported type
                data = _pack(_as_decoded(payload, self.extended), self.extended)
            # This finds values that msgpack packs but does not return equal: NaN, odd map keys, distant dates.
            decoded = self.decode(data)
            faithful = decoded == payload or decoded == _as_decoded(payload, self.extended)
        except (TypeError, ValueError, OverflowError, BufferError, RecursionError) as error:
            offender = _find_offender(payload, self.extended)
            raise offender or PayloadError("payload", f"cannot be stored: {escaped(str(error))}") from error
        except Exception as error:  # msgpack in pure Python calls repr, which may raise anything
            if offender := _find_offender(payload, self.extended):
                raise offender from error
            raise
        if not faithful:
            raise _find_offender(payload, self.extended) or PayloadError("payload", "would not come back equal")
        return data

    def decode(self, data: bytes) -> Payload:
        """Decodes what `encode` returned."""
        return msgpack.unpackb(data, strict_map_key=False, timestamp=3, ext_hook=from_extension)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and cast("MsgpackCodec", other).extended is self.extended

    def __hash__(self) -> int:
        return hash((type(self), self.extended))

    def __repr__(self) -> str:
        return f"MsgpackCodec({'extended=True' if self.extended else ''})"


@dataclass(frozen=True, slots=True)
class _AbsentCodec:
    """Stands for a codec that was not pickled: it may hold a key, or something that cannot be pickled."""

    name: str

    def encode(self, payload: Payload) -> bytes:  # noqa: ARG002 -- as a codec's
        raise TypeError(f"{self.name} is not pickled with a step run")

    def decode(self, data: bytes) -> Payload:  # noqa: ARG002 -- as a codec's
        raise TypeError(f"{self.name} is not pickled with a step run: read it with `get_step_run` of a store")


class Payloads:
    """A codec and the store's own checks.

    Attributes:
        codec: the store's codec.
        max_bytes: the largest encoded payload.
        prefix: the store's prefix.
    """

    __slots__ = ("_placed", "_plain", "codec", "max_bytes", "prefix")

    def __init__(self, codec: Codec | PlacedCodec, max_bytes: int, prefix: str) -> None:
        self.codec = codec
        self.max_bytes = max_bytes
        self.prefix = prefix
        # If a codec has both pairs of methods, the pair with a place is used.
        self._placed = codec if isinstance(codec, PlacedCodec) else None
        self._plain = cast("Codec", codec)

    def __reduce__(self) -> tuple[type[Payloads], tuple[Codec, int, str]]:
        travels = type(self.codec) is MsgpackCodec
        return Payloads, (self._plain if travels else _AbsentCodec(self._name), self.max_bytes, self.prefix)

    def __deepcopy__(self, _memo: object) -> Payloads:
        return self  # in one process, the codec need not stay behind

    @property
    def _name(self) -> str:
        codec = self.codec
        return codec.name if isinstance(codec, _AbsentCodec) else type(codec).__name__

    def encode_own(self, payload: Payload, run_id: str, step: str, field: PayloadField) -> bytes:
        """Encodes an error payload that the store made. It is small, and no limit may prevent recording a failure."""
        if self._placed is None:
            return self._plain.encode(payload)
        return self._placed.encode_at(payload, Place(self.prefix, run_id, step, field))

    def encode(self, argument: str, payload: Mapping[str, Any], run_id: str, step: str, field: PayloadField) -> bytes:
        """Encodes the payload given as `argument`, which will be stored in a field of a step.

        Raises:
            PayloadError: it is not a dict, or the codec rejects it; the error has the path.
            PayloadTooLargeError: it is larger than `max_bytes` when encoded.
        """
        if not isinstance(payload, dict):
            raise PayloadError(argument, f"must be a dict, not {described(payload)}")
        try:
            if self._placed is None:  # the common case, without a call of `encode_own`
                data = self._plain.encode(payload)
            else:
                data = self.encode_own(payload, run_id, step, field)
        except InvalidArgumentError as error:
            raise PayloadError(error.argument.replace("payload", argument, 1), error.problem) from error.__cause__
        except (ValueError, TypeError) as error:
            raise PayloadError(argument, f"rejected by {type(self.codec).__name__}: {escaped(str(error))}") from error
        if type(data) is not bytes or not data:
            raise PayloadError(
                argument, f"{type(self.codec).__name__} must encode to non-empty bytes, not {described(data)}"
            )
        if len(data) > self.max_bytes:
            self.check_size(argument, data)
        return data

    def check_size(self, argument: str, data: bytes) -> None:
        """Raises PayloadTooLargeError if an encoded payload is larger than `max_bytes`."""
        if len(data) > self.max_bytes:
            raise PayloadTooLargeError(
                argument, f"is {len(data):,} bytes, over the store's max_payload_bytes of {self.max_bytes:,}"
            )

    def decode(self, data: bytes, run_id: str, step: str, name: str) -> Payload:
        """Decodes a stored payload.

        Raises:
            UndecodablePayloadError: the codec cannot read it, usually because another codec wrote it.
        """
        try:
            payload = self._decode(data, run_id, step, name)
        except Exception as error:  # of any kind: the caller needs to know which payload it was
            if self._can_decode(data, run_id, step, name):
                raise  # a signal handler raised it, usually that of SIGALRM
            problem = error.problem if isinstance(error, InvalidArgumentError) else ""
            raise UndecodablePayloadError(run_id, step, name, self._name, problem) from error
        if not isinstance(cast("object", payload), dict):
            raise UndecodablePayloadError(run_id, step, name, self._name)
        return payload

    def moved(self, data: bytes, run_id: str, step: str, name: str, new_run_id: str) -> bytes:
        """Returns a stored payload as it is stored in the same field of the same step of another run.

        Raises:
            UndecodablePayloadError: the codec's bytes depend on the run, and it cannot read them.
        """
        if self._placed is None:
            return data
        return self.encode_own(self.decode(data, run_id, step, name), new_run_id, step, _field(name))

    def _decode(self, data: bytes, run_id: str, step: str, name: str) -> Payload:
        if self._placed is None:
            return self._plain.decode(data)
        return self._placed.decode_at(data, Place(self.prefix, run_id, step, _field(name)))

    def _can_decode(self, data: bytes, run_id: str, step: str, name: str) -> bool:
        try:
            self._decode(data, run_id, step, name)
        except Exception:  # noqa: BLE001 -- a codec may raise anything
            return False
        return True


def _field(name: str) -> PayloadField:
    """Returns the field of a payload, given the name of its attribute or argument."""
    return name if name in ("input", "output", "progress") else "error"


def _to_extension(value: Any) -> Any:
    """Returns what msgpack packs instead of a value that it does not support."""
    value = plain(value)
    if (kind := kind_of(value)) is not None and problem_of(value) is None:
        return msgpack.ExtType(kind.code, kind.to_text(value).encode())
    if type(value) in _SCALARS:
        return value
    raise TypeError(f"msgpack does not support {type(value).__name__}")


# Idle packers; creating one costs more than packing. Any thread may use one.
_packers: deque[Any] = deque()
_extended_packers: deque[Any] = deque()


def _pack(value: object, extended: bool) -> bytes:
    idle = _extended_packers if extended else _packers
    try:
        packer = idle.pop()
    except IndexError:
        packer = msgpack.Packer(strict_types=True, datetime=True, default=_to_extension if extended else None)
    data = packer.pack(value)  # if this raises, the packer is dropped
    if len(data) < _PACKER_BYTES:  # a packer never shrinks its buffer
        idle.append(packer)
    return data


def error_payload(error: BaseException) -> Payload:
    """Returns a dict for an exception: `type`, `message`, and the end of the `traceback`."""
    with defer_sigalrm():  # an exception raised by a SIGALRM handler would look like one raised by str(error)
        return _error_payload(error)


def _error_payload(error: BaseException) -> Payload:
    try:
        message = str(error)
    except BaseException as problem:  # a failing str() must not hide the failure
        if _is_interruption(problem):
            raise
        message = f"(str() of this {type(error).__name__} raised)"
    cls = type(error)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    try:
        lines = "".join(traceback.TracebackException.from_exception(error, limit=-20).format())
    except BaseException as problem:  # exceptions may have attributes that raise
        if _is_interruption(problem):
            raise
        lines = "".join(traceback.format_tb(error.__traceback__, limit=-20))
    return {
        "type": _printable(name),
        "message": _printable(message)[:_MESSAGE_CHARS],
        "traceback": _printable(lines)[-_TRACEBACK_CHARS:],
    }


def _is_interruption(problem: BaseException) -> bool:
    """Returns whether a signal has ended the work on an exception, such as a handler's SystemExit: the process ends."""
    if isinstance(problem, Exception):
        return False
    return isinstance(problem, KeyboardInterrupt) or is_raised_by_handler(problem)


def _printable(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def _as_decoded(value: object, extended: bool) -> object:
    """Returns the value as it will be decoded: tuples as lists, datetimes in UTC, enum members as values if `extended`.

    Subclasses are not converted, so they are rejected. Datetimes are converted to UTC, because a datetime in the hour
    that is repeated when clocks are set back does not equal any datetime in another zone.
    """
    if extended:
        value = plain(value)
    if type(value) is dict:
        items = cast("dict[object, object]", value)
        converted = {_as_decoded_key(key, extended): _as_decoded(item, extended) for key, item in items.items()}
        if len(converted) != len(items):
            raise ValueError("two of its keys would become equal")
        return converted
    if type(value) in (list, tuple):
        return [_as_decoded(item, extended) for item in cast("list[object]", value)]
    return _as_decoded_key(value, extended)


def _as_decoded_key(value: Any, extended: bool) -> object:
    if extended:
        value = plain(value)
    return value.astimezone(UTC) if is_datetime(value) and value.utcoffset() is not None else value


def _find_offender(payload: object, extended: bool) -> PayloadError | None:
    """Finds the first value that msgpack does not support, depth first. Slow; only for payloads that are rejected."""
    stack: list[tuple[Any, str, int]] = [(payload, "payload", 1)]
    while stack:
        value, path, depth = stack.pop()
        if extended:
            value = plain(value)
        if depth > _MAX_DEPTH:
            return PayloadError(path, f"nested more than {_MAX_DEPTH} levels deep")
        found: list[tuple[Any, str, int]] = []
        if type(value) is dict:
            keys: set[object] = set()
            for key, item in cast("dict[object, object]", value).items():
                inner = f"{path}[{_subscript(key)}]"
                if problem := _key_problem(key, extended):
                    return PayloadError(f"key {inner}", problem)
                if (converted := _as_decoded_key(key, extended)) in keys:
                    same = "instant" if is_datetime(converted) else "value"
                    return PayloadError(f"key {inner}", f"the same {same} as another key: one of the two would be lost")
                keys.add(converted)
                found.append((item, inner, depth + 1))
        elif type(value) in (list, tuple):
            found = [(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
        elif problem := _scalar_problem(value, extended):
            return PayloadError(path, problem)
        stack += reversed(found)
    return None


def _subscript(key: object) -> str:
    try:
        text = repr(key)
    except Exception:  # noqa: BLE001 -- a key without a repr must still be rejected
        return f"a {type(key).__name__} without a repr"
    text = escaped(text)
    return text if len(text) <= _KEY_CHARS else text[:_KEY_CHARS] + "…"


def _key_problem(key: object, extended: bool) -> str | None:
    if extended:
        key = plain(key)
    return "a tuple cannot be a key" if type(key) is tuple else _scalar_problem(key, extended)


def _scalar_problem(value: object, extended: bool) -> str | None:
    if type(value) is int:
        return None if -(2**63) <= value < 2**64 else "int of more than 64 bits"
    if type(value) is float:
        return "NaN is not equal to itself, so it would not come back equal" if math.isnan(value) else None
    if type(value) is str:
        return "str with a lone surrogate, which UTF-8 cannot encode" if _SURROGATE.search(value) else None
    if is_datetime(value):
        return _datetime_problem(value)
    if value is None or type(value) in (bool, bytes, bytearray):
        return None
    if extended:
        return problem_of(value) if kind_of(value) else f"{described(value)}; allowed are {_EXTENDED}"
    hint = _WITH_OPTION if kind_of(value) or isinstance(value, Enum) else ""
    return f"{described(value)}; allowed are {_ALLOWED}{hint}"


def _datetime_problem(value: datetime) -> str | None:
    if value.tzinfo is None:
        return "datetime without a time zone; use an aware one, such as datetime.now(timezone.utc)"
    try:
        if value.utcoffset() is None:
            return "datetime in a time zone without an offset, so it is no moment"
        msgpack.unpackb(msgpack.packb(value, datetime=True), timestamp=3)
    except Exception as error:  # noqa: BLE001 -- a time zone may raise anything
        return f"datetime that msgpack cannot encode ({escaped(str(error))})"
    return None
