"""The arguments of a step's function, and the part of them that is stored as the input of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from inspect import BoundArguments, Parameter, Signature
from typing import Any, Final, cast

from squidstep_redis.errors import InvalidArgumentError, PayloadError, described
from squidstep_redis.protocol.fingerprints import digest

_STORED_AS: Final = {Parameter.VAR_POSITIONAL: list, Parameter.VAR_KEYWORD: dict}


def bind(
    fn: Callable[..., Any], parameters: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> BoundArguments:
    """Returns the arguments of a call.

    Args:
        fn: the function.
        parameters: its parameters.
        args: the positional arguments.
        kwargs: the keyword arguments.

    Raises:
        TypeError: the function does not accept them. It names the function, as Python does.
    """
    try:
        return parameters.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{getattr(fn, '__qualname__', type(fn).__qualname__)}(): {error}") from None


def with_defaults(bound: BoundArguments) -> BoundArguments:
    """Returns the arguments of a call, including those that were not given.

    Args:
        bound: the arguments of the call.
    """
    complete = BoundArguments(bound.signature, cast("Any", dict(bound.arguments)))
    complete.apply_defaults()
    return complete


def input_of(bound: BoundArguments, excluded: AbstractSet[str]) -> dict[str, Any]:
    """Returns the input of the step: the arguments of a call by parameter, without the excluded ones.

    Args:
        bound: the arguments of the call.
        excluded: names of arguments that are not stored, also among the `**kwargs` of the function.
    """
    return _without(bound.arguments, excluded, _others_of(bound.signature))


def stored_arguments(bound: BoundArguments, stored: Mapping[str, Any], excluded: AbstractSet[str]) -> BoundArguments:
    """Returns the arguments to call the function with.

    Args:
        bound: the arguments of the call.
        stored: the stored input of the step. It differs from the input of the call if the step was scheduled with
            a different input; its values then replace those of the call.
        excluded: names of arguments that are not stored: their values are always those of the call.

    Raises:
        InvalidArgumentError: the stored input has an argument that the function does not accept, or no list for its
            `*args`, or no dict for its `**kwargs`.
    """
    given = input_of(bound, excluded)
    if _is_stored_as(given, stored):
        return bound
    parameters, others = bound.signature, _others_of(bound.signature)
    unknown = stored.keys() - parameters.parameters.keys()
    if unknown:
        raise InvalidArgumentError(
            "input", f"the step was scheduled with {sorted(unknown)}, which its function does not accept: {parameters}"
        )
    for name, parameter in parameters.parameters.items():
        expected = _STORED_AS.get(parameter.kind)
        if expected is not None and not isinstance(stored.get(name, expected()), expected):
            problem = (
                f"the step was scheduled with {described(stored[name])} as {parameter}, which is a {expected.__name__}"
            )
            raise InvalidArgumentError("input", problem)
    changed = {
        name: value
        for name, value in _without(stored, excluded, others).items()
        if name not in given or not _is_stored_as(given[name], value)
    }
    values = {**bound.arguments, **changed}
    if others in values and others not in excluded:
        kept_out = {name: value for name, value in bound.arguments.get(others, {}).items() if name in excluded}
        values[others] = {**values[others], **kept_out}
    scheduled = with_defaults(BoundArguments(parameters, cast("Any", values)))
    for name, parameter in parameters.parameters.items():
        if parameter.kind is Parameter.VAR_POSITIONAL:
            scheduled.arguments[name] = tuple(scheduled.arguments[name])
    return scheduled


def digest_of(bound: BoundArguments, excluded: AbstractSet[str]) -> bytes:
    """Returns the fingerprint of the input of a call; empty if the user's codec accepts an input that has none.

    Args:
        bound: the arguments of the call.
        excluded: names of arguments that are not stored.
    """
    for each in (with_defaults(bound), bound):  # a default need not be storable
        try:
            return digest("input", input_of(each, excluded))
        except PayloadError:
            continue
    return b""


def _others_of(parameters: Signature) -> str:
    """Returns the name of the parameter for keyword arguments of any name; empty if there is none."""
    for name, parameter in parameters.parameters.items():
        if parameter.kind is Parameter.VAR_KEYWORD:
            return name
    return ""


def _without(arguments: Mapping[str, Any], excluded: AbstractSet[str], others: str) -> dict[str, Any]:
    kept = {name: value for name, value in arguments.items() if name not in excluded}
    if others in kept and excluded:
        kept[others] = {name: value for name, value in kept[others].items() if name not in excluded}
    return kept


def _is_stored_as(given: object, stored: object) -> bool:
    """Returns whether a value is stored in this form: with tuples as lists, and datetimes in UTC.

    Fingerprints are compared, because a datetime in an hour that a change of clocks repeats or skips does not equal any
    datetime in another time zone.
    """
    if stored == given:
        return True
    try:
        return digest("input", stored) == digest("input", given)
    except PayloadError:  # the user's codec may accept a value that has no fingerprint
        return False
