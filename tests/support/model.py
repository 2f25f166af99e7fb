"""The contract in plain Python: what each operation changes in a store, and what it returns.

It uses no Redis, no Lua, no concurrency and no clock. It is the sequential specification with which test_machine.py
compares the real store, one operation at a time. Three simplifications keep it short:

- A record has no stored status. The status follows from the outcome of the latest attempt.
- Every call has an id, `call`. A call that is re-sent after a lost reply has the same id.
- A lease is the number of seconds for which it was granted, or `EXPIRED` after `lapse`; the delay after a failure, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

Payload = Mapping[str, Any]
CallId = int

MAX_PAST_ATTEMPTS: Final = 8
"""The attempts that a record keeps besides the latest. Older ones are dropped."""
EXPIRED: Final = 0
STATUS: Final = {
    "running": "running",
    "completed": "completed",
    "failed": "failed",
    "released": "pending",
    "lease_expired": "failed",
}
LEASE_EXPIRED_ERROR: Final = {
    "type": "LeaseExpired",
    "message": "the lease of the last attempt expired without a result",
}


class Snapshot(NamedTuple):
    """The fields of a StepRun that the model predicts."""

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
    final: bool = False
    delay: int | None = None
    progress: Payload | None = None


class Claim(NamedTuple):
    """The argument of operations on a claim. Without `call` it is a bare id, which names the current claim."""

    run: str
    step: str
    call: CallId | None


class RefusedError(Exception):
    """The operation wrote nothing.

    The run was "deleted" or "exists", the record is "missing", or the claim is "stale". Or the input is a "mismatch":
    `found` is then the fingerprint of the record.
    """

    def __init__(self, reason: str, found: Snapshot | str | None = None) -> None:
        super().__init__(reason, found)


class PastAttempt(NamedTuple):
    """The fields of an attempt that `attempts` returns."""

    number: int
    owner: str | None
    outcome: str
    error: Payload | None


@dataclass
class Attempt:
    """One claim of a step, and its outcome."""

    number: int
    call: CallId
    owner: str | None
    lease: int | None
    input: Payload
    outcome: str = "running"
    output: Payload | None = None
    error: Payload | None = None
    final: bool = False
    delay: int | None = None


@dataclass
class Record:
    """One step run."""

    position: int
    input: Payload
    scheduled_by: CallId | None
    attempts: list[Attempt] = field(default_factory=list[Attempt])
    progress: Payload | None = None
    checkpoint: tuple[int, CallId] = (0, 0)  # the attempt and the call that stored the progress
    attempts_at_retry: int = 0
    """The number of attempts at the latest retry; these do not count towards max_attempts."""
    fingerprint: str | None = None

    @property
    def latest(self) -> Attempt:
        return self.attempts[-1]

    @property
    def kept_attempts(self) -> list[Attempt]:
        return self.attempts[-MAX_PAST_ATTEMPTS - 1 :]

    @property
    def status(self) -> str:
        return STATUS[self.latest.outcome] if self.attempts else "pending"

    def is_held_by(self, claim: Claim) -> bool:
        """Returns whether the claim may still end or extend the attempt; it may even if its lease has expired."""
        return self.status == "running" and claim.call in (None, self.latest.call)

    def attempt_of(self, claim: Claim) -> Attempt | None:
        """Returns the attempt of the claim, which for a bare id is the latest."""
        if claim.call is None:
            return self.latest if self.attempts else None
        return next((attempt for attempt in self.kept_attempts if attempt.call == claim.call), None)


@dataclass
class Run:
    """The records of a run, in the order of their creation, and the state of the run itself."""

    steps_created: int = 0
    records: dict[str, Record] = field(default_factory=dict[str, Record])
    completed: list[str] = field(default_factory=list[str])
    ttl: float | None = None
    is_fork: bool = False
    cancel_reason: str | None = None

    @property
    def expires(self) -> bool:
        """Whether the keys have a TTL: they have none while a claim without a lease is live."""
        unleased = (record.status == "running" and record.latest.lease is None for record in self.records.values())
        return self.ttl is not None and not any(unleased)


class Model:
    """The specified behavior of a store."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.tombstones: dict[str, CallId] = {}

    # Transitions

    def schedule_step(
        self, run_id: str, step: str, input: Payload, *, call: CallId, fingerprint: str | None = None
    ) -> tuple[Snapshot, str]:
        created = self.schedule_steps(run_id, {step: input}, call=call, fingerprint=fingerprint)
        if step not in self._records(run_id):
            return self._not_stored(run_id, step, input), "skip"
        return self._snapshot(run_id, step), "schedule" if created else "skip"

    def schedule_steps(
        self, run_id: str, steps: Mapping[str, Payload], *, call: CallId, fingerprint: str | None = None
    ) -> list[str]:
        self._check_not_deleted(run_id)
        for step in steps:
            record = self._records(run_id).get(step)
            if record is not None and record.scheduled_by != call:
                _check_input(record, fingerprint)
        for step, input in steps.items():
            is_new = step not in self._records(run_id)
            if is_new and self._is_cancelled(run_id):
                continue
            record = self._get_or_create(run_id, step, input, call)
            if is_new:
                record.fingerprint = fingerprint
        records = self._records(run_id)
        return [step for step in steps if step in records and records[step].scheduled_by == call]

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
        fingerprint: str | None = None,
    ) -> tuple[Snapshot, str | None, float | None]:
        """Returns the step run, the reason to skip it (None: execute), and the seconds after which to retry."""
        self._check_not_deleted(run_id)
        if self._is_cancelled(run_id) and step not in self._records(run_id):
            return self._not_stored(run_id, step, input), "cancelled", None
        record = self._get_or_create(run_id, step, input, None)
        if not any(attempt.call == call for attempt in record.kept_attempts):
            _check_input(record, fingerprint)
        status = record.status
        if status == "completed":
            return self._snapshot(run_id, step), "completed", None
        if status == "running" and record.latest.call == call:  # a re-send of the same call
            return self._snapshot(run_id, step), None, None
        if self._is_cancelled(run_id):
            return self._snapshot(run_id, step), "cancelled", None
        if status == "running" and record.latest.lease != EXPIRED:
            return self._snapshot(run_id, step), "busy", record.latest.lease
        if status == "failed" and record.latest.final:
            return self._snapshot(run_id, step), "failed", None
        if any(attempt.call == call for attempt in record.kept_attempts):
            # This call has acquired a claim that has ended. No call acquires a second one.
            return self._snapshot(run_id, step), "superseded", None
        if status != "pending":
            counted = sum(attempt.outcome != "released" for attempt in record.attempts[record.attempts_at_retry :])
            exhausted = max_attempts is not None and counted >= max_attempts
            if status == "running":
                record.latest.outcome = "lease_expired"
                record.latest.error = LEASE_EXPIRED_ERROR if exhausted else None
            if exhausted:
                return self._snapshot(run_id, step), "exhausted", None
            if status == "failed" and record.latest.delay:
                return self._snapshot(run_id, step), "delayed", record.latest.delay
            record.input, record.fingerprint = input, None
        record.fingerprint = fingerprint or record.fingerprint
        record.attempts.append(Attempt(len(record.attempts) + 1, call, owner, lease, record.input))
        return self._snapshot(run_id, step), None, None

    def complete_step(
        self, claim: Claim, output: Payload, *, call: CallId, schedule: Mapping[str, Payload] | None = None
    ) -> Snapshot:
        first = self._get(claim).is_held_by(claim)
        completed = self._end(claim, "completed", output=output)
        if first:
            self.runs[claim.run].completed.append(claim.step)
            for step, input in (schedule or {}).items() if not self._is_cancelled(claim.run) else ():
                self._get_or_create(claim.run, step, input, None)
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
        fingerprint: str | None = None,
    ) -> tuple[Snapshot, str | None, float | None]:
        before = deepcopy(self.runs)
        self.complete_step(claim, output, call=call)
        claims: dict[str, Any] = {
            "lease": lease,
            "max_attempts": max_attempts,
            "owner": owner,
            "fingerprint": fingerprint,
        }
        try:
            return self.begin_step(claim.run, step, input, call=call, **claims)
        except RefusedError:
            self.runs = before
            raise

    def fail_step(
        self, claim: Claim, error: Payload, *, call: CallId, final: bool = False, retry_after: int | None = None
    ) -> Snapshot:
        first = self._get(claim).is_held_by(claim)
        if first:
            self._get(claim).latest.final, self._get(claim).latest.delay = final, retry_after
        return self._end(claim, "failed", error=error, final=final)

    def release_step(self, claim: Claim, *, call: CallId) -> Snapshot:
        return self._end(claim, "released")

    def retry_step(self, run_id: str, step: str, *, call: CallId, owner: str | None = None) -> Snapshot:
        record = self._get(Claim(run_id, step, None))
        attempt = next((attempt for attempt in record.kept_attempts if attempt.call == call), None)
        if attempt is None:
            if record.status == "running" and record.latest.lease == EXPIRED:
                record.latest.outcome = "lease_expired"
            if record.status == "pending":
                return self._snapshot(run_id, step)
            if record.status != "failed":
                raise RefusedError("stale", self._snapshot(run_id, step))
            attempt = Attempt(len(record.attempts) + 1, call, owner, None, record.input, "released")
            record.attempts.append(attempt)
            record.attempts_at_retry = len(record.attempts)
        return self._snapshot(run_id, step, attempt)._replace(input=record.input)

    def extend_claim(
        self, claim: Claim, lease: int | None, *, call: CallId, progress: Payload | None = None
    ) -> Snapshot:
        record = self._get(claim)
        if not record.is_held_by(claim):
            raise RefusedError("stale", self._snapshot(claim.run, claim.step))
        record.latest.lease = lease
        if progress is not None:
            self.checkpoint_step(claim, progress, call=call)
        return self._snapshot(claim.run, claim.step)

    def checkpoint_step(self, claim: Claim, progress: Payload, *, call: CallId) -> Snapshot:
        record = self._get(claim)
        if not record.is_held_by(claim):
            raise RefusedError("stale", self._snapshot(claim.run, claim.step))
        attempt, latest_call = record.checkpoint
        if attempt != record.latest.number or latest_call <= call:  # not a delayed copy of an earlier checkpoint
            record.progress, record.checkpoint = progress, (record.latest.number, call)
        return self._snapshot(claim.run, claim.step)

    def delete_pending_steps(self, run_id: str, steps: Sequence[str], *, call: CallId) -> list[str]:
        records = self._records(run_id)
        for step in steps:
            if step in records and records[step].status == "pending":
                del records[step]
        if run_id in self.runs and not records:
            del self.runs[run_id]
        return [step for step in steps if step not in records]

    def expire_run(self, run_id: str, ttl: float | None, *, call: CallId) -> bool:
        if run_id in self.runs:
            self.runs[run_id].ttl = ttl
        return run_id in self.runs

    def cancel_run(self, run_id: str, reason: str | None = None, *, call: CallId) -> bool:
        if run_id in self.runs and self.runs[run_id].cancel_reason is None:
            self.runs[run_id].cancel_reason = reason or ""
        return run_id in self.runs

    def resume_run(self, run_id: str, *, call: CallId) -> bool:
        if run_id in self.runs:
            self.runs[run_id].cancel_reason = None
        return run_id in self.runs

    def delete_run(self, run_id: str, *, call: CallId) -> bool:
        if self.runs.pop(run_id, None):
            self.tombstones[run_id] = call
        return self.tombstones.get(run_id) == call

    def fork_run(
        self, run_id: str, new_run_id: str, *, steps: list[str] | None = None, through: str | None = None
    ) -> list[str]:
        """Copies completed steps, with the claims that ended them."""
        self._check_not_deleted(run_id)
        records, order = self._records(run_id), self.completed_steps(run_id)
        for step in steps or ([through] if through else []):
            if step not in order:
                stale = step in records
                raise RefusedError("stale" if stale else "missing", self._snapshot(run_id, step) if stale else None)
        if through:
            order = order[: order.index(through) + 1]
        order = [step for step in order if steps is None or step in steps]
        if not order:
            raise RefusedError("missing")
        self._check_not_deleted(new_run_id)
        if new_run_id in self.runs:
            raise RefusedError("exists")
        created = [step for step in records if step in order]
        copies = {
            step: replace(records[step], position=position, attempts=[replace(each) for each in records[step].attempts])
            for position, step in enumerate(created, 1)
        }
        self.runs[new_run_id] = Run(len(created), copies, order, is_fork=True)
        return list(order)

    # Reads

    def get_step_run(self, run_id: str, step: str) -> Snapshot | None:
        return self._snapshot(run_id, step) if step in self._records(run_id) else None

    def get_run(self, run_id: str) -> list[Snapshot]:
        return [self._snapshot(run_id, step) for step in self._records(run_id)]

    scan_steps = get_run  # a small run is one page

    def step_statuses(self, run_id: str) -> dict[str, str]:
        return {step: record.status for step, record in self._records(run_id).items()}

    def completed_steps(self, run_id: str) -> list[str]:
        return self.runs[run_id].completed if run_id in self.runs else []

    def completed_outputs(self, run_id: str) -> list[Payload | None]:
        return [self._records(run_id)[step].latest.output for step in self.completed_steps(run_id)]

    def attempts(self, run_id: str, step: str) -> list[PastAttempt]:
        record = self._records(run_id).get(step)
        kept_attempts = record.kept_attempts if record else []
        return [PastAttempt(each.number, each.owner, each.outcome, each.error) for each in kept_attempts]

    def failed_steps(self) -> set[tuple[str, str]]:
        return {(run, step) for run, step, record in self._all_records() if record.status == "failed"}

    def leased_claims(self) -> set[tuple[str, str]]:
        return {(run, step) for run, step, record in self._all_records() if self._snapshot(run, step).lease is not None}

    def delayed_steps(self) -> set[tuple[str, str]]:
        return {(run, step) for run, step, _ in self._all_records() if self._snapshot(run, step).delay}

    def lapsed_claims(self) -> set[tuple[str, str]]:
        return {(run, step) for run, step in self.leased_claims() if self._snapshot(run, step).lease == EXPIRED}

    def has_claim_of(self, run_id: str, call: CallId) -> bool:
        """Returns whether a record of the run keeps a claim that this call acquired."""
        records = self._records(run_id).values()
        return any(attempt.call == call for record in records for attempt in record.kept_attempts)

    # The passing of time

    def lapse(self, run_id: str, step: str) -> None:
        """Expires the lease of a claim."""
        self.runs[run_id].records[step].latest.lease = EXPIRED

    def end_delay(self, run_id: str, step: str) -> None:
        """Ends the delay after a failure."""
        self.runs[run_id].records[step].latest.delay = EXPIRED

    def end_tombstone(self, run_id: str) -> None:
        """Expires a tombstone: the run can be created again."""
        del self.tombstones[run_id]

    # Helpers of the operations

    def _check_not_deleted(self, run_id: str) -> None:
        if run_id in self.tombstones:
            raise RefusedError("deleted")

    def _is_cancelled(self, run_id: str) -> bool:
        return run_id in self.runs and self.runs[run_id].cancel_reason is not None

    def _not_stored(self, run_id: str, step: str, input: Payload) -> Snapshot:
        return Snapshot(run_id, step, "pending", 0, None, input, None, None, None, 0)

    def _get_or_create(self, run_id: str, step: str, input: Payload, call: CallId | None) -> Record:
        """Returns the record of a step, and creates a pending one if there is none."""
        run = self.runs.setdefault(run_id, Run())
        if step not in run.records:
            run.steps_created += 1
            run.records[step] = Record(run.steps_created, input, call)
        return run.records[step]

    def _get(self, claim: Claim) -> Record:
        self._check_not_deleted(claim.run)
        if claim.step not in self._records(claim.run):
            raise RefusedError("missing")
        return self._records(claim.run)[claim.step]

    def _end(
        self,
        claim: Claim,
        outcome: str,
        output: Payload | None = None,
        error: Payload | None = None,
        final: bool = False,
    ) -> Snapshot:
        """Ends the attempt that the claim holds. A re-send, which finds it ended in this way, returns the same."""
        record = self._get(claim)
        if record.is_held_by(claim):
            record.latest.outcome, record.latest.output, record.latest.error = outcome, output, error
            if outcome == "completed":
                record.progress = None
        attempt = record.attempt_of(claim)
        ended = attempt and (attempt.outcome, attempt.output, attempt.error, attempt.final)
        if attempt and ended == (outcome, output, error, final):
            return self._snapshot(claim.run, claim.step, attempt)
        raise RefusedError("stale", self._snapshot(claim.run, claim.step))

    def _records(self, run_id: str) -> dict[str, Record]:
        return self.runs[run_id].records if run_id in self.runs else {}

    def _all_records(self) -> Iterator[tuple[str, str, Record]]:
        return ((run_id, step, record) for run_id, run in self.runs.items() for step, record in run.records.items())

    def _snapshot(self, run_id: str, step: str, attempt: Attempt | None = None) -> Snapshot:
        """Returns the current state of a record, or its state after one of its attempts."""
        record = self._records(run_id)[step]
        if not record.attempts:
            return Snapshot(run_id, step, "pending", 0, None, record.input, None, None, None, record.position)
        attempt = attempt or record.latest
        status = STATUS[attempt.outcome]
        lease = attempt.lease if status == "running" else None
        last_error = attempt.error if status == "failed" else None
        number, owner, input, output = attempt.number, attempt.owner, attempt.input, attempt.output
        ending = (attempt.final, attempt.delay) if attempt.outcome == "failed" else (False, None)
        rest = (record.position, *ending, record.progress)
        return Snapshot(run_id, step, status, number, owner, input, output, last_error, lease, *rest)


def _check_input(record: Record, fingerprint: str | None) -> None:
    if fingerprint is not None and record.fingerprint not in (None, fingerprint):
        raise RefusedError("mismatch", record.fingerprint)
