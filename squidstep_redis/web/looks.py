"""What changed since the last visit. A signed cookie holds what a browser saw when it last loaded the overview.

The store keeps no counters, so nothing here counts completions: `squidstep_redis.metrics` does.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from squidstep_redis.web.guard import cookie_path
from squidstep_redis.web.reads import Counts
from squidstep_redis.web.settings import WebSettings

_COOKIE: Final = "squidstep_look"
_PURPOSE: Final = "look"
_MAX_AGE: Final = 30 * 86_400  # seconds
_LOOK: Final = re.compile(r"(\d{1,15})-(\d{1,12})-(\d{1,12})-(\d{1,12})")


class Look(NamedTuple):
    """What the overview showed, and when."""

    at: datetime
    counts: Counts

    def changes(self, counts: Counts) -> Counts:
        """Returns how much the counts differ from those of this look."""
        return Counts(*(now - then for now, then in zip(counts, self.counts, strict=True)))


def format_look(settings: WebSettings, counts: Counts, at: datetime) -> str:
    """Returns a signed look, for a cookie or a link."""
    text = "-".join(map(str, (int(at.timestamp() * 1_000), *counts)))
    return f"{text}.{settings.sign(_PURPOSE, text)}"


def parse_look(settings: WebSettings, text: str) -> Look | None:
    """Returns the look that `format_look` has signed; None for any other text."""
    look, _, signature = text.partition(".")
    match = _LOOK.fullmatch(look)
    if match is None or not settings.is_signed(_PURPOSE, look, signature):
        return None
    at, *counts = map(int, match.groups())
    return Look(datetime.fromtimestamp(at / 1_000, UTC), Counts(*counts))


def last_look(request: Request) -> str:
    """Returns the signed look of this request's address, or else of its browser; empty without one."""
    return request.query_params.get("look", "") or request.cookies.get(_COOKIE, "")


def set_look(request: Request, response: Response, look: str) -> None:
    """Sets the cookie with the counts that the browser sees now."""
    response.set_cookie(
        _COOKIE,
        look,
        max_age=_MAX_AGE,
        path=cookie_path(request),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
