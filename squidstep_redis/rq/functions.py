"""The arguments of a step's function. They are the input of the step, and can determine the run id."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from inspect import BoundArguments, Parameter, Signature, iscoroutine
from string import Formatter
from typing import Any, Final, TypeVar, cast

from squidstep_redis import InvalidArgumentError, PayloadError

T = TypeVar("T")

RunIdOf = str | Callable[..., str]
"""A format string over a function's arguments, or a function of them that returns the run id."""


def with_defaults(bound: BoundArguments) -> BoundArguments:
    """Returns the arguments of a call, including those that were not given.

    Args:
        bound: the arguments of the call.
    """
    complete = BoundArguments(bound.signature, cast("Any", dict(bound.arguments)))
    complete.apply_defaults()
    return complete


def stored_arguments(bound: BoundArguments, stored: dict[str, Any]) -> BoundArguments:
    """Returns the arguments to call the function with.

    Args:
        bound: the arguments of the call.
        stored: the stored input of the step. It differs from `bound` if the step was scheduled with another input; its
            values then replace those of the call.

    Raises:
        InvalidArgumentError: the stored input has an argument that the function does not accept.
    """
    if stored == _as_stored(bound.arguments):
        return bound
    parameters = bound.signature
    unknown = stored.keys() - parameters.parameters.keys()
    if unknown:
        raise InvalidArgumentError(
            "input", f"the step was scheduled with {sorted(unknown)}, which its function does not accept: {parameters}"
        )
    scheduled = with_defaults(BoundArguments(parameters, cast("Any", {**bound.arguments, **stored})))
    for name, parameter in parameters.parameters.items():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            scheduled.arguments[name] = tuple(scheduled.arguments[name])
    return scheduled


def result_of(fn: Callable[..., T], arguments: BoundArguments) -> T:
    """Calls the function and returns its result.

    Args:
        fn: the function of the step.
        arguments: the arguments to call it with.

    Raises:
        InvalidArgumentError: the function returned a coroutine, which would never be awaited.
    """
    result = fn(*arguments.args, **arguments.kwargs)
    if iscoroutine(result):
        result.close()
        raise InvalidArgumentError(
            "fn", f"{fn!r} is not a coroutine function, but returned a coroutine: decorate the function that it wraps"
        )
    return result


_STORED_DATA: Final = (
    "A step stores the arguments and the result of its function. Pass plain data, such as an id, and load everything "
    "else inside the function. The self of a method is also an argument: use a function, or "
    "current_run().call(name, self.method, …)."
)


def explain(error: PayloadError) -> None:
    """Adds a note to the error that explains how the payload comes from the function."""
    if _STORED_DATA not in getattr(error, "__notes__", ()):  # the error of a nested step is handled twice
        error.add_note(_STORED_DATA)


def run_id_of(run_id: RunIdOf | None, parameters: Signature) -> Callable[[BoundArguments], str] | None:
    """Returns a function that makes the run id from the arguments, including defaults.

    Args:
        run_id: a format string over the arguments, or a function of them; None: the arguments do not determine the run
            id, and None is returned.
        parameters: the parameters of the step's function.

    Raises:
        InvalidArgumentError: the format string is malformed, or names something that is not a parameter. The returned
            function also raises it if `run_id` is a function and returns None.
    """
    if run_id is None:
        return None
    if not isinstance(run_id, str):

        def call_run_id(bound: BoundArguments) -> str:
            complete = with_defaults(bound)
            id = cast("str | None", run_id(*complete.args, **complete.kwargs))
            if id is None:  # elsewhere None means that there is no run
                raise InvalidArgumentError("run_id", "must be a non-empty str, but its function returned None")
            return id

        return call_run_id
    try:
        fields = [field for _, field, _, _ in Formatter().parse(run_id) if field is not None]
    except ValueError as error:
        raise InvalidArgumentError("run_id", f"{run_id!r} is not a valid format string: {error}") from error
    for field in fields:
        if re.split(r"[.\[]", field)[0] not in parameters.parameters:
            raise InvalidArgumentError(
                "run_id", f"{run_id!r} names {field!r}, which is not a parameter of {parameters}"
            )
    return lambda bound: run_id.format(**with_defaults(bound).arguments)


def _as_stored(value: Any) -> Any:
    """Returns the value as a payload returns it: tuples become lists."""
    if isinstance(value, Mapping):
        return {key: _as_stored(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_as_stored(item) for item in cast("Sequence[Any]", value)]
    return value
