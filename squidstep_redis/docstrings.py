"""Docstrings that several functions share, and signatures that show the settings behind `**settings`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, Final, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

# In a docstring without its indentation: the description of one argument or attribute.
_ENTRY: Final = re.compile(r"^    (\**\w+): (.*(?:\n        .*)*)", re.MULTILINE)


def with_docs_of(original: Callable[..., Any], **replacements: str) -> Callable[[F], F]:
    """Gives a method the docstring of its blocking counterpart.

    Args:
        original: the blocking method.
        **replacements: descriptions of the arguments that differ or that the original does not have.
    """
    entries = {name: _entry(name, text) for name, text in replacements.items()}
    doc = _ENTRY.sub(lambda found: entries.pop(found[1], found[0]), _dedented(original.__doc__))
    if entries:
        doc = doc.replace("\n\nReturns:", "\n".join(["", *entries.values(), "\nReturns:"]))

    def decorate(method: F) -> F:
        method.__doc__ = doc
        return method

    return decorate


def with_settings(parameters: Mapping[str, Parameter], *kinds: type) -> Callable[[F], F]:
    """Shows the settings that `**settings` stands for, in the signature and the docstring of a function.

    The docstring describes them in place of `**settings`, except for those that it already describes.

    Args:
        parameters: the settings by name, with their types and defaults.
        *kinds: the TypedDicts whose keys are the settings, and whose docstrings describe them.
    """
    names = {name: None for kind in kinds for name in kind.__annotations__}  # a set that keeps the order
    entries = {name: text for kind in kinds for name, text in _ENTRY.findall(_dedented(kind.__doc__))}

    def decorate(fn: F) -> F:
        own = signature(fn)
        kept = [each for each in own.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
        shown = own.replace(parameters=[*kept, *(parameters[name] for name in names)])
        fn.__dict__["__signature__"] = shown
        doc = _dedented(fn.__doc__)
        own_entries = dict(_ENTRY.findall(doc))
        lines = "\n".join(_entry(name, text) for name, text in entries.items() if name not in own_entries)
        fn.__doc__ = _ENTRY.sub(lambda found: lines if found[1] == "**settings" else found[0], doc)
        return fn

    return decorate


def _entry(name: str, text: str) -> str:
    lines = [line.strip() for line in text.split("\n")]
    return f"    {name}: " + "\n        ".join(lines)


def _dedented(doc: str | None) -> str:
    """Returns a docstring without the indentation of its last line. `inspect.cleandoc` is slower at import."""
    text, _, indentation = (doc or "").rpartition("\n")
    return text.replace(f"\n{indentation}", "\n") if text and not indentation.strip() else doc or ""
