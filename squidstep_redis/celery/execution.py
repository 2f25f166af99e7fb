"""Executes a function call as a step of a task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any, Final

from squidstep_redis import (
    InputMismatchError,
    InvalidArgumentError,
    PermanentError,
    RunCancelledError,
    SquidstepError,
    StepExhaustedError,
    StepFailedError,
    current_claim,
)
from squidstep_redis.celery.installed import PREDICATES, Request, Task
from squidstep_redis.celery.stores import store_for
from squidstep_redis.claims.failures import failure_rules
from squidstep_redis.functions.execution import FunctionCall, execute
from squidstep_redis.functions.inputs import Inputs
from squidstep_redis.task_queues import owner_of

_FINAL: Final = (
    *(PermanentError, StepFailedError, StepExhaustedError, RunCancelledError),
    *(InputMismatchError, InvalidArgumentError),
)
"""Errors that the next delivery would raise, too."""


def owner(task: Task | None, pid: int | None = None) -> str:
    """Returns the owner of a task's claims: `host:pid task-id`.

    Args:
        task: the current task; None: outside a task, where the owner is `host:pid`.
        pid: the process that claims the step; None: this process.
    """
    return owner_of(None if task is None else task.request.id, pid)


def inputs_of(task: Task | None) -> Inputs:
    """Returns the inputs of the steps that were called in this delivery of a task.

    They are kept with the delivery, because each `current_run()` of a function without a decorator makes a run.

    Args:
        task: the current task; None: outside a task, where each run has its own inputs.
    """
    return Inputs() if task is None else Inputs(vars(task.request).setdefault("_squidstep_inputs", {}))


def execute_in_task(task: Task | None, call: FunctionCall) -> Any:
    """Executes a function as a step, once across all deliveries, and returns its stored result.

    Args:
        task: the current task; None: outside a task.
        call: the call of the function.
    """
    settings: Any = {**call.settings, "owner": owner(task)}
    permanent = failure_rules(call.settings.get("permanent", ()), None).permanent
    try:
        return execute(store_for(task), call._replace(fn=_releasing(call.fn), settings=settings))
    except PREDICATES:
        raise
    except (*_FINAL, *permanent) as error:
        if task is not None:
            vars(task.request)["_squidstep_final"] = error
        raise


def is_final(request: Request, error: BaseException) -> bool:
    """Returns whether an error of a step shows that further deliveries of the task cannot help.

    Args:
        request: the current delivery.
        error: the error.
    """
    return vars(request).get("_squidstep_final") is error


def _releasing(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that releases the claim if `fn` raises Retry, Ignore or Reject: these are not failures."""

    @wraps(fn)  # error messages show its name
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except PREDICATES:
            claim: Any = current_claim()
            if claim is not None and not claim.ended:
                with contextlib.suppress(SquidstepError):  # the claim was lost, or expires with its lease
                    claim.release()
            raise

    return call
