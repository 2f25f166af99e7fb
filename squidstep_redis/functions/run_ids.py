"""The run id of a function's call, made from its arguments."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from inspect import BoundArguments, Signature
from typing import cast

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.functions.templates import (
    NoneInFormatError,
    check_format,
    format_arguments,
    function_of_arguments,
)
from squidstep_redis.protocol.arguments import RunIdOf


def run_id_of(run_id: RunIdOf, parameters: Signature, excluded: AbstractSet[str]) -> Callable[[BoundArguments], str]:
    """Returns a function that makes the run id from the arguments, including defaults.

    Args:
        run_id: a format string over the arguments, or a function of them.
        parameters: the parameters of the step's function.
        excluded: names of arguments that are not stored. The run id is stored, so a format string must not name them.
            A function receives all arguments.

    Raises:
        InvalidArgumentError: the format string is empty or malformed, or names something that is not a parameter, an
            excluded parameter, or one whose default is None; or the function does not accept the parameters. The
            returned function also raises it if the string would contain None, or the function returns None.
    """
    if isinstance(run_id, str):
        return _formatted(run_id, parameters, excluded)
    if not callable(cast("object", run_id)):
        raise InvalidArgumentError(
            "run_id", f"must be a format string over the arguments, or a function of them, not {described(run_id)}"
        )
    of_arguments = function_of_arguments("run_id", run_id, parameters)

    def call_run_id(bound: BoundArguments) -> str:
        id = cast("str | None", of_arguments(bound))
        if id is None:  # elsewhere None means that there is no run
            raise InvalidArgumentError("run_id", "must be a non-empty str, but its function returned None")
        return id

    return call_run_id


def _formatted(run_id: str, parameters: Signature, excluded: AbstractSet[str]) -> Callable[[BoundArguments], str]:
    if not run_id:
        raise InvalidArgumentError("run_id", "must be a non-empty str")
    for field in check_format("run_id", run_id, parameters, excluded):
        if field in parameters.parameters and parameters.parameters[field].default is None:
            raise InvalidArgumentError(
                "run_id", f"{run_id!r} names {field!r}, whose default is None: all calls without it would be one run"
            )

    def format_run_id(bound: BoundArguments) -> str:
        try:
            return format_arguments(run_id, bound)
        except NoneInFormatError:
            problem = "is made from an argument that is None: all such calls would be one run"
            raise InvalidArgumentError("run_id", problem) from None

    return format_run_id
