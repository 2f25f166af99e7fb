"""`step` makes the function of a task a step; `steps` makes it a run of several steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar, Unpack

from squidstep_redis import InvalidArgumentError
from squidstep_redis.celery.retries import retrying
from squidstep_redis.celery.runs import open_run
from squidstep_redis.claims.request import StepSettings, with_step_settings
from squidstep_redis.functions.checks import is_coroutine_function, parameters_of
from squidstep_redis.protocol.arguments import LabelsOf, RunIdOf, Step
from squidstep_redis.task_queue_runs import Decorators, OnBusy, Parameters

P = ParamSpec("P")
T = TypeVar("T")


def _parameters_of(fn: Callable[..., Any]) -> Parameters:
    signature = parameters_of(fn)
    if is_coroutine_function(fn):
        raise InvalidArgumentError("fn", f"{fn!r} is a coroutine function, and Celery does not await it")
    names = list(signature.parameters)
    has_self = names[:1] == ["self"]
    return Parameters(signature.replace(parameters=list(signature.parameters.values())[has_self:]), has_self)


_decorators: Final = Decorators(open_run, _parameters_of, retrying)


@with_step_settings
def step(
    name: Step,
    *,
    run_id: RunIdOf | None = None,
    labels: LabelsOf | None = None,
    on_busy: OnBusy = "reschedule",
    exclude: tuple[str, ...] = (),
    **settings: Unpack[StepSettings],
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a function a step: it takes effect once, no matter how often Celery delivers the task.

    It goes under `@app.task` or `@shared_task`. A redelivery of a completed step returns the stored result. Outside a
    task, the function runs as if it were not decorated, unless it has a `run_id`. With `bind=True`, the parameter
    `self` is not an argument of the step. If the function raises Retry (`self.retry`), Ignore or Reject, the attempt
    does not count against `max_attempts`, and the next delivery executes the step.

    Args:
        name: the name of the step.
        run_id: how to make the run id from the function's arguments: a format string such as "order-{order_id}", whose
            values must not be None, or a function of the arguments. None: the run of the task, see `current_run`.
        labels: labels of the run if this step creates it, by which `runs` finds it: a dict of format strings over the
            function's arguments, such as {"tenant": "{tenant}"}, or a function of the arguments that returns a dict of
            str; None: those of `steps`, if the step belongs to its run. A format string must not name excluded
            parameters. If one of its arguments is None, there is no such label. An existing run keeps its own labels.
        on_busy: what to do while another worker has claimed the step, or while it may not be retried yet (after
            `backoff` or RetryLater). "reschedule": the task is sent again, to be delivered after 1, 2, 4, … seconds,
            but no later than when the lease expires, or when the delay ends; this uses none of the task's own retries,
            whose number `max_retries` limits. "raise": raises StepBusyError or StepDelayedError. "wait": waits inside
            the task until the step is completed or can be claimed.
        exclude: names of parameters that are neither stored nor part of the fingerprint, such as passwords. When
            the step is executed, the function receives them as given in this call. A `run_id` format string must not
            name them; a `run_id` function receives them.
        permanent: a type of exception, or a tuple of them, besides PermanentError: if the function raises one, the
            step has failed permanently, and `autoretry_for` does not retry the task.
        **settings: how the step is claimed, and what a failure means: see `StepSettings`.

    Raises:
        InvalidArgumentError: an argument is rejected, when the function is decorated: also a `run_id` that names
            something that is not a parameter of the function, or a parameter whose default is None; a function as
            `run_id`, `backoff`, `fingerprint` or `labels` that cannot be called with its arguments; and a generator
            function or coroutine function.
    """
    return _decorators.step(name, run_id, labels, on_busy, exclude, settings)


@with_step_settings
def steps(
    *,
    run_id: RunIdOf | None = None,
    labels: LabelsOf | None = None,
    on_busy: OnBusy = "reschedule",
    exclude: tuple[str, ...] = (),
    **settings: Unpack[StepSettings],
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes the function of a task a run of several steps.

    Each step is a `current_run().call(…)` in the function, or a call of a function decorated with `step`. The function
    itself runs at each delivery; steps that were completed before return their stored results.

    Args:
        run_id: how to make the run id from the function's arguments: a format string such as "order-{order_id}", whose
            values must not be None, or a function of the arguments. None: the run of the task, see `current_run`.
        labels: labels of the run if one of its steps creates it, by which `runs` finds it: a dict of format strings
            over the function's arguments, such as {"tenant": "{tenant}"}, or a function of the arguments that returns a
            dict of str; None: none. A format string must not name excluded parameters. If one of its arguments is None,
            there is no such label. An existing run keeps its own labels.
        on_busy: what to do while another worker has claimed one of the steps, or while one may not be retried yet
            (after `backoff` or RetryLater). "reschedule": the task is sent again, to be delivered after 1, 2, 4, …
            seconds, but no later than when the lease expires, or when the delay ends; this uses none of the task's own
            retries, whose number `max_retries` limits. "raise": raises StepBusyError or StepDelayedError. "wait":
            waits inside the task until the step is completed or can be claimed.
        exclude: names of parameters that are neither stored nor part of the fingerprint, such as passwords: those
            of the functions of `current_run().call(…)` that have such a parameter. When a step is executed, its
            function receives them as given in this call. A `run_id` format string must not name them.
        permanent: a type of exception, or a tuple of them, besides PermanentError: if the function of such a step
            raises one, the step has failed permanently, and `autoretry_for` does not retry the task.
        **settings: how each step of `current_run().call(…)` is claimed, and what a failure means: see
            `StepSettings`.

    Raises:
        InvalidArgumentError: an argument is rejected, when the function is decorated: also a `run_id` that names
            something that is not a parameter of the function, or a parameter whose default is None; a function as
            `run_id`, `backoff`, `fingerprint` or `labels` that cannot be called with its arguments; and a generator
            function or coroutine function.
    """
    return _decorators.steps(run_id, labels, on_busy, exclude, settings)
