"""Docstrings that methods share."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def with_docs_of(original: Callable[..., Any], **replacements: str) -> Callable[[F], F]:
    """Gives a method the docstring of its blocking counterpart.

    Args:
        original: the blocking method.
        **replacements: descriptions of the arguments that differ or that the original does not have.
    """
    doc = original.__doc__ or ""
    for name, text in replacements.items():
        line = f"            {name}: {text}\n"
        doc, replaced = re.subn(rf"^            {name}: .*\n(?:                .*\n)*", line, doc, flags=re.MULTILINE)
        if not replaced:
            doc = doc.replace("\n        Returns:", f"{line}\n        Returns:")

    def decorate(method: F) -> F:
        method.__doc__ = doc
        return method

    return decorate


def with_arguments_of(original: Callable[..., Any]) -> Callable[[F], F]:
    """Gives a docstring without a section `Args` that of another method, as far as the method has these arguments.

    Args:
        original: the other method.
    """
    section = (original.__doc__ or "").partition("        Args:\n")[2].partition("\n\n")[0] + "\n"
    described = re.findall(r"^( {12}(\w+): .*\n(?: {13,}.*\n)*)", section, re.MULTILINE)

    def decorate(method: F) -> F:
        names = signature(method).parameters
        lines = "".join(text for text, name in described if name in names)
        method.__doc__ = (method.__doc__ or "").replace("        Returns:", f"        Args:\n{lines}\n        Returns:")
        return method

    return decorate
