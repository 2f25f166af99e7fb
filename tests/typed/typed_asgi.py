"""Type tests of squidstep_redis.asgi. Pyright checks this file; it is never run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from squidstep_redis import AsyncStepRunStore, StepRunStore
from squidstep_redis.asgi import RETRY_STATUSES, UNSTORED_HEADERS, IdempotencyMiddleware


def account(scope: Scope) -> str:
    return scope["user"].username


async def application(scope: Scope, receive: Receive, send: Send) -> None: ...


def it_is_an_application(store: AsyncStepRunStore) -> None:
    wrapped: ASGIApp = IdempotencyMiddleware(application, store, tenant=account)
    IdempotencyMiddleware(wrapped, store, tenant=None, required=True, lease=timedelta(seconds=5))


def frameworks_take_it(app: FastAPI, store: AsyncStepRunStore) -> None:
    app.add_middleware(IdempotencyMiddleware, store=store, tenant=account, required=lambda scope: "id" in scope)
    Starlette(middleware=[Middleware(IdempotencyMiddleware, store=store, tenant=None, header="webhook-id")])
    app.add_middleware(
        IdempotencyMiddleware,
        store=store,
        tenant=None,
        methods={"PUT"},
        retry_statuses=RETRY_STATUSES - {500},
        unstored_headers=UNSTORED_HEADERS - {"set-cookie"},
        max_request_bytes=1_000,
        max_response_bytes=1_000,
        unstorable="pass",
        unreachable="pass",
        docs_url="https://example.com/keys",
    )


def what_is_wrong_is_seen(app: FastAPI, store: AsyncStepRunStore, blocking: StepRunStore, any: Any) -> None:
    IdempotencyMiddleware(any, store)  # pyright: ignore[reportCallIssue]: no tenant
    IdempotencyMiddleware(any, blocking, tenant=None)  # pyright: ignore[reportArgumentType]: a blocking store
    IdempotencyMiddleware(any, store, tenant=7)  # pyright: ignore[reportArgumentType]: no function
    IdempotencyMiddleware(any, store, tenant=None, lease=None)  # pyright: ignore[reportArgumentType]: never expires
    IdempotencyMiddleware(any, store, tenant=None, unstorable="store")  # pyright: ignore[reportArgumentType]: no choice
    app.add_middleware(IdempotencyMiddleware, store=blocking, tenant=None)  # pyright: ignore[reportArgumentType]
