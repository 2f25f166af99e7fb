"""Which request executes, and what all other requests receive: each row of the guide's table."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.asgi import JSON, Client, Gate, Site, body_of, respond
from support.backends import Bench

from squidstep_redis import InvalidArgumentError
from squidstep_redis.asgi.messages import Receive, Scope, Send


def test_the_first_request_executes_and_later_ones_are_replayed(site: Site) -> None:
    first = site.request(b'{"amount": 42}')
    assert (first.status, first.body, first.is_replay) == (201, b'{"effect": 1}', False)
    for _ in range(2):
        again = site.request([b'{"amount"', b": 42}"])
        assert again.is_replay
        assert (again.status, again.body) == (first.status, first.body)
        assert again.headers == {**first.headers, "idempotent-replayed": "true"}
    assert site.effects == [b'{"amount": 42}']
    assert site.request(b'{"amount": 42}', key="key-1").is_replay  # the same key without quotes
    assert site.request(b'{"amount": 42}', key="key-2").body == b'{"effect": 2}'


def test_a_concurrent_request_receives_409_until_the_first_is_stored(site: Site) -> None:
    async def main() -> None:
        gate = site.handler = Gate()
        first = asyncio.create_task(site.client.request())
        await gate.entered.wait()
        busy = await Client(site.middleware).request()
        other = await Client(site.middleware).request(b"other")
        assert busy is not None
        assert other is not None
        assert (busy.status, busy.title) == (409, "A request is outstanding for this idempotency key")
        assert 1 <= int(busy.headers["retry-after"]) <= 30
        assert other.status == 422
        gate.opened.set()
        done, again = await first, await Client(site.middleware).request()
        assert done is not None
        assert again is not None
        assert (done.body, again.body, again.is_replay) == (b"attempt 1", b"attempt 1", True)

    site.run(main())
    assert len(site.effects) == 1


@pytest.mark.parametrize(
    "other",
    [{"body": b"[]"}, {"path": "/refunds"}, {"path": "/charges?dry=1"}, {"method": "PATCH"}],
    ids=lambda other: next(iter(other)),
)
def test_another_request_under_a_used_key_receives_422(site: Site, other: dict[str, Any]) -> None:
    site.request()
    reply = site.request(**other)
    assert (reply.status, reply.title) == (422, "The idempotency key was used for another request")
    assert len(site.effects) == 1


@pytest.mark.parametrize(("path", "other"), [("/files/a%2Fb", "/files/a/b"), ("/files/%ff", "/files/%fe")])
def test_paths_that_differ_only_before_decoding_are_different(site: Site, path: str, other: str) -> None:
    site.request(path=path)
    assert site.request(path=other).status == 422
    assert site.request(path=path).is_replay


def test_a_key_is_required_where_the_site_says_so(bench: Bench) -> None:
    site = Site(bench, required=lambda scope: scope["path"] != "/search", docs_url="https://example.com/keys")
    missing = site.request(key=None)
    assert (missing.status, missing.title) == (400, "The idempotency key is missing")
    assert missing.headers["link"] == '<https://example.com/keys>; rel="describedby"'
    assert b'"type": "https://example.com/keys"' in missing.body
    assert [site.request(key=None, path="/search").status for _ in range(2)] == [201, 201]
    assert len(site.effects) == 2
    assert Site(bench, required=True).request(key=None).status == 400


@pytest.mark.parametrize("options", [{"key": "two words"}, {"headers": [(b"idempotency-key", b"second")]}])
def test_a_request_with_an_invalid_key_receives_400(site: Site, options: dict[str, Any]) -> None:
    reply = site.request(**options)
    assert (reply.status, reply.title) == (400, "The idempotency key is invalid")
    assert site.effects == []


def test_other_methods_and_requests_without_a_key_pass(site: Site) -> None:
    for options in ({"key": None}, {"method": "PUT"}, {"method": "GET"}):
        assert [site.request(**options).is_replay for _ in range(2)] == [False, False]
    assert len(site.effects) == 6
    assert list(site.driven.runs().runs) == []


def test_methods_and_header_can_be_chosen(bench: Bench) -> None:
    site = Site(bench, methods=["PUT"], header="Webhook-Id")
    for _ in range(2):
        site.request(key=None, method="PUT", headers=[(b"webhook-id", b"msg_1")])
    assert len(site.effects) == 1
    site.request(method="POST", headers=[(b"webhook-id", b"msg_1")])
    assert len(site.effects) == 2


def test_tenants_have_their_own_keys(bench: Bench) -> None:
    site = Site(bench, tenant=lambda scope: dict(scope["headers"])[b"x-account"].decode())
    replies = [site.request(headers=[(b"x-account", name)]) for name in (b"ann", b"ben", b"ann")]
    assert [reply.is_replay for reply in replies] == [False, False, True]
    assert site.step_run(tenant="ben").input["path"] == "/charges"


def test_a_tenant_must_be_a_str(bench: Bench) -> None:
    site = Site(bench, tenant=lambda scope: None)
    with pytest.raises(InvalidArgumentError, match="tenant: must return a str"):
        site.request()
    assert site.effects == []


def test_keys_are_forgotten_with_the_run_ttl_of_the_store(bench: Bench) -> None:
    site = Site(bench, bench.store(run_ttl=60))
    site.request()
    key = bench.keys("idempotency::key-1")[0]
    assert 0 < bench.backend.raw.pttl(key) <= 60_000
    bench.backend.raw.delete(*bench.keys("idempotency::key-1"))  # as when it has expired
    assert not site.request(b"another body").is_replay


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_other_scopes_are_passed_on_as_they_are(site: Site, kind: str) -> None:
    seen: list[Any] = []

    async def app(*args: Any) -> None:
        seen.extend(args)

    given = ({"type": kind}, object(), object())
    site.run(site.behind_middleware(app)(*given))
    assert all(found is passed for found, passed in zip(seen, given, strict=True))


def test_headers_of_a_request_may_be_an_iterator(site: Site) -> None:
    """ASGI allows any iterable, and the application reads them, too."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(list(scope["headers"]))
        await respond(send, 200, await body_of(receive), [JSON])

    middleware = site.behind_middleware(app, max_request_bytes=10)

    async def with_iterator(scope: Scope, receive: Receive, send: Send) -> None:
        await middleware({**scope, "headers": iter(scope["headers"])}, receive, send)

    client = Client(with_iterator)
    for is_replay in (False, True):
        reply = site.run(client.request(headers=[(b"x-user", b"ann")]))
        assert (reply.status, reply.is_replay) == (200, is_replay)
    assert seen == [[(b"Idempotency-Key", b'"key-1"'), (b"x-user", b"ann")]]
    assert site.run(client.request(headers=[(b"content-length", b"11")])).status == 413


async def _asyncio(scope: object) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"tenant": "ann"}, "tenant"),
        ({"tenant": _asyncio}, "tenant"),
        ({"header": "no header"}, "header"),
        ({"header": b"bytes"}, "header"),
        ({"methods": "POST"}, "methods"),
        ({"methods": [1]}, "methods"),
        ({"methods": ["POST", "patch"]}, "methods"),
        ({"required": "yes"}, "required"),
        ({"required": _asyncio}, "required"),
        ({"lease": None}, "lease"),
        ({"lease": 0}, "lease"),
        ({"unstored_headers": "date"}, "unstored_headers"),
        ({"max_request_bytes": -1}, "max_request_bytes"),
        ({"max_response_bytes": 1.5}, "max_response_bytes"),
        ({"unstorable": "store"}, "unstorable"),
        ({"unreachable": None}, "unreachable"),
        ({"retry_statuses": 500}, "retry_statuses"),
        ({"retry_statuses": ["5xx"]}, "retry_statuses"),
        ({"retry_statuses": [True]}, "retry_statuses"),
        ({"docs_url": 7}, "docs_url"),
        ({"docs_url": "https://example.com/schlüssel"}, "docs_url"),
    ],
)
def test_bad_options_are_refused_when_the_middleware_is_made(
    site: Site, options: dict[str, Any], argument: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        site.behind_middleware(site.app, **options)
    assert caught.value.argument == argument


def test_a_blocking_store_is_refused(site: Site, bench: Bench) -> None:
    with pytest.raises(InvalidArgumentError, match="AsyncStepRunStore"):
        site.middleware.__class__(site.app, bench.store(), tenant=None)
