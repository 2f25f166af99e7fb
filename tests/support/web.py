"""The web page on a store of the tests, and a browser without scripts: a client of ASGI that keeps cookies."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Mapping
from html import unescape
from html.parser import HTMLParser
from http.cookies import SimpleCookie
from typing import Any, NamedTuple, cast
from urllib.parse import urlencode

from squidstep_redis import AsyncStepRunStore
from squidstep_redis.web import web_app
from support.backends import Bench, Driven

HOST = "steps.example"


class Page(NamedTuple):
    """What a browser received."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def html(self) -> str:
        return self.body.decode()

    @property
    def text(self) -> str:
        """What a person reads, with single spaces."""
        return text_of(self.html)

    def forms(self) -> dict[str, str]:
        """Returns the token of each form that changes something, by the form's action."""
        found = re.findall(
            r'<form method="post" action="([^"]*)">.*?name="token" value="([0-9a-f]*)"', self.html, re.DOTALL
        )
        return {unescape(action): token for action, token in found}

    def links(self) -> list[str]:
        return [unescape(link) for link in re.findall(r'href="([^"]*)"', self.html)]


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.parts.append(" ")

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def text_of(html: str) -> str:
    parser = _Text()
    parser.feed(html)
    return " ".join("".join(parser.parts).split())


def tags_of(html: str) -> list[str]:
    """Returns the elements that a browser would make, in order."""
    parser = _Text()
    parser.feed(html)
    return parser.tags


class Site:
    """The page of a store.

    Attributes:
        store: the store, with the methods of a blocking one.
        app: the application.
        cookies: what the browser keeps.
    """

    def __init__(self, bench: Bench, store: Any = None, **settings: Any) -> None:
        assert bench.runner is not None
        self.bench = bench
        self.runner = bench.runner
        self.store: Any = store or bench.store()
        self.settings = settings
        self.app: Any = web_app(self.asyncio_store, **settings)
        self.cookies: dict[str, str] = {}

    @property
    def asyncio_store(self) -> AsyncStepRunStore:
        return cast("Driven", self.store).store

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(coroutine)

    def get(self, path: str, headers: Mapping[str, str] = {}, root: str = "") -> Page:
        return self.run(self.request("GET", path, headers=headers, root=root))

    def post(self, path: str, fields: Mapping[str, str], headers: Mapping[str, str] = {}, root: str = "") -> Page:
        """Sends a form, as a browser does from a page of this site, unless the headers say something else."""
        sent = {"content-type": "application/x-www-form-urlencoded", "sec-fetch-site": "same-origin", **headers}
        return self.run(self.request("POST", path, urlencode(fields).encode(), sent, root=root))

    def submit(self, page: Page, action: str, **fields: str) -> Page:
        """Sends the form of a page whose action begins with this."""
        path, token = next(item for item in page.forms().items() if item[0].startswith(action))
        return self.post(path, {"token": token, **fields})

    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] = {}, root: str = ""
    ) -> Page:
        path, _, query = path.partition("?")
        cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        all_headers = {"host": HOST, **({"cookie": cookies} if cookies else {}), **headers}
        scope = {
            "type": "http",
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": root + path,
            "root_path": root,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in all_headers.items() if value],
        }
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if messages:
                return messages.pop()
            return await asyncio.Future()  # the client stays

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start, *rest = sent
        received = [(name.decode(), value.decode("latin-1")) for name, value in start["headers"]]
        for name, value in received:
            if name == "set-cookie":
                self.cookies |= {key: morsel.value for key, morsel in SimpleCookie(value).items()}
        return Page(start["status"], dict(received), b"".join(part.get("body", b"") for part in rest))
