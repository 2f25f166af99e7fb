"""What all operations share: the settings of a store, and what becomes of a run id. Pure, like all that makes calls."""

from __future__ import annotations

import os
from binascii import b2a_base64
from functools import lru_cache
from itertools import count
from typing import Final, NamedTuple, cast

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Seconds
from squidstep_redis.protocol.codec import Codec, MsgpackCodec, Payloads
from squidstep_redis.protocol.keys import Keys, RunKeys, member_prefix
from squidstep_redis.protocol.records import Records

MAX_PAYLOAD_BYTES: Final = 512 * 1024 * 1024  # the server's own limit on one value
RUNS_KNOWN: Final = 1_024  # of one store: who begins a step completes it, as a rule

_nonces = count()


def nonce() -> bytes:
    """Tells a call from the others of this process: no connection is shared with another process."""
    return b"%d" % next(_nonces)


def token() -> bytes:
    """Tells a claim from all others: 72 random bits in 12 characters, so that a state line stays compact."""
    return b2a_base64(os.urandom(9), newline=False)


class Run(NamedTuple):
    """A run id that has been checked, and what is sent of it.

    Attributes:
        text: the id.
        keys: those of the run, and of its bucket.
        member: what begins the members of its steps in the two indexes.
        wake: the key by which those who wait for one of its steps are told.
    """

    text: str
    keys: RunKeys
    member: bytes
    wake: bytes


class Operations:
    """The settings of one store."""

    def __init__(self, prefix: str, codec: Codec | None, max_payload_bytes: int, run_ttl: Seconds | None) -> None:
        """Raises InvalidArgumentError for settings that a store cannot have."""
        if codec is not None and (isinstance(codec, type) or not isinstance(cast("object", codec), Codec)):
            raise InvalidArgumentError("codec", f"must have encode() and decode(), not {described(codec)}")
        self.prefix = prefix
        self.keys = Keys(arguments.prefix(prefix))
        max_bytes = arguments.integer("max_payload_bytes", max_payload_bytes, MAX_PAYLOAD_BYTES)
        self.payloads = Payloads(codec or MsgpackCodec(), max_bytes)
        self._records = Records(prefix, self.payloads)
        self._ttl_ms = arguments.milliseconds("run_ttl", run_ttl)
        self._known_run = lru_cache(RUNS_KNOWN)(self._checked_run)

    def _run(self, run_id: RunId) -> Run:
        return self._known_run(run_id) if type(run_id) is str else self._checked_run(run_id)

    def _checked_run(self, run_id: RunId) -> Run:
        text, data = arguments.run_id(run_id)
        return Run(text, self.keys.run(data), member_prefix(data), self.keys.wake(data))
