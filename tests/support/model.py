"""The contract in plain Python: what each operation does to a store, and what it returns.

No Redis, no Lua, no concurrency and no clock: this is the sequential specification, against which test_machine.py
holds the real store, one operation at a time. Three things make it short:

- A record's status is never kept, it follows from how the latest attempt stands.
- Every call has an identity, `call`: a call that is sent again after a lost reply comes with the same one.
- A lease is the seconds it was granted for, and `OVER` once `lapse` has let it end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

Payload = Mapping[str, Any]
CallId = int

KEPT: Final = 8
"""Past attempts that a record remembers, beside the latest: what was granted before those is forgotten."""
OVER: Final = 0
STATUS: Final = {
    "running": "running",
    "completed": "completed",
    "failed": "failed",
    "released": "pending",
    "lease_expired": "failed",
}
LAPSED: Final = {"type": "LeaseExpired", "message": "the lease of the last attempt expired without a result"}


class Shown(NamedTuple):
    """What a StepRun shows."""

    run: str
    step: str
    status: str
    attempt: int
    owner: str | None
    input: Payload
    output: Payload | None
    last_error: Payload | None
    lease: int | None
    position: int


class Claim(NamedTuple):
    """What complete_step and its like are handed: a claim, or without `call` a bare id, for its current holder."""

    run: str
    step: str
    call: CallId | None


class RefusedError(Exception):
    """The operation wrote nothing: the run was "deleted", the record is "missing", the claim is "stale"."""

    def __init__(self, why: str, current: Shown | None = None) -> None:
        super().__init__(why, current)


class PastAttempt(NamedTuple):
    """What `attempts` tells of each."""

    number: int
    owner: str | None
    outcome: str
    error: Payload | None


@dataclass
class Attempt:
    """One claim of a step, and what came of it."""

    number: int
    call: CallId
    owner: str | None
    lease: int | None
    input: Payload
    outcome: str = "running"
    output: Payload | None = None
    error: Payload | None = None


@dataclass
class Record:
    """One step run."""

    position: int
    input: Payload
    scheduled_by: CallId | None
    attempts: list[Attempt] = field(default_factory=list[Attempt])
    forgiven: int = 0
    """So many attempts, from the first on, do not count against max_attempts: the step was retried after them."""

    @property
    def latest(self) -> Attempt:
        return self.attempts[-1]

    @property
    def remembered(self) -> list[Attempt]:
        return self.attempts[-KEPT - 1 :]

    @property
    def status(self) -> str:
        return STATUS[self.latest.outcome] if self.attempts else "pending"

    def held_by(self, claim: Claim) -> bool:
        """Whether the claim may still end, extend or release the attempt. That its lease is over does no harm."""
        return self.status == "running" and claim.call in (None, self.latest.call)

    def ended_by(self, claim: Claim) -> Attempt | None:
        """The attempt that a call sent again would find ended: the claim's own, or for a bare id the latest."""
        if claim.call is None:
            return self.latest if self.attempts else None
        return next((attempt for attempt in self.remembered if attempt.call == claim.call), None)


@dataclass
class Run:
    """The records of a run, in the order they came to be, and what goes beyond each."""

    made: int = 0
    records: dict[str, Record] = field(default_factory=dict[str, Record])
    completed: list[str] = field(default_factory=list[str])
    ttl: float | None = None

    @property
    def expires(self) -> bool:
        """A run that is to expire does not while a claim without a lease is live."""
        unleased = (record.status == "running" and record.latest.lease is None for record in self.records.values())
        return self.ttl is not None and not any(unleased)


class Model:
    """A store."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.tombstones: dict[str, CallId] = {}

    # Transitions

    def schedule_step(self, run_id: str, step: str, input: Payload, *, call: CallId) -> tuple[Shown, str]:
        made = self.schedule_steps(run_id, {step: input}, call=call)
        return self._shown(run_id, step), "schedule" if made else "skip"

    def schedule_steps(self, run_id: str, steps: Mapping[str, Payload], *, call: CallId) -> list[str]:
        self._check_not_deleted(run_id)
        for step, input in steps.items():
            self._make(run_id, step, input, call)
        return [step for step in steps if self._records(run_id)[step].scheduled_by == call]

    def begin_step(
        self,
        run_id: str,
        step: str,
        input: Payload,
        *,
        call: CallId,
        lease: int | None = None,
        max_attempts: int | None = None,
        owner: str | None = None,
    ) -> tuple[Shown, str | None, float | None]:
        """Answers the step run, why to skip it (None: execute), and in how many seconds to try again."""
        self._check_not_deleted(run_id)
        record = self._make(run_id, step, input, None)
        status = record.status
        if status == "completed":
            return self._shown(run_id, step), "completed", None
        if status == "running":
            if record.latest.call == call:  # the same call, sent again
                return self._shown(run_id, step), None, None
            if record.latest.lease != OVER:
                return self._shown(run_id, step), "busy", record.latest.lease
        if any(attempt.call == call for attempt in record.remembered):
            # It was granted once, and that claim has ended: whatever became of it, no call is granted a second.
            return self._shown(run_id, step), "superseded", None
        if status != "pending":
            counted = sum(attempt.outcome != "released" for attempt in record.attempts[record.forgiven :])
            exhausted = max_attempts is not None and counted >= max_attempts
            if status == "running":
                record.latest.outcome = "lease_expired"
                record.latest.error = LAPSED if exhausted else None
            if exhausted:
                return self._shown(run_id, step), "exhausted", None
            record.input = input
        record.attempts.append(Attempt(len(record.attempts) + 1, call, owner, lease, record.input))
        return self._shown(run_id, step), None, None

    def complete_step(
        self, claim: Claim, output: Payload, *, call: CallId, schedule: Mapping[str, Payload] | None = None
    ) -> Shown:
        first = self._existing(claim).held_by(claim)
        completed = self._end(claim, "completed", output=output)
        if first:
            self.runs[claim.run].completed.append(claim.step)
            for step, input in (schedule or {}).items():
                self._make(claim.run, step, input, None)
        return completed

    def advance_step(
        self,
        claim: Claim,
        output: Payload,
        step: str,
        input: Payload,
        *,
        call: CallId,
        lease: int | None = None,
        max_attempts: int | None = None,
        owner: str | None = None,
    ) -> tuple[Shown, str | None, float | None]:
        self.complete_step(claim, output, call=call)
        return self.begin_step(claim.run, step, input, call=call, lease=lease, max_attempts=max_attempts, owner=owner)

    def fail_step(self, claim: Claim, error: Payload, *, call: CallId) -> Shown:
        return self._end(claim, "failed", error=error)

    def release_step(self, claim: Claim, *, call: CallId) -> Shown:
        return self._end(claim, "released")

    def retry_step(self, run_id: str, step: str, *, call: CallId, owner: str | None = None) -> Shown:
        record = self._existing(Claim(run_id, step, None))
        again = next((attempt for attempt in record.remembered if attempt.call == call), None)
        if again is None:
            if record.status == "running" and record.latest.lease == OVER:
                record.latest.outcome = "lease_expired"
            if record.status == "pending":
                return self._shown(run_id, step)
            if record.status != "failed":
                raise RefusedError("stale", self._shown(run_id, step))
            again = Attempt(len(record.attempts) + 1, call, owner, None, record.input, "released")
            record.attempts.append(again)
            record.forgiven = len(record.attempts)
        return self._shown(run_id, step, again)._replace(input=record.input)

    def extend_claim(self, claim: Claim, lease: int | None, *, call: CallId) -> Shown:
        record = self._existing(claim)
        if not record.held_by(claim):
            raise RefusedError("stale", self._shown(claim.run, claim.step))
        record.latest.lease = lease
        return self._shown(claim.run, claim.step)

    def delete_pending_steps(self, run_id: str, steps: Sequence[str], *, call: CallId) -> list[str]:
        records = self._records(run_id)
        for step in steps:
            if step in records and records[step].status == "pending":
                del records[step]
        return [step for step in steps if step not in records]

    def expire_run(self, run_id: str, ttl: float | None, *, call: CallId) -> bool:
        if run_id in self.runs:
            self.runs[run_id].ttl = ttl
        return run_id in self.runs

    def delete_run(self, run_id: str, *, call: CallId) -> bool:
        if self.runs.pop(run_id, None):
            self.tombstones[run_id] = call
        return self.tombstones.get(run_id) == call

    # Reads

    def get_step_run(self, run_id: str, step: str) -> Shown | None:
        return self._shown(run_id, step) if step in self._records(run_id) else None

    def get_run(self, run_id: str) -> list[Shown]:
        return [self._shown(run_id, step) for step in self._records(run_id)]

    scan_steps = get_run  # of a small run: all on one page

    def step_statuses(self, run_id: str) -> dict[str, str]:
        return {step: record.status for step, record in self._records(run_id).items()}

    def completed_steps(self, run_id: str) -> list[str]:
        return self.runs[run_id].completed if run_id in self.runs else []

    def completed_outputs(self, run_id: str) -> list[Payload | None]:
        return [self._records(run_id)[step].latest.output for step in self.completed_steps(run_id)]

    def attempts(self, run_id: str, step: str) -> list[PastAttempt]:
        record = self._records(run_id).get(step)
        remembered = record.remembered if record else []
        return [PastAttempt(each.number, each.owner, each.outcome, each.error) for each in remembered]

    def failed_steps(self) -> set[tuple[str, str]]:
        return {(run, step) for run, step, record in self._all() if record.status == "failed"}

    def leased_claims(self) -> set[tuple[str, str]]:
        return {(run, step) for run, step, record in self._all() if self._shown(run, step).lease is not None}

    def lapsed_claims(self) -> set[tuple[str, str]]:
        return {(run, step) for run, step in self.leased_claims() if self._shown(run, step).lease == OVER}

    def remembers(self, call: CallId) -> bool:
        """Whether some record knows of a claim that this begin_step was granted."""
        return any(attempt.call == call for _, _, record in self._all() for attempt in record.remembered)

    # What time does

    def lapse(self, run_id: str, step: str) -> None:
        """The lease of a claim ends."""
        self.runs[run_id].records[step].latest.lease = OVER

    def end_tombstone(self, run_id: str) -> None:
        """A deleted run may come again."""
        del self.tombstones[run_id]

    # What the operations share

    def _check_not_deleted(self, run_id: str) -> None:
        if run_id in self.tombstones:
            raise RefusedError("deleted")

    def _make(self, run_id: str, step: str, input: Payload, call: CallId | None) -> Record:
        """The step's record: a new one, pending, if there is none."""
        run = self.runs.setdefault(run_id, Run())
        if step not in run.records:
            run.made += 1
            run.records[step] = Record(run.made, input, call)
        return run.records[step]

    def _existing(self, claim: Claim) -> Record:
        self._check_not_deleted(claim.run)
        if claim.step not in self._records(claim.run):
            raise RefusedError("missing")
        return self._records(claim.run)[claim.step]

    def _end(self, claim: Claim, outcome: str, output: Payload | None = None, error: Payload | None = None) -> Shown:
        """Ends the attempt that is held; a call sent again finds it ended in just this way, and returns the same."""
        record = self._existing(claim)
        if record.held_by(claim):
            record.latest.outcome, record.latest.output, record.latest.error = outcome, output, error
        attempt = record.ended_by(claim)
        if attempt and (attempt.outcome, attempt.output, attempt.error) == (outcome, output, error):
            return self._shown(claim.run, claim.step, attempt)
        raise RefusedError("stale", self._shown(claim.run, claim.step))

    def _records(self, run_id: str) -> dict[str, Record]:
        return self.runs[run_id].records if run_id in self.runs else {}

    def _all(self) -> Iterator[tuple[str, str, Record]]:
        return ((run_id, step, record) for run_id, run in self.runs.items() for step, record in run.records.items())

    def _shown(self, run_id: str, step: str, attempt: Attempt | None = None) -> Shown:
        """The record as it stands; with one of its attempts, as that attempt left it."""
        record = self._records(run_id)[step]
        if not record.attempts:
            return Shown(run_id, step, "pending", 0, None, record.input, None, None, None, record.position)
        attempt = attempt or record.latest
        status = STATUS[attempt.outcome]
        lease = attempt.lease if status == "running" else None
        last_error = attempt.error if status == "failed" else None
        number, owner, input, output = attempt.number, attempt.owner, attempt.input, attempt.output
        return Shown(run_id, step, status, number, owner, input, output, last_error, lease, record.position)
