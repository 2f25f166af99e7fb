"""An application behind the middleware, and a client of ASGI: no network."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

from squidstep_redis import AsyncStepRunStore, Call, RefusedError, ServerError, StepRun, current_claim
from squidstep_redis.asgi import IdempotencyMiddleware
from squidstep_redis.asgi.messages import Receive, Scope, Send, run_id_of
from support.backends import Bench, Driven
from support.internals import log_calls

Handler = Callable[[bytes], Awaitable[tuple[int, bytes]]]
JSON = (b"content-type", b"application/json")


class Reply(NamedTuple):
    """What a client received."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def is_replay(self) -> bool:
        return self.headers.get("idempotent-replayed") == "true"

    @property
    def title(self) -> str:
        """The title of a problem, whose document is checked."""
        assert self.headers["content-type"] == "application/problem+json"
        assert int(self.headers["content-length"]) == len(self.body)
        document = json.loads(self.body)
        assert document.keys() == {"type", "title", "status", "detail"}
        assert document["status"] == self.status
        return document["title"]


class Client:
    """Sends requests to an application, as a server would."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.messages: list[Any] = []

    async def request(
        self,
        body: bytes | Iterable[bytes] = b"{}",
        *,
        key: str | None = '"key-1"',
        method: str = "POST",
        path: str = "/charges",
        headers: Iterable[tuple[bytes, bytes]] = (),
        disconnect: asyncio.Event | None = None,
        extensions: dict[str, Any] | None = None,
    ) -> Reply | None:
        """Sends a request; returns the response, or None if there was none.

        Args:
            body: the body, or its chunks.
            disconnect: the client disconnects when it is set; None: never.
        """
        chunks = [body] if isinstance(body, bytes) else list(body)
        keys = [] if key is None else [(b"Idempotency-Key", key.encode("latin-1"))]
        path, _, query = path.partition("?")
        scope: Scope = {
            "type": "http",
            "method": method,
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [*keys, *headers],
            "extensions": extensions,
        }
        sent: list[Any] = []
        self.messages = sent

        async def receive() -> Any:
            if chunks:
                return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}
            await (disconnect or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        if not sent:
            return None
        start, *rest = sent
        assert start["type"] == "http.response.start"
        assert not rest[-1].get("more_body", False)
        names = {name.decode(): value.decode() for name, value in start["headers"]}
        return Reply(start["status"], names, b"".join(part.get("body", b"") for part in rest))


class Site:
    """An application of one handler behind the middleware, and its client.

    Attributes:
        effects: the bodies that the handler has received.
        handler: returns status and body; by default it counts: 201, and the number of effects.
        headers: of its responses.
    """

    def __init__(self, bench: Bench, store: Any = None, **options: Any) -> None:
        assert bench.runner is not None
        self.runner = bench.runner
        self.driven: Any = store or bench.store()
        self.store: AsyncStepRunStore = cast("Driven", self.driven).store
        self.effects: list[bytes] = []
        self.headers = [JSON]
        self.handler: Handler = self.count
        self.middleware = self.behind_middleware(self.app, **options)
        self.client = Client(self.middleware)

    def behind_middleware(self, app: Any, **options: Any) -> IdempotencyMiddleware:
        return IdempotencyMiddleware(app, self.store, **{"tenant": None, **options})

    async def count(self, body: bytes) -> tuple[int, bytes]:
        return 201, b'{"effect": %d}' % len(self.effects)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await body_of(receive)
        self.effects.append(body)
        status, content = await self.handler(body)
        await respond(send, status, content, self.headers)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(coroutine)

    def request(self, body: bytes | Iterable[bytes] = b"{}", **options: Any) -> Reply:
        """Sends one request, and waits for the response."""
        reply = self.run(self.client.request(body, **options))
        assert reply is not None
        return reply

    def step_run(self, key: str = "key-1", tenant: str = "") -> StepRun:
        return self.driven.get_step_run(run_id_of(tenant, key), "request")


async def body_of(receive: Receive) -> bytes:
    """Receives the whole body of a request."""
    body = b""
    while True:
        message = await receive()
        assert message["type"] == "http.request"
        body += message["body"]
        if not message["more_body"]:
            return body


async def respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Sends a whole response."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


class Gate:
    """A handler that waits until the test lets it continue."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self, body: bytes) -> tuple[int, bytes]:
        self.entered.set()
        await self.opened.wait()
        claim = current_claim()
        return 200, b"attempt %d" % (claim.step_run.attempt if claim else 0)


def refuse_calls(store: Any, operation: str, times: int, error: type[ServerError] = RefusedError) -> None:
    """Makes the next calls of an operation fail without being sent."""
    left = [times]

    @contextlib.contextmanager
    def refused(calls: list[Call[Any]]) -> Iterator[list[Any]]:
        if calls[0].script.name == operation and left[0]:
            left[0] -= 1
            raise error(operation, calls[0].run_id, calls[0].step, "refused by the test", False)
        yield []

    log_calls(store, refused)
