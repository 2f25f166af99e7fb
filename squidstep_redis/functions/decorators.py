"""The decorators of the stores, which make a function a step."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from squidstep_redis.claims.request import ClaimSettings
from squidstep_redis.functions.arguments import bind
from squidstep_redis.functions.checks import check_is_coroutine_function, excluded_names, parameters_of
from squidstep_redis.functions.execution import FunctionCall, execute, execute_async
from squidstep_redis.functions.labels import with_labels_of
from squidstep_redis.functions.run_ids import run_id_of
from squidstep_redis.protocol.arguments import LabelsOf, RunIdOf, Step

P = ParamSpec("P")
T = TypeVar("T")


def blocking_step(
    store: Any, name: Step, run_id: RunIdOf, exclude: tuple[str, ...], settings: ClaimSettings, labels: LabelsOf | None
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Returns the decorator that `StepRunStore.step` describes.

    Args:
        store: the StepRunStore.
        name: the name of the step.
        run_id: how to make the run id from the arguments.
        exclude: names of parameters that are not stored.
        settings: how the step is claimed, and what a failure means.
        labels: how to make the labels of the run from the arguments; None: it has none.
    """

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        call_of = _calls(fn, False, name, run_id, exclude, settings, labels)

        @wraps(fn)
        def call_as_step(*args: P.args, **kwargs: P.kwargs) -> T:
            return cast("T", execute(store, call_of(args, kwargs)))

        return call_as_step

    return decorate


def asyncio_step(
    store: Any, name: Step, run_id: RunIdOf, exclude: tuple[str, ...], settings: ClaimSettings, labels: LabelsOf | None
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Returns the decorator that `AsyncStepRunStore.step` describes.

    Args:
        store: the AsyncStepRunStore.
        name: the name of the step.
        run_id: how to make the run id from the arguments.
        exclude: names of parameters that are not stored.
        settings: how the step is claimed, and what a failure means.
        labels: how to make the labels of the run from the arguments; None: it has none.
    """

    def decorate(fn: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        call_of = _calls(fn, True, name, run_id, exclude, settings, labels)

        @wraps(fn)
        async def call_as_step(*args: P.args, **kwargs: P.kwargs) -> T:
            return cast("T", await execute_async(store, call_of(args, kwargs)))

        return call_as_step

    return decorate


def _calls(
    fn: Callable[..., Any],
    is_asyncio: bool,
    name: Step,
    run_id: RunIdOf,
    exclude: tuple[str, ...],
    settings: ClaimSettings,
    labels: LabelsOf | None,
) -> Callable[[tuple[Any, ...], dict[str, Any]], FunctionCall]:
    """Returns a function that makes a call of the decorated function from its arguments."""
    parameters = parameters_of(fn)
    check_is_coroutine_function(fn, is_asyncio)
    excluded = excluded_names(exclude, parameters)
    id_of = run_id_of(run_id, parameters, excluded)
    settings_of = with_labels_of(settings, labels, parameters, excluded)

    def call_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> FunctionCall:
        bound = bind(fn, parameters, args, kwargs)
        return FunctionCall(id_of(bound), name, fn, bound, excluded, settings_of(bound))

    return call_of
