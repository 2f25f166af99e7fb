"""The cursors of listings across runs: the score and the member of an index entry, as text."""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Final

from squidstep_redis.errors import InvalidArgumentError, described

_CURSOR: Final = re.compile(r"(-?(?:inf|\d[\d.e+-]{0,24})):([\w-]{0,1400}={0,2})", re.ASCII)


def format_cursor(score: float, member: bytes) -> str:
    """Returns the cursor of the page that begins after an entry."""
    return f"{score:.17g}:{urlsafe_b64encode(member).decode()}"


def parse_cursor(cursor: object) -> tuple[float, bytes] | None:
    """Returns the score and the member of a cursor that a caller passed; None for the first page.

    Raises:
        InvalidArgumentError: `format_cursor` would not return it.
    """
    if cursor is None:
        return None
    match = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
    try:
        if match is None:
            raise ValueError
        return float(match[1]), urlsafe_b64decode(match[2])
    except ValueError:
        problem = f"must be the cursor of another page, not {described(cursor)}"
        raise InvalidArgumentError("cursor", problem) from None
