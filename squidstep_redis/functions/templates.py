"""Format strings over the arguments of a call, and functions of them: how run ids and labels are made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from inspect import BoundArguments, Parameter, Signature
from string import Formatter
from typing import Any

from squidstep_redis.errors import InvalidArgumentError
from squidstep_redis.functions.arguments import with_defaults
from squidstep_redis.functions.checks import check_accepts


class NoneInFormatError(Exception):
    """A format string names an argument that is None."""


class _WithoutNone(Formatter):
    """Formats like `str.format`, but rejects None."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        if value is None:
            raise NoneInFormatError
        return super().convert_field(value, conversion)


class _AnyValue:
    """Has every attribute and every item, to try out the field of a format string."""

    def __getattr__(self, name: str) -> _AnyValue:
        return self

    def __getitem__(self, key: object) -> _AnyValue:
        return self


_without_none = _WithoutNone()


def format_arguments(text: str, bound: BoundArguments) -> str:
    """Formats a checked format string with the arguments of a call, including defaults.

    Raises:
        NoneInFormatError: one of the named arguments is None.
    """
    return _without_none.vformat(text, (), with_defaults(bound).arguments)


def check_format(argument: str, text: str, parameters: Signature, excluded: AbstractSet[str]) -> list[str]:
    """Returns the fields of a format string that can be formatted with the arguments of every call.

    Args:
        argument: the name of the argument, for error messages.
        text: the format string.
        parameters: the parameters of the step's function.
        excluded: names of arguments that are not stored, so that the string must not name them.

    Raises:
        InvalidArgumentError: the string is malformed, or names something that is not a parameter, or an excluded one.
    """
    fields: list[str] = []
    try:
        for field in _fields(text):
            name = re.split(r"[.\[]", field)[0]
            if name not in parameters.parameters:
                raise InvalidArgumentError(
                    argument, f"{text!r} names {field!r}, which is not a parameter of {parameters}"
                )
            if name in excluded:
                raise InvalidArgumentError(
                    argument,
                    f"{text!r} names {name!r}, which is excluded, but it would be stored: name another parameter, "
                    "or pass a function that returns what may be stored",
                )
            _without_none.get_field(field, (), {name: _AnyValue()})
            fields.append(field)
    except ValueError as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(argument, f"{text!r} is not a valid format string: {error}") from error
    return fields


def _fields(text: str) -> Iterator[str]:
    """Yields the fields of a format string, including those in format specifications."""
    for _, field, spec, conversion in Formatter().parse(text):
        if field is not None:
            if conversion not in (None, "r", "s", "a"):
                raise ValueError(f"unknown conversion {conversion!r}")
            yield field
            yield from _fields(spec or "")


def function_of_arguments(
    argument: str, fn: Callable[..., Any], parameters: Signature
) -> Callable[[BoundArguments], Any]:
    """Returns a function that calls `fn` with the arguments of a call, including defaults.

    Raises:
        InvalidArgumentError: `fn` does not accept the parameters of the step's function.
    """
    kinds = [parameter.kind for parameter in parameters.parameters.values()]
    named = [name for name, parameter in parameters.parameters.items() if parameter.kind is Parameter.KEYWORD_ONLY]
    if Parameter.VAR_KEYWORD in kinds:
        named.append("any_other")
    positional = [kind for kind in kinds if kind not in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD)]
    check_accepts(argument, fn, *positional, **dict.fromkeys(named))

    def call(bound: BoundArguments) -> Any:
        complete = with_defaults(bound)
        return fn(*complete.args, **complete.kwargs)

    return call
