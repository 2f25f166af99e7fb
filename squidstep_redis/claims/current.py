"""The claims under which code runs, by context. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Final
from weakref import ref

_current: Final[ContextVar[tuple[ref[Any], ...]]] = ContextVar("squidstep_claims", default=())


def current_claims() -> Iterator[Any]:
    """Returns all claims under which this code runs, innermost first."""
    for reference in _current.get():
        claim = reference()
        if claim is not None:
            yield claim


def enter(claim: object) -> None:
    """Makes this claim the innermost."""
    _current.set((ref(claim), *map(ref, current_claims())))


def leave(claim: object) -> None:
    """Removes this claim.

    A block may exit in a different context from the one in which it was entered, and need not be the innermost: of two
    generators, the first may end first.
    """
    _current.set(tuple(ref(each) for each in current_claims() if each is not claim))
