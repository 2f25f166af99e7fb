"""Protects the page: headers of each response, host names, and the check that a form came from the page."""

from __future__ import annotations

import ipaddress
import secrets
from typing import Final
from urllib.parse import quote, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from squidstep_redis.web.settings import WebSettings

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # With no-referrer, a browser would send "Origin: null" with the page's own forms.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_COOKIE: Final = "squidstep_form"
_PURPOSE: Final = "form"


def root_of(request: Request) -> str:
    """Returns the path under which the application is mounted, without a slash at the end.

    It never begins with two slashes, which a browser would read as the name of another host.
    """
    root = str(request.scope.get("root_path", "")).strip("/")
    return f"/{root}" if root else ""


def cookie_path(request: Request) -> str:
    """Returns the path of the application's cookies: as browsers send it, or they would keep the cookies back."""
    return quote(root_of(request)) or "/"


class Guard:
    """Middleware: rejects other host names, which DNS rebinding would use, and adds headers."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        """Wraps an application.

        Args:
            app: the application.
            hosts: names that the Host header may have, besides IP addresses and localhost; None: any.
        """
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        host = Request(scope).headers.get("host", "")
        if self._hosts is not None and not self._is_known(host):
            text = (
                "The page is not served under this host name. To allow it, use `squidstep web --allow-host NAME`, or "
                "the argument hosts of web_app."
            )
            await PlainTextResponse(text, 421)(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # a malformed IPv6 address
            return False
        if name == "localhost" or name in (self._hosts or ()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # a rebound name is a name, never an address


def form_token(request: Request, settings: WebSettings) -> tuple[str, str]:
    """Returns the token of this browser's forms, and the value of the cookie that it belongs to."""
    cookie = request.cookies.get(_COOKIE, "")
    if not 32 <= len(cookie) <= 64 or not cookie.isalnum():
        cookie = secrets.token_hex(16)
    return settings.sign(_PURPOSE, cookie), cookie


def set_form_cookie(request: Request, response: Response, cookie: str) -> None:
    """Sets the cookie that the token of the browser's forms belongs to, for this application only."""
    if request.cookies.get(_COOKIE) != cookie:
        response.set_cookie(
            _COOKIE,
            cookie,
            path=cookie_path(request),
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )


def check_form(request: Request, settings: WebSettings, token: str) -> None:
    """Raises HTTPException unless the request was sent by a form of this page.

    If the browser says where the form comes from (with Sec-Fetch-Site, or with Origin if it lacks that), that must be
    this page's site. The token must belong to the cookie.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        is_ours = site == "same-origin"
    else:
        is_ours = origin is None or urlsplit(origin).netloc.lower() == request.headers.get("host", "").lower()
    if not is_ours:
        raise HTTPException(403, "The form was sent by another site. Nothing was changed.")
    if not settings.is_signed(_PURPOSE, request.cookies.get(_COOKIE, ""), token):
        raise HTTPException(
            403,
            "The form does not belong to this page, or the server was restarted after the page was loaded. Nothing was "
            "changed. Load the page again, and repeat what you did. If several processes serve it, give each the same "
            "secret.",
        )
