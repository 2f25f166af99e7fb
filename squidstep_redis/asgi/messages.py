"""HTTP as the middleware needs it: the types of ASGI, keys, fingerprints, whole requests and responses. No store."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, MutableMapping
from hashlib import sha256
from typing import Any, Final, Literal, NamedTuple, Self
from urllib.parse import quote

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MAX_KEY_CHARS: Final = 255
MAX_RUN_ID_BYTES: Final = 512  # what a store accepts

# A string of RFC 8941, section 3.3.3, without parameters; or the same key without quotes, as many clients send it.
_QUOTED: Final = re.compile(rb'"((?:[ !#-\[\]-~]|\\["\\])+)"')
_BARE: Final = re.compile(rb"[!#-+\--:<-~]+")  # visible characters but " , ;


def values_of(headers: Headers, name: bytes) -> Iterator[bytes]:
    """Yields the values of a header, whose name is in lower case."""
    return (value for each, value in headers if each.lower() == name)


def parse_key(values: list[bytes]) -> str | None:
    """Returns the idempotency key of a request; None if it has none.

    Args:
        values: the values of the header, one for each time that the request has it.

    Raises:
        ValueError: it has several keys, or an invalid one; the message says what is wrong.
    """
    if not values:
        return None
    if len(values) > 1:
        raise ValueError("The request has more than one key.")
    text = values[0].strip(b" \t")
    quoted = _QUOTED.fullmatch(text)
    if quoted is None and not _BARE.fullmatch(text):
        raise ValueError(
            "The key must be a non-empty string of printable ASCII characters in double quotes, without parameters. "
            "The quotes may be left out if it has no spaces, quotes, commas or semicolons."
        )
    key = (re.sub(rb"\\(.)", rb"\1", quoted[1]) if quoted else text).decode("ascii")
    if len(key) > MAX_KEY_CHARS:
        raise ValueError(f"The key has more than {MAX_KEY_CHARS} characters.")
    return key


def run_id_of(tenant: str, key: str) -> str:
    """Returns the run id of a key: readable if it fits, else a hash. Different tenants and keys have different runs."""
    run_id = f"idempotency:{quote(tenant, safe='', errors='surrogatepass')}:{key}"
    if len(run_id) <= MAX_RUN_ID_BYTES:  # it is ASCII
        return run_id
    return f"idempotency#{sha256(run_id.encode()).hexdigest()}"


def fingerprint_of(scope: Scope, body: bytes) -> str:
    """Returns a hash of what a request asks for: its method, path, query and body."""
    path, raw_path = scope["path"].encode(), scope.get("raw_path")
    parts = [scope["method"].encode(), path, scope.get("query_string", b""), body]
    if raw_path and raw_path != path:  # in path, it is decoded: /a%2Fb would be the same as /a/b
        parts.append(raw_path)
    digest = sha256()
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()


class RequestReader:
    """Reads the body of a request, and replays what it has read to the application."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.body = b""
        self._receive = receive
        self._has_more = True
        self._is_replayed = True
        length = next(values_of(scope["headers"], b"content-length"), b"")
        self._declared_size = int(length) if length.isdigit() else 0

    async def read(self, limit: int) -> Literal["whole", "too large", "disconnected"]:
        """Reads the body to its end, or until it is known to be larger than `limit` bytes."""
        if self._declared_size > limit:
            return "too large"
        body = bytearray()
        while self._has_more and len(body) <= limit:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return "disconnected"
            self._has_more, self._is_replayed = message.get("more_body", False), False
            body += message.get("body", b"")
        self.body = bytes(body)
        return "whole" if len(body) <= limit else "too large"

    async def receive(self) -> Message:
        """Replays what was read, then receives the rest: the `receive` of the application."""
        if self._is_replayed:
            return await self._receive()
        self._is_replayed = True
        return {"type": "http.request", "body": self.body, "more_body": self._has_more}


class Response(NamedTuple):
    """A whole response."""

    status: int
    headers: Headers
    body: bytes

    def output(self, unstored: Collection[bytes]) -> dict[str, Any]:
        """Returns the part of it that is stored.

        Args:
            unstored: names of headers to leave out, in lower case.
        """
        headers = [[name, value] for name, value in self.headers if name.lower() not in unstored]
        return {"status": self.status, "headers": headers, "body": self.body}

    @classmethod
    def replay_of(cls, output: Mapping[str, Any]) -> Self:
        """Returns the response to an earlier request, with a header that says so."""
        headers = [(name, value) for name, value in output["headers"]]
        return cls(output["status"], [*headers, (b"idempotent-replayed", b"true")], output["body"])

    async def send(self, send: Send) -> None:
        """Sends it to the client."""
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


def problem(
    status: int, title: str, detail: str, docs_url: str | None = None, retry_in: float | None = None
) -> Response:
    """Returns an error as an `application/problem+json` response (RFC 9457).

    Args:
        status: the status code.
        title: what is wrong, the same each time.
        detail: what to do.
        docs_url: where the use of keys is documented; None: nowhere.
        retry_in: seconds until the client may retry; None: it need not.
    """
    document = {"type": docs_url or "about:blank", "title": title, "status": status, "detail": detail}
    body = json.dumps(document).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", b"%d" % len(body))]
    if docs_url:
        headers.append((b"link", f'<{docs_url}>; rel="describedby"'.encode("latin-1")))
    if retry_in is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(retry_in))))
    return Response(status, headers, body)
