"""Docstrings that blocking and asyncio methods share."""

from __future__ import annotations

import re
from collections.abc import Callable
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
