"""Codecs that compress and encrypt payloads. Pass one to a store: `StepRunStore(client, codec=CompressedCodec())`.

To do both, compress first: `EncryptedCodec(keys, current="2026-01", codec=CompressedCodec())`.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from squidstep_redis import Codec, InvalidArgumentError, MsgpackCodec, PayloadError, Place, PlacedCodec

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["CompressedCodec", "EncryptedCodec"]

_Payload = dict[str, Any]

# A compressed payload begins with MARK and one of the tags. No msgpack begins with MARK, so what `MsgpackCodec` wrote
# is read as it is. The output of another codec that begins with it gets the tag STORED.
_MARK: Final = b"\xc1"
_ZLIB, _ZSTD, _STORED = _MARK + b"z", _MARK + b"s", _MARK + b"r"
_TAGS: Final = {"zlib": _ZLIB, "zstd": _ZSTD}
_LEVELS: Final = {"zlib": (6, 9), "zstd": (3, 22)}  # the default and the highest
_MEBIBYTE: Final = 1024 * 1024
_MAX_LIMIT: Final = 1024 * _MEBIBYTE
_SMALLEST_WINDOW_LOG: Final = 10  # zstd's own limit


class CompressedCodec:
    """Compresses what another codec encodes, with zlib or zstd.

    It reads what either algorithm compressed, at any level. If the other codec is `MsgpackCodec`, it also reads what
    that codec wrote without compression. So you can introduce it, or change its settings, while runs exist. First
    update all readers.

    Args:
        codec: encodes the payload; None: `MsgpackCodec()`.
        algorithm: "zlib", or "zstd", which needs the extra `zstd` before Python 3.14.
        level: from 1 to 9 for zlib, default 6; from 1 to 22 for zstd, default 3. Higher is slower and smaller.
        threshold: a payload that is encoded to fewer bytes, or that would not become smaller, is not compressed.
        max_decompressed_bytes: a payload that is encoded to more bytes is rejected, and decompression stops there, so
            that a small stored value cannot exhaust the memory of its readers.

    Raises:
        InvalidArgumentError: an argument was rejected.
        ImportError: zstd is not installed.
    """

    def __init__(
        self,
        codec: Codec | None = None,
        *,
        algorithm: Literal["zlib", "zstd"] = "zlib",
        level: int | None = None,
        threshold: int = 1_024,
        max_decompressed_bytes: int = 64 * _MEBIBYTE,
    ) -> None:
        self._codec = _check_codec(codec)
        if not isinstance(cast("object", algorithm), str) or algorithm not in _TAGS:
            raise InvalidArgumentError("algorithm", f"must be 'zlib' or 'zstd', not {algorithm!r}")
        self._tag = _TAGS[algorithm]
        default, highest = _LEVELS[algorithm]
        self._level = _integer("level", default if level is None else level, 1, highest)
        self._threshold = _integer("threshold", threshold, 0, _MAX_LIMIT)
        self._limit = _integer("max_decompressed_bytes", max_decompressed_bytes, 1, _MAX_LIMIT)
        if algorithm == "zstd":
            _zstd()

    def encode(self, payload: _Payload) -> bytes:
        """Encodes a payload, and compresses the result if it is long enough.

        Raises:
            PayloadError: the payload is too large, or the other codec rejects it.
        """
        data = self._codec.encode(payload)
        if len(data) > self._limit:
            size = f"{len(data):,} bytes before it is compressed"
            raise PayloadError("payload", f"is {size}, over max_decompressed_bytes of {self._limit:,}")
        if len(data) >= self._threshold:
            compress: Any = zlib.compress if self._tag == _ZLIB else _zstd().compress
            compressed = self._tag + compress(data, self._level)
            if len(compressed) < len(data):
                return compressed
        return _STORED + data if data.startswith(_MARK) else data

    def decode(self, data: bytes) -> _Payload:
        """Decodes what `encode` returned.

        Raises:
            PayloadError: it is damaged, or too large when it is decompressed.
        """
        if not data.startswith(_MARK):
            return self._codec.decode(data)
        tag, body = data[:2], data[2:]
        if tag == _STORED:
            return self._codec.decode(body)
        if tag == _ZLIB:
            decompressor: Any = zlib.decompressobj()
            damaged: type[Exception] = zlib.error
        elif tag == _ZSTD:
            zstd = _zstd()
            window = max(self._limit.bit_length(), _SMALLEST_WINDOW_LOG)
            decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})
            damaged = zstd.ZstdError
        else:
            raise PayloadError("payload", "it is not what CompressedCodec writes")
        try:
            decompressed = decompressor.decompress(body, self._limit + 1)
        except damaged as error:
            raise PayloadError("payload", f"it cannot be decompressed: {error}") from error
        if len(decompressed) > self._limit:
            raise PayloadError("payload", f"it is over max_decompressed_bytes of {self._limit:,}")
        if not decompressor.eof or decompressor.unused_data:
            raise PayloadError("payload", "it cannot be decompressed: it is truncated, or followed by other bytes")
        return self._codec.decode(decompressed)

    def __repr__(self) -> str:
        algorithm = "zlib" if self._tag == _ZLIB else "zstd"
        return f"CompressedCodec({self._codec!r}, algorithm={algorithm!r}, level={self._level})"


# An encrypted payload: VERSION, the length of the key id, the key id, the nonce, the ciphertext with its tag.
_VERSION: Final = b"\x01"
_KEY_SIZES: Final = (16, 24, 32)
_NONCE: Final = 12  # bytes; as recommended for GCM
_TAG: Final = 16
_MAX_KEY_ID: Final = 255


class EncryptedCodec:
    """Encrypts what another codec encodes, with AES-GCM. It needs the extra `encryption`.

    Without the key, a payload can be neither read nor changed. With it, a payload can be decrypted only in its place:
    prefix, run, step and field. A payload that was moved from another place, changed or truncated, or whose key is not
    known, raises UndecodablePayloadError.

    What stays readable: run ids, step names, owners, statuses, times, and the approximate size of payloads.

    Args:
        keys: each key by its id: 16, 24 or 32 random bytes, such as `os.urandom(32)`. The id is stored with each
            payload, as readable text of up to 255 bytes. Never reuse an id for another key.
        current: id of the key that encrypts. The others only decrypt. Change it before it has encrypted 4 billion
            payloads, because nonces are random.
        codec: encodes the payload; None: `MsgpackCodec()`.

    Raises:
        InvalidArgumentError: an argument was rejected.
        ImportError: `cryptography` is not installed.
    """

    def __init__(self, keys: Mapping[str, bytes], *, current: str, codec: Codec | None = None) -> None:
        self._codec = _check_codec(codec)
        if not isinstance(cast("object", keys), Mapping):
            raise InvalidArgumentError("keys", f"must be a mapping of keys by their ids, not {type(keys).__name__}")
        self._ciphers = {key_id: _cipher(key_id, key) for key_id, key in keys.items()}
        if not isinstance(cast("object", current), str) or current not in self._ciphers:
            raise InvalidArgumentError("current", f"must be one of the key ids {sorted(keys)}, not {current!r}")
        self._current = current

    def encode_at(self, payload: _Payload, place: Place) -> bytes:
        """Encodes and encrypts a payload for its place.

        Raises:
            PayloadError: the other codec rejects it.
        """
        data = self._codec.encode(payload)
        key_id = self._current.encode()
        nonce = os.urandom(_NONCE)
        header = _VERSION + bytes([len(key_id)]) + key_id
        return header + nonce + self._ciphers[self._current].encrypt(nonce, data, _associated(header, place))

    def decode_at(self, data: bytes, place: Place) -> _Payload:
        """Decrypts and decodes what `encode_at` returned for the same place.

        Raises:
            PayloadError: the key is not known, or the data was changed, truncated or moved.
        """
        start = 2 + data[1] if len(data) > 1 else 0
        header, nonce, sealed = data[:start], data[start : start + _NONCE], data[start + _NONCE :]
        if header[:1] != _VERSION or len(sealed) < _TAG:
            raise PayloadError("payload", "it is not what EncryptedCodec writes, or it was truncated")
        key_id = header[2:].decode(errors="backslashreplace")
        if (cipher := self._ciphers.get(key_id)) is None:
            raise PayloadError("payload", f"key {key_id!r} is not known, only {sorted(self._ciphers)}")
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 -- of an extra; __init__ has loaded it

        try:
            opened = cipher.decrypt(nonce, sealed, _associated(header, place))
        except InvalidTag as error:
            problem = f"key {key_id!r} does not authenticate it: it was changed, truncated, or moved from another"
            raise PayloadError("payload", f"{problem} prefix, run, step or field") from error
        return self._codec.decode(opened)

    def __repr__(self) -> str:
        return f"EncryptedCodec({sorted(self._ciphers)}, current={self._current!r}, codec={self._codec!r})"


def _associated(header: bytes, place: Place) -> bytes:
    """Returns what is authenticated but not stored. Each part begins with its length, so that parts cannot overlap."""
    parts = (header, *(text.encode() for text in place))
    return b"".join(len(part).to_bytes(4) + part for part in parts)


def _cipher(key_id: object, key: object) -> AESGCM:
    if not isinstance(key_id, str) or not key_id.isprintable() or not 0 < len(key_id.encode()) <= _MAX_KEY_ID:
        problem = f"an id must be 1 to {_MAX_KEY_ID} bytes of printable text, not {key_id!r}"
        raise InvalidArgumentError("keys", problem)
    if not isinstance(key, bytes) or len(key) not in _KEY_SIZES:
        raise InvalidArgumentError("keys", f"key {key_id!r} must be 16, 24 or 32 bytes")  # never quote a key
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 -- of an extra
    except ModuleNotFoundError as error:
        raise ImportError("EncryptedCodec needs cryptography: pip install 'squidstep-redis[encryption]'") from error
    return AESGCM(key)


def _zstd() -> Any:
    """Returns the standard library's module, or its backport."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd  # noqa: PLC0415 -- optional
        else:
            from backports import zstd  # noqa: PLC0415 -- of an extra
    except ModuleNotFoundError as error:
        raise ImportError("zstd is not installed: pip install 'squidstep-redis[zstd]'") from error
    return zstd


def _check_codec(codec: Codec | None) -> Codec:
    if codec is None:
        return MsgpackCodec()
    if isinstance(cast("object", codec), Codec) and not isinstance(codec, type):
        return codec
    if isinstance(cast("object", codec), PlacedCodec):
        raise InvalidArgumentError("codec", f"cannot be {type(codec).__name__}: encrypt last, after all other codecs")
    raise InvalidArgumentError("codec", f"must have encode() and decode(), not {type(codec).__name__}")


def _integer(argument: str, value: object, minimum: int, maximum: int) -> int:
    if type(value) is not int or not minimum <= value <= maximum:
        raise InvalidArgumentError(argument, f"must be an int from {minimum:,} to {maximum:,}, not {value!r}")
    return value
