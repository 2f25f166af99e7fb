"""Sends a task again if its step cannot be executed now, and stops Celery's retries of a task that cannot succeed."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from typing import Any, Final, NoReturn, ParamSpec, TypeVar, cast

from squidstep_redis.celery.execution import is_final
from squidstep_redis.celery.installed import Request, Task, current_task, send_again
from squidstep_redis.celery.notes import headers_with, notes_of
from squidstep_redis.protocol.arguments import Seconds
from squidstep_redis.task_queue_runs import OnBusy
from squidstep_redis.task_queues import NOT_NOW, NotNow, is_wrapped_by, rerun

P = ParamSpec("P")
T = TypeVar("T")

_DEFAULT_VISIBILITY_TIMEOUT: Final = 3600.0  # of Celery's Redis transport, in seconds

# The delivery whose decorated function is running.
_inside: ContextVar[Request | None] = ContextVar("squidstep_celery_inside", default=None)


def retrying(
    fn: Callable[P, T], call: Callable[[Any, Any], T], lease: Seconds | None, on_busy: OnBusy
) -> Callable[P, T]:
    """Returns the decorated function. If it is the function of a task, it decides on the next delivery.

    Args:
        fn: the function that is decorated.
        call: calls it as a step, or as a run of steps, with its arguments and keyword arguments.
        lease: seconds until the next delivery if the other worker's claim has no lease.
        on_busy: "reschedule"; with any other value, the error is raised.
    """

    @wraps(fn)
    def decorated(*args: P.args, **kwargs: P.kwargs) -> T:
        before, task = _inside.get(), current_task()
        request = None if task is None else task.request
        if task is None or request is None or request is before or not is_wrapped_by(task.run, decorated):
            return call(args, kwargs)
        try:
            _inside.set(request)
            return call(args, kwargs)
        except NOT_NOW as error:
            if on_busy != "reschedule":
                raise
            if request.is_eager:
                error.add_note("The task was not retried: it was called by apply(), which would not wait.")
                raise
            _send_again_later(task, error, lease)
        except Exception as error:
            if is_final(request, error) and getattr(task, "autoretry_for", ()):
                request.called_directly = True  # Task.retry, which autoretry_for calls, then raises the error
            raise
        finally:
            _inside.set(before)

    # Celery checks the arguments of `delay` and `apply_async`, and does not look at the function that is wrapped.
    cast("Any", decorated).__signature__ = signature(fn)
    return decorated


def _send_again_later(task: Task, error: NotNow, lease: Seconds | None) -> NoReturn:
    request = task.request
    delay, notes = rerun(error, lease, notes_of(request))
    send_again(task, error, min(delay, _longest_countdown(task)), headers_with(request, {**notes}))


def _longest_countdown(task: Task) -> float:
    """Returns the longest countdown in seconds: the Redis transport redelivers a task that waits longer."""
    options: Any = task.app.conf.broker_transport_options
    return float(options.get("visibility_timeout", _DEFAULT_VISIBILITY_TIMEOUT)) / 2
