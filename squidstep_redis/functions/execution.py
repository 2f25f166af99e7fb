"""Executes the call of a function as a step: its result is stored as `{"result": …}`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from inspect import BoundArguments, iscoroutine
from typing import Any, Final, NamedTuple, TypeVar, cast

from squidstep_redis.claims.current import current_claims
from squidstep_redis.claims.request import ClaimSettings
from squidstep_redis.claims.retrying import FIRST_PAUSE, LAST_PAUSE, jittered
from squidstep_redis.claims.rules import current_claim
from squidstep_redis.errors import InvalidArgumentError, PayloadError, StepBusyError
from squidstep_redis.functions.arguments import input_of, stored_arguments
from squidstep_redis.functions.inputs import Inputs
from squidstep_redis.protocol.arguments import RunId, Step

T = TypeVar("T")

_STORED_DATA: Final = (
    "A step stores the arguments and the result of its function. Pass plain data, such as an id, and load everything "
    "else inside the function. exclude=(…) keeps arguments out of the store, such as the self of a method; a run can "
    "also call a bound method: run.call(name, self.method, …)."
)


class FunctionCall(NamedTuple):
    """The call of a function as a step.

    Attributes:
        run_id: the run of the step.
        step: the name of the step.
        fn: the function.
        bound: the arguments of the call.
        excluded: names of arguments that are not stored.
        settings: how the step is claimed, and what a failure means.
        inputs: the inputs of the steps of this execution; None: they are not compared.
    """

    run_id: RunId
    step: Step
    fn: Callable[..., Any]
    bound: BoundArguments
    excluded: frozenset[str]
    settings: ClaimSettings
    inputs: Inputs | None = None

    @property
    def input(self) -> dict[str, Any]:
        """The input of the step: the arguments that are stored."""
        return input_of(self.bound, self.excluded)

    def arguments(self, stored: dict[str, Any]) -> BoundArguments:
        """Returns the arguments to call the function with.

        Args:
            stored: the stored input of the step, which differs from the call's if the step was scheduled with its own.

        Raises:
                InvalidArgumentError: the stored input has an argument that the function does not accept, or no list for
                its `*args`, or no dict for its `**kwargs`.
        """
        return stored_arguments(self.bound, stored, self.excluded)

    def with_one_input(self) -> AbstractContextManager[None]:
        """Returns a block that raises InputMismatchError if this execution called the step with a different input."""
        if self.inputs is None:
            return nullcontext()
        return self.inputs.one_of(self.run_id, self.step, self.bound, self.excluded)


def execute(store: Any, call: FunctionCall, is_given_up: Callable[[Any, Any], bool] | None = None) -> Any:
    """Executes a function as a step of a blocking store, once across all deliveries, and returns its stored result.

    Args:
        store: a StepRunStore.
        call: the call of a function that is not a coroutine function.
        is_given_up: receives the claim and the function's result before the result is stored. If it has ended the claim
            and returns True, nothing is stored, and the result is returned as it is. None: every result is stored.

    Raises:
        SquidstepError: what `run_step` raises.
    """

    def work(stored: dict[str, Any]) -> dict[str, Any]:
        arguments = call.arguments(stored)
        result = check_result(call.fn, call.fn(*arguments.args, **arguments.kwargs))
        if is_given_up is not None and is_given_up(current_claim(), result):
            raise _GivenUp(result)
        return {"result": result}

    try:
        with call.with_one_input():
            return result_in(store.run_step(call.run_id, call.step, work, call.input, **call.settings))
    except _GivenUp as given_up:
        return given_up.result
    except StepBusyError as error:
        raise_if_own(error)
        raise
    except PayloadError as error:
        explain(error)
        raise


async def execute_async(store: Any, call: FunctionCall) -> Any:
    """Executes a coroutine function as a step of an asyncio store, and returns its stored result.

    Args:
        store: an AsyncStepRunStore.
        call: the call of a coroutine function.

    Raises:
        SquidstepError: what `run_step` raises.
    """

    async def work(stored: dict[str, Any]) -> dict[str, Any]:
        arguments = call.arguments(stored)
        return {"result": await cast("Awaitable[Any]", call.fn(*arguments.args, **arguments.kwargs))}

    try:
        with call.with_one_input():
            return result_in(await store.run_step(call.run_id, call.step, work, call.input, **call.settings))
    except StepBusyError as error:
        raise_if_own(error)
        raise
    except PayloadError as error:
        explain(error)
        raise


class _GivenUp(Exception):  # noqa: N818 -- it is a result, not an error
    """The claim was ended without this result of the function."""

    def __init__(self, result: object) -> None:
        super().__init__(result)
        self.result = result


def check_result(fn: Callable[..., Any], result: T) -> T:
    """Returns the result of a function that is not a coroutine function, unless the result is a coroutine.

    Args:
        fn: the function.
        result: what it returned.

    Raises:
        InvalidArgumentError: the result is a coroutine, which has not done the work. It is closed.
    """
    if iscoroutine(result):
        result.close()
        raise InvalidArgumentError(
            "fn", f"{fn!r} is not a coroutine function, but returned a coroutine: decorate the function that it wraps"
        )
    return result


def result_in(output: dict[str, Any]) -> Any:
    """Returns the function's result, or the whole output if the step was completed in another way.

    Args:
        output: the stored output of the step.
    """
    return output["result"] if output.keys() == {"result"} else output


def explain(error: PayloadError) -> None:
    """Adds a note to the error that explains how the payload comes from the function.

    Args:
        error: the error.
    """
    if _STORED_DATA not in getattr(error, "__notes__", ()):  # the error of a nested step is handled twice
        error.add_note(_STORED_DATA)


def raise_if_own(error: StepBusyError) -> None:
    """Raises InvalidArgumentError if the code that found a step busy is executing it itself: no retry would help.

    Args:
        error: the error.
    """
    if any(claim.is_of_this_code(error.current) for claim in current_claims()):
        place = f"step {error.current.step!r} of run {error.current.run_id!r}"
        raise InvalidArgumentError(
            "step", f"this code itself is executing {place}. A nested step needs its own name"
        ) from error


def pauses() -> Iterator[float]:
    """Yields the seconds between the attempts to claim a step that another worker holds."""
    pause = FIRST_PAUSE
    while True:
        yield jittered(pause)
        pause = min(2 * pause, LAST_PAUSE)
