"""What the store returns: step runs, their attempts, and the decisions about them."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, Literal, NamedTuple

from squidstep_redis.errors import PayloadNotReadError
from squidstep_redis.ids import step_run_id

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class StepStatus(StrEnum):
    """The state of a step."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


class Outcome(StrEnum):
    """How one attempt at a step ended."""

    RUNNING = "running"
    """The attempt is still running."""
    COMPLETED = "completed"
    FAILED = "failed"
    RELEASED = "released"
    """The claim was released; the attempt does not count against `max_attempts`."""
    LEASE_EXPIRED = "lease_expired"
    """The lease expired, and another attempt took over or no attempt was left."""


FORMAT: Final = b"1"

# The status letter of a state line (lua/lib/record.lua), and what it means for the step and for its latest attempt.
STATUS: Final = {
    b"p": StepStatus.PENDING,
    b"r": StepStatus.RUNNING,
    b"c": StepStatus.COMPLETED,
    b"f": StepStatus.FAILED,
    b"x": StepStatus.FAILED,
    b"n": StepStatus.FAILED,
}
OUTCOME: Final = {
    b"p": Outcome.RELEASED,
    b"r": Outcome.RUNNING,
    b"c": Outcome.COMPLETED,
    b"f": Outcome.FAILED,
    b"x": Outcome.LEASE_EXPIRED,
    b"n": Outcome.FAILED,
}

# At most 13 digits, so that the sum of three is still a date, and exact text in Lua.
_N, _N_OR_EMPTY, _TOKEN = rb"(\d{1,13})", rb"(\d{0,13})", rb"([!-~]*)"
_LINE: Final = re.compile(
    b" ".join((FORMAT + rb"([prcfxn])", _N, _N_OR_EMPTY, _TOKEN, *3 * (_N_OR_EMPTY,), _N, _N, _TOKEN, rb"(.*)")),
    re.DOTALL,
).fullmatch


class StateLine(NamedTuple):
    """A parsed state line: everything about a step except its payloads. lua/README.md draws it.

    Numbers are converted when they are needed. A part that does not apply is empty.

    Attributes:
        letter: the status letter.
        attempt: number of the latest claim.
        released: how many attempts do not count against `max_attempts`.
        token: claim token of the latest attempt.
        lease: when the lease ends, or the delay after a failure, in ms since the attempt started.
        started: when the attempt started, in ms since the step was created.
        ended: when the attempt ended, in ms since it started.
        created: when the step was created, in ms since 1970.
        position: position among the steps of the run, in order of creation, from 1.
        scheduled_by: nonce of the call that scheduled the step.
        owner: who made the latest claim.
    """

    letter: bytes
    attempt: bytes
    released: bytes
    token: bytes
    lease: bytes
    started: bytes
    ended: bytes
    created: bytes
    position: bytes
    scheduled_by: bytes
    owner: bytes

    @classmethod
    def parse(cls, line: bytes) -> StateLine:
        """Parses a state line; raises ValueError if the scripts would not write it."""
        match = _LINE(line)
        if match is None or not (line.isascii() or match[11].decode()):  # of an owner; raises a ValueError
            raise ValueError(line)
        return cls._make(match.groups())

    def format(self) -> bytes:
        """Returns the line that `parse` accepts."""
        return FORMAT + b" ".join(self)

    @property
    def created_ms(self) -> int:
        """Milliseconds since 1970 at which the step was created."""
        return int(self.created)

    @property
    def started_ms(self) -> int | None:
        """Milliseconds since 1970 at which the latest attempt started; None if there was none."""
        return int(self.created) + int(self.started) if self.started else None

    @property
    def changed_ms(self) -> int:
        """Milliseconds since 1970 of the latest change: when the attempt ended, else when it started or was created."""
        return int(self.created) + int(self.started or 0) + int(self.ended or 0)

    def ms_after_start(self, span: bytes) -> int | None:
        """Milliseconds since 1970 of `lease` or `ended`; None if it does not apply."""
        started = self.started_ms
        return started + int(span) if started is not None and span else None


Decode = Callable[[bytes, str, str, str], dict[str, Any]]
_Payload = bytes | dict[str, Any] | None
_Payloads = tuple[_Payload, _Payload, _Payload, _Payload]


class StepRun:
    """One step of one run, as the store returned it: a snapshot, not a live view.

    The step run that `begin_step` returns with "execute" also carries the claim: pass it to `complete_step`,
    `fail_step`, `extend_claim` or `release_step`. Payloads are decoded on first access. A step run can be pickled and
    sent to another process, with its claim. Your own codec is not sent, because it may hold a key: payloads stay
    encoded, and reading one raises UndecodablePayloadError. There, read them with `get_step_run` of a store. If a
    listing has not read the payloads, reading one raises PayloadNotReadError.

    Attributes:
        run_id: the run.
        step: the step's name.
        status: the state of the step.
        attempt: number of the latest claim, from 1; 0 if there was none. It grows with every claim, so it is a
            fencing token, and together with `id` an idempotency key.
        prefix: key prefix of the store.
        token: token of the claim that this object carries; empty if it carries none.
        cancel_reason: why the run was cancelled, empty without a reason; None if it is not cancelled, or if the
            operation does not say. Operations that skip because of the cancellation set it, and so do `extend_claim`
            and `checkpoint_step`.
    """

    __slots__ = (
        *("_decode", "_decoded", "_line", "_payloads"),
        *("attempt", "cancel_reason", "prefix", "run_id", "status", "step", "token"),
    )

    prefix: Final[str]
    run_id: Final[str]
    step: Final[str]
    status: Final[StepStatus]
    attempt: Final[int]
    token: Final[bytes]
    cancel_reason: Final[str | None]

    def __init__(
        self,
        prefix: str,
        run_id: str,
        step: str,
        line: bytes,
        payloads: _Payloads,
        decode: Decode,
        token: bytes = b"",
        cancel_reason: bytes | None = None,
    ) -> None:
        """Called only by the store; raises ValueError if `line` is not a state line."""
        self._line = parsed = StateLine.parse(line)
        self.run_id = run_id
        self.step = step
        self.status = STATUS[parsed.letter]
        self.attempt = int(parsed.attempt)
        self.prefix = prefix
        self.token = token
        self.cancel_reason = None if cancel_reason is None else cancel_reason.decode(errors="backslashreplace")
        self._payloads = payloads
        self._decoded: dict[int, dict[str, Any]] = {}  # stays behind when the step run is pickled
        self._decode = decode

    def __reduce__(self) -> tuple[Any, ...]:
        reason = None if self.cancel_reason is None else self.cancel_reason.encode()
        place = (self.prefix, self.run_id, self.step)
        return StepRun, (*place, self._line.format(), self._payloads, self._decode, self.token, reason)

    def after_transition(
        self,
        line: bytes,
        decode: Decode,
        output: bytes | None = None,
        last_error: bytes | None = None,
        progress: bytes | None = None,
        cancel_reason: bytes | None = None,
    ) -> StepRun:
        """Returns the step run after a transition of this claim; called only by the store, which decodes it."""
        runs = line[1:2] == b"r"
        payloads = (self._payloads[0], output, last_error, self._payloads[3] if runs and progress is None else progress)
        token = self.token if runs else b""
        return StepRun(self.prefix, self.run_id, self.step, line, payloads, decode, token, cancel_reason)

    def with_claim(self) -> StepRun:
        """Returns this step run, carrying the claim that it shows; it carries none unless the step is running.

        For operators: `release_step(step_run.with_claim())` releases exactly this claim. An `id` stands for any holder.
        """
        token = self._line.token if self.status is StepStatus.RUNNING else b""
        return StepRun(self.prefix, self.run_id, self.step, self._line.format(), self._payloads, self._decode, token)

    @property
    def id(self) -> str:
        """Opaque id, the same from schedule to completion. Accepted wherever a step run is; see `complete_step`."""
        return step_run_id(self.prefix, self.run_id, self.step)

    @property
    def input(self) -> dict[str, Any]:
        """The step's input."""
        value = self._payload(0, "input")
        if value is None:
            raise PayloadNotReadError(self.run_id, self.step, "input")
        return value

    @property
    def output(self) -> dict[str, Any] | None:
        """The step's output; None until it is completed."""
        return self._payload(1, "output")

    @property
    def last_error(self) -> dict[str, Any] | None:
        """Why the latest attempt failed; None if it did not."""
        return self._payload(2, "last_error")

    @property
    def progress(self) -> dict[str, Any] | None:
        """What the latest checkpoint stored, in this attempt or an earlier one; None without one, or once completed.

        `extend_claim` does not read it: it returns what it stores, or else what its argument knew.
        """
        if self._payloads[0] is None:
            raise PayloadNotReadError(self.run_id, self.step, "progress")
        return self._payload(3, "progress")

    @property
    def owner(self) -> str | None:
        """Who made the latest claim, as given to `begin_step`."""
        return self._line.owner.decode() or None

    @property
    def current_token(self) -> bytes:
        """Token of the latest claim, as stored. It identifies the claim, even if this object does not carry it.

        `expire_claim` uses it.
        """
        return self._line.token

    @property
    def created_at(self) -> datetime:
        """When the record was created: the server's clock, to the millisecond, in UTC."""
        return moment(self._line.created_ms)

    @property
    def started_at(self) -> datetime | None:
        """When the latest attempt was claimed; None if there was none."""
        return _moment(self._line.started_ms)

    @property
    def ended_at(self) -> datetime | None:
        """When the latest attempt was completed, failed or released, or its lease expired; None while it runs."""
        return _moment(self._line.ms_after_start(self._line.ended))

    @property
    def lease_ends_at(self) -> datetime | None:
        """When the claim can be taken over; None if it never expires or the step is not running."""
        if self.status is not StepStatus.RUNNING:
            return None
        return _moment(self._line.ms_after_start(self._line.lease))

    @property
    def final(self) -> bool:
        """Whether the step has failed permanently: no delivery can claim it again, until `retry_step`."""
        return self._line.letter == b"n"

    @property
    def retry_at(self) -> datetime | None:
        """Before this time, a failed step cannot be claimed again; None if there was no delay, or it has not failed."""
        return _moment(self._line.ms_after_start(self._line.lease)) if self._line.letter == b"f" else None

    @property
    def attempts_used(self) -> int:
        """Number of attempts that count against `max_attempts`. Released ones, and those before a retry, do not."""
        return self.attempt - int(self._line.released or 0)

    @property
    def position(self) -> int:
        """Position among the step runs of the run, from 1, in order of creation."""
        return int(self._line.position)

    def _payload(self, index: int, name: str) -> dict[str, Any] | None:
        value = self._payloads[index]
        if not isinstance(value, bytes):
            return value
        if index not in self._decoded:
            self._decoded[index] = self._decode(value, self.run_id, self.step, name)
        return self._decoded[index]

    def _key(self) -> tuple[object, ...]:
        return (self.prefix, self.run_id, self.step, self.status, self.attempt, self._line[4:])

    def __eq__(self, other: object) -> bool:
        """Equal if both show the same state; progress, and whether one carries the claim, do not matter."""
        if not isinstance(other, StepRun):
            return NotImplemented
        if self._key() != other._key():
            return False
        # The same bytes are equal, even if they cannot be decoded here, or decode to a NaN, which equals nothing.
        return self._payloads[:3] == other._payloads[:3] or all(
            self._payload(index, name) == other._payload(index, name)
            for index, name in enumerate(("input", "output", "last_error"))
        )

    def __hash__(self) -> int:
        return hash((self.run_id, self.step, self.attempt))

    def __repr__(self) -> str:
        owner = f", owner={self.owner!r}" if self.owner else ""
        claimed = ", claimed" if self.token else ""
        return f"<StepRun {self.run_id!r} {self.step!r} {self.status} attempt={self.attempt}{owner}{claimed}>"


class Attempt(NamedTuple):
    """One attempt at a step."""

    number: int
    owner: str | None
    outcome: Outcome
    error: dict[str, Any] | None
    started_at: datetime
    ended_at: datetime | None


SkipReason = Literal["busy", "completed", "failed", "delayed", "exhausted", "superseded", "cancelled"]


class _BeginPair(NamedTuple):
    step_run: StepRun
    decision: Literal["execute", "skip"]


class BeginResult(_BeginPair):
    """What `begin_step` returns; unpacks to `(step_run, decision)`.

    Attributes:
        reason: why to skip: "busy", "completed", "failed", "delayed", "exhausted", "superseded" or "cancelled"; None
            when the decision is "execute".
        retry_in: seconds until the live lease that blocks this call expires, or the delay after a failure ends; None
            if there is neither.
        takeover: whether the claim replaced a claim whose lease had expired: the previous holder's work may be
            half done. A call that is re-sent after a lost reply does not report it.
    """

    reason: SkipReason | None
    retry_in: float | None
    takeover: bool

    def __new__(
        cls, step_run: StepRun, reason: SkipReason | None, retry_in: float | None, takeover: bool = False
    ) -> BeginResult:
        """Called only by the store."""
        self = super().__new__(cls, step_run, "execute" if reason is None else "skip")
        self.reason = reason
        self.retry_in = retry_in
        self.takeover = takeover
        return self

    def __reduce__(self) -> tuple[type[BeginResult], tuple[StepRun, SkipReason | None, float | None, bool]]:
        return BeginResult, (self.step_run, self.reason, self.retry_in, self.takeover)

    @property
    def busy(self) -> bool:
        """Another claim is live: retry in `retry_in` seconds. If that is None, the claim never expires."""
        return self.reason == "busy"

    @property
    def failed(self) -> bool:
        """The step has failed permanently: no delivery can claim it again, until `retry_step`."""
        return self.reason == "failed"

    @property
    def delayed(self) -> bool:
        """The step has failed, and may be claimed again in `retry_in` seconds."""
        return self.reason == "delayed"

    @property
    def exhausted(self) -> bool:
        """`max_attempts` is reached: the step stays failed."""
        return self.reason == "exhausted"

    @property
    def superseded(self) -> bool:
        """This same call was granted a claim earlier, and that claim has ended since."""
        return self.reason == "superseded"

    @property
    def cancelled(self) -> bool:
        """The run is cancelled; `step_run.cancel_reason` says why. A step run at position 0 is not stored."""
        return self.reason == "cancelled"


class ScheduleResult(NamedTuple):
    """What `schedule_step` returns: the step run, and whether this call created it.

    In a cancelled run, a step without a record is skipped: its step run has a `cancel_reason`, is at position 0, and is
    not stored.
    """

    step_run: StepRun
    decision: Literal["schedule", "skip"]


def moment(ms: int) -> datetime:
    """Converts milliseconds since 1970 to a datetime in UTC."""
    return _EPOCH + timedelta(milliseconds=ms)


def _moment(ms: int | None) -> datetime | None:
    return None if ms is None else moment(ms)
