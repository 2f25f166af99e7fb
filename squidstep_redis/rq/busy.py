"""Reschedules a job whose step cannot be executed now: another worker holds it, or it must be retried later."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, Final, ParamSpec, TypeVar, cast

from redis.exceptions import RedisError

from squidstep_redis.functions.checks import is_coroutine_function
from squidstep_redis.protocol.arguments import Seconds
from squidstep_redis.rq.installed import Job, Retry, RQScheduler, get_current_job
from squidstep_redis.rq.notes import leave_notes, notes_of
from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.task_queue_runs import OnBusy
from squidstep_redis.task_queues import NOT_NOW, NotNow, is_wrapped_by, rerun

P = ParamSpec("P")
T = TypeVar("T")

# RQ counts how often a job returns Retry, and fails the job after the maximum. A busy step is not a failure.
MAX_RESCHEDULES: Final = 1_000_000
_SYNCHRONOUS: Final = "sync"  # the worker name of jobs that run inside enqueue(), where RQ ignores Retry

# The job whose decorated function is running. A timeout may keep this from being reset, so it is compared with the job.
_inside: ContextVar[Job | None] = ContextVar("squidstep_rq_inside", default=None)


def rescheduling(
    fn: Callable[P, T], call: Callable[[Any, Any], T], lease: Seconds | None, on_busy: OnBusy
) -> Callable[P, T]:
    """Returns the decorated function. If it is the function of a job, it returns Retry when a step cannot be executed.

    Args:
        fn: the function that is decorated.
        call: calls it as a step, or as a run of steps, with its arguments and keyword arguments.
        lease: seconds until RQ reruns the job if the other worker's claim has no lease.
        on_busy: "reschedule"; with any other value, the error is raised.
    """

    def on_busy_step(error: NotNow, job: Job | None) -> T:
        if on_busy != "reschedule" or job is None or not is_wrapped_by(job.func, decorated):
            raise error
        if job.worker_name == _SYNCHRONOUS:
            error.add_note("The job was not rescheduled: it runs inside enqueue(), where RQ ignores Retry.")
            raise error
        if problem := _problem_of_scheduler(job):
            error.add_note(f"The job was not rescheduled: {problem}.")
            raise error
        retry = _retry_later(job, error, lease)
        if getattr(job.func, "__func__", job.func) is not decorated:  # a function around it may drop what it returns
            _set_result(job, retry)
        return cast("T", retry)

    def on_result(result: T, job: Job | None) -> T:
        if job is not None and isinstance(result, Retry):
            leave_notes(job, {})
        return result

    @wraps(fn)
    def call_sync(*args: P.args, **kwargs: P.kwargs) -> T:
        before, job = _inside.get(), get_current_job()
        outermost = None if job is before else job
        try:
            _inside.set(job)
            return on_result(call(args, kwargs), outermost)
        except NOT_NOW as error:
            return on_busy_step(error, outermost)
        finally:
            _inside.set(before)

    @wraps(fn)
    async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
        before, job = _inside.get(), get_current_job()
        outermost = None if job is before else job
        try:
            _inside.set(job)
            return on_result(await cast("Any", call(args, kwargs)), outermost)
        except NOT_NOW as error:
            return on_busy_step(error, outermost)
        finally:
            _inside.set(before)

    decorated = cast("Callable[P, T]", call_async) if is_coroutine_function(fn) else call_sync
    return decorated


def _set_result(job: Job, retry: Retry) -> None:
    """Makes the job return Retry, even if functions around the decorated one return something else.

    If the job simply finished, the step would be lost if its worker died. Job.perform assigns the result to the job,
    and returns what it then reads from the job.
    """
    vars(job)["_squidstep_retry"] = retry
    job.__class__ = _returning_retry(type(job))


@cache
def _returning_retry(kind: type[Job]) -> type[Job]:
    def get(job: Job) -> Any:
        return vars(job)["_squidstep_retry"]

    def discard(job: Job, value: object) -> None:
        pass

    return type(kind.__name__, (kind,), {"_result": property(get, discard)})


def _problem_of_scheduler(job: Job) -> str | None:
    """Returns why RQ cannot schedule a job; None if it can."""
    connection: Any = job.connection
    try:
        with defer_sigalrm():
            if connection.exists(RQScheduler.get_locking_key(job.origin)):
                return None
    except RedisError as error:
        return f"RQ's server did not say whether a worker has a scheduler: {type(error).__name__}: {error}"
    return "no worker of its queue has a scheduler (--with-scheduler)"


def _retry_later(job: Job, error: NotNow, lease: Seconds | None) -> Retry:
    """Returns the Retry that reschedules a job. It uses none of the retries of a Retry that the function returns."""
    delay, notes = rerun(error, lease, notes_of(job))
    leave_notes(job, {"returned": job.number_of_retries or 0, **notes})
    return Retry(max=MAX_RESCHEDULES, interval=delay)
