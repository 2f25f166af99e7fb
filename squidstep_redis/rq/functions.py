"""The arguments of a step's function. They are the input of the step, and can determine the run id."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from inspect import (
    BoundArguments,
    Parameter,
    Signature,
    isasyncgenfunction,
    iscoroutine,
    iscoroutinefunction,
    isgeneratorfunction,
    signature,
)
from string import Formatter
from typing import Any, Final, TypeVar, cast

from squidstep_redis import InvalidArgumentError, PayloadError
from squidstep_redis.protocol.fingerprints import digest

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
    if _is_stored_as(bound.arguments, stored):
        return bound
    parameters = bound.signature
    unknown = stored.keys() - parameters.parameters.keys()
    if unknown:
        raise InvalidArgumentError(
            "input", f"the step was scheduled with {sorted(unknown)}, which its function does not accept: {parameters}"
        )
    given = bound.arguments
    same = {name for name in stored.keys() & given.keys() if _is_stored_as(given[name], stored[name])}
    values = {**given, **{name: value for name, value in stored.items() if name not in same}}
    scheduled = with_defaults(BoundArguments(parameters, cast("Any", values)))
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


def parameters_of(fn: Callable[..., Any]) -> Signature:
    """Returns the parameters of a function that is decorated.

    Raises:
        InvalidArgumentError: it is no function whose call does the work.
    """
    if not callable(fn):
        raise InvalidArgumentError("fn", f"must be a function, not {fn!r}")
    if isgeneratorfunction(fn) or isasyncgenfunction(fn):
        raise InvalidArgumentError("fn", f"{fn!r} is a generator function: a call returns before it does any work")
    try:
        return signature(fn)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError("fn", f"the parameters of {fn!r} are unknown: {error}") from error


def check_accepts(argument: str, function: object, *args: Any, **kwargs: Any) -> None:
    """Raises InvalidArgumentError if a function cannot be called with these arguments, or is a coroutine function.

    Args:
        argument: what the error calls the function.
        function: the function.
        args: positional arguments like those of its calls.
        kwargs: keyword arguments like those of its calls.
    """
    if not callable(function):
        raise InvalidArgumentError(argument, f"must be a function, not {function!r}")
    if iscoroutinefunction(function):
        raise InvalidArgumentError(argument, "must not be a coroutine function")
    try:
        accepted = signature(function)
    except (TypeError, ValueError):  # some functions in C do not say what they accept
        return
    try:
        accepted.bind(*args, **kwargs)
    except TypeError as error:
        count = len(args) + len(kwargs)
        raise InvalidArgumentError(
            argument, f"its function {accepted} cannot be called with {count} argument{'s'[: count != 1]}: {error}"
        ) from error


def run_id_of(run_id: RunIdOf | None, parameters: Signature) -> Callable[[BoundArguments], str] | None:
    """Returns a function that makes the run id from the arguments, including defaults.

    Args:
        run_id: a format string over the arguments, or a function of them; None: the arguments do not determine the run
            id, and None is returned.
        parameters: the parameters of the step's function.

    Raises:
        InvalidArgumentError: the format string is malformed, or names something that is not a parameter, or a parameter
            whose default is None; or the function does not accept the parameters. The returned function also raises it
            if the string would contain None, or the function returns None.
    """
    if run_id is None:
        return None
    if isinstance(run_id, str):
        return _formatted(run_id, parameters)
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


def _formatted(run_id: str, parameters: Signature) -> Callable[[BoundArguments], str]:
    known = parameters.parameters
    try:
        for field in _fields(run_id):
            name = re.split(r"[.\[]", field)[0]
            if name not in known:
                raise InvalidArgumentError(
                    "run_id", f"{run_id!r} names {field!r}, which is not a parameter of {parameters}"
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


def _is_stored_as(given: object, stored: object) -> bool:
    """Returns whether a value is stored in this form: with tuples as lists, and datetimes in UTC.

    Fingerprints are compared, because a datetime in an hour that a change of clocks repeats or skips does not equal any
    datetime in another time zone.
    """
    if stored == given:
        return True
    try:
        return digest("input", stored) == digest("input", given)
    except PayloadError:  # the user's codec may accept what has no fingerprint
        return False
