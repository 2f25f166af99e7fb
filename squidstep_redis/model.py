"""What the store answers: step runs, their attempts, and the decisions about them."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import crc32
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, Literal, NamedTuple, cast

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class StepStatus(StrEnum):
    """Where a step run stands."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


class Outcome(StrEnum):
    """How one attempt at a step ended."""

    RUNNING = "running"
    """It has not ended."""
    COMPLETED = "completed"
    FAILED = "failed"
    RELEASED = "released"
    """Given back; it does not count against `max_attempts`."""
    LEASE_EXPIRED = "lease_expired"
    """Its lease ended and another attempt took over, or none was left."""


FORMAT: Final = b"1"

# The status letter of a state line (lua/lib/record.lua), and what it says of the step and of its latest attempt.
STATUS: Final = {
    b"p": StepStatus.PENDING,
    b"r": StepStatus.RUNNING,
    b"c": StepStatus.COMPLETED,
    b"f": StepStatus.FAILED,
    b"x": StepStatus.FAILED,
}
OUTCOME: Final = {
    b"p": Outcome.RELEASED,
    b"r": Outcome.RUNNING,
    b"c": Outcome.COMPLETED,
    b"f": Outcome.FAILED,
    b"x": Outcome.LEASE_EXPIRED,
}

Decode = Callable[[bytes, str, str, str], dict[str, Any]]
_Payload = bytes | dict[str, Any] | None


class StepRun:
    """One step of one run, as the store answered it: a snapshot, not a live view.

    The one that `begin_step` answers with "execute" also carries the claim: hand it to `complete_step`,
    `fail_step`, `extend_claim` or `release_step`. Payloads are decoded when they are first looked at. It can be
    pickled and handed to another process; the claim goes with it.

    Attributes:
        run_id: the run.
        step: the step's name.
        status: where the step stands.
        attempt: number of the latest claim, from 1; 0 if there was none. It grows with every claim, so it serves
            as a fencing token, and with `id` as an idempotency key.
        prefix: of the store that it belongs to.
        token: of the claim that this object carries; empty if it carries none.
    """

    __slots__ = ("_decode", "_fields", "_payloads", "attempt", "prefix", "run_id", "status", "step", "token")

    prefix: Final[str]
    run_id: Final[str]
    step: Final[str]
    status: Final[StepStatus]
    attempt: Final[int]
    token: Final[bytes]

    def __init__(
        self,
        prefix: str,
        run_id: str,
        step: str,
        line: bytes,
        payloads: tuple[_Payload, _Payload, _Payload],
        decode: Decode,
        token: bytes = b"",
    ) -> None:
        """Made by the store alone; raises ValueError or KeyError if `line` is no state line."""
        letter, attempt, *fields = line[1:].split(b" ", 10)
        if len(fields) != 9:
            raise ValueError(line)
        self.run_id = run_id
        self.step = step
        self.status = STATUS[letter]
        self.attempt = int(attempt)
        self.prefix = prefix
        self.token = token
        self._fields = fields
        self._payloads = list(payloads)
        self._decode = decode

    def after_transition(self, line: bytes, output: bytes | None = None, last_error: bytes | None = None) -> StepRun:
        """The step run after a transition that this one was handed to; made by the store alone."""
        payloads = (self._payloads[0], output, last_error)
        token = self.token if line[1:2] == b"r" else b""
        return StepRun(self.prefix, self.run_id, self.step, line, payloads, self._decode, token)

    @property
    def id(self) -> str:
        """The same from schedule to completion, opaque, and accepted wherever a step run is: see `complete_step`."""
        return step_run_id(self.prefix, self.run_id, self.step)

    @property
    def input(self) -> dict[str, Any]:
        """What the step is given."""
        return cast("dict[str, Any]", self._payload(0, "input"))

    @property
    def output(self) -> dict[str, Any] | None:
        """What the step gave, once completed."""
        return self._payload(1, "output")

    @property
    def last_error(self) -> dict[str, Any] | None:
        """Why the latest attempt failed, if it did."""
        return self._payload(2, "last_error")

    @property
    def owner(self) -> str | None:
        """Who made the latest claim, as given to `begin_step`."""
        return self._fields[8].decode() or None

    @property
    def current_token(self) -> bytes:
        """Of the latest claim as stored: it names the claim, but this object need not carry it. See `expire_claim`."""
        return self._fields[1]

    @property
    def created_at(self) -> datetime:
        """When the record came to be: the server's clock, to the millisecond, in UTC."""
        return moment(self._created_ms)

    @property
    def started_at(self) -> datetime | None:
        """When the latest attempt was claimed."""
        return None if self._started_ms is None else moment(self._started_ms)

    @property
    def ended_at(self) -> datetime | None:
        """When the latest attempt was completed, failed or released, or its lease ended."""
        return self._after_start(self._fields[4])

    @property
    def lease_ends_at(self) -> datetime | None:
        """When the claim can be taken over; None if it never ends or the step is not running."""
        return self._after_start(self._fields[2])

    @property
    def position(self) -> int:
        """Its place, from 1, among the step runs of the run, in the order they came to be."""
        return int(self._fields[6])

    @property
    def _created_ms(self) -> int:
        return int(self._fields[5])

    @property
    def _started_ms(self) -> int | None:
        return self._created_ms + int(self._fields[3]) if self._fields[3] else None

    def _after_start(self, span_ms: bytes) -> datetime | None:
        started = self._started_ms
        return moment(started + int(span_ms)) if started is not None and span_ms else None

    def _payload(self, index: int, name: str) -> dict[str, Any] | None:
        value = self._payloads[index]
        if type(value) is bytes:
            value = self._payloads[index] = self._decode(value, self.run_id, self.step, name)
        return cast("dict[str, Any] | None", value)

    def _key(self) -> tuple[object, ...]:
        return (self.prefix, self.run_id, self.step, self.status, self.attempt, self._fields[2:])

    def __eq__(self, other: object) -> bool:
        """Equal if they show the same; who carries the claim makes no difference."""
        if not isinstance(other, StepRun):
            return NotImplemented
        return self._key() == other._key() and (
            (self.input, self.output, self.last_error) == (other.input, other.output, other.last_error)
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


class _Began(NamedTuple):
    step_run: StepRun
    decision: Literal["execute", "skip"]


class BeginResult(_Began):
    """What `begin_step` answers; unpacks to `(step_run, decision)`.

    Attributes:
        reason: why to skip: "busy", "completed", "exhausted" or "superseded"; None when the decision is "execute".
        retry_in: seconds until the live lease that is in the way ends, if there is one.
        takeover: whether the claim was granted over one whose lease had ended: what its holder did may be half done.
            A call that is sent again after a lost reply is not told.
    """

    reason: SkipReason | None
    retry_in: float | None
    takeover: bool

    def __new__(
        cls, step_run: StepRun, reason: SkipReason | None, retry_in: float | None, takeover: bool = False
    ) -> BeginResult:
        """Made by the store alone."""
        self = super().__new__(cls, step_run, "execute" if reason is None else "skip")
        self.reason = reason
        self.retry_in = retry_in
        self.takeover = takeover
        return self

    def __reduce__(self) -> tuple[type[BeginResult], tuple[StepRun, SkipReason | None, float | None, bool]]:
        return BeginResult, (self.step_run, self.reason, self.retry_in, self.takeover)

    @property
    def busy(self) -> bool:
        """Another claim is live: try again in `retry_in` seconds, or not at all if that is None."""
        return self.reason == "busy"

    @property
    def exhausted(self) -> bool:
        """`max_attempts` are used up: the step has failed for good."""
        return self.reason == "exhausted"

    @property
    def superseded(self) -> bool:
        """This very call was granted a claim, which ended before this reply to it got through."""
        return self.reason == "superseded"


SkipReason = Literal["busy", "completed", "exhausted", "superseded"]


class ClaimCounts(NamedTuple):
    """How many leased claims there are, by the indexes."""

    live: int
    """Under a lease that has not ended."""
    lapsed: int
    """Whose lease is over, and that nobody has taken over."""


class RunSummary(NamedTuple):
    """What a list of runs says of one. Of a large run that is at work meanwhile, the counts may be a little off.

    Attributes:
        run_id: the run.
        counts: how many steps have each status.
        changed_at: when a step of it was last made, claimed or ended; None if that cannot be read.
        problem: why its records cannot be trusted; None if they can. `delete_run` is the cure.
    """

    run_id: str
    counts: dict[StepStatus, int]
    changed_at: datetime | None
    problem: str | None = None

    @property
    def steps(self) -> int:
        """How many there are."""
        return sum(self.counts.values())

    @property
    def is_over(self) -> bool:
        """Whether each of its steps is completed or failed."""
        unfinished = self.counts[StepStatus.PENDING] + self.counts[StepStatus.RUNNING]
        return self.problem is None and not unfinished


class RunPage(NamedTuple):
    """A page of runs.

    Attributes:
        runs: newest change first.
        cursor: for the next page; None: this is the last.
        progress: how far through the keys of the server this page came, from 0 to 1; roughly.
    """

    runs: list[RunSummary]
    cursor: str | None
    progress: float


class StepPage(NamedTuple):
    """A page of the step runs of one run.

    Attributes:
        step_runs: in no order.
        cursor: for the next page; None: this is the last.
    """

    step_runs: list[StepRun]
    cursor: str | None


class ScheduleResult(NamedTuple):
    """What `schedule_step` answers: the step run, and whether this call made it."""

    step_run: StepRun
    decision: Literal["schedule", "skip"]


def step_run_id(prefix: str, run_id: str, step: str) -> str:
    """Makes the id of a step run: opaque, URL-safe, and bound to the store's prefix by a check sum."""
    run = run_id.encode()
    body = len(run).to_bytes(2) + run + step.encode()
    return urlsafe_b64encode(crc32(prefix.encode() + b"\0" + body).to_bytes(4) + body).rstrip(b"=").decode()


def parse_step_run_id(prefix: str, id: str) -> tuple[str, str]:
    """Takes an id back to its run and step.

    Raises:
        ValueError: it is not an id that `step_run_id` made for this prefix.
    """
    data = urlsafe_b64decode(id.encode("ascii") + b"=" * (-len(id) % 4))
    end = 6 + int.from_bytes(data[4:6])
    run_id, step = data[6:end].decode(), data[end:].decode()
    if step_run_id(prefix, run_id, step) != id:
        raise ValueError(id)
    return run_id, step


def moment(ms: int) -> datetime:
    """Milliseconds since 1970, as the records have them."""
    return _EPOCH + timedelta(milliseconds=ms)
