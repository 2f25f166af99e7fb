"""Runs whose steps are calls of functions."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, cast

from squidstep_redis.claims.request import ClaimSettings
from squidstep_redis.docstrings import with_docs_of
from squidstep_redis.functions.arguments import bind
from squidstep_redis.functions.checks import check_is_coroutine_function, excluded_names, parameters_of
from squidstep_redis.functions.execution import FunctionCall, execute, execute_async
from squidstep_redis.functions.inputs import Inputs
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Step

P = ParamSpec("P")
T = TypeVar("T")


class _BaseRun:
    _is_asyncio: bool

    def __init__(self, store: Any, run_id: RunId, exclude: tuple[str, ...], settings: ClaimSettings) -> None:
        """Called only by `store.run`."""
        self.id = arguments.run_id(run_id).text
        self._store = store
        self._excluded = excluded_names(exclude)
        self._settings = settings
        self._inputs = Inputs()

    def _call(self, step: Step, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FunctionCall:
        parameters = parameters_of(fn)
        check_is_coroutine_function(fn, self._is_asyncio)
        bound = bind(fn, parameters, args, kwargs)
        return FunctionCall(self.id, step, fn, bound, self._excluded, self._settings, self._inputs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id!r}>"


class Run(_BaseRun):
    """A run whose steps are calls of functions: what `StepRunStore.run` returns.

    Attributes:
        id: the run id.
    """

    _is_asyncio = False

    def call(self, step: Step, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `fn(*args, **kwargs)` as a step: once across all deliveries.

        Two round trips if the function is executed, one if the step is already completed.

        Args:
            step: the name of the step. Calls with the same name are the same step and return the same result. With one
                run object, they must have the same arguments.
            fn: the function that does the work. Its result is stored as `{"result": …}`.
            args: positional arguments of `fn`. They are stored as the step's input under the names of the parameters,
                so they must be valid in a payload, apart from the excluded ones.
            kwargs: keyword arguments of `fn`. They are stored as the step's input, so they must be valid in a payload,
                apart from the excluded ones.

        Returns:
            The stored result of `fn`. A tuple is returned as a list.

        Raises:
            InputMismatchError: the step was called with other arguments on this object, or the step has a
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
        return cast("T", execute(self._store, self._call(step, fn, args, kwargs)))


class AsyncRun(_BaseRun):
    """A run whose steps are calls of coroutine functions: what `AsyncStepRunStore.run` returns.

    Attributes:
        id: the run id.
    """

    _is_asyncio = True

    @with_docs_of(Run.call, fn='the coroutine function that does the work. Its result is stored as `{"result": …}`.')
    async def call(
        self, step: Step, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return cast("T", await execute_async(self._store, self._call(step, fn, args, kwargs)))
