"""The run of a task, and the calls of its steps."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, ClassVar, Literal, Unpack
from uuid import uuid4

from squidstep_redis import InvalidArgumentError
from squidstep_redis.celery.execution import execute_in_task, inputs_of
from squidstep_redis.celery.installed import Request, Task, current_task
from squidstep_redis.celery.notes import headers_with, notes_of
from squidstep_redis.claims.request import ClaimSettings, StepSettings, with_step_settings
from squidstep_redis.functions.checks import excluded_names
from squidstep_redis.functions.execution import FunctionCall
from squidstep_redis.protocol.arguments import Labels
from squidstep_redis.task_queue_runs import QueueRun, queue_settings
from squidstep_redis.task_queues import is_uuid4


class Run(QueueRun):
    """The run of a task.

    Threads that a task starts can use the run, although Celery has no current task in them.

    Attributes:
        id: the run id; None outside a task: functions are then called without storing anything.
        task: the task that executes the run; None outside a task.
        request: the delivery of the task; None outside a task.
        inputs: the inputs of the steps that the task has called.
    """

    current: ClassVar[ContextVar[Run | None]] = ContextVar("squidstep_celery_run", default=None)

    def __init__(
        self, id: str | None, task: Task | None, settings: ClaimSettings, excluded: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(id, inputs_of(task), settings, excluded)
        self.task = task
        self.request = None if task is None else task.request

    def execute(self, call: FunctionCall) -> Any:
        """Executes a function as a step of the run, with the task as the owner of its claim.

        Args:
            call: the call of the function.
        """
        return execute_in_task(self.task, call)


@with_step_settings
def current_run(
    run_id: str | None = None,
    *,
    labels: Labels | None = None,
    on_busy: Literal["raise", "wait"] = "raise",
    exclude: tuple[str, ...] = (),
    **settings: Unpack[StepSettings],
) -> Run:
    """Returns the run of the current task, for calling several steps within one task. Nothing is sent.

    Inside a function decorated with `steps`, the settings of the decorator apply, unless `run_id` is given.

    Args:
        run_id: the id of another run; None: the run of `steps`, or else the run of the task (`default_run_id`).
        labels: labels of the run if one of these steps creates it, a dict of up to 8 str of up to 64 bytes by name, by
            which `runs` finds it; None: none. An existing run keeps its own.
        on_busy: while another worker has claimed a step, "raise" StepBusyError, or "wait" until the step is completed
            or can be claimed. To have the task retried instead, decorate its function with `steps`.
        exclude: names of parameters that are neither stored nor part of the fingerprint, such as passwords: those
            of the called functions that have such a parameter. When a step is executed, its function receives them as
            given in this call.
        **settings: how each step is claimed, and what a failure means: see `StepSettings`.

    Raises:
        InvalidArgumentError: an argument is rejected.
    """
    return open_run(run_id, queue_settings(settings, on_busy, labels), excluded_names(exclude))


def open_run(run_id: str | None, settings: ClaimSettings, excluded: frozenset[str]) -> Run:
    """Returns a run, as `current_run` does.

    Args:
        run_id: the id of another run; None: the run of `steps`, or else the run of the task.
        settings: how the steps of the run are claimed, and what a failure means; not used for the run of `steps`.
        excluded: names of arguments that are not stored; not used for the run of `steps`.
    """
    run, task = Run.current.get(), current_task()
    # A task can run inside an apply() call of another task: `current` is then the other task's run.
    if run_id is None and run is not None and (task is None or run.request is task.request):
        return run
    if run_id is None and task is not None:
        run_id = default_run_id(task)
    return Run(run_id, task, settings, excluded)


def default_run_id(task: Task) -> str:
    """Returns the run id of a task without a `run_id`. It is the task id if Celery has generated that for this call.

    Other task ids do not stand for one execution. If you have chosen the id, the run id also contains the id of the
    message, so that each `apply_async` is a separate run. Retries and redeliveries continue the run.

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
