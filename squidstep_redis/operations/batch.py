"""Any mixture of operations in one round trip."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from squidstep_redis.operations.context import Context
from squidstep_redis.protocol.call import Call, check_calls
from squidstep_redis.protocol.workflow import SendBatch, Workflow

T = TypeVar("T")


def batch(context: Context, calls: Iterable[Call[T]]) -> Workflow[list[T | Exception]]:  # noqa: ARG001 -- an operation
    """Sends any mixture of operations, on any runs, in one round trip per server.

    They are not one transaction. Each is atomic, and those of one run take effect in the given order.

    Args:
        calls: calls made by `store.calls`, such as `store.calls.begin_step("run", "step", {})`.

    Returns:
        For each call, in order, the operation's result or the error it would have raised.

    Raises:
        InvalidArgumentError: one of the items is not a call; nothing was sent.
        ServerError: the server could not be reached, or did not reply, within the store's `timeout`. After an
            OutcomeUnknownError any of the operations may have taken effect; re-sending the same calls is safe.
    """
    return _batch(check_calls(calls))


def _batch(calls: list[Call[T]]) -> Workflow[list[T | Exception]]:
    return (yield SendBatch(calls)) if calls else []
