"""Everything that squidstep_redis raises, in one tree.

Each error says what happened, to which run and step, and what to do next. Errors of the connection itself
(refused, timed out, out of memory, …) are redis-py's own and pass through untouched.

    SquidstepError
    ├── InvalidArgumentError      refused before anything was sent
    │   ├── PayloadError              with the path to the culprit
    │   │   └── PayloadTooLargeError
    │   └── UnsupportedClientError
    ├── StepRunNotFoundError      there is no such record; nothing was written
    │   └── RunDeletedError           … because the run was deleted a short while ago
    ├── StaleStepRunError         the claim is not yours (any more); nothing was written
    ├── StepBusyError             run_step: another worker holds the step; try again later
    ├── StepExhaustedError        run_step: max_attempts are used up; the step has failed for good
    ├── CorruptRunError           what is stored cannot be trusted; nothing was written
    │   └── NewerFormatError          … because a later version of this library wrote it
    ├── UndecodablePayloadError   the store's codec cannot read a stored payload
    └── ReplyMismatchError        the connection handed over the answer to another call
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from squidstep_redis.model import StepRun


class SquidstepError(Exception):
    """Base of all errors that this library raises by itself."""


class InvalidArgumentError(SquidstepError, ValueError):
    """An argument was refused before anything was sent.

    Attributes:
        argument: the name of the argument.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(argument, problem)
        self.argument = argument
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.argument}: {self.problem}"


class PayloadError(InvalidArgumentError):
    """A payload that would not come back equal, or not at all.

    `argument` is the path to the culprit, such as `input["items"][3]["price"]`.
    """


class PayloadTooLargeError(PayloadError):
    """A payload over the store's `max_payload_bytes`."""


class UnsupportedClientError(InvalidArgumentError):
    """A redis-py client (or pipeline) with which a store cannot keep its promises."""


class StepRunNotFoundError(SquidstepError, LookupError):
    """There is no record of the step; nothing was written."""

    def __init__(self, run_id: str, step: str | None, problem: str) -> None:
        super().__init__(run_id, step, problem)
        self.run_id = run_id
        self.step = step
        self.problem = problem

    def __str__(self) -> str:
        return f"{_where(self.run_id, self.step)}: {self.problem}"


class RunDeletedError(StepRunNotFoundError):
    """The run was deleted and its tombstone still stands: a late write must not bring it back to life."""


class StaleStepRunError(SquidstepError):
    """The claim is not held (any more); nothing was written.

    Another worker took the step over, or it has ended already. Discard your result: `current` says what holds.

    Attributes:
        current: the step run as it is stored now.
    """

    def __init__(self, current: StepRun, problem: str) -> None:
        super().__init__(current, problem)
        self.current = current
        self.problem = problem

    def __str__(self) -> str:
        return f"{_where(self.current.run_id, self.current.step)}: {self.problem}"


class StepBusyError(SquidstepError):
    """Another worker holds the step, so this delivery did not execute it: deliver it again later.

    Attributes:
        current: the step run as it is stored now.
        retry_in: seconds until the lease that is in the way ends, unless it is extended; None: never, or unknown.
    """

    def __init__(self, current: StepRun, retry_in: float | None) -> None:
        super().__init__(current, retry_in)
        self.current = current
        self.retry_in = retry_in

    def __str__(self) -> str:
        holder = f" by {self.current.owner}" if self.current.owner else ""
        until = "" if self.retry_in is None else f"; its lease ends in {self.retry_in:.3f} s"
        return (
            f"{_where(self.current.run_id, self.current.step)}: is being executed{holder}, as attempt "
            f"{self.current.attempt}{until}. Nothing was executed here: try again later"
        )


class StepExhaustedError(SquidstepError):
    """The step has failed as often as `max_attempts` allows: it is not executed again.

    Attributes:
        current: the step run as it is stored now; its `last_error` says why.
    """

    def __init__(self, current: StepRun) -> None:
        super().__init__(current)
        self.current = current

    def __str__(self) -> str:
        return (
            f"{_where(self.current.run_id, self.current.step)}: all attempts are used up, the last was number "
            f"{self.current.attempt}; see last_error. More are granted to a larger max_attempts"
        )


class CorruptRunError(SquidstepError):
    """What is stored under a key cannot be trusted; nothing was written.

    Attributes:
        key: the Redis key.
    """

    def __init__(self, run_id: str | None, key: str, problem: str) -> None:
        super().__init__(run_id, key, problem)
        self.run_id = run_id
        self.key = key
        self.problem = problem

    def __str__(self) -> str:
        return f"key {self.key!r}: {self.problem}"


class NewerFormatError(CorruptRunError):
    """A later version of this library wrote the record: upgrade this process."""


class UndecodablePayloadError(SquidstepError):
    """The store's codec cannot read a stored payload: it was written with another codec, as a rule."""

    def __init__(self, run_id: str, step: str, name: str, codec: str) -> None:
        super().__init__(run_id, step, name, codec)
        self.run_id = run_id
        self.step = step
        self.name = name
        self.codec = codec

    def __str__(self) -> str:
        return f"{_where(self.run_id, self.step)}: {self.codec} cannot decode the stored {self.name}"


class ReplyMismatchError(SquidstepError):
    """The connection answered with the reply to another call.

    It happens when something (a signal handler that raises, as a rule) interrupted an earlier call on the same
    connection. Whether this call took effect is unknown; sending it again is safe.
    """


def _where(run_id: str, step: str | None) -> str:
    return f"run {run_id!r}" if step is None else f"run {run_id!r}, step {step!r}"


def described(value: Any) -> str:
    """Names a refused value in a message: its type, and a little of what it is.

    Returns:
        Such as `int -3`, or `str 'aaaa…'` for what would fill the screen.
    """
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 -- what has no repr must be refused all the same
        text = "(without a repr)"
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"
