"""The settings of one store that its operations need."""

from __future__ import annotations

from typing import Final, cast

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Labels, Seconds
from squidstep_redis.protocol.codec import Codec, MsgpackCodec, Payloads, PlacedCodec
from squidstep_redis.protocol.fingerprints import Fingerprint, Fingerprints, check_fingerprint
from squidstep_redis.protocol.keys import Keys
from squidstep_redis.protocol.labels import labels_data
from squidstep_redis.protocol.records import Records

MAX_PAYLOAD_BYTES: Final = 512 * 1024 * 1024  # the server's own limit on one value


class Context:
    """The settings of one store that every operation receives: prefix, keys, payload rules, record reader, defaults.

    Attributes:
        prefix: prefix of all keys.
        keys: the store's keys.
        payloads: encodes and decodes payloads.
        records: reads records.
        run_ttl_ms: expiry of runs that this store creates, in milliseconds, as it is sent; empty: none.
        fingerprints: makes fingerprints of inputs.
    """

    def __init__(
        self,
        prefix: str,
        codec: Codec | PlacedCodec | None,
        max_payload_bytes: int,
        run_ttl: Seconds | None,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        """Raises InvalidArgumentError if a setting is rejected."""
        has_methods = isinstance(cast("object", codec), Codec | PlacedCodec) and not isinstance(codec, type)
        if codec is not None and not has_methods:
            raise InvalidArgumentError("codec", f"must have encode() and decode(), not {described(codec)}")
        self.prefix = prefix
        self.keys = Keys(arguments.prefix(prefix))
        max_bytes = arguments.integer("max_payload_bytes", max_payload_bytes, MAX_PAYLOAD_BYTES)
        self.payloads = Payloads(MsgpackCodec() if codec is None else codec, max_bytes, prefix)
        self.records = Records(prefix, self.payloads)
        self.run_ttl_ms = arguments.milliseconds("run_ttl", run_ttl)
        check_fingerprint(fingerprint)
        self.fingerprints = Fingerprints(fingerprint)


def settings_of_new_run(context: Context, labels: Labels | None) -> bytes:
    """Returns what a run gets if this call creates it, as it is sent: its expiry, and its labels.

    Raises:
        InvalidArgumentError: a label is rejected.
    """
    return context.run_ttl_ms if labels is None else new_run(context.run_ttl_ms, labels_data(labels))


def new_run(ttl_ms: bytes, labels: bytes) -> bytes:
    """Returns what a run gets if a call creates it, as it is sent: its expiry, and its labels."""
    return b"%b %b" % (ttl_ms, labels) if labels else ttl_ms
