"""Everything that squidstep_redis raises, in one tree.

Each error says what failed, for which run and step, what was written, and what to do.

    SquidstepError
    ├── InvalidArgumentError      rejected before anything was sent
    │   ├── PayloadError              with the path to the offending value
    │   │   └── PayloadTooLargeError
    │   └── UnsupportedClientError
    ├── StepRunNotFoundError      there is no such record; nothing was written
    │   └── RunDeletedError           the run was deleted recently
    ├── StaleStepRunError         the claim is not held, or no longer held; nothing was written
    ├── InputMismatchError        the step has a different input; nothing was written
    ├── StepBusyError             run_step: another worker holds the step; retry later
    ├── WaitTimeoutError          wait_for_step: the step did not end in time
    ├── StepExhaustedError        run_step: max_attempts reached; the step stays failed
    ├── StepFailedError           run_step: the step has failed permanently
    ├── StepDelayedError          run_step: the step has failed, and may be retried later
    ├── RunCancelledError         run_step: the run is cancelled; nothing begins until resume_run
    ├── RunExistsError            import_run, fork_run: the run exists already; nothing was written
    ├── CorruptRunError           the stored data is corrupt; nothing was written
    │   └── NewerFormatError          a later version of this library wrote it
    ├── UndecodablePayloadError   the store's codec cannot read a stored payload
    ├── BatchError                batch with raise_errors: a call failed; it holds all results and errors
    └── ServerError               the server or the connection failed: see server_errors.py
        ├── NotSentError              could not connect; nothing was sent
        ├── RefusedError              the server refused; nothing was written
        └── OutcomeUnknownError       sent, but no reply: re-send it, or read the record
            ├── NotReplicatedError        done, but not confirmed by the replicas or the AOF in time
            └── ReplyMismatchError        the connection returned the reply to another call

Your own code raises PermanentError and RetryLater, which are not SquidstepErrors: see `claims/failures.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from squidstep_redis.escaping import escaped

if TYPE_CHECKING:
    from squidstep_redis.model import StepRun

error_class = dataclass(eq=False, repr=False)
"""Makes an exception's fields the arguments of its constructor; equality and repr remain those of exceptions."""


@dataclass(init=False, eq=False, repr=False)  # of no fields; those of a subclass are its arguments
class SquidstepError(Exception):
    """Base of all errors that this library raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        notes = getattr(self, "__notes__", None)
        return type(self), self._pickled_args(), {"__notes__": notes} if notes else None

    def _pickled_args(self) -> tuple[Any, ...]:
        """Returns the arguments with which unpickling calls the constructor."""
        return tuple(getattr(self, field.name) for field in fields(self))


@error_class
class InvalidArgumentError(SquidstepError, ValueError):
    """An argument was rejected before anything was sent.

    Attributes:
        argument: the name of the argument, or the path to the offending value.
        problem: what is wrong with it.
    """

    argument: str
    problem: str

    def __str__(self) -> str:
        return f"{self.argument}: {self.problem}"


class PayloadError(InvalidArgumentError):
    """A payload that could not be read back equal, or not at all.

    `argument` is the path to the offending value, such as `input["items"][3]["price"]`.
    """


class PayloadTooLargeError(PayloadError):
    """A payload larger than the store's `max_payload_bytes`."""


class UnsupportedClientError(InvalidArgumentError):
    """A redis-py client or pipeline with which a store cannot keep its guarantees."""


@error_class
class StepRunNotFoundError(SquidstepError, LookupError):
    """There is no record of the step; nothing was written.

    Attributes:
        run_id: the run.
        step: the step; None if the error is about the whole run.
        problem: what is missing.
    """

    run_id: str
    step: str | None
    problem: str

    def __str__(self) -> str:
        return f"{place_of(self.run_id, self.step)}: {self.problem}"


class RunDeletedError(StepRunNotFoundError):
    """The run was deleted and its tombstone still exists, so that a late write cannot recreate it."""


class _StepRunMessage:
    """The text of an error about a step run.

    Celery's result backend stores an error as JSON, and restores it with texts in place of objects.
    """

    current: StepRun

    def _message(self) -> str:
        raise NotImplementedError

    def __str__(self) -> str:
        return self._message() if hasattr(self.current, "run_id") else str(self.current)


@error_class
class StaleStepRunError(_StepRunMessage, SquidstepError):
    """The claim is not held, or no longer held; nothing was written.

    Another worker took over the step, or the step has ended. Discard your result: `current` is the valid state.

    Attributes:
        current: the step run as it is stored now.
        problem: which operation was refused, and why.
    """

    current: StepRun
    problem: str

    def _message(self) -> str:
        return f"{place_of(self.current.run_id, self.current.step)}: {self.problem}"


@error_class
class InputMismatchError(SquidstepError):
    """The step was scheduled or begun with an input that has a different fingerprint; nothing was written.

    Attributes:
        run_id: the run.
        step: the step.
        stored: the fingerprint of the step.
        given: the fingerprint of the input that was refused.
    """

    run_id: str
    step: str
    stored: str
    given: str

    def __str__(self) -> str:
        return (
            f"{place_of(self.run_id, self.step)}: the input has the fingerprint {self.given!r}, but the step has "
            f"{self.stored!r}, from a different input. Nothing was written; use another run id or step name for a "
            "different input, or fingerprint=False to ignore the difference"
        )


@error_class
class StepBusyError(_StepRunMessage, SquidstepError):
    """Another worker holds the step, so this delivery did not execute it. Redeliver it later.

    Attributes:
        current: the step run as it is stored now.
        retry_in: seconds until the holder's lease expires, unless it is extended; None if never or unknown.
    """

    current: StepRun
    retry_in: float | None

    def _message(self) -> str:
        until = "" if self.retry_in is None else f"; its lease expires in {self.retry_in:.3f} s"
        holder = escaped(self.current.owner or "another worker")
        return (
            f"{place_of(self.current.run_id, self.current.step)}: held by {holder} "
            f"(attempt {self.current.attempt}{until}). Nothing was executed here; retry later"
        )


@error_class
class WaitTimeoutError(SquidstepError, TimeoutError):
    """The step did not end within the timeout. Wait longer, or find out who holds it.

    Attributes:
        run_id: the run.
        step: the step.
        timeout: seconds waited.
        current: the step run as last read; None if it is not scheduled yet.
    """

    run_id: str
    step: str
    timeout: float
    current: StepRun | None

    def __str__(self) -> str:
        found = "there is no such step run yet" if self.current is None else f"it is {self.current.status}"
        return f"{place_of(self.run_id, self.step)}: did not end within {self.timeout:g} s; {found}"


@error_class
class StepExhaustedError(_StepRunMessage, SquidstepError):
    """The step has used all attempts that `max_attempts` allows: it stays failed.

    Attributes:
        current: the step run as it is stored now, with its `last_error`.
    """

    current: StepRun

    def _message(self) -> str:
        return (
            f"{place_of(self.current.run_id, self.current.step)}: max_attempts reached after attempt "
            f"{self.current.attempt}{_last_error(self.current)}; call retry_step, or allow more attempts"
        )


@error_class
class StepFailedError(_StepRunMessage, SquidstepError):
    """The step has failed permanently, so this delivery did not execute it.

    Attributes:
        current: the step run as it is stored now, with its `last_error`.
    """

    current: StepRun

    def _message(self) -> str:
        return (
            f"{place_of(self.current.run_id, self.current.step)}: failed permanently in attempt {self.current.attempt}"
            f"{_last_error(self.current)}. Nothing was executed here; call retry_step to allow another attempt"
        )


@error_class
class StepDelayedError(_StepRunMessage, SquidstepError):
    """The step has failed and may not be retried yet, so this delivery did not execute it. Redeliver it later.

    Attributes:
        current: the step run as it is stored now, with its `last_error`.
        retry_in: seconds until it can be claimed again.
    """

    current: StepRun
    retry_in: float

    def _message(self) -> str:
        return (
            f"{place_of(self.current.run_id, self.current.step)}: failed in attempt {self.current.attempt}"
            f"{_last_error(self.current)}, and may be retried in {self.retry_in:.3f} s. Nothing was executed here; "
            "retry then, or call retry_step"
        )


@error_class
class RunCancelledError(SquidstepError):
    """The run was cancelled, so no step of it begins.

    Attributes:
        run_id: the run.
        step: the step that was not executed, or whose work was stopped.
        reason: why the run was cancelled; empty if no reason was given.
    """

    run_id: str
    step: str
    reason: str

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return (
            f"{place_of(self.run_id, self.step)}: the run was cancelled{why}. The step was not executed to its "
            "end here; call resume_run to let the steps of the run begin again"
        )


@error_class
class RunExistsError(SquidstepError):
    """An import or a fork would overwrite a run; nothing was written.

    Attributes:
        run_id: the run.
    """

    run_id: str

    def __str__(self) -> str:
        return f"{place_of(self.run_id, None)}: already exists; nothing was written. Delete it first to replace it"


@error_class
class CorruptRunError(SquidstepError):
    """The data stored under a key is corrupt; nothing was written.

    Attributes:
        run_id: the run; None if the key belongs to an index.
        key: the Redis key.
        problem: what is wrong with it.
    """

    run_id: str | None
    key: str
    problem: str

    def __str__(self) -> str:
        return f"key {self.key!r}: {self.problem}"


class NewerFormatError(CorruptRunError):
    """A later version of this library wrote the record: upgrade this process."""


@error_class
class UndecodablePayloadError(SquidstepError):
    """The store's codec cannot read a stored payload, usually because another codec wrote it.

    An `EncryptedCodec` also raises it for a payload that was changed or moved, or whose key it does not have.

    Attributes:
        run_id: the run.
        step: the step.
        name: "input", "output", "last_error", "error" or "progress".
        codec: the name of the codec's class.
        problem: the reason that the codec gives; empty if it gives none.
    """

    run_id: str
    step: str
    name: str
    codec: str
    problem: str = ""

    def __str__(self) -> str:
        why = f": {escaped(self.problem)}" if self.problem else ""
        return f"{place_of(self.run_id, self.step)}: {self.codec} cannot decode the stored {self.name}{why}"


@error_class
class PayloadNotReadError(SquidstepError):
    """The step run is from a listing with `payloads=False`. `get_step_run` reads the payloads.

    Attributes:
        run_id: the run.
        step: the step.
        name: "input" or "progress".
    """

    run_id: str
    step: str
    name: str

    def __str__(self) -> str:
        place = place_of(self.run_id, self.step)
        return f"{place}: the listing did not read the {self.name}; get_step_run(run_id, step) reads it"


def place_of(run_id: str, step: str | None) -> str:
    """Returns the run and the step, for messages."""
    return f"run {run_id!r}" if step is None else f"run {run_id!r}, step {step!r}"


def _last_error(step_run: StepRun) -> str:
    """Quotes the type and the message of a step's last error, if it has both."""
    try:
        error = step_run.last_error or {}
    except UndecodablePayloadError:
        return " (its last error cannot be decoded)"
    kind, message = (
        (str(error[name]) for name in ("type", "message")) if {"type", "message"} <= error.keys() else ("", "")
    )
    text = escaped(f"{kind}: {message}") if kind else ""
    return f" (last error: {text if len(text) <= 200 else text[:199] + '…'})" if text else ""


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to the caller's exception, unless it accepts none, such as a frozen dataclass.

    Args:
        error: the exception.
        note: the note.
    """
    try:
        error.add_note(note)
    except (AttributeError, TypeError):
        return


def described(value: Any) -> str:
    """Describes a rejected value for a message: its type, and its repr cut to 60 characters.

    Returns:
        Text such as `int -3`, or `str 'aaaa…'`.
    """
    try:
        text = escaped(repr(value))
    except Exception:  # noqa: BLE001 -- a value without a repr must still be rejected
        text = "(without a repr)"
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"
