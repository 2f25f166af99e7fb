"""An application for a uvicorn process that a test kills: its handler never returns."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import redis.asyncio

from squidstep_redis import AsyncStepRunStore
from squidstep_redis.asgi import IdempotencyMiddleware


async def hang(scope: Any, receive: Any, send: Any) -> None:
    """Reports that it executes, and waits to be killed."""
    async with redis.asyncio.Redis.from_url(os.environ["SQUIDSTEP_REDIS_URL"]) as client:
        await client.rpush("entered", scope["path"])
    await asyncio.Event().wait()


store = AsyncStepRunStore.from_url(os.environ["SQUIDSTEP_REDIS_URL"], prefix=os.environ["SQUIDSTEP_PREFIX"])
app = IdempotencyMiddleware(hang, store, tenant=None, lease=float(os.environ["LEASE"]))
