"""The settings of one store that its operations need."""

from __future__ import annotations

from functools import cached_property
from typing import Final, cast

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Seconds
from squidstep_redis.protocol.codec import Codec, MsgpackCodec, Payloads
from squidstep_redis.protocol.fingerprints import Fingerprint, Fingerprints, check_fingerprint
from squidstep_redis.protocol.keys import Keys
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
        codec: Codec | None,
        max_payload_bytes: int,
        run_ttl: Seconds | None,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        """Raises InvalidArgumentError if a setting is rejected."""
        if codec is not None and (isinstance(codec, type) or not isinstance(cast("object", codec), Codec)):
            raise InvalidArgumentError("codec", f"must have encode() and decode(), not {described(codec)}")
        self.prefix = prefix
        self.keys = Keys(arguments.prefix(prefix))
        max_bytes = arguments.integer("max_payload_bytes", max_payload_bytes, MAX_PAYLOAD_BYTES)
        self.payloads = Payloads(codec or MsgpackCodec(), max_bytes)
        self.records = Records(prefix, self.payloads)
        self.run_ttl_ms = arguments.milliseconds("run_ttl", run_ttl)
        check_fingerprint(fingerprint)
        self.fingerprints = Fingerprints(fingerprint)

    @cached_property
    def lease_expired_payload(self) -> bytes:
        """The last error of a step whose last allowed attempt lost its lease. Encoded here, because Lua cannot."""
        message = "the lease of the last attempt expired without a result"
        return self.payloads.encode_own({"type": "LeaseExpired", "message": message})
