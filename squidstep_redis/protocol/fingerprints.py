"""Fingerprints of inputs, by which a step recognizes a delivery with a different input.

A fingerprint is a hash of a canonical form of the input. The form depends on the values alone: not on the order of
keys, on the codec, or on the version of Python.
"""

from __future__ import annotations

import struct
from base64 import urlsafe_b64encode
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from inspect import iscoroutine
from typing import Any, Final, NamedTuple, cast
from uuid import UUID

from squidstep_redis.errors import InputMismatchError, InvalidArgumentError, PayloadError, described
from squidstep_redis.escaping import escaped
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.call import Reply
from squidstep_redis.signals import is_raised_by_handler

Fingerprint = bool | str | Callable[[dict[str, Any]], object]
"""True: hashes the whole input. A str: the fingerprint itself. A function: hashes what it returns. False: none."""

_DIGEST_BYTES: Final = 18  # 24 characters of base64
_TEXT_KINDS: Final = (Decimal, UUID, datetime, date, time, timedelta)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def check_fingerprint(value: object) -> None:
    """Raises InvalidArgumentError if a value is no Fingerprint and not None."""
    if isinstance(value, str):
        arguments.fingerprint(value)
    elif value is not None and not isinstance(value, bool) and not callable(value):
        raise InvalidArgumentError("fingerprint", f"must be a bool, a str or a function, not {described(value)}")


class Fingerprints(NamedTuple):
    """Makes the fingerprints of one store.

    Attributes:
        default: what a fingerprint is made of if an operation does not say it; None: there is none.
    """

    default: Fingerprint | None

    def of(self, fingerprint: Fingerprint | None, argument: str, input: object) -> bytes:
        """Returns the fingerprint of an input as it is sent; empty for none.

        Args:
            fingerprint: what to make it of; None: the default.
            argument: what error messages call the input.
            input: the input, which the codec has accepted.

        Raises:
            InvalidArgumentError: the function raised an exception or returned None, or the str is malformed.
            PayloadError: a value has no canonical form; has the path.
        """
        if fingerprint is None:
            fingerprint = self.default
        if fingerprint is None or fingerprint is False:
            return b""
        if fingerprint is True:
            return digest(argument, input)
        check_fingerprint(fingerprint)
        if isinstance(fingerprint, str):
            return arguments.fingerprint(fingerprint)
        return digest(f"fingerprint of {argument}", _picked(fingerprint, argument, input))


def _picked(function: Any, argument: str, input: object) -> object:
    try:
        picked = function(input)
    except Exception as error:
        if is_raised_by_handler(error):
            raise
        problem = f"its function raised {type(error).__name__} for {argument}: {escaped(str(error))}"
        raise InvalidArgumentError("fingerprint", problem) from error
    if iscoroutine(picked):
        picked.close()
        raise InvalidArgumentError("fingerprint", "must not be a coroutine function")
    if picked is None:  # usually a missing key: then all such inputs would be the same
        raise InvalidArgumentError("fingerprint", f"its function returned None for {argument}")
    return picked


def mismatch(run_id: str, step: str, given: bytes, reply: Reply) -> InputMismatchError:
    """Returns the error for the reply "mismatch" of a script."""
    return InputMismatchError(run_id, step, reply[3].decode(errors="backslashreplace"), given.decode())


# The canonical form: each value is a letter and its content, of a known length or with an end.


def digest(argument: str, value: object) -> bytes:
    """Returns the hash of a value.

    Args:
        argument: what error messages call the value.
        value: anything that a payload may contain.

    Raises:
        PayloadError: a part of it has no canonical form; the error has the path.
    """
    try:
        data = _canonical(value)
    except _NoFormError as error:
        raise PayloadError(argument + "".join(reversed(error.path)), error.problem) from None
    except RecursionError:
        raise PayloadError(argument, "is nested too deeply for a fingerprint") from None
    return urlsafe_b64encode(blake2b(data, digest_size=_DIGEST_BYTES).digest())


class _NoFormError(Exception):
    """A value has no canonical form; `path` leads to it, the last step first."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.path: list[str] = []
        self.problem = f"has no fingerprint: {described(value)}; pass a function that picks the fields"


def _canonical(value: object) -> bytes:
    # One frame per level, because payloads of 500 levels are stored.
    if isinstance(value, dict):
        items: list[bytes] = []
        for key, item in cast("dict[object, object]", value).items():
            try:
                items.append(_canonical(key) + _canonical(item))
            except _NoFormError as error:
                error.path.append(f"[{key!r}]")
                raise
        return b"m%be" % b"".join(sorted(items))
    if isinstance(value, list | tuple):
        elements: list[bytes] = []
        for index, item in enumerate(cast("list[object]", value)):
            try:
                elements.append(_canonical(item))
            except _NoFormError as error:
                error.path.append(f"[{index}]")
                raise
        return b"l%be" % b"".join(elements)
    return _canonical(value.value) if isinstance(value, Enum) else _scalar(value)


def _scalar(value: object) -> bytes:
    if value is None:
        return b"n"
    if isinstance(value, bool):
        return b"t" if value else b"f"
    if isinstance(value, str):
        return _sized(b"s", value.encode(errors="surrogatepass"))
    if isinstance(value, int):
        return b"i%x;" % value
    if isinstance(value, float):
        return b"d" + struct.pack(">d", value + 0.0)  # which makes -0.0 equal to 0.0
    if isinstance(value, bytes | bytearray):
        return _sized(b"b", bytes(value))
    if isinstance(value, datetime) and value.utcoffset() is not None:
        return b"T%x;" % ((value - _EPOCH) // _MICROSECOND)
    for kind in _TEXT_KINDS:
        if isinstance(value, kind):
            return _sized(b"x", f"{kind.__name__} {value}".encode())
    raise _NoFormError(value)


def _sized(letter: bytes, data: bytes) -> bytes:
    return b"%b%x:%b" % (letter, len(data), data)
