"""Real HTTP: uvicorn in the event loop of the test, and a client of one request per connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn

from support.asgi import Reply


class Server(uvicorn.Server):
    """uvicorn on a free port, which signals that it is listening."""

    def __init__(self, app: Any) -> None:
        super().__init__(uvicorn.Config(app, port=0, log_config=None, loop="asyncio"))
        self.is_listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()

    @property
    def port(self) -> int:
        return self.servers[0].sockets[0].getsockname()[1]


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[Server]:
    """Serves an application during the block."""
    server = Server(app)
    task = asyncio.create_task(server.serve())
    listening = asyncio.create_task(server.is_listening.wait())
    await asyncio.wait([task, listening], return_when=asyncio.FIRST_COMPLETED)
    assert listening.done(), "uvicorn did not start"
    try:
        yield server
    finally:
        server.should_exit = True
        await task


def encoded(body: bytes, key: str | None, path: str) -> bytes:
    """Returns a POST request in HTTP/1.1."""
    head = [f"POST {path} HTTP/1.1", "Host: test", "Connection: close", f"Content-Length: {len(body)}"]
    if key is not None:
        head.append(f'Idempotency-Key: "{key}"')
    return "\r\n".join([*head, "", ""]).encode() + body


async def post(port: int, body: bytes = b"{}", *, key: str | None = "key-1", path: str = "/charges") -> Reply:
    """Sends a request on a connection of its own; returns the response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(encoded(body, key, path))
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
        await writer.wait_closed()
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        content = unchunked(content)
    return Reply(int(status.split()[1]), headers, content)


def unchunked(content: bytes) -> bytes:
    """Returns the body of a chunked response; raises ValueError if it is incomplete."""
    body = b""
    while True:
        size, _, content = content.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return body
        body, content = body + content[:length], content[length + 2 :]
