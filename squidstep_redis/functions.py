"""How the call of a function becomes a step: its arguments are the input, and name the run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from inspect import BoundArguments, Parameter, Signature
from string import Formatter
from typing import Any, cast

from squidstep_redis.errors import InvalidArgumentError

RunIdOf = str | Callable[..., str]
"""A format string over a function's arguments, or a function of them."""


def bind(parameters: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BoundArguments:
    """The arguments by name, defaults included; raises TypeError as the call itself would."""
    bound = parameters.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


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
    scheduled = BoundArguments(parameters, cast("Any", {**bound.arguments, **stored}))
    for name, parameter in parameters.parameters.items():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            scheduled.arguments[name] = tuple(scheduled.arguments[name])
    return scheduled


def run_id_of(run_id: RunIdOf | None, parameters: Signature) -> Callable[[BoundArguments], str] | None:
    """What makes the run id out of the arguments.

    Raises:
        InvalidArgumentError: a format string is malformed, or names what is no parameter.
    """
    if run_id is None:
        return None
    if not isinstance(run_id, str):
        return lambda bound: run_id(*bound.args, **bound.kwargs)
    try:
        fields = [field for _, field, _, _ in Formatter().parse(run_id) if field is not None]
    except ValueError as error:
        raise InvalidArgumentError("run_id", f"{run_id!r} is no format string: {error}") from error
    for field in fields:
        if re.split(r"[.\[]", field)[0] not in parameters.parameters:
            raise InvalidArgumentError("run_id", f"{run_id!r} names {field!r}, no parameter of the function")
    return lambda bound: run_id.format(**bound.arguments)


def _as_kept(value: Any) -> Any:
    """A value as it comes back from a payload: a tuple as a list."""
    if isinstance(value, Mapping):
        return {key: _as_kept(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_as_kept(item) for item in cast("Sequence[Any]", value)]
    return value
