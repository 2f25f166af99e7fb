"""Reschedules a job whose step cannot be executed now: another worker holds it, or it is to be retried later."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, wraps
from inspect import iscoroutinefunction
from typing import Any, Final, Literal, ParamSpec, TypeVar, cast

from squidstep_redis import InvalidArgumentError, RetryLater, StepBusyError, StepDelayedError
from squidstep_redis.claims.request import DEFAULT_LEASE
from squidstep_redis.protocol.arguments import Seconds
from squidstep_redis.rq.installed import Job, Retry, RQScheduler, get_current_job
from squidstep_redis.rq.notes import Notes, leave_notes, notes_of
from squidstep_redis.signals import defer_sigalrm

P = ParamSpec("P")
T = TypeVar("T")

OnBusy = Literal["reschedule", "raise", "wait"]
"""What a decorated function does while another worker has claimed its step."""

# RQ counts how often a job returns Retry, and fails the job after the maximum. A busy step is not a failure.
MAX_RESCHEDULES: Final = 1_000_000
_MAX_DOUBLINGS: Final = 32  # 2**32 seconds are longer than any lease
_SYNCHRONOUS: Final = "sync"  # the worker name of jobs that run inside enqueue(), where RQ ignores Retry

NotNow = StepBusyError | StepDelayedError | RetryLater
NOT_NOW: Final = (StepBusyError, StepDelayedError, RetryLater)

_inside: ContextVar[bool] = ContextVar("squidstep_rq_inside", default=False)


def check_on_busy(on_busy: object) -> None:
    """Raises InvalidArgumentError if `on_busy` is not one of the three modes."""
    if on_busy not in ("reschedule", "raise", "wait"):
        raise InvalidArgumentError("on_busy", f"must be 'reschedule', 'raise' or 'wait', not {on_busy!r}")


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

    def on_busy_step(error: NotNow, outermost: bool) -> T:
        job = get_current_job()
        if on_busy != "reschedule" or not outermost or job is None or not _is_function_of(job, decorated):
            raise error
        if job.worker_name == _SYNCHRONOUS:
            error.add_note("The job was not rescheduled: it runs inside enqueue(), where RQ ignores Retry.")
            raise error
        if not _has_scheduler(job):
            error.add_note("The job was not rescheduled: no worker of its queue has a scheduler (--with-scheduler).")
            raise error
        retry = _retry_later(job, error, lease)
        if not _is(job.func, decorated):  # a function around it may drop what it returns
            _set_result(job, retry)
        return cast("T", retry)

    def on_result(result: T, outermost: bool) -> T:
        if outermost and isinstance(result, Retry) and (job := get_current_job()) is not None:
            leave_notes(job, {})
        return result

    @wraps(fn)
    def call_sync(*args: P.args, **kwargs: P.kwargs) -> T:
        outermost = not _inside.get()
        try:
            _inside.set(True)
            return on_result(call(args, kwargs), outermost)
        except NOT_NOW as error:
            return on_busy_step(error, outermost)
        finally:
            _inside.set(not outermost)

    @wraps(fn)
    async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
        outermost = not _inside.get()
        try:
            _inside.set(True)
            return on_result(await cast("Any", call(args, kwargs)), outermost)
        except NOT_NOW as error:
            return on_busy_step(error, outermost)
        finally:
            _inside.set(not outermost)

    decorated = cast("Callable[P, T]", call_async) if iscoroutinefunction(fn) else call_sync
    return decorated


def _is_function_of(job: Job, decorated: object) -> bool:
    """Returns whether the decorated function is the job's own function, or wrapped by it."""
    function: object = job.func
    while function is not None:
        if _is(function, decorated):
            return True
        function = getattr(getattr(function, "__func__", function), "__wrapped__", None)
    return False


def _is(function: object, decorated: object) -> bool:
    return getattr(function, "__func__", function) is decorated


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


def _has_scheduler(job: Job) -> bool:
    connection: Any = job.connection
    with defer_sigalrm():
        return bool(connection.exists(RQScheduler.get_locking_key(job.origin)))


def _retry_later(job: Job, error: NotNow, lease: Seconds | None) -> Retry:
    """Returns the Retry that reschedules a job. It uses none of the retries of a Retry that the function returns."""
    before = notes_of(job)
    notes: Notes = {"returned": job.number_of_retries or 0}
    if isinstance(error, StepBusyError):
        notes["claim"] = f"{error.current.id} {error.current.attempt}"
        notes["looks"] = before.get("looks", 0) if before.get("claim") == notes["claim"] else 0
    delay = reschedule_delay(error, lease, notes.get("looks"))
    if "looks" in notes:
        notes["looks"] += 1
    leave_notes(job, notes)
    return Retry(max=MAX_RESCHEDULES, interval=delay)


def reschedule_delay(error: NotNow, lease: Seconds | None, looks: int | None = None) -> int:
    """Returns the seconds until the rerun, at least 1, plus jitter of up to 10 %. RQ accepts whole seconds only.

    Args:
        error: why the step was not executed, or is to be retried, with the remaining lease or delay.
        lease: seconds to use if the other worker's claim has no lease; None: the default lease.
        looks: how often the job has found this claim before: it looks again after 1, 2, 4, … seconds, and at the end of
            the lease; None: at the end of the lease or delay.
    """
    rest = error.retry_in
    if rest is None:
        rest = lease if isinstance(lease, float | int) else DEFAULT_LEASE if lease is None else lease.total_seconds()
    seconds = max(1, math.ceil(rest))
    if looks is not None and 2 ** min(looks, _MAX_DOUBLINGS) < seconds:
        seconds = 2**looks
        return seconds + random.randint(0, seconds // 10)
    return seconds + random.randint(0, max(1, seconds // 10))
