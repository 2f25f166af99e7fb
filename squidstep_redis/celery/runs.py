"""The run of a task, and the calls of its steps."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from inspect import iscoroutinefunction
from typing import Any, Literal, ParamSpec, TypeVar, cast
from uuid import uuid4

from squidstep_redis import InvalidArgumentError
from squidstep_redis.celery.execution import execute_in_task, inputs_of
from squidstep_redis.celery.installed import Request, Task, current_task
from squidstep_redis.celery.notes import headers_with, notes_of
from squidstep_redis.claims.failures import Backoff, Permanent
from squidstep_redis.claims.request import DEFAULT_LEASE
from squidstep_redis.functions.checks import excluded_names, parameters_of
from squidstep_redis.functions.execution import FunctionCall
from squidstep_redis.functions.settings import StepSettings, step_settings
from squidstep_redis.protocol.arguments import Labels, Seconds, Step
from squidstep_redis.protocol.fingerprints import Fingerprint
from squidstep_redis.task_queues import is_uuid4

P = ParamSpec("P")
T = TypeVar("T")

# Always set inside the `try` whose `finally` restores the previous value. With the token of `ContextVar.set`, a soft
# time limit between that call and the assignment of the token would leak the run into the next task of the process.
_run: ContextVar[Run | None] = ContextVar("squidstep_celery_run", default=None)


class Run:
    """The run of a task.

    Threads that a task starts can use the run, although Celery has no current task in them.

    Attributes:
        id: the run id; None outside a task: functions are then called without storing anything.
        task: the task that executes the run; None outside a task.
        request: the delivery of the task; None outside a task.
        inputs: those of the steps that the task has called.
    """

    def __init__(
        self, id: str | None, task: Task | None, settings: StepSettings, excluded: frozenset[str] = frozenset()
    ) -> None:
        self.id = id
        self.task = task
        self.request = None if task is None else task.request
        self.inputs = inputs_of(task)
        self._settings = settings
        self._excluded = excluded

    def call(self, step: Step, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `fn(*args, **kwargs)` as a step: once across all deliveries.

        Two round trips if the function is executed, one if the step is already completed.

        Args:
            step: the name of the step. Calls with the same name are the same step and return the same result. In one
                delivery of a task, they must have the same arguments.
            fn: the function that does the work. Its result is stored as `{"result": …}`.
            args: positional arguments of `fn`. They are stored as the step's input under the names of the parameters,
                so they must be valid in a payload.
            kwargs: keyword arguments of `fn`. They are stored as the step's input, so they must be valid in a payload.

        Returns:
            The stored result of `fn`. A tuple is returned as a list.

        Raises:
            InputMismatchError: this task has called the step with other arguments, or the step has another fingerprint.
                The function was not called.
            StepBusyError: another worker has claimed the step, or has taken it over.
            StepDelayedError: the step has failed and may not be retried yet.
            RunCancelledError: the run is cancelled.
            StepFailedError: the step has failed permanently.
            StepExhaustedError: `max_attempts` is reached.
            StaleStepRunError: the claim was lost, and no other worker has completed or claimed the step.
            PayloadError: the arguments or the result cannot be stored in a payload. If it is the result, the step has
                failed permanently, because the function may have taken effect.
            InvalidArgumentError: an argument was rejected; nothing was sent.
            ServerError: the server was unreachable, or did not confirm the result.
        """
        if self.id is None:
            return fn(*args, **kwargs)
        bound = parameters_of(fn).bind(*args, **kwargs)
        call = FunctionCall(self.id, step, fn, bound, self._excluded, self._settings, self.inputs)
        return cast("T", execute_in_task(self.task, call))

    def with_labels(self, settings: StepSettings) -> StepSettings:
        """Returns the settings of a decorated step, with the labels of the run if it has none of its own."""
        return {**settings, "labels": self._settings["labels"]} if settings["labels"] is None else settings

    def __repr__(self) -> str:
        return f"<Run {self.id!r}>"


def current_run(
    run_id: str | None = None,
    *,
    lease: Seconds | None = DEFAULT_LEASE,
    max_attempts: int | None = None,
    permanent: Permanent = (),
    backoff: Backoff | None = None,
    on_busy: Literal["raise", "wait"] = "raise",
    fingerprint: Fingerprint | None = None,
    labels: Labels | None = None,
    exclude: tuple[str, ...] = (),
) -> Run:
    """Returns the run of the current task, for calling several steps within one task. Nothing is sent.

    Inside a function decorated with `steps`, the settings of the decorator apply, unless `run_id` is given.

    Args:
        run_id: the id of another run; None: the run of `steps`, or else the run of the task (`default_run_id`).
        lease: seconds after which another worker can take over a step from a dead one; None: never. A heartbeat extends
            the lease while the step runs.
        max_attempts: the maximum number of attempts of each step; None: no limit.
        permanent: a type of exception, or a tuple of them, besides PermanentError: if the function of a step raises
            one, the step has failed permanently.
        backoff: how long a step cannot be claimed after any other exception: a function that returns the seconds, given
            how many attempts there were, such as an ExponentialBackoff; None: it can be claimed at once.
        on_busy: while another worker has claimed a step, "raise" StepBusyError, or "wait" until the step is completed
            or can be claimed. To have the task retried instead, decorate its function with `steps`.
        fingerprint: what identifies the input of each step, the dict of the given arguments. True: all of it; a
            function of the dict: what it returns, which may be anything that a payload may contain; a str of up to
            256 bytes without control characters: that itself; False: nothing; None: the store's setting. If the step
            has another fingerprint, for example of another task, InputMismatchError is raised.
        labels: labels of the run if one of these steps creates it, a dict of up to 8 str of up to 64 bytes by name, by
            which `runs` finds it; None: none. A run that exists keeps its own.
        exclude: names of parameters that are not stored, for example of passwords, nor part of the fingerprint: those
            of the called functions that have such a parameter. When a step is executed, its function receives them as
            given in this call.

    Raises:
        InvalidArgumentError: an argument is rejected.
    """
    settings = step_settings(
        lease=lease,
        max_attempts=max_attempts,
        permanent=permanent,
        backoff=backoff,
        on_busy=on_busy,
        owner=None,  # that of the task
        fingerprint=fingerprint,
        labels=labels,
    )
    return open_run(run_id, settings, excluded_names(exclude))


def open_run(run_id: str | None, settings: StepSettings, excluded: frozenset[str]) -> Run:
    """Returns a run, as `current_run` does.

    Args:
        run_id: the id of another run; None: the run of `steps`, or else the run of the task.
        settings: how the steps of the run are claimed, and what a failure means; not used for the run of `steps`.
        excluded: names of arguments that are not stored; not used for the run of `steps`.
    """
    run, task = _run.get(), current_task()
    # A task can run inside an apply() call of another task: `_run` is then the other task's run.
    if run_id is None and run is not None and (task is None or run.request is task.request):
        return run
    if run_id is None and task is not None:
        run_id = default_run_id(task)
    return Run(run_id, task, settings, excluded)


def default_run_id(task: Task) -> str:
    """Returns the run id of a task without a `run_id`. It is the task id if Celery has made that up for this call.

    Other task ids do not stand for one execution. If you have chosen the id, the run id also contains the id of the
    message, so that each `apply_async` is a run of its own. Retries and redeliveries continue the run.

    Args:
        task: the current task.

    Raises:
        InvalidArgumentError: you have chosen the task id, and the messages of the broker have no id that stays the same
            at a redelivery.
    """
    request = task.request
    if is_uuid4(request.id):
        return request.id
    notes = notes_of(request)
    if "run_id" not in notes:
        notes["run_id"] = f"{request.id}@{_message_id(request)}"
        request.headers = headers_with(request, notes)  # for `Task.retry`
    return notes["run_id"]


def _message_id(request: Request) -> str:
    id: object = str(uuid4()) if request.is_eager else (request.properties or {}).get("delivery_tag")
    if not isinstance(id, str) or not is_uuid4(id):  # SQS makes a new tag for each redelivery, AMQP counts deliveries
        raise InvalidArgumentError(
            "run_id",
            f"you have chosen the task id {request.id!r}, and the messages of this broker have no id that tells a "
            "redelivery from another call: give the decorator a run_id",
        )
    return id


def call_in_run(run: Run, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Calls a function with `run` as the current run.

    Args:
        run: the run of the function's steps.
        fn: the function to call.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    before = _run.get()
    try:
        _run.set(run)
        return fn(*args, **kwargs)
    finally:
        _run.set(before)


def check_is_awaited(fn: Callable[..., Any]) -> None:
    """Raises InvalidArgumentError for a coroutine function, which Celery does not await."""
    if iscoroutinefunction(fn):
        raise InvalidArgumentError("fn", f"{fn!r} is a coroutine function, and Celery does not await it")
