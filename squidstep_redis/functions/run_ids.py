"""The run id of a function's call, made of its arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from inspect import BoundArguments, Parameter, Signature
from string import Formatter
from typing import Any, Final, cast

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.functions.arguments import with_defaults
from squidstep_redis.functions.checks import check_accepts
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
    kinds = [parameter.kind for parameter in parameters.parameters.values()]
    named = [name for name, parameter in parameters.parameters.items() if parameter.kind is Parameter.KEYWORD_ONLY]
    if Parameter.VAR_KEYWORD in kinds:
        named.append("any_other")
    positional = [kind for kind in kinds if kind not in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD)]
    check_accepts("run_id", run_id, *positional, **dict.fromkeys(named))

    def call_run_id(bound: BoundArguments) -> str:
        complete = with_defaults(bound)
        id = cast("str | None", run_id(*complete.args, **complete.kwargs))
        if id is None:  # elsewhere None means that there is no run
            raise InvalidArgumentError("run_id", "must be a non-empty str, but its function returned None")
        return id

    return call_run_id


class _WithoutNone(Formatter):
    """Formats like `str.format`, but rejects None: all calls without a value would be one run."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if value is None:
            raise InvalidArgumentError("run_id", "is made of an argument that is None: all such calls would be one run")
        return super().convert_field(value, conversion)


class _AnyValue:
    """Has every attribute and every item, to try out the field of a format string."""

    def __getattr__(self, name: str) -> _AnyValue:
        return self

    def __getitem__(self, key: object) -> _AnyValue:
        return self


_without_none: Final = _WithoutNone()


def _formatted(run_id: str, parameters: Signature, excluded: AbstractSet[str]) -> Callable[[BoundArguments], str]:
    if not run_id:
        raise InvalidArgumentError("run_id", "must be a non-empty str")
    known = parameters.parameters
    try:
        for field in _fields(run_id):
            name = re.split(r"[.\[]", field)[0]
            if name not in known:
                raise InvalidArgumentError(
                    "run_id", f"{run_id!r} names {field!r}, which is not a parameter of {parameters}"
                )
            if name in excluded:
                raise InvalidArgumentError(
                    "run_id",
                    f"{run_id!r} names {name!r}, which is excluded, but the run id is stored: name another parameter, "
                    "or pass a function that returns what may be stored",
                )
            if known[name].default is None and field == name:
                raise InvalidArgumentError(
                    "run_id", f"{run_id!r} names {name!r}, whose default is None: all calls without it would be one run"
                )
            _without_none.get_field(field, (), {name: _AnyValue()})
    except ValueError as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError("run_id", f"{run_id!r} is not a valid format string: {error}") from error
    return lambda bound: _without_none.vformat(run_id, (), with_defaults(bound).arguments)


def _fields(text: str) -> Iterator[str]:
    """Yields the fields of a format string, including those in format specifications."""
    for _, field, spec, conversion in Formatter().parse(text):
        if field is not None:
            if conversion not in (None, "r", "s", "a"):
                raise ValueError(f"unknown conversion {conversion!r}")
            yield field
            yield from _fields(spec or "")
