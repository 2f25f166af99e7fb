"""The middleware: which request executes, and what all other requests receive."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any, Final, Literal, cast

from squidstep_redis import (
    AsyncClaim,
    AsyncStepRunStore,
    InputMismatchError,
    InvalidArgumentError,
    RunCancelledError,
    RunDeletedError,
    ServerError,
    StepBusyError,
    StepDelayedError,
    StepFailedError,
)
from squidstep_redis.asgi.claimed_request import ClaimedRequest, ResponseRules, outstanding
from squidstep_redis.asgi.messages import (
    ASGIApp,
    Receive,
    RequestReader,
    Response,
    Scope,
    Send,
    fingerprint_of,
    parse_key,
    problem,
    run_id_of,
    values_of,
)
from squidstep_redis.functions.checks import is_coroutine_function

RETRY_STATUSES: Final[frozenset[int]] = frozenset({401, 403, 408, 409, 423, 425, 429, *range(500, 600)})
"""Statuses after which a retry executes again: server errors, and refusals that may not apply to a later request."""

UNSTORED_HEADERS: Final[frozenset[str]] = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te"),
        *("trailer", "transfer-encoding", "upgrade", "date", "set-cookie"),
    }
)
"""Headers that belong to one connection or one moment, and cookies, which are secrets."""

_STEP: Final = "request"
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_logger: Final = logging.getLogger("squidstep_redis.asgi")


class IdempotencyMiddleware:
    """Executes the requests with the same idempotency key once, and gives all of them the same response.

    | request | response |
    |---|---|
    | the first with its key | the application's response, once it is stored |
    | the same again, after that | the stored response, with the header `Idempotent-Replayed: true` |
    | the same again, meanwhile | 409, with `Retry-After` |
    | a different method, path, query or body with the same key | 422 |
    | without a key | 400 if one is required; otherwise the application's, without protection |
    | with an invalid key, or several | 400 |
    | the same again, after a failure (a status of `retry_statuses`, an exception, a dead server) | executes again |
    | any, while the store is unreachable | 503, with `Retry-After` |

    Its own responses are of the type `application/problem+json`. Each key is a run with one step, `request`:
    `idempotency:<tenant, percent-encoded>:<key>`, or `idempotency#<SHA-256 of that>` beyond 512 bytes. Two round trips
    if it executes, one if not. Meanwhile the store's heartbeat extends the lease.

    While the application executes, `squidstep_redis.current_claim()` is its claim, whose `step_run.id` is an
    idempotency key for other services.
    """

    def __init__(
        self,
        app: ASGIApp,
        store: AsyncStepRunStore,
        *,
        tenant: Callable[[Scope], str] | None,
        header: str = "Idempotency-Key",
        methods: Iterable[str] = ("POST", "PATCH"),
        required: bool | Callable[[Scope], bool] = False,
        lease: float | timedelta = 30.0,
        retry_statuses: Collection[int] = RETRY_STATUSES,
        unstored_headers: Collection[str] = UNSTORED_HEADERS,
        max_request_bytes: int = 1024 * 1024,
        max_response_bytes: int = 1024 * 1024,
        unstorable: Literal["refuse", "pass"] = "refuse",
        unreachable: Literal["refuse", "pass"] = "refuse",
        docs_url: str | None = None,
    ) -> None:
        """Wraps an application. Nothing is sent.

        Args:
            app: the application.
            store: stores requests and responses. Its `run_ttl` is how long a key is remembered; without one, keys are
                kept until they are purged. Close it yourself, in the application's lifespan.
            tenant: returns the owner of a request's keys, given its ASGI scope: clients with different owners cannot
                see each other's responses. None: there is only one client, which is trusted.
            header: name of the header with the key, such as `webhook-id`.
            methods: the HTTP methods to protect.
            required: whether a request must have a key: a bool, or a function of its ASGI scope.
            lease: seconds, or a timedelta, after which a retry takes over from a process that is dead or hangs. It is
                also the longest `Retry-After`.
            retry_statuses: statuses after which a retry executes again. A response with any other status is stored.
            unstored_headers: names of response headers that only the first client receives.
            max_request_bytes: the largest request body that is read into memory, in bytes.
            max_response_bytes: the largest response body that is stored, in bytes. It must fit in the store's
                `max_payload_bytes`.
            unstorable: what to do with a body over a limit, and with a streaming response, which starts without a
                Content-Length. "refuse": a request receives 413 and is not executed; instead of a response, the client
                receives 500. "pass": a request is executed without protection; a response reaches the first client.
                In both cases, a retry of a request whose response is not stored receives 500 and is not executed.
            unreachable: what to do while the store is unreachable. "refuse": 503. "pass": the request is executed
                without protection, perhaps not for the first time.
            docs_url: URL of your documentation of keys, for clients: `type` and `Link` of the error responses.

        Raises:
            InvalidArgumentError: an argument was rejected.
        """
        self.app = app
        self.store = store
        self._tenant = tenant
        self._header = _names("header", [header])[0].lower().encode()
        self._methods = frozenset(_names("methods", methods))
        self._required = required
        self._lease = lease
        self._max_request_bytes = max_request_bytes
        self._passes_large = unstorable == "pass"
        self._passes_unreachable = unreachable == "pass"
        self._docs_url = docs_url
        _check("store", isinstance(cast("object", store), AsyncStepRunStore), "must be an AsyncStepRunStore")
        _check("tenant", tenant is None or _is_function(tenant), "must be a plain function of the scope, or None")
        _check("required", isinstance(required, bool) or _is_function(required), "must be a bool or a plain function")
        lower = sorted(method for method in self._methods if method != method.upper())
        _check("methods", not lower, f"must be in upper case, as servers name them, not {', '.join(lower)}")
        _check("lease", cast("object", lease) is not None, "must not be None: a dead server would hold the key forever")
        store.claim_step("run", _STEP, {}, lease=lease)  # checks the lease; sends nothing
        for name, limit in (("max_request_bytes", max_request_bytes), ("max_response_bytes", max_response_bytes)):
            _check(name, type(limit) is int and limit >= 0, "must be an int from 0")
        for name, choice in (("unstorable", unstorable), ("unreachable", unreachable)):
            _check(name, choice in ("refuse", "pass"), "must be 'refuse' or 'pass'")
        statuses = retry_statuses if isinstance(cast("object", retry_statuses), Collection) else [None]
        are_ints = all(isinstance(each, int) and not isinstance(each, bool) for each in statuses)  # also HTTPStatus
        _check("retry_statuses", are_ints, "must be a collection of ints")
        url = cast("object", docs_url)
        _check("docs_url", url is None or (isinstance(url, str) and url.isascii()), "must be an ASCII str, or None")
        self._rules = ResponseRules(
            frozenset(retry_statuses),
            frozenset(name.lower().encode() for name in _names("unstored_headers", unstored_headers)),
            max_response_bytes,
            unstorable,
            docs_url,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request; passes on everything else."""
        if scope["type"] != "http" or scope["method"] not in self._methods:
            await self.app(scope, receive, send)
            return
        headers: Any = scope["headers"]
        if not isinstance(headers, list):  # ASGI allows iterables that can be read only once
            scope = {**scope, "headers": list(headers)}
        try:
            key = parse_key(list(values_of(scope["headers"], self._header)))
        except ValueError as error:
            await self._problem(400, "The idempotency key is invalid", str(error)).send(send)
            return
        if key is not None:
            await self._handle(key, scope, RequestReader(scope, receive), send)
        elif self._required(scope) if callable(self._required) else self._required:
            detail = f"This operation requires a unique key in the header {self._header.decode()}."
            await self._problem(400, "The idempotency key is missing", detail).send(send)
        else:
            await self.app(scope, receive, send)

    async def _handle(self, key: str, scope: Scope, request: RequestReader, send: Send) -> None:
        response: Response | Literal["sent"] | None
        size = await request.read(self._max_request_bytes)
        if size == "disconnected":
            return
        if size == "too large":
            detail = (
                f"With an idempotency key, a request has at most {self._max_request_bytes} bytes. Nothing was done."
            )
            response = None if self._passes_large else self._problem(413, "The request is too large", detail)
        else:
            response = await self._respond(key, scope, request, send)
        if response is None:
            await self.app(scope, request.receive, send)  # without protection
        elif response != "sent":
            await response.send(send)

    async def _respond(
        self, key: str, scope: Scope, request: RequestReader, send: Send
    ) -> Response | Literal["sent"] | None:
        """Executes a request if it has the claim on its key; returns the response to send, or None to pass it on."""
        claim = self.store.claim_step(
            run_id_of(self._tenant_of(scope), key),
            _STEP,
            {"method": scope["method"], "path": scope["path"]},
            lease=self._lease,
            fingerprint=fingerprint_of(scope, request.body),
        )
        claimed: ClaimedRequest | None = None
        try:
            async with AsyncExitStack() as stack:
                if refusal := await self._enter(stack, claim):
                    return refusal
                if claim.output is not None:
                    return Response.replay_of(claim.output)
                claimed = ClaimedRequest(claim, request, send, self._rules)
                await self._execute(claimed, scope)
        except ServerError as error:
            if claimed is not None and error is not claimed.unrecorded:
                raise
            if claimed is None:
                _logger.warning("an idempotency key cannot be claimed: %s", error)
                detail = "Nothing was executed. Retry later with the same key."
                unavailable = self._problem(503, "Idempotency keys are unavailable", detail, retry_in=1.0)
                return None if self._passes_unreachable else unavailable
        return "sent"

    async def _enter(self, stack: AsyncExitStack, claim: AsyncClaim) -> Response | None:
        """Enters the block of a claim; returns the response if another request has the key."""
        try:
            await stack.enter_async_context(claim)
        except InputMismatchError:
            detail = "A key belongs to one request: one method, path, query and body. Other requests need their own."
            return self._problem(422, "The idempotency key was used for another request", detail)
        except StepBusyError as error:
            return outstanding(error.retry_in, self._docs_url)
        except StepDelayedError as error:
            detail = "The request failed, and may be retried later with the same key."
            return self._problem(503, "The request failed", detail, retry_in=error.retry_in)
        except (StepFailedError, RunCancelledError, RunDeletedError):
            detail = "The request may have been executed, but it has no stored response. It is not executed again."
            return self._problem(500, "The request failed permanently", detail)
        return None

    async def _execute(self, claimed: ClaimedRequest, scope: Scope) -> None:
        extensions: dict[str, Any] = scope.get("extensions") or {}
        whole_bodies = {name: value for name, value in extensions.items() if not name.startswith("http.response.")}
        if len(whole_bodies) < len(extensions):  # otherwise they could send responses that cannot be stored
            scope = {**scope, "extensions": whole_bodies}
        try:
            await self.app(scope, claimed.receive, claimed.send)
        except Exception:
            if not claimed.is_refused:
                raise
            _logger.debug("the application could not send its response, which was refused", exc_info=True)
        await claimed.finish()

    def _tenant_of(self, scope: Scope) -> str:
        tenant = self._tenant(scope) if self._tenant else ""
        _check("tenant", isinstance(cast("object", tenant), str), "must return a str")
        return tenant

    def _problem(self, status: int, title: str, detail: str, retry_in: float | None = None) -> Response:
        return problem(status, title, detail, self._docs_url, retry_in)


def _check(argument: str, holds: bool, problem: str) -> None:
    if not holds:
        raise InvalidArgumentError(argument, problem)


def _is_function(function: object) -> bool:
    """Returns whether a call of it returns its result. What a coroutine function returns would always be true."""
    return callable(function) and not is_coroutine_function(function)


def _names(argument: str, values: Iterable[str]) -> tuple[str, ...]:
    _check(argument, not isinstance(values, str), "must be a collection of names, not one str")
    names = tuple(values)
    for name in names:
        is_token = isinstance(cast("object", name), str) and _TOKEN.fullmatch(name) is not None
        _check(argument, is_token, "must be a name, or a collection of names, as HTTP allows them")
    return names
