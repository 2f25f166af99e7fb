"""The run of a job, and the calls of its steps."""

from __future__ import annotations

from contextvars import ContextVar
from datetime import datetime
from typing import Any, ClassVar, Final, Literal, Unpack

from squidstep_redis import InvalidArgumentError
from squidstep_redis.claims.request import ClaimSettings, StepSettings, with_step_settings
from squidstep_redis.functions.checks import excluded_names
from squidstep_redis.functions.execution import FunctionCall
from squidstep_redis.protocol.arguments import Labels
from squidstep_redis.rq.execution import execute_in_job, inputs_of
from squidstep_redis.rq.installed import Job, get_current_job
from squidstep_redis.rq.notes import notes_of, start_of
from squidstep_redis.task_queue_runs import QueueRun, queue_settings
from squidstep_redis.task_queues import is_uuid4

_RQ_SCHEDULER: Final = frozenset({"interval", "cron_string"})  # in `job.meta`: rq-scheduler repeats the job


class Run(QueueRun):
    """The run of a job.

    Threads that a job starts can use the run, although RQ has no current job in them.

    Attributes:
        id: the run id; None outside a job: functions are then called without storing anything.
        job: the job that executes the run; None outside a job.
        inputs: the inputs of the steps that the job has called.
    """

    current: ClassVar[ContextVar[Run | None]] = ContextVar("squidstep_rq_run", default=None)

    def __init__(
        self, id: str | None, job: Job | None, settings: ClaimSettings, excluded: frozenset[str] = frozenset()
    ) -> None:
        super().__init__(id, inputs_of(job), settings, excluded)
        self.job = job

    def execute(self, call: FunctionCall) -> Any:
        """Executes a function as a step of the run, with the job as the owner of its claim.

        Args:
            call: the call of the function.
        """
        return execute_in_job(self.job, call)


@with_step_settings
def current_run(
    run_id: str | None = None,
    *,
    labels: Labels | None = None,
    on_busy: Literal["raise", "wait"] = "raise",
    exclude: tuple[str, ...] = (),
    **settings: Unpack[StepSettings],
) -> Run:
    """Returns the run of the current job, for calling several steps within one job. Nothing is sent.

    Inside a function decorated with `steps`, the settings of the decorator apply, unless `run_id` is given.

    Args:
        run_id: the id of another run; None: the run of `steps`, or else the run of the job (`default_run_id`).
        labels: labels of the run if one of these steps creates it, a dict of up to 8 str of up to 64 bytes by name, by
            which `runs` finds it; None: none. An existing run keeps its own.
        on_busy: while another worker has claimed a step, "raise" StepBusyError, or "wait" until the step is completed
            or can be claimed. To reschedule the job instead, decorate its function with `steps`.
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
        run_id: the id of another run; None: the run of `steps`, or else the run of the job.
        settings: how the steps of the run are claimed, and what a failure means; not used for the run of `steps`.
        excluded: names of arguments that are not stored; not used for the run of `steps`.
    """
    run, job = Run.current.get(), get_current_job()
    if job is not None:
        notes_of(job)  # which removes those of the delivery before
    # With `is_async=False`, a job can run inside an enqueue() call of another job, whose run `current` then is.
    # A timeout may also have kept it from being reset.
    if run_id is None and run is not None and (job is None or run.job is job):
        return run
    if run_id is None and job is not None:
        run_id = default_run_id(job)
    return Run(run_id, job, settings, excluded)


def default_run_id(job: Job) -> str:
    """Returns the run id of a job without a `run_id`. It is the job id if RQ has generated the job id.

    Other job ids do not stand for one execution. If you have chosen the id, the run id also contains the time at which
    the job was created, so that each `enqueue` is a separate run. With `Repeat`, it also contains the number of
    repeats left. rq-scheduler enqueues one job at each tick of `cron` or `schedule(interval=…)`, and nothing in RQ
    distinguishes the ticks: the run id then contains the time at which the worker started the job.

    Args:
        job: the current job.

    Raises:
        InvalidArgumentError: rq-scheduler repeats the job, and the job has a `Retry`: a retry of one tick would be
            mistaken for the next tick.
    """
    if job.meta.keys() & _RQ_SCHEDULER:
        return _tick_of(job)
    run_id = job.id if is_uuid4(job.id) else f"{job.id}@{_time(job.created_at)}"
    left = getattr(job, "repeats_left", None)
    return run_id if left is None else f"{run_id}#{left}"


def _tick_of(job: Job) -> str:
    notes = notes_of(job)
    if "run_id" in notes:
        return notes["run_id"]
    if job.retries_left is not None:
        raise InvalidArgumentError(
            "run_id",
            f"job {job.id!r} is repeated by rq-scheduler and has a Retry, so that a retry cannot be distinguished from "
            "the next tick: give the decorator a run_id, such as a function that returns the day",
        )
    notes["run_id"] = f"{job.id}@{_time(start_of(job))}"
    return notes["run_id"]


def _time(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%dT%H:%M:%S.%fZ}"
