"""Everything that squidstep_redis raises, in one tree.

Each error says what happened, to which run and step, and what to do next.

    SquidstepError
    ├── InvalidArgumentError      refused before anything was sent
    │   ├── PayloadError              with the path to the culprit
    │   │   └── PayloadTooLargeError
    │   └── UnsupportedClientError
    ├── StepRunNotFoundError      there is no such record; nothing was written
    │   └── RunDeletedError           … because the run was deleted a short while ago
    ├── StaleStepRunError         the claim is not yours (any more); nothing was written
    ├── StepBusyError             run_step: another worker holds the step; try again later
    ├── WaitTimeoutError          wait_for_step: the step was not over in time
    ├── StepExhaustedError        run_step: max_attempts are used up; the step has failed for good
    ├── RunExistsError            import_run: there is such a run already; nothing was written
    ├── CorruptRunError           what is stored cannot be trusted; nothing was written
    │   └── NewerFormatError          … because a later version of this library wrote it
    ├── UndecodablePayloadError   the store's codec cannot read a stored payload
    └── ServerError               the server, or the way to it, failed; its __cause__ is redis-py's error
        ├── NotSentError              nothing was sent: no connection was to be had
        ├── RefusedError              the server refused, and nothing was written
        └── OutcomeUnknownError       sent, and not answered: send it again, or look
            ├── NotReplicatedError        done, and not confirmed by as many replicas, or the AOF, as was asked for
            └── ReplyMismatchError        the connection handed over the answer to another call
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from squidstep_redis.model import StepRun
    from squidstep_redis.protocol.call import Call


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


class WaitTimeoutError(SquidstepError, TimeoutError):
    """The step that was waited for was not over in time; wait again, or look who is at it.

    Attributes:
        run_id: the run.
        step: the step's name.
        current: the step run as it was last seen; None: nobody has scheduled or begun it yet.
    """

    def __init__(self, run_id: str, step: str, timeout: float, current: StepRun | None) -> None:
        super().__init__(run_id, step, timeout, current)
        self.run_id = run_id
        self.step = step
        self.timeout = timeout
        self.current = current

    def __str__(self) -> str:
        found = "there is no such step run yet" if self.current is None else f"it is {self.current.status}"
        return f"{_where(self.run_id, self.step)}: was not over after {self.timeout:g} s, {found}"


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


class RunExistsError(SquidstepError):
    """An import would overwrite a run; nothing was written."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return f"{_where(self.run_id, None)}: exists already, and nothing was written. To replace it, delete it first"


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


class ServerError(SquidstepError):
    """The server did not do what it was asked, or did not say so. redis-py's own error is the `__cause__`.

    Attributes:
        operation: the name of the operation, or "batch".
        run_id: the run it was about; None if it spans runs.
        step: the step, if it was about one.
        transient: whether the same call may get through later, without anybody changing a setting.
    """

    def __init__(self, operation: str, run_id: str | None, step: str | None, problem: str, transient: bool) -> None:
        super().__init__(operation, run_id, step, problem, transient)
        self.operation = operation
        self.run_id = run_id
        self.step = step
        self.problem = problem
        self.transient = transient

    def __str__(self) -> str:
        where = "" if self.run_id is None else f", {_where(self.run_id, self.step)}"
        return f"{self.operation}{where}: {self.problem}"


class NotSentError(ServerError):
    """No connection was to be had: the server is away, refuses connections, or the client's pool is exhausted.

    Nothing was sent, so nothing was written.
    """


class RefusedError(ServerError):
    """The server refused the operation before it wrote anything: read-only, loading, out of memory, no rights, …."""


class OutcomeUnknownError(ServerError):
    """The operation was sent, and whether it took effect is not known.

    `store.send(error.call)` sends the very same call again: it takes effect once in all, and answers what it would
    have answered. Calling the method again makes another call, which `begin_step` does not take for the same: it finds
    the first one's claim busy. Or look, with `get_step_run`.

    Attributes:
        call: what was sent; None for a batch, and after pickling.
    """

    def __init__(
        self,
        operation: str,
        run_id: str | None,
        step: str | None,
        problem: str,
        transient: bool,
        call: Call[Any] | None = None,
    ) -> None:
        super().__init__(operation, run_id, step, problem, transient)
        self.call = call

    def __str__(self) -> str:
        again = "each of its calls" if self.operation == "batch" else "the same call, error.call,"
        return f"{super().__str__()}. Whether it took effect is unknown: {again} can safely be sent again"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args  # a call is made of functions, which do not travel


class NotReplicatedError(OutcomeUnknownError):
    """The master did it, but fewer replicas (or its AOF) confirmed it in time than the store was told to wait for.

    It stands, unless the master is lost before it has passed it on. Send it again to wait once more.

    Attributes:
        result: what the operation answered; None after pickling.
        replicas: how many confirmed it; None if the server did not say.
    """

    def __init__(
        self,
        operation: str,
        run_id: str | None,
        step: str | None,
        problem: str,
        transient: bool,
        call: Call[Any] | None = None,
        result: Any = None,
        replicas: int | None = None,
    ) -> None:
        super().__init__(operation, run_id, step, problem, transient, call)
        self.result = result
        self.replicas = replicas

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, None, None, self.replicas)


class ReplyMismatchError(OutcomeUnknownError):
    """The connection answered with the reply to another call.

    It happens when something (a signal handler that raises, as a rule) interrupted an earlier call on the same
    connection.
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
