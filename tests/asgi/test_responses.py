"""Responses: what is stored and replayed, what executes again, and what cannot be stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

import pytest
from starlette.responses import StreamingResponse
from support.asgi import JSON, Client, Site, body_of, respond
from support.backends import Bench
from support.records import begun

from squidstep_redis import MsgpackCodec, Outcome, current_claim
from squidstep_redis.asgi import RETRY_STATUSES, UNSTORED_HEADERS
from squidstep_redis.asgi.messages import Receive, Scope, Send

REFUSED = (500, "The response cannot be stored")
PERMANENT = (500, "The request failed permanently")
OUTSTANDING = (409, "A request is outstanding for this idempotency key")


def answering(site: Site, status: int, body: bytes = b"body") -> None:
    async def handler(request: bytes) -> tuple[int, bytes]:
        return status, body

    site.handler = handler


def outcomes(site: Site) -> list[Outcome]:
    return [attempt.outcome for attempt in site.driven.attempts("idempotency::key-1", "request")]


@pytest.mark.parametrize("status", [200, 204, 303, 400, 402, 404, 422])
def test_a_final_response_is_stored(site: Site, status: int) -> None:
    answering(site, status, b"")
    assert [site.request().status for _ in range(2)] == [status, status]
    assert len(site.effects) == 1


@pytest.mark.parametrize("status", [401, 403, 408, 409, 423, 425, 429])
def test_after_a_refusal_a_retry_executes_again(site: Site, status: int) -> None:
    answering(site, status)
    assert [(site.request().status, site.step_run().status) for _ in range(2)] == [(status, "pending")] * 2
    assert site.request(b"another body").status == 422
    answering(site, 200)
    assert [site.request().is_replay for _ in range(2)] == [False, True]
    assert len(site.effects) == 3
    assert list(site.driven.failed_steps(limit=10)) == []


def test_after_a_server_error_a_retry_executes_again(site: Site) -> None:
    answering(site, 503)
    first = site.request()
    assert (first.status, first.body, first.is_replay) == (503, b"body", False)
    assert site.step_run().last_error == {"type": "HTTPResponse", "message": "status 503"}
    assert site.request(b"another body").status == 422
    answering(site, 200)
    assert [site.request().is_replay for _ in range(2)] == [False, True]
    assert outcomes(site) == [Outcome.FAILED, Outcome.COMPLETED]


def test_the_statuses_that_are_not_stored_can_be_chosen(bench: Bench) -> None:
    site = Site(bench, retry_statuses=RETRY_STATUSES - {500} | {404})
    answering(site, 500)
    assert [site.request().is_replay for _ in range(2)] == [False, True]
    answering(site, 404)
    assert [site.request(key="other").is_replay for _ in range(2)] == [False, False]


def test_headers_of_one_connection_and_cookies_are_not_stored(site: Site) -> None:
    once = [(name.title().encode(), b"once") for name in sorted(UNSTORED_HEADERS)]
    site.headers = [JSON, *once, (b"x-request-id", b"1"), (b"vary", b"a"), (b"vary", b"b")]
    first, again = site.request(), site.request()
    assert first.headers["Set-Cookie"] == "once"
    assert again.headers.keys() == {"content-type", "content-length", "x-request-id", "vary", "idempotent-replayed"}
    stored = site.step_run().output
    assert stored is not None
    assert [value for name, value in stored["headers"] if name == b"vary"] == [b"a", b"b"]


def test_the_headers_that_are_not_stored_can_be_chosen(bench: Bench) -> None:
    site = Site(bench, unstored_headers=["X-Secret"])
    site.headers = [(b"x-secret", b"s"), (b"set-cookie", b"id=1")]
    assert "x-secret" in site.request().headers
    assert site.request().headers["set-cookie"] == "id=1"
    assert "x-secret" not in site.request().headers


def test_a_body_in_parts_with_a_length_is_stored_whole(site: Site) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await body_of(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        for part, more in ((b"", True), (b"ab", True), (b"cd", True), (b"", False)):
            await send({"type": "http.response.body", "body": part, "more_body": more})

    client = Client(site.behind_middleware(app))
    replies = [site.run(client.request()) for _ in range(2)]
    assert [(reply.body, reply.is_replay) for reply in replies] == [(b"abcd", False), (b"abcd", True)]


def test_the_client_does_not_wait_for_background_work(site: Site) -> None:
    async def main() -> None:
        go_on, responded = asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await respond(send, 200, b"done", [])
            responded.set()
            await go_on.wait()
            raise RuntimeError("of the background")

        client = Client(site.behind_middleware(app))
        first = asyncio.create_task(client.request())
        await responded.wait()
        assert [message["type"] for message in client.messages] == ["http.response.start", "http.response.body"]
        again = await Client(client.app).request()
        assert again is not None
        assert again.is_replay
        go_on.set()
        with pytest.raises(RuntimeError, match="of the background"):
            await first

    site.run(main())
    assert site.step_run().status == "completed"


def test_nothing_is_sent_before_the_response_is_stored(site: Site) -> None:
    sent_at_completion: list[int] = []

    def listener(event: Any) -> None:
        if event.kind == "complete":
            sent_at_completion.append(len(site.client.messages))

    site.store.on_event(listener)
    site.request()
    assert sent_at_completion == [0]


def test_the_handler_sees_its_claim(site: Site) -> None:
    async def handler(body: bytes) -> tuple[int, bytes]:
        claim = current_claim()
        assert claim is not None
        return 200, claim.step_run.id.encode()

    site.handler = handler
    assert site.request().body.decode() == site.step_run().id


class Stream:
    """An application that streams until the client is gone; counts its runs and what it has sent."""

    def __init__(self, *headers: tuple[bytes, bytes], status: int = 200, parts: int = 3) -> None:
        self.headers = list(headers)
        self.status = status
        self.parts = parts
        self.runs = 0
        self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        await body_of(receive)
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        for _ in range(self.parts):
            await send({"type": "http.response.body", "body": b"part.", "more_body": True})
            self.sent += 1
        await send({"type": "http.response.body"})


def both_replies(site: Site, app: Any, **options: Any) -> tuple[Any, Any]:
    client = Client(site.behind_middleware(app, **options))
    return site.run(client.request()), site.run(client.request())


LENGTH = (b"content-length", b"15")
UNSTORABLE = {
    "stream": lambda: Stream((b"content-type", b"text/event-stream")),
    "large": lambda: Stream(LENGTH),
}


@pytest.mark.parametrize("kind", UNSTORABLE)
def test_an_unstorable_response_is_refused(site: Site, kind: str) -> None:
    app = UNSTORABLE[kind]()
    first, again = both_replies(site, app, max_response_bytes=12)
    assert (first.status, first.title) == REFUSED
    assert (again.status, again.title) == PERMANENT
    assert (app.runs, app.sent) == (1, 1 if kind == "stream" else 3)
    found = site.step_run()
    assert found.last_error is not None
    assert (found.status, found.final, found.last_error["type"]) == ("failed", True, "UnstorableResponse")


@pytest.mark.parametrize("kind", UNSTORABLE)
def test_an_unstorable_response_is_passed_to_the_first_client(site: Site, kind: str) -> None:
    app = UNSTORABLE[kind]()
    first, again = both_replies(site, app, max_response_bytes=12, unstorable="pass")
    assert (first.status, first.body, app.runs) == (200, b"part.part.part.", 1)
    assert (again.status, again.title) == PERMANENT


def test_a_passed_stream_reaches_the_client_part_by_part(site: Site) -> None:
    async def main() -> None:
        received, go_on, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await body_of(receive)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            received.set()
            await go_on.wait()
            assert (await receive())["type"] == "http.disconnect"  # a stream sees it
            await send({"type": "http.response.body"})

        client = Client(site.behind_middleware(app, unstorable="pass"))
        first = asyncio.create_task(client.request(disconnect=gone))
        await received.wait()
        assert [message.get("body") for message in client.messages] == [None, b"first"]
        go_on.set()
        gone.set()
        await first

    site.run(main())


def test_a_stream_whose_status_is_not_stored_is_passed(site: Site) -> None:
    app = Stream(status=500)
    replies = both_replies(site, app)
    assert [(reply.status, reply.body) for reply in replies] == [(500, b"part.part.part.")] * 2
    assert app.runs == 2


def test_a_refused_stream_sees_that_its_client_is_gone(site: Site) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await body_of(receive)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
        seen.append((await receive())["type"])

    first, _ = both_replies(site, app)
    assert (first.status, seen) == (500, ["http.disconnect"])


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_streaming_application_does_not_end_the_refusal(site: Site, is_lost: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if is_lost:
            claim = current_claim()
            assert claim is not None
            lost = claim.step_run
            await site.store.expire_claim(lost)
            begun(await site.store.begin_step(lost.run_id, lost.step, {}))

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"part."

        await body_of(receive)
        # Starlette ends the task that sends as soon as another one sees a disconnect.
        await StreamingResponse(parts())(scope, receive, send)

    behind = site.behind_middleware(app)

    async def outside(scope: Any, receive: Any, send: Any) -> None:
        async def send_slowly(message: Any) -> None:
            await asyncio.sleep(0.01)  # as other middleware, which passes messages on through a queue
            await send(message)

        await behind(scope, receive, send_slowly)

    reply = site.run(Client(outside).request())

    assert reply is not None
    assert (reply.status, reply.title) == (OUTSTANDING if is_lost else REFUSED)


class TextCodec(MsgpackCodec):
    """Stores no bytes, as JSON would not."""

    def encode(self, payload: dict[str, Any]) -> bytes:
        if "body" in payload:
            raise TypeError("no bytes, please")
        return super().encode(payload)


@pytest.mark.parametrize(
    "settings", [{"codec": TextCodec()}, {"max_payload_bytes": 500}], ids=lambda given: next(iter(given))
)
def test_a_response_that_the_store_rejects_is_refused(bench: Bench, settings: dict[str, Any]) -> None:
    site = Site(bench, bench.store(**settings))
    answering(site, 200, b"x" * 600)
    first, again = site.request(), site.request()
    assert (first.status, first.title) == REFUSED
    assert (again.status, again.title) == PERMANENT
    assert len(site.effects) == 1


@pytest.mark.parametrize("unstorable", ["refuse", "pass"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_large_request_is_refused_or_passed(bench: Bench, unstorable: Any, declared: bool) -> None:
    site = Site(bench, max_request_bytes=5, unstorable=unstorable)
    chunks = [b"abc", b"de", b"f"]
    length = [(b"content-length", b"6")] if declared else []
    replies = [site.request(chunks, headers=length) for _ in range(2)]
    if unstorable == "pass":
        assert [reply.status for reply in replies] == [201, 201]
        assert site.effects == [b"abcdef"] * 2
    else:
        assert [(reply.status, reply.title) for reply in replies] == [(413, "The request is too large")] * 2
        assert site.effects == []
    assert list(site.driven.runs().runs) == []
    assert site.request([b"abc", b"de"]).status == 201


def test_extensions_that_send_more_than_bodies_are_hidden(site: Site) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["extensions"])
        await respond(send, 200, b"", [])

    client = Client(site.behind_middleware(app))
    given = {"http.response.pathsend": {}, "http.response.trailers": {}, "tls": {"version": 1}}
    site.run(client.request(extensions=given))
    site.run(client.request(extensions=given, key="plain", method="PUT"))
    assert seen == [{"tls": {"version": 1}}, given]


def test_what_the_application_sends_may_be_of_any_iterable_type(site: Site) -> None:
    """ASGI allows iterators as headers, and frameworks pass a member of HTTPStatus on."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [[bytearray(b"content-length"), b"4"], [b"x-charge", b"7"]]
        message: dict[str, Any] = {"status": HTTPStatus.CREATED, "headers": map(iter, headers)}
        await send({"type": "http.response.start", **message})
        await send({"type": "http.response.body", "body": memoryview(b"pa"), "more_body": True})
        await send({"type": "http.response.body", "body": bytearray(b"id")})

    client = Client(site.behind_middleware(app))
    replies = [site.run(client.request()) for _ in range(2)]
    assert [(reply.status, reply.headers["x-charge"], reply.body) for reply in replies] == [(201, "7", b"paid")] * 2
    assert [reply.is_replay for reply in replies] == [False, True]


def test_a_reused_message_is_stored_as_it_was_sent(site: Site) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message: dict[str, Any] = {"type": "http.response.start", "status": 201, "headers": [JSON]}
        await send(message)
        message["headers"].clear()
        message.clear()
        message.update(type="http.response.body", body=b"{}")
        await send(message)

    client = Client(site.behind_middleware(app))
    for _ in range(2):
        reply = site.run(client.request())
        assert (reply.status, reply.headers["content-type"], reply.body) == (201, "application/json", b"{}")


def test_statuses_of_the_standard_library_can_be_chosen(bench: Bench) -> None:
    site = Site(bench, retry_statuses={HTTPStatus.PAYMENT_REQUIRED})
    answering(site, 402)
    assert [site.request().is_replay for _ in range(2)] == [False, False]
