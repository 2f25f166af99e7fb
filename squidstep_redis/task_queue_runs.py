"""Code that RQ and Celery share: the run of a job or task, and decorators that make its function a step or a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from inspect import BoundArguments, Signature
from typing import Any, ClassVar, Literal, NamedTuple, ParamSpec, Protocol, TypeVar, cast

from squidstep_redis import InvalidArgumentError
from squidstep_redis.claims.request import DEFAULT_LEASE, ClaimSettings, StepSettings, unknown_argument
from squidstep_redis.functions.arguments import bind
from squidstep_redis.functions.checks import check_step, excluded_names, is_coroutine_function, parameters_of
from squidstep_redis.functions.execution import FunctionCall, check_result
from squidstep_redis.functions.inputs import Inputs
from squidstep_redis.functions.labels import with_labels_of
from squidstep_redis.functions.run_ids import run_id_of
from squidstep_redis.functions.settings import checked_settings
from squidstep_redis.protocol.arguments import Labels, LabelsOf, RunIdOf, Seconds, Step

P = ParamSpec("P")
T = TypeVar("T")

OnBusy = Literal["reschedule", "raise", "wait"]
"""What a decorated function does while another worker has claimed its step."""


class QueueRun(ABC):
    """The run of a job or task.

    Attributes:
        id: the run id; None outside a job or task: functions are then called without storing anything.
        inputs: the inputs of the steps that the job or task has called.
        current: the run of the running function that is decorated with `steps`.
    """

    current: ClassVar[ContextVar[Any]]

    def __init__(self, id: str | None, inputs: Inputs, settings: ClaimSettings, excluded: frozenset[str]) -> None:
        self.id = id
        self.inputs = inputs
        self._settings = settings
        self._excluded = excluded

    @abstractmethod
    def execute(self, call: FunctionCall) -> Any:
        """Executes a function as a step of the run, and returns its stored result.

        Args:
            call: the call of the function.
        """

    def call(self, step: Step, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `fn(*args, **kwargs)` as a step: once across all deliveries.

        Two round trips if the function is executed, one if the step is already completed.

        Args:
            step: the name of the step. Calls with the same name are the same step and return the same result. In one
                execution of a job or task, they must have the same arguments.
            fn: the function that does the work; in a job of RQ, also a coroutine function. Its result is stored as
                `{"result": …}`.
            args: positional arguments of `fn`. They are stored as the step's input under the names of the parameters,
                so they must be valid in a payload.
            kwargs: keyword arguments of `fn`. They are stored as the step's input, so they must be valid in a payload.

        Returns:
            The stored result of `fn`. A tuple is returned as a list. RQ's Retry is returned and not stored: return it
            from the job's function, too.

        Raises:
            InputMismatchError: this job or task has called the step with other arguments, or the step has a
                different fingerprint. The function was not called.
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
        bound = bind(fn, parameters_of(fn), args, kwargs)
        call = FunctionCall(self.id, step, fn, bound, self._excluded, self._settings, self.inputs)
        return cast("T", self.execute(call))

    def with_labels(self, settings: ClaimSettings) -> ClaimSettings:
        """Returns the settings of a decorated step, with the labels of the run if the step has none.

        Args:
            settings: the settings of the step.
        """
        return settings if settings.get("labels") is not None else {**settings, "labels": self._settings.get("labels")}

    def __repr__(self) -> str:
        return f"<Run {self.id!r}>"


def queue_settings(
    settings: StepSettings, on_busy: Literal["raise", "wait"], labels: Labels | None = None
) -> ClaimSettings:
    """Returns the checked settings of the steps of a job or task. The owner of a claim is set for each claim.

    Args:
        settings: the settings that are given to a decorator or to `current_run`.
        on_busy: what to do while another worker has claimed a step.
        labels: labels of the run if one of its steps creates it; None: none, or those of each call.

    Raises:
        InvalidArgumentError: a setting is rejected.
        TypeError: there is no such setting.
    """
    if unknown := settings.keys() - StepSettings.__annotations__:
        raise unknown_argument(unknown, StepSettings)
    all_settings: ClaimSettings = {**settings, "on_busy": on_busy, "labels": labels}
    return checked_settings(all_settings)


class Parameters(NamedTuple):
    """The parameters of a decorated function.

    Attributes:
        signature: the parameters that are arguments of the step.
        has_self: whether a parameter comes before them that is not an argument: the task of Celery, with `bind=True`,
            or the object of a method.
    """

    signature: Signature
    has_self: bool = False

    def bind(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundArguments:
        """Returns the arguments of the step.

        Args:
            fn: the function.
            args: the positional arguments of the function.
            kwargs: its keyword arguments.
        """
        return bind(fn, self.signature, args[self.has_self :], kwargs)


class Decorated(Protocol):
    """Makes the decorated function, which decides what happens if a step cannot be executed now."""

    def __call__(
        self, fn: Callable[P, T], call: Callable[[Any, Any], T], lease: Seconds | None, on_busy: OnBusy, /
    ) -> Callable[P, T]:
        """Returns the decorated function.

        Args:
            fn: the function that is decorated.
            call: calls it as a step, or as a run of steps, with its arguments and keyword arguments.
            lease: seconds until the next delivery if the other worker's claim has no lease.
            on_busy: what to do while another worker has claimed the step.
        """
        ...


class Decorators(NamedTuple):
    """The decorators of one integration.

    Attributes:
        open_run: returns a run, given its id or None, the settings of its steps, and the arguments that are not stored.
        parameters_of: returns the parameters of a function that is decorated, or rejects the function.
        decorated: makes the decorated function.
    """

    open_run: Callable[[str | None, ClaimSettings, frozenset[str]], QueueRun]
    parameters_of: Callable[[Callable[..., Any]], Parameters]
    decorated: Decorated

    def step(
        self,
        name: Step,
        run_id: RunIdOf | None,
        labels: LabelsOf | None,
        on_busy: OnBusy,
        exclude: tuple[str, ...],
        settings: StepSettings,
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """Returns the decorator that makes a function a step.

        Args:
            name: the name of the step.
            run_id: how to make the run id from the arguments; None: the run of the job or task.
            labels: how to make the labels of the run from the arguments; None: it has none.
            on_busy: what to do while another worker has claimed the step.
            exclude: names of parameters that are not stored.
            settings: how the step is claimed, and what a failure means.

        Raises:
            InvalidArgumentError: an argument is rejected.
            TypeError: there is no such setting.
        """
        check_step(name)
        checked = _decorator_settings(settings, on_busy)

        def decorate(fn: Callable[P, T]) -> Callable[P, T]:
            parameters = self.parameters_of(fn)
            excluded = excluded_names(exclude, parameters.signature)
            id_of = None if run_id is None else run_id_of(run_id, parameters.signature, excluded)
            settings_of = with_labels_of(checked, labels, parameters.signature, excluded)

            def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
                bound = parameters.bind(fn, args, kwargs)
                run = self.open_run(None if id_of is None else id_of(bound), checked, excluded)
                if run.id is None:
                    return fn(*args, **kwargs)
                function = partial(fn, args[0]) if parameters.has_self else fn
                call_settings = run.with_labels(settings_of(bound))
                step_call = FunctionCall(run.id, name, function, bound, excluded, call_settings, run.inputs)
                return cast("T", run.execute(step_call))

            return self.decorated(fn, call, settings.get("lease", DEFAULT_LEASE), on_busy)

        return decorate

    def steps(
        self,
        run_id: RunIdOf | None,
        labels: LabelsOf | None,
        on_busy: OnBusy,
        exclude: tuple[str, ...],
        settings: StepSettings,
    ) -> Callable[[Callable[P, T]], Callable[P, T]]:
        """Returns the decorator that makes a function a run of several steps.

        Args:
            run_id: how to make the run id from the arguments; None: the run of the job or task.
            labels: how to make the labels of the run from the arguments; None: it has none.
            on_busy: what to do while another worker has claimed a step.
            exclude: names of parameters that are not stored.
            settings: how the steps are claimed, and what a failure means.

        Raises:
            InvalidArgumentError: an argument is rejected.
            TypeError: there is no such setting.
        """
        checked = _decorator_settings(settings, on_busy)
        excluded = excluded_names(exclude)

        def decorate(fn: Callable[P, T]) -> Callable[P, T]:
            parameters = self.parameters_of(fn)
            id_of = None if run_id is None else run_id_of(run_id, parameters.signature, excluded)
            settings_of = with_labels_of(checked, labels, parameters.signature, excluded)

            def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
                bound = parameters.bind(fn, args, kwargs)
                run = self.open_run(None if id_of is None else id_of(bound), settings_of(bound), excluded)
                if is_coroutine_function(fn):
                    return cast("T", _await_in_run(run, fn, args, kwargs))
                return _call_in_run(run, fn, args, kwargs)

            return self.decorated(fn, call, settings.get("lease", DEFAULT_LEASE), on_busy)

        return decorate


def _decorator_settings(settings: StepSettings, on_busy: object) -> ClaimSettings:
    if on_busy not in ("reschedule", "raise", "wait"):
        raise InvalidArgumentError("on_busy", f"must be 'reschedule', 'raise' or 'wait', not {on_busy!r}")
    return queue_settings(settings, "wait" if on_busy == "wait" else "raise")


# The variable is always set inside the `try` whose `finally` restores the previous value. With the token of
# `ContextVar.set`, a timeout of the job or task between that call and the assignment of the token would leak the run
# into the next job or task of the process.


def _call_in_run(run: QueueRun, fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """Calls a function with `run` as the current run."""
    before = run.current.get()
    try:
        run.current.set(run)
        result = fn(*args, **kwargs)
    finally:
        run.current.set(before)
    return result if run.id is None else check_result(fn, result)  # a coroutine would execute outside of the run


async def _await_in_run(run: QueueRun, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Awaits a coroutine function with `run` as the current run."""
    before = run.current.get()
    try:
        run.current.set(run)
        return await cast("Any", fn)(*args, **kwargs)
    finally:
        run.current.set(before)
