"""Any mixture of operations in one round trip."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeVar, overload

from squidstep_redis.model import BeginResult, ScheduleResult, StepRun
from squidstep_redis.operations.context import Context
from squidstep_redis.protocol.call import Call, check_calls
from squidstep_redis.protocol.workflow import SendBatch, Workflow
from squidstep_redis.server_errors import BatchError
from squidstep_redis.summaries import StepPage

# What operations return. For a list of mixed calls, pyright infers the union of the results, but mypy infers `object`:
# this bound rejects that, so that mypy takes the last overload.
R = TypeVar(
    "R", bound=StepRun | BeginResult | ScheduleResult | StepPage | list[Any] | dict[str, Any] | str | bool | None
)


@overload
def batch(
    context: Context, calls: Iterable[Call[R]], *, raise_errors: Literal[False] = False
) -> Workflow[list[R | Exception]]: ...
@overload
def batch(context: Context, calls: Iterable[Call[R]], *, raise_errors: Literal[True]) -> Workflow[list[R]]: ...
@overload
def batch(context: Context, calls: Iterable[Call[Any]], *, raise_errors: bool = False) -> Workflow[list[Any]]: ...
def batch(
    context: Context,  # noqa: ARG001 -- an operation
    calls: Iterable[Call[Any]],
    *,
    raise_errors: bool = False,
) -> Workflow[list[Any]]:
    """Sends any mix of operations, on any runs, in one round trip per server.

    If a server has lost its scripts, for example after a restart, it takes one more round trip.

    The operations are not one transaction. Each is atomic, and those on one run take effect in the given order, unless
    one has to be sent again because the server refused it temporarily, or because another call of the batch found a
    corrupt record.

    Args:
        calls: calls made by `store.calls`, such as `store.calls.begin_step("run", "step", {})`.
        raise_errors: whether to raise BatchError if a call fails, after all calls have been sent. The list then
            contains no errors, and type checkers know that.

    Returns:
        For each call, in order, the operation's result or the error it would have raised.

    Raises:
        BatchError: a call failed, and `raise_errors` is set. It holds the results and errors of all calls.
        InvalidArgumentError: one of the items is not a call; nothing was sent.
        ServerError: the server could not be reached, or did not reply, within the store's `timeout`. After an
            OutcomeUnknownError any of the operations may have taken effect; re-sending the same calls is safe.
    """
    return _batch(check_calls(calls), raise_errors)


def _batch(calls: list[Call[Any]], raise_errors: bool) -> Workflow[list[Any]]:
    results: list[Any] = (yield SendBatch(calls)) if calls else []
    if raise_errors and any(isinstance(result, Exception) for result in results):
        error = BatchError(results)
        raise error from error.errors[0]
    return results
