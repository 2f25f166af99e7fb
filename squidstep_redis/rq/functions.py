"""How the call of a function becomes a step: its arguments are the input, and name the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from inspect import BoundArguments, Parameter, Signature, iscoroutine
from string import Formatter
from typing import Any, Final, TypeVar, cast

from squidstep_redis.errors import InvalidArgumentError, PayloadError, described

T = TypeVar("T")

RunIdOf = str | Callable[..., str]
"""A format string over a function's arguments, or a function of them."""


def _with_defaults(bound: BoundArguments) -> BoundArguments:
    whole = BoundArguments(bound.signature, cast("Any", dict(bound.arguments)))
    whole.apply_defaults()
    return whole


def stored_arguments(bound: BoundArguments, stored: dict[str, Any]) -> BoundArguments:
    """The arguments to call with: those given, unless the step was scheduled with others.

    Raises:
        InvalidArgumentError: it was scheduled with arguments that the function does not take.
    """
    if stored == _as_kept(bound.arguments):
        return bound
    parameters = bound.signature
    unknown = stored.keys() - parameters.parameters.keys()
    if unknown:
        raise InvalidArgumentError(
            "input", f"the step was scheduled with {sorted(unknown)}, which its function does not take: {parameters}"
        )
    scheduled = _with_defaults(BoundArguments(parameters, cast("Any", {**bound.arguments, **stored})))
    for name, parameter in parameters.parameters.items():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            scheduled.arguments[name] = tuple(scheduled.arguments[name])
    return scheduled


def result_of(fn: Callable[..., T], arguments: BoundArguments) -> T:
    """What the function answers; raises InvalidArgumentError if that is a coroutine, which nobody would await."""
    result = fn(*arguments.args, **arguments.kwargs)
    if iscoroutine(result):
        result.close()
        raise InvalidArgumentError(
            "fn", f"{described(fn)} is no coroutine function, but answered a coroutine: make the step of what it wraps"
        )
    return result


_WHAT_IS_KEPT: Final = (
    "A step keeps its function's arguments and what it answers. Hand over plain data, such as an id, and look up the "
    "rest inside. A method's self is an argument, too: use a function, or current_run().call(name, self.method, …)."
)


def explain(error: PayloadError) -> None:
    """Notes on the error what a payload has to do with a function."""
    if _WHAT_IS_KEPT not in getattr(error, "__notes__", ()):  # it passes from a step within another through both
        error.add_note(_WHAT_IS_KEPT)


def run_id_of(run_id: RunIdOf | None, parameters: Signature) -> Callable[[BoundArguments], str] | None:
    """What makes the run id out of the arguments, defaults included.

    Raises:
        InvalidArgumentError: a format string is malformed, or names what is no parameter; what is answered raises it,
            too, if a function names no run.
    """
    if run_id is None:
        return None
    if not isinstance(run_id, str):

        def named(bound: BoundArguments) -> str:
            whole = _with_defaults(bound)
            id = cast("str | None", run_id(*whole.args, **whole.kwargs))
            if id is None:  # which elsewhere stands for no run at all
                raise InvalidArgumentError("run_id", "must be a non-empty str, and its function answered None")
            return id

        return named
    try:
        fields = [field for _, field, _, _ in Formatter().parse(run_id) if field is not None]
    except ValueError as error:
        raise InvalidArgumentError("run_id", f"{run_id!r} is no format string: {error}") from error
    for field in fields:
        if re.split(r"[.\[]", field)[0] not in parameters.parameters:
            raise InvalidArgumentError("run_id", f"{run_id!r} names {field!r}, no parameter of the function")
    return lambda bound: run_id.format(**_with_defaults(bound).arguments)


def _as_kept(value: Any) -> Any:
    """A value as it comes back from a payload: a tuple as a list."""
    if isinstance(value, Mapping):
        return {key: _as_kept(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_as_kept(item) for item in cast("Sequence[Any]", value)]
    return value
