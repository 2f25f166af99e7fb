"""The status and the text of a page that cannot be shown."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Final

from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from squidstep_redis import (
    CorruptRunError,
    InvalidArgumentError,
    ServerError,
    SquidstepError,
    StaleStepRunError,
    StepRunNotFoundError,
)
from squidstep_redis.escaping import escaped
from squidstep_redis.web.rendering import render
from squidstep_redis.web.settings import WebSettings

_logger: Final = logging.getLogger("squidstep_redis.web")

_STATUSES: Final[dict[type[Exception], int]] = {
    InvalidArgumentError: 400,
    StepRunNotFoundError: 404,
    StaleStepRunError: 409,
    CorruptRunError: 500,
    ServerError: 503,
    RedisError: 503,  # of a cluster whose nodes cannot be reached
}
_TITLES: Final = {
    400: "The request is not valid",
    403: "This is not allowed",
    404: "There is no such page",
    409: "The step has changed in the meantime",
    413: "The form is too large",
    500: "The page cannot be shown",
    503: "The store's server is unavailable",
}
_RETRY_SECONDS: Final = 5


async def problem_page(request: Request, settings: WebSettings, error: Exception) -> Response:
    """Returns the page of an error. An unknown error is logged, and its text is not shown.

    Args:
        request: the request.
        settings: the application's settings.
        error: the exception.
    """
    headers: dict[str, str] = {}
    title = None
    if isinstance(error, HTTPException):
        status, text = error.status_code, error.detail
        headers.update(error.headers or {})
    elif isinstance(error, (SquidstepError, RedisError)):
        status, text = next((code for type_, code in _STATUSES.items() if isinstance(error, type_)), 500), str(error)
        if isinstance(error, StepRunNotFoundError):
            title = "There is no such run" if error.step is None else "There is no such step"
        elif isinstance(error, CorruptRunError):
            title = "The stored data is corrupt"
    else:
        _logger.error("the page %s failed", escaped(request.url.path), exc_info=error)
        status, text = 500, "The page itself failed; the log of its server has the details."
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(_RETRY_SECONDS)
    title = title or _TITLES.get(status, HTTPStatus(status).phrase)
    response = await render(request, settings, "problem", {"heading": title, "text": text, "status": status}, status)
    response.headers.update(headers)
    return response
