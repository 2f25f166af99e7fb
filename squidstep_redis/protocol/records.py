"""Turns records, as the scripts return them, into step runs and attempts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from squidstep_redis.errors import CorruptRunError, SquidstepError
from squidstep_redis.model import FORMAT, OUTCOME, Attempt, StateLine, StepRun
from squidstep_redis.protocol.call import corrupt, newer
from squidstep_redis.protocol.codec import Payloads

StoredPayloads = tuple[bytes | None, bytes | None, bytes | None, bytes | None]

NO_PAYLOADS: Final[StoredPayloads] = (None, None, None, None)

IMPORTED_CHECKPOINT: Final = b"0 import 0\n"  # before the payload; any checkpoint is later
_CHECKPOINT: Final = re.compile(rb"\d{1,13} \S+ \d+")

LEASE_EXPIRED: Final = b"lease_expired"
"""The stored error of a step whose last allowed attempt lost its lease. No codec encodes it: the same bytes are sent
for each step of a call, and a codec may encode for one place only."""


def step_name(run: str, name: bytes, key: bytes) -> str:
    """Returns the name of a stored step as text.

    Raises:
        CorruptRunError: this library would not store it. It names `key`.
    """
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise CorruptRunError(run, key.decode(), f"names the step {name!r}, which squidstep_redis did not write")
    return text


def lease_expired_error() -> dict[str, Any]:
    """Returns the error for which LEASE_EXPIRED stands."""
    return {"type": "LeaseExpired", "message": "the lease of the last attempt expired without a result"}


def progress_payload(run: str, step: str, stored: bytes | None, key: bytes) -> bytes | None:
    r"""Returns the payload of stored progress, which is a line about the checkpoint, "\n", and the payload.

    Raises:
        CorruptRunError: the scripts would not write it. It names `key`.
    """
    if stored is None:
        return None
    checkpoint, _, payload = stored.partition(b"\n")
    if not _CHECKPOINT.fullmatch(checkpoint):
        raise corrupt(run, key.decode(), f"p{step}")
    return payload


@dataclass(frozen=True, slots=True)
class Records:
    """Reads the records of one store."""

    prefix: str
    payloads: Payloads

    def record(
        self, run: str, step: str, values: list[bytes | None], key: bytes, cancel_reason: bytes | None = None
    ) -> StepRun:
        """Returns the step run of a whole record: state line, input, output, error, progress.

        Raises:
            CorruptRunError: a part is missing, or the scripts would not write the line. It names `key`.
        """
        line, input, output, last_error, progress = values
        if line is None or input is None or (output is None) == (line[1:2] == b"c"):
            raise self.unreadable(run, step, line or b"", key)
        progress = progress_payload(run, step, progress, key)
        return self.step_run(run, step, line, (input, output, last_error, progress), key, b"", cancel_reason)

    def step_run(
        self,
        run: str,
        step: str,
        line: bytes,
        payloads: StoredPayloads,
        key: bytes,
        token: bytes = b"",
        cancel_reason: bytes | None = None,
    ) -> StepRun:
        """Returns the step run of a state line, with the payloads that are known and the claim's token if any.

        Raises:
            CorruptRunError: the scripts would not write the line. It names `key`.
        """
        stored: tuple[bytes | None, bytes | None, bytes | dict[str, Any] | None, bytes | None] = payloads
        if payloads[2] == LEASE_EXPIRED and line[1:2] == b"x":
            stored = (payloads[0], payloads[1], lease_expired_error(), payloads[3])
        try:
            return StepRun(self.prefix, run, step, line, stored, self.payloads.decode, token, cancel_reason)
        except ValueError:
            raise self.unreadable(run, step, line, key) from None

    def state(self, run: str, step: str, line: bytes, key: bytes) -> StateLine:
        """Returns a parsed state line.

        Raises:
            CorruptRunError: the scripts would not write the line. It names `key`.
        """
        try:
            return StateLine.parse(line)
        except ValueError:
            raise self.unreadable(run, step, line, key) from None

    def attempt(self, run: str, step: str, entry: bytes, key: bytes) -> Attempt:
        r"""Returns the attempt of a history entry: a state line, "\n", its error.

        Raises:
            CorruptRunError: the scripts would not write the line. It names `key`.
        """
        line, _, error = entry.partition(b"\n")  # an owner has no line break: the first one ends the line
        step_run = self.step_run(run, step, line, (None, None, error or None, None), key)
        if (started := step_run.started_at) is None:
            raise self.unreadable(run, step, line, key)
        outcome = OUTCOME[line[1:2]]
        return Attempt(step_run.attempt, step_run.owner, outcome, step_run.last_error, started, step_run.ended_at)

    def unreadable(self, run: str, step: str, line: bytes, key: bytes) -> SquidstepError:
        """Returns the error for a state line that does not parse: a newer format, or corruption. It names `key`."""
        format = line[: len(line) - len(line.lstrip(b"0123456789"))]
        if format not in (b"", FORMAT):
            return newer(run, key.decode(), format.decode())
        return corrupt(run, key.decode(), f"s{step}")
