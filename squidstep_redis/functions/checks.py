"""The checks when a function is decorated: a mistake is found at import, not when the step is executed."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from inspect import Parameter, Signature, isasyncgenfunction, iscoroutinefunction, isgeneratorfunction, signature
from typing import Any, cast

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.protocol.arguments import step


def check_step(name: object) -> None:
    """Raises InvalidArgumentError if the argument of a decorator is not the name of a step.

    Args:
        name: the argument. It is the function if the decorator is used without parentheses.
    """
    if callable(name) and not isinstance(name, Enum):
        raise InvalidArgumentError("step", 'is a function: a step needs a name, as in @step("charge")')
    step(name)


def is_coroutine_function(fn: object) -> bool:
    """Returns whether a call of it returns a coroutine: it is `async def`, or an object whose `__call__` is."""
    return _is_function(fn, iscoroutinefunction)


def is_generator_function(fn: object) -> bool:
    """Returns whether a call of it returns a generator: its body has `yield`, or the `__call__` of an object has."""
    return _is_function(fn, isgeneratorfunction) or _is_function(fn, isasyncgenfunction)


def _is_function(fn: object, is_kind: Callable[[object], bool]) -> bool:
    while isinstance(fn, partial):  # inspect looks into those of functions, but not of other objects
        fn = cast("partial[Any]", fn).func
    return is_kind(fn) or is_kind(type(fn).__call__)


def parameters_of(fn: Callable[..., Any]) -> Signature:
    """Returns the parameters of a function that is to be a step.

    Args:
        fn: the function.

    Raises:
        InvalidArgumentError: it is not a function whose call does the work, or its parameters are unknown.
    """
    if isinstance(fn, staticmethod | classmethod):
        kind = "staticmethod" if isinstance(fn, staticmethod) else "classmethod"
        raise InvalidArgumentError("fn", f"must be a function: put the decorator under @{kind}")
    if not callable(fn):
        raise InvalidArgumentError("fn", f"must be a function, not {fn!r}")
    if is_generator_function(fn):
        raise InvalidArgumentError("fn", f"{fn!r} is a generator function: a call returns before it does any work")
    try:
        return signature(fn)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError("fn", f"the parameters of {fn!r} are unknown: {error}") from error


def check_is_coroutine_function(fn: Callable[..., Any], is_asyncio: bool) -> None:
    """Raises InvalidArgumentError if the store cannot wait for the function.

    Args:
        fn: the function that is to be a step.
        is_asyncio: whether it is a step of an asyncio store.
    """
    is_awaited = is_coroutine_function(fn)
    if is_awaited and not is_asyncio:
        raise InvalidArgumentError(
            "fn", f"{fn!r} is a coroutine function: use an AsyncStepRunStore, or make it a plain function"
        )
    if is_asyncio and not is_awaited:
        raise InvalidArgumentError(
            "fn",
            f"{fn!r} is not a coroutine function: use a StepRunStore, or define it with `async def`; in it, "
            "`await asyncio.to_thread(…)` calls a function that blocks",
        )


def check_accepts(argument: str, function: object, *args: Any, **kwargs: Any) -> None:
    """Raises InvalidArgumentError if a function cannot be called with these arguments, or its call does no work.

    Args:
        argument: the name of the function in the error.
        function: the function.
        args: positional arguments like those of its calls.
        kwargs: keyword arguments like those of its calls.
    """
    if not callable(function):
        raise InvalidArgumentError(argument, f"must be a function, not {function!r}")
    if is_coroutine_function(function):
        raise InvalidArgumentError(argument, "must not be a coroutine function: nothing awaits what it returns")
    if is_generator_function(function):
        raise InvalidArgumentError(argument, "must not be a generator function: a call returns before it does any work")
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


def excluded_names(exclude: tuple[str, ...], parameters: Signature | None = None) -> frozenset[str]:
    """Returns the names of the arguments that are not stored.

    Args:
        exclude: the names.
        parameters: the parameters of the decorated function; None: the functions are not known yet, and a function
            that has no such parameter ignores the name.

    Raises:
        InvalidArgumentError: it is not a tuple of str, or the function has no such parameter.
    """
    names = cast("object", exclude)
    if not isinstance(names, tuple) or not all(isinstance(each, str) for each in cast("tuple[object, ...]", names)):
        raise InvalidArgumentError(
            "exclude", f'must be a tuple of names of parameters, such as ("password",), not {described(names)}'
        )
    if parameters is not None and not _accepts_any_name(parameters):
        for name in exclude:
            if name not in parameters.parameters:
                raise InvalidArgumentError("exclude", f"names {name!r}, which is not a parameter of {parameters}")
    return frozenset(exclude)


def _accepts_any_name(parameters: Signature) -> bool:
    return any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.parameters.values())
