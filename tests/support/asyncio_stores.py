"""Asyncio stores for tests that need event loops, clients and servers of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis.asyncio

from squidstep_redis import AsyncStepRunStore, StepRunStore, StepStatus
from squidstep_redis.embedded import EmbeddedServer
from support.servers import find_binary, wait_until

KINDS = ("own client", "user's pool")
either_kind = pytest.mark.parametrize("kind", KINDS)


@contextlib.contextmanager
def embedded(name: str) -> Iterator[tuple[EmbeddedServer, StepRunStore]]:
    """Starts a server that a test may pause, and a store that observes it."""
    with EmbeddedServer(binary=find_binary(name), port=0) as server, StepRunStore.from_url(server.url) as observer:
        yield server, observer


def make_store(url: str, kind: str, **settings: Any) -> AsyncStepRunStore:
    """Makes a store on a client of its own, or on a user's client with a pool of 8 connections and no timeout."""
    if kind == "own client":
        return AsyncStepRunStore.from_url(url, **settings)
    return AsyncStepRunStore(redis.asyncio.Redis.from_url(url, max_connections=8, socket_timeout=None), **settings)


@contextlib.asynccontextmanager
async def opened(url: str, kind: str, **settings: Any) -> AsyncIterator[AsyncStepRunStore]:
    """Provides such a store, and closes it and its client."""
    store = make_store(url, kind, **settings)
    try:
        async with store:
            yield store
    finally:
        await store.client.aclose()


async def forever(input: dict[str, Any]) -> dict[str, Any]:
    """Work that ends only when it is cancelled."""
    await asyncio.Event().wait()
    return {}


def wait_for_status(observer: StepRunStore, step: str, *expected: StepStatus) -> None:
    """Waits until the step has one of these statuses."""

    def has_it() -> bool:
        step_run = observer.get_step_run("run", step)
        return step_run is not None and step_run.status in expected

    wait_until(has_it, timeout=20)
