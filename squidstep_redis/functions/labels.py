"""The labels of a run, made from the arguments of a function's call."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from inspect import BoundArguments, Signature
from typing import cast

from squidstep_redis.claims.request import ClaimSettings
from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.functions.templates import (
    NoneInFormatError,
    check_format,
    format_arguments,
    function_of_arguments,
)
from squidstep_redis.protocol.arguments import Labels, LabelsOf
from squidstep_redis.protocol.labels import check_label_names

SettingsOf = Callable[[BoundArguments], ClaimSettings]


def with_labels_of(
    settings: ClaimSettings, labels: LabelsOf | None, parameters: Signature, excluded: AbstractSet[str]
) -> SettingsOf:
    """Returns a function that returns the settings of a call, with labels that are made from its arguments.

    Args:
        settings: all other settings.
        labels: format strings over the arguments by label, or a function of the arguments; None: no labels.
        parameters: the parameters of the step's function.
        excluded: names of arguments that are not stored. Labels are stored, so a format string must not name them. A
            function receives all arguments.

    Raises:
        InvalidArgumentError: a name of a label is rejected; a format string is malformed, or names something that is
            not a parameter, or an excluded one; or the function does not accept the parameters.
    """
    if labels is None:
        return lambda _: settings
    of_arguments = _labels_of(labels, parameters, excluded)
    return lambda bound: {**settings, "labels": of_arguments(bound)}


def _labels_of(
    labels: LabelsOf, parameters: Signature, excluded: AbstractSet[str]
) -> Callable[[BoundArguments], Labels]:
    if callable(labels):
        return function_of_arguments("labels", labels, parameters)
    formats = check_label_names(labels)
    for name, text in formats.items():
        argument = f"labels[{name!r}]"
        if not isinstance(cast("object", text), str):
            raise InvalidArgumentError(argument, f"must be a format string over the arguments, not {described(text)}")
        check_format(argument, text, parameters, excluded)

    def format_labels(bound: BoundArguments) -> Labels:
        found: dict[str, str] = {}
        for name, text in formats.items():
            with suppress(NoneInFormatError):  # a call without that argument has no such label
                found[name] = format_arguments(text, bound)
        return found

    return format_labels
