"""`step` makes the function of a task a step; `steps` makes it a run of several steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import BoundArguments, Signature
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

from squidstep_redis.celery.execution import execute_in_task
from squidstep_redis.celery.retries import OnBusy, check_on_busy, retrying
from squidstep_redis.celery.runs import call_in_run, check_is_awaited, current_run, open_run
from squidstep_redis.claims.failures import Backoff, Permanent
from squidstep_redis.claims.request import DEFAULT_LEASE
from squidstep_redis.functions.checks import check_step, excluded_names, parameters_of
from squidstep_redis.functions.execution import FunctionCall
from squidstep_redis.functions.labels import with_labels_of
from squidstep_redis.functions.run_ids import run_id_of
from squidstep_redis.functions.settings import StepSettings, step_settings
from squidstep_redis.protocol.arguments import LabelsOf, RunIdOf, Seconds, Step
from squidstep_redis.protocol.fingerprints import Fingerprint

P = ParamSpec("P")
T = TypeVar("T")


def step(
    name: Step,
    *,
    run_id: RunIdOf | None = None,
    lease: Seconds | None = DEFAULT_LEASE,
    max_attempts: int | None = None,
    permanent: Permanent = (),
    backoff: Backoff | None = None,
    on_busy: OnBusy = "reschedule",
    fingerprint: Fingerprint | None = None,
    labels: LabelsOf | None = None,
    exclude: tuple[str, ...] = (),
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
        lease: seconds after which another worker can take over the step from a dead one; None: never. A heartbeat
            extends the lease while the function runs.
        max_attempts: the maximum number of attempts; None: no limit.
        permanent: a type of exception, or a tuple of them, besides PermanentError: if the function raises one, the
            step has failed permanently, and `autoretry_for` does not retry the task.
        backoff: how long the step cannot be claimed after any other exception: a function that returns the seconds,
            given how many attempts there were, such as an ExponentialBackoff; None: it can be claimed at once.
        on_busy: what to do while another worker has claimed the step, or while it may not be retried yet (after
            `backoff` or RetryLater). "reschedule": the task is sent again, to be delivered after 1, 2, 4, … seconds,
            at the latest when the lease expires, or when the delay ends; this uses none of the task's own retries,
            whose number `max_retries` limits. "raise": raises StepBusyError or StepDelayedError. "wait": waits inside
            the task until the step is completed or can be claimed.
        fingerprint: what identifies the step's input, the dict of the given arguments. True: all of it; a function of
            the dict: what it returns, which may be anything that a payload may contain; a str of up to 256 bytes
            without control characters: that itself; False: nothing; None: the store's setting. If the step has
            another fingerprint, for example of another task, InputMismatchError is raised.
        labels: labels of the run if this step creates it, by which `runs` finds it: a dict of format strings over the
            function's arguments, such as {"tenant": "{tenant}"}, or a function of the arguments that returns a dict of
            str; None: those of `steps`, if the step belongs to its run. A format string must not name excluded
            parameters. If one of its arguments is None, there is no such label. A run that exists keeps its own labels.
        exclude: names of parameters that are not stored, for example of passwords, nor part of the fingerprint. When
            the step is executed, the function receives them as given in this call. A `run_id` format string must not
            name them; a `run_id` function receives them.

    Raises:
        InvalidArgumentError: an argument is rejected, when the function is decorated: also a `run_id` that names
            something that is not a parameter of the function, or a parameter whose default is None; a function as
            `run_id`, `backoff`, `fingerprint` or `labels` that cannot be called with what it is given; and a generator
            function or coroutine function.
    """
    check_step(name)
    general = _settings(lease, max_attempts, permanent, backoff, on_busy, fingerprint)

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        parameters = _parameters_of(fn)
        excluded = excluded_names(exclude, parameters.signature)
        id_of = None if run_id is None else run_id_of(run_id, parameters.signature, excluded)
        settings_of = with_labels_of(general, labels, parameters.signature, excluded)

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
            bound = parameters.bind(args, kwargs)
            run = current_run(id_of(bound) if id_of is not None else None)
            if run.id is None:
                return fn(*args, **kwargs)
            function = partial(fn, args[0]) if parameters.has_self else fn
            step_call = FunctionCall(
                run.id, name, function, bound, excluded, run.with_labels(settings_of(bound)), run.inputs
            )
            return cast("T", execute_in_task(run.task, step_call))

        return retrying(fn, call, lease, on_busy)

    return decorate


def steps(
    *,
    run_id: RunIdOf | None = None,
    lease: Seconds | None = DEFAULT_LEASE,
    max_attempts: int | None = None,
    permanent: Permanent = (),
    backoff: Backoff | None = None,
    on_busy: OnBusy = "reschedule",
    fingerprint: Fingerprint | None = None,
    labels: LabelsOf | None = None,
    exclude: tuple[str, ...] = (),
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes the function of a task a run of several steps.

    Each step is a `current_run().call(…)` in the function, or a call of a function decorated with `step`. The function
    itself runs at each delivery; steps that were completed before return their stored results.

    Args:
        run_id: how to make the run id from the function's arguments: a format string such as "order-{order_id}", whose
            values must not be None, or a function of the arguments. None: the run of the task, see `current_run`.
        lease: seconds after which another worker can take over a step of `current_run().call(…)` from a dead one;
            None: never. A heartbeat extends the lease while the step runs.
        max_attempts: the maximum number of attempts of each step of `current_run().call(…)`; None: no limit.
        permanent: a type of exception, or a tuple of them, besides PermanentError: if the function of such a step
            raises one, the step has failed permanently, and `autoretry_for` does not retry the task.
        backoff: how long the step cannot be claimed after any other exception: a function that returns the seconds,
            given how many attempts there were, such as an ExponentialBackoff; None: it can be claimed at once.
        on_busy: what to do while another worker has claimed one of the steps, or while one may not be retried yet
            (after `backoff` or RetryLater). "reschedule": the task is sent again, to be delivered after 1, 2, 4, …
            seconds, at the latest when the lease expires, or when the delay ends; this uses none of the task's own
            retries, whose number `max_retries` limits. "raise": raises StepBusyError or StepDelayedError. "wait":
            waits inside the task until the step is completed or can be claimed.
        fingerprint: what identifies the input of each step of `current_run().call(…)`, the dict of the given
            arguments. True: all of it; a function of the dict: what it returns, which may be anything that a payload
            may contain; a str of up to 256 bytes without control characters: that itself; False: nothing; None: the
            store's setting. If the step has another fingerprint, for example of another task, InputMismatchError is
            raised.
        labels: labels of the run if one of its steps creates it, by which `runs` finds it: a dict of format strings
            over the function's arguments, such as {"tenant": "{tenant}"}, or a function of the arguments that returns a
            dict of str; None: none. A format string must not name excluded parameters. If one of its arguments is None,
            there is no such label. A run that exists keeps its own labels.
        exclude: names of parameters that are not stored, for example of passwords, nor part of the fingerprint: those
            of the functions of `current_run().call(…)` that have such a parameter. When a step is executed, its
            function receives them as given in this call. A `run_id` format string must not name them.

    Raises:
        InvalidArgumentError: an argument is rejected, when the function is decorated: also a `run_id` that names
            something that is not a parameter of the function, or a parameter whose default is None; a function as
            `run_id`, `backoff`, `fingerprint` or `labels` that cannot be called with what it is given; and a generator
            function or coroutine function.
    """
    general = _settings(lease, max_attempts, permanent, backoff, on_busy, fingerprint)
    excluded = excluded_names(exclude)

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        parameters = _parameters_of(fn)
        id_of = None if run_id is None else run_id_of(run_id, parameters.signature, excluded)
        settings_of = with_labels_of(general, labels, parameters.signature, excluded)

        def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
            bound = parameters.bind(args, kwargs)
            run = open_run(id_of(bound) if id_of is not None else None, settings_of(bound), excluded)
            return call_in_run(run, fn, args, kwargs)

        return retrying(fn, call, lease, on_busy)

    return decorate


class _Parameters(NamedTuple):
    """The parameters of a decorated function.

    Attributes:
        signature: those that are arguments of the step.
        has_self: whether there is a `self` before them: the task, with `bind=True`, or the object of a method.
    """

    signature: Signature
    has_self: bool

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundArguments:
        return self.signature.bind(*args[self.has_self :], **kwargs)


def _parameters_of(fn: Callable[..., Any]) -> _Parameters:
    all_parameters = parameters_of(fn)
    check_is_awaited(fn)
    names = list(all_parameters.parameters)
    has_self = names[:1] == ["self"]
    signature = all_parameters.replace(parameters=list(all_parameters.parameters.values())[has_self:])
    return _Parameters(signature, has_self)


def _settings(
    lease: Seconds | None,
    max_attempts: int | None,
    permanent: Permanent,
    backoff: Backoff | None,
    on_busy: OnBusy,
    fingerprint: Fingerprint | None,
) -> StepSettings:
    """Returns the settings of the steps; raises InvalidArgumentError if an argument of a decorator is rejected."""
    check_on_busy(on_busy)
    return step_settings(
        lease=lease,
        max_attempts=max_attempts,
        permanent=permanent,
        backoff=backoff,
        on_busy="wait" if on_busy == "wait" else "raise",
        owner=None,  # that of the task
        fingerprint=fingerprint,
    )
