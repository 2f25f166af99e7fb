"""Makes the ASGI application."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Collection
from hashlib import sha256

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from squidstep_redis import AsyncStepRunStore, InvalidArgumentError
from squidstep_redis.web.actions import Actions
from squidstep_redis.web.guard import Guard
from squidstep_redis.web.live import Hub
from squidstep_redis.web.pages import Pages
from squidstep_redis.web.problems import problem_page
from squidstep_redis.web.rendering import check_templates
from squidstep_redis.web.settings import Authorize, Right, WebSettings

Handler = Callable[[Request], Awaitable[Response]]


def web_app(
    store: AsyncStepRunStore,
    *,
    payloads: bool = False,
    actions: bool = False,
    authorize: Authorize | None = None,
    title: str | None = None,
    hosts: Collection[str] | None = None,
    secret: str | None = None,
) -> Starlette:
    """Makes an ASGI application that shows a store. Mount it under any path. Nothing is sent until it is used.

    Anyone who reaches it sees the names of runs, steps and owners, errors and reasons, unless `authorize` says
    otherwise. It loads nothing from other hosts, and needs no scripts; with them, two of its pages update themselves.

    Args:
        store: the store to show. Close it yourself, in the lifespan of your application.
        payloads: whether inputs, outputs, progress and whole errors can be seen and downloaded. Otherwise they are
            not even read from the server.
        actions: whether steps can be retried and released, and runs cancelled and resumed.
        authorize: decides on each request: `authorize(request, right)`, a function or a coroutine function, receives
            the Starlette request and "see", "payloads" or "act", and returns True to allow it; anything else is a
            denial. "see" is checked for every request except those for static files, "payloads" only if `payloads` is
            True, and "act" only if `actions` is True. It may raise Starlette's HTTPException, such as a 401, or a 303
            with the header Location. A plain function runs in the event loop, so it must not block. None: everyone has
            every right that is enabled.
        title: the name of the store in the heading; None: its key prefix.
        hosts: the names that the Host header may have, besides IP addresses and localhost: a protection against DNS
            rebinding for a page without `authorize`. None: any name.
        secret: signs forms and cookies. Processes that serve the same address need the same secret, of at least 16
            characters. None: a random one.

    Returns:
        A Starlette application without a lifespan.

    Raises:
        InvalidArgumentError: an argument was rejected.
    """
    if not isinstance(store, AsyncStepRunStore):  # pyright: ignore[reportUnnecessaryIsInstance] -- callers may be untyped
        raise InvalidArgumentError("store", f"must be an AsyncStepRunStore, not {type(store).__name__}")
    if secret is not None and len(secret) < 16:
        raise InvalidArgumentError("secret", "must have at least 16 characters")
    if authorize is not None and not callable(authorize):
        raise InvalidArgumentError("authorize", "must be a function of a request and a right")
    check_templates()
    names = None if hosts is None else frozenset(name.lower() for name in hosts)
    key = secrets.token_bytes(32) if secret is None else sha256(secret.encode()).digest()
    title = f"prefix {store.calls.prefix}" if title is None else title
    settings = WebSettings(store, title, payloads, actions, authorize, names, key)
    pages, changes = Pages(settings, Hub()), Actions(settings)

    def route(path: str, handler: Handler, right: Right = "see", method: str = "GET") -> Route:
        return Route(path, _guarded(settings, handler, right), methods=[method])

    routes = [
        route("/", pages.overview),
        route("/runs", pages.runs),
        route("/run", pages.run),
        route("/step", pages.step),
        route("/failed", pages.failed),
        route("/events", pages.events),
        route("/payload", pages.payload, "payloads"),
        route("/retry", changes.retry, "act", "POST"),
        route("/retry-run", changes.retry_run, "act", "POST"),
        route("/retry-group", changes.retry_group, "act", "POST"),
        route("/release", changes.release, "act", "POST"),
        route("/cancel", changes.cancel, "act", "POST"),
        route("/resume", changes.resume, "act", "POST"),
        Route("/static/{name}", pages.static),
    ]

    async def handle(request: Request, error: Exception) -> Response:
        return await problem_page(request, settings, error)

    return Starlette(
        routes=routes, middleware=[Middleware(Guard, hosts=names)], exception_handlers={HTTPException: handle}
    )


def _guarded(settings: WebSettings, handler: Handler, right: Right) -> Handler:
    """Returns a handler that checks the rights of a request, and turns exceptions into pages."""

    async def guarded(request: Request) -> Response:
        try:
            if not await settings.allows(request, "see"):
                raise HTTPException(403, "You are not allowed to see this page.")
            if right != "see" and not await settings.allows(request, right):
                what = "see payloads" if right == "payloads" else "change anything"
                raise HTTPException(403, f"You are not allowed to {what} here. Nothing was changed.")
            return await handler(request)
        except Exception as error:  # noqa: BLE001 -- each error has a page; unknown ones are logged
            return await problem_page(request, settings, error)

    return guarded
