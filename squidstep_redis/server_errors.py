"""What is raised if the server or the connection fails, for one call or in a batch. `errors.py` has the whole tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from squidstep_redis.errors import SquidstepError, error_class, place_of

if TYPE_CHECKING:
    from squidstep_redis.protocol.call import Call


@error_class
class ServerError(SquidstepError):
    """The server did not execute the operation, or did not confirm it. redis-py's own error is the `__cause__`.

    Attributes:
        operation: the name of the operation, or "batch".
        run_id: the run; None if the operation spans runs.
        step: the step; None if the operation is about a run.
        problem: what failed, and what to do.
        transient: whether the same call may succeed later, without any change of settings.
    """

    operation: str
    run_id: str | None
    step: str | None
    problem: str
    transient: bool

    def __str__(self) -> str:
        where = "" if self.run_id is None else f", {place_of(self.run_id, self.step)}"
        return f"{self.operation}{where}: {self.problem}"


class NotSentError(ServerError):
    """Could not connect: the server is down, refuses connections, or the client's pool is exhausted.

    Nothing was sent, so nothing was written.
    """


class RefusedError(ServerError):
    """The server refused the operation before it wrote anything: read-only, loading, out of memory, no permission."""


@error_class
class OutcomeUnknownError(ServerError):
    """The operation was sent, and it is unknown whether it took effect.

    `store.send(error.call)` re-sends the same call: it takes effect once in total, and returns what it would have
    returned. Calling the method a second time makes a new call: a second `begin_step` finds the step busy, under the
    first call's claim. Or read the record with `get_step_run`.

    Attributes:
        call: what was sent; None for a batch, and after pickling.
    """

    call: Call[Any] | None = None

    def __str__(self) -> str:
        resend = "each of its calls" if self.operation == "batch" else "the same call, error.call,"
        return f"{super().__str__()}. Whether it took effect is unknown; {resend} can safely be re-sent"

    def _pickled_args(self) -> tuple[Any, ...]:
        return (
            self.operation,
            self.run_id,
            self.step,
            self.problem,
            self.transient,
        )  # a call has functions, which cannot be pickled


@error_class
class NotReplicatedError(OutcomeUnknownError):
    """The primary executed it, but the replicas or the AOF did not confirm it within the store's `wait_timeout`.

    It takes effect unless the primary is lost before it has replicated it. Re-send the call to wait longer.

    Attributes:
        result: what the operation returned; None after pickling.
        replicas: how many replicas confirmed it; None if unknown.
    """

    result: Any = None
    replicas: int | None = None

    def _pickled_args(self) -> tuple[Any, ...]:
        return (*super()._pickled_args(), None, None, self.replicas)


class ReplyMismatchError(OutcomeUnknownError):
    """The connection returned the reply to another call.

    An earlier call on the same connection was interrupted, usually by a signal handler that raised.
    """


@error_class
class BatchError(SquidstepError):
    """At least one call of a batch failed. The calls are independent, so the others took effect.

    The first error is the `__cause__`. Each error says what its own call wrote.

    Attributes:
        results: for each call, in order, its result or its error.
    """

    results: list[Any]

    @property
    def errors(self) -> list[Exception]:
        """The errors alone, in the order of their calls."""
        return [result for result in self.results if isinstance(result, Exception)]

    def __str__(self) -> str:
        first, failed, total = self.errors[0], len(self.errors), len(self.results)
        unknown = sum(isinstance(error, OutcomeUnknownError) for error in self.errors)
        return (
            f"batch: {failed} of {total} calls failed. The first is results[{self.results.index(first)}], "
            f"{type(first).__name__}: {str(first).rstrip('.')}. {total - failed} succeeded, {failed - unknown} wrote "
            f"nothing, and {unknown} may have taken effect. Handle each of the errors; re-sending the same calls is "
            "safe, because each takes effect once"
        )
