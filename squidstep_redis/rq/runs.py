"""The run of a job, and the calls of its steps."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Final, Literal, ParamSpec, TypeVar, cast

from squidstep_redis import InvalidArgumentError
from squidstep_redis.claims.failures import Backoff, Permanent
from squidstep_redis.claims.request import DEFAULT_LEASE
from squidstep_redis.functions.checks import excluded_names, parameters_of
from squidstep_redis.functions.execution import FunctionCall
from squidstep_redis.functions.settings import StepSettings, step_settings
from squidstep_redis.protocol.arguments import Labels, Seconds, Step
from squidstep_redis.protocol.fingerprints import Fingerprint
from squidstep_redis.rq.execution import execute_in_job, inputs_of
from squidstep_redis.rq.installed import Job, get_current_job
from squidstep_redis.rq.notes import notes_of
from squidstep_redis.task_queues import is_uuid4

P = ParamSpec("P")
T = TypeVar("T")

_RQ_SCHEDULER: Final = frozenset({"interval", "cron_string"})  # in `job.meta`: rq-scheduler repeats the job

# Always set inside the `try` whose `finally` restores the previous value. With the token of `ContextVar.set`, a job
# timeout between that call and the assignment of the token would leak the run into the next job of the process.
_run: ContextVar[Run | None] = ContextVar("squidstep_rq_run", default=None)


class Run:
    """The run of a job.

    Threads that a job starts can use the run, although RQ has no current job in them.

    Attributes:
        id: the run id; None outside a job: functions are then called without storing anything.
        job: the job that executes the run; None outside a job.
        inputs: those of the steps that the job has called.
    """

    def __init__(
        self, id: str | None, job: Job | None, settings: StepSettings, excluded: frozenset[str] = frozenset()
    ) -> None:
        self.id = id
        self.job = job
        self.inputs = inputs_of(job)
        self._settings = settings
        self._excluded = excluded

    def call(self, step: Step, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `fn(*args, **kwargs)` as a step: once across all deliveries.

        Two round trips if the function is executed, one if the step is already completed.

        Args:
            step: the name of the step. Calls with the same name are the same step and return the same result. In one
                execution of a job, they must have the same arguments.
            fn: the function or coroutine function that does the work. Its result is stored as `{"result": …}`.
            args: positional arguments of `fn`. They are stored as the step's input under the names of the parameters,
                so they must be valid in a payload.
            kwargs: keyword arguments of `fn`. They are stored as the step's input, so they must be valid in a payload.

        Returns:
            The stored result of `fn`. A tuple is returned as a list. RQ's Retry is returned and not stored: return it
            from the job's function, too.

        Raises:
            InputMismatchError: this job has called the step with other arguments, or the step has another fingerprint.
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
        return cast("T", execute_in_job(self.job, call))

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
    """Returns the run of the current job, for calling several steps within one job. Nothing is sent.

    Inside a function decorated with `steps`, the settings of the decorator apply, unless `run_id` is given.

    Args:
        run_id: the id of another run; None: the run of `steps`, or else the run of the job (`default_run_id`).
        lease: seconds after which another worker can take over a step from a dead one; None: never. A heartbeat extends
            the lease while the step runs.
        max_attempts: the maximum number of attempts of each step; None: no limit.
        permanent: a type of exception, or a tuple of them, besides PermanentError: if the function of a step raises
            one, the step has failed permanently.
        backoff: how long a step cannot be claimed after any other exception: a function that returns the seconds, given
            how many attempts there were, such as an ExponentialBackoff; None: it can be claimed at once.
        on_busy: while another worker has claimed a step, "raise" StepBusyError, or "wait" until the step is completed
            or can be claimed. To reschedule the job instead, decorate its function with `steps`.
        fingerprint: what identifies the input of each step, the dict of the given arguments. True: all of it; a
            function of the dict: what it returns, which may be anything that a payload may contain; a str of up to
            256 bytes without control characters: that itself; False: nothing; None: the store's setting. If the step
            has another fingerprint, for example of another job, InputMismatchError is raised.
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
        owner=None,  # that of the job
        fingerprint=fingerprint,
        labels=labels,
    )
    return open_run(run_id, settings, excluded_names(exclude))


def open_run(run_id: str | None, settings: StepSettings, excluded: frozenset[str]) -> Run:
    """Returns a run, as `current_run` does.

    Args:
        run_id: the id of another run; None: the run of `steps`, or else the run of the job.
        settings: how the steps of the run are claimed, and what a failure means; not used for the run of `steps`.
        excluded: names of arguments that are not stored; not used for the run of `steps`.
    """
    run, job = _run.get(), get_current_job()
    # With `is_async=False`, a job can run inside an enqueue() call of another job: `_run` is then the other job's run.
    if run_id is None and run is not None and (job is None or run.job == job):
        return run
    if run_id is None and job is not None:
        run_id = default_run_id(job)
    return Run(run_id, job, settings, excluded)


def default_run_id(job: Job) -> str:
    """Returns the run id of a job without a `run_id`. It is the job id if RQ has made that up for this job.

    Other job ids do not stand for one execution. If you have chosen the id, the run id also contains the time at which
    the job was created, so that each `enqueue` is a run of its own. With `Repeat`, it also contains the number of
    repeats left. rq-scheduler enqueues one job at each tick of `cron` or `schedule(interval=…)`, and nothing in RQ
    distinguishes the ticks: the run id then contains the time at which the worker started the job.

    Args:
        job: the current job.

    Raises:
        InvalidArgumentError: rq-scheduler repeats the job, and the job has a `Retry`: a retry of one tick would be
            taken for the next tick.
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
    notes["run_id"] = f"{job.id}@{_time(job.started_at)}"
    return notes["run_id"]


def _time(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%dT%H:%M:%S.%fZ}"


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


async def await_in_run(run: Run, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Awaits a coroutine function with `run` as the current run.

    Args:
        run: the run of the function's steps.
        fn: the coroutine function to call.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    before = _run.get()
    try:
        _run.set(run)
        return await cast("Any", fn)(*args, **kwargs)
    finally:
        _run.set(before)
