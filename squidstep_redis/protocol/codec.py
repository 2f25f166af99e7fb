"""Encodes and decodes payloads. A payload comes back equal, or is rejected with the path to the offending value."""

from __future__ import annotations

import math
import re
import traceback
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol, cast, runtime_checkable

import msgpack as untyped_msgpack

from squidstep_redis.errors import (
    InvalidArgumentError,
    PayloadError,
    PayloadTooLargeError,
    UndecodablePayloadError,
    described,
)
from squidstep_redis.signals import defer_sigalrm

Payload = dict[str, Any]

msgpack: Any = untyped_msgpack  # it ships no types

_ALLOWED: Final = "None, bool, int (64 bits), float, str, bytes, aware datetime, and lists, tuples and dicts of these"
# Of the search for the offending value. msgpack itself fails at 511 or 1,024 levels, depending on its version.
_MAX_DEPTH: Final = 500
_PACKER_BYTES: Final = 64 * 1024
_KEY_CHARS: Final = 500
_MESSAGE_CHARS: Final = 2_000
_TRACEBACK_CHARS: Final = 8_000
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@runtime_checkable
class Codec(Protocol):
    """Converts payloads to bytes and back. Your own codec may wrap `MsgpackCodec` to compress or encrypt.

    Equal payloads must give equal bytes, or a completion that you send twice is not recognized as a repeat. All
    processes that share a prefix need the same codec: the bytes do not say which codec wrote them.
    """

    def encode(self, payload: Payload) -> bytes:
        """Returns the bytes to store; raises ValueError or TypeError for a payload that it does not support."""
        ...

    def decode(self, data: bytes) -> Payload:
        """Returns the payload that `encode` was given."""
        ...


class MsgpackCodec:
    """The default codec: msgpack, strict.

    A payload either comes back equal or is rejected. Tuples come back as lists, aware datetimes in UTC, bytearrays as
    bytes. Subclasses of the allowed types (enum members, named tuples, numpy scalars) are rejected, not flattened.
    """

    def encode(self, payload: Payload) -> bytes:
        """Encodes a payload and checks that it decodes to an equal one.

        Raises:
            PayloadError: a value in the payload would not come back equal; its path starts at `payload`.
        """
        try:
            try:
                data = _pack(payload)
            except TypeError:  # tuples, or an unsupported type
                data = _pack(_as_decoded(payload))
            # Values that msgpack packs but does not return equal show up here: NaN, odd map keys, distant dates.
            decoded = self.decode(data)
            faithful = decoded == payload or decoded == _as_decoded(payload)
        except (TypeError, ValueError, OverflowError, BufferError, RecursionError) as error:
            raise _find_offender(payload) or PayloadError("payload", f"cannot be stored: {error}") from error
        except Exception as error:  # msgpack in pure Python calls repr, which may raise anything
            if offender := _find_offender(payload):
                raise offender from error
            raise
        if not faithful:
            raise _find_offender(payload) or PayloadError("payload", "would not come back equal")
        return data

    def decode(self, data: bytes) -> Payload:
        """Decodes what `encode` returned."""
        return msgpack.unpackb(data, strict_map_key=False, timestamp=3)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return "MsgpackCodec()"


@dataclass(frozen=True, slots=True)
class _AbsentCodec:
    """Stands for a codec that was not pickled: it may hold a key, or what cannot be pickled."""

    name: str

    def encode(self, payload: Payload) -> bytes:  # noqa: ARG002 -- as a codec's
        raise TypeError(f"{self.name} is not pickled with a step run")

    def decode(self, data: bytes) -> Payload:  # noqa: ARG002 -- as a codec's
        raise TypeError(f"{self.name} is not pickled with a step run: read it with `get_step_run` of a store")


@dataclass(frozen=True, slots=True)
class Payloads:
    """A codec and the store's own checks."""

    codec: Codec
    max_bytes: int

    def __reduce__(self) -> tuple[type[Payloads], tuple[Codec, int]]:
        travels = type(self.codec) is MsgpackCodec
        return Payloads, (self.codec if travels else _AbsentCodec(self._name), self.max_bytes)

    @property
    def _name(self) -> str:
        codec = self.codec
        return codec.name if isinstance(codec, _AbsentCodec) else type(codec).__name__

    def encode_own(self, payload: Payload) -> bytes:
        """Encodes an error payload that the store made. It is small, and no limit may prevent recording a failure."""
        return self.codec.encode(payload)

    def encode(self, argument: str, payload: object) -> bytes:
        """Encodes the payload given as `argument`.

        Raises:
            PayloadError: it is not a dict, or the codec rejects it; has the path.
            PayloadTooLargeError: it is larger than `max_bytes` when encoded.
        """
        if not isinstance(payload, dict):
            raise PayloadError(argument, f"must be a dict, not {described(payload)}")
        try:
            data = self.codec.encode(cast("Payload", payload))
        except InvalidArgumentError as error:
            raise PayloadError(error.argument.replace("payload", argument, 1), error.problem) from error.__cause__
        except (ValueError, TypeError) as error:
            raise PayloadError(argument, f"rejected by {type(self.codec).__name__}: {error}") from error
        if type(data) is not bytes or not data:
            raise PayloadError(
                argument, f"{type(self.codec).__name__} must encode to non-empty bytes, not {described(data)}"
            )
        if len(data) > self.max_bytes:
            raise PayloadTooLargeError(
                argument, f"is {len(data):,} bytes, over the store's max_payload_bytes of {self.max_bytes:,}"
            )
        return data

    def decode(self, data: bytes, run_id: str, step: str, name: str) -> Payload:
        """Decodes a stored payload.

        Raises:
            UndecodablePayloadError: the codec cannot read it, usually because another codec wrote it.
        """
        try:
            payload = self.codec.decode(data)
        except Exception as error:  # of any kind: the caller needs to know which payload it was
            if self._can_decode(data):
                raise  # a signal handler raised it, usually that of SIGALRM
            raise UndecodablePayloadError(run_id, step, name, self._name) from error
        if not isinstance(cast("object", payload), dict):
            raise UndecodablePayloadError(run_id, step, name, self._name)
        return payload

    def _can_decode(self, data: bytes) -> bool:
        try:
            self.codec.decode(data)
        except Exception:  # noqa: BLE001 -- a codec may raise anything
            return False
        return True


# Idle packers; creating one costs more than packing. Any thread may use one.
_packers: deque[Any] = deque()


def _pack(value: object) -> bytes:
    try:
        packer = _packers.pop()
    except IndexError:
        packer = msgpack.Packer(strict_types=True, datetime=True)
    data = packer.pack(value)  # if this raises, the packer is dropped
    if len(data) < _PACKER_BYTES:  # a packer never shrinks its buffer
        _packers.append(packer)
    return data


def error_payload(error: BaseException) -> Payload:
    """Returns a dict for an exception: `type`, `message`, and the end of the `traceback`."""
    with defer_sigalrm():  # an exception raised by a SIGALRM handler would look like one raised by str(error)
        return _error_payload(error)


def _error_payload(error: BaseException) -> Payload:
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 -- a failing str() must not hide the failure
        message = f"(str() of this {type(error).__name__} raised)"
    cls = type(error)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    try:
        lines = "".join(traceback.TracebackException.from_exception(error, limit=-20).format())
    except Exception:  # noqa: BLE001 -- exceptions may have attributes that raise
        lines = "".join(traceback.format_tb(error.__traceback__, limit=-20))
    return {
        "type": _printable(name),
        "message": _printable(message)[:_MESSAGE_CHARS],
        "traceback": _printable(lines)[-_TRACEBACK_CHARS:],
    }


def _printable(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def _as_decoded(value: object) -> object:
    """Returns the value as it will be decoded: tuples as lists, datetimes in UTC.

    Subclasses are not converted, so they are rejected. UTC, because a datetime in the hour that is repeated when
    clocks are set back does not equal any datetime in another zone.
    """
    if type(value) is dict:
        items = cast("dict[object, object]", value)
        converted = {_as_decoded_key(key): _as_decoded(item) for key, item in items.items()}
        if len(converted) != len(items):
            raise ValueError("two of its keys would become equal")
        return converted
    if type(value) in (list, tuple):
        return [_as_decoded(item) for item in cast("list[object]", value)]
    return _as_decoded_key(value)


def _as_decoded_key(value: Any) -> object:
    return value.astimezone(UTC) if type(value) is datetime and value.tzinfo is not None else value


def _find_offender(payload: object) -> PayloadError | None:
    """Finds the first value that msgpack does not support, depth first. Slow; only for payloads that are rejected."""
    stack: list[tuple[Any, str, int]] = [(payload, "payload", 1)]
    while stack:
        value, path, depth = stack.pop()
        if depth > _MAX_DEPTH:
            return PayloadError(path, f"nested more than {_MAX_DEPTH} levels deep")
        found: list[tuple[Any, str, int]] = []
        if type(value) is dict:
            keys: set[object] = set()
            for key, item in cast("dict[object, object]", value).items():
                inner = f"{path}[{_subscript(key)}]"
                if problem := "a tuple cannot be a key" if type(key) is tuple else _scalar_problem(key):
                    return PayloadError(f"key {inner}", problem)
                if (converted := _as_decoded_key(key)) in keys:
                    return PayloadError(f"key {inner}", "the same instant as another key: one of the two would be lost")
                keys.add(converted)
                found.append((item, inner, depth + 1))
        elif type(value) in (list, tuple):
            found = [(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
        elif problem := _scalar_problem(value):
            return PayloadError(path, problem)
        stack += reversed(found)
    return None


def _subscript(key: object) -> str:
    try:
        text = repr(key)
    except Exception:  # noqa: BLE001 -- a key without a repr must still be rejected
        return f"a {type(key).__name__} without a repr"
    return text if len(text) <= _KEY_CHARS else text[:_KEY_CHARS] + "…"


def _scalar_problem(value: object) -> str | None:
    if type(value) is int:
        return None if -(2**63) <= value < 2**64 else "int of more than 64 bits"
    if type(value) is float:
        return "NaN is not equal to itself, so it would not come back equal" if math.isnan(value) else None
    if type(value) is str:
        return "str with a lone surrogate, which UTF-8 cannot encode" if _SURROGATE.search(value) else None
    if type(value) is datetime:
        if value.tzinfo is None:
            return "datetime without a time zone; use an aware one, such as datetime.now(timezone.utc)"
        try:
            msgpack.unpackb(msgpack.packb(value, datetime=True), timestamp=3)
        except (OverflowError, ValueError) as error:
            return f"datetime that msgpack cannot encode ({error})"
        return None
    if value is None or type(value) in (bool, bytes, bytearray):
        return None
    return f"{described(value)}; allowed are {_ALLOWED}"
