"""Stores on each kind of client, through a proxy or at an address that moves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, cast

import pytest
import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from support.backends import Bench, Driven
from support.operations import finish
from support.proxy import Proxy

from squidstep_redis import AsyncStepRunStore, StepRunStore
from squidstep_redis.protocol.scripts import directory, script
from squidstep_redis.transport.pool import ask


class HookedRedis(redis.Redis):
    """A client with a hook, as instrumentation has."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return super().execute_command(*args, **options)


class HookedAsyncRedis(redis.asyncio.Redis):
    async def execute_command(self, *args: Any, **options: Any) -> Any:
        return await super().execute_command(*args, **options)


CLIENTS = ["own", "plain", "RESP3", "blocking pool", "hooked", "hooked, with retries"]
"""Kinds of clients: the one of `from_url`, and those of a user."""


@pytest.fixture(params=CLIENTS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


Connect = Callable[..., StepRunStore]


@pytest.fixture
def connect_to(bench: Bench) -> Iterator[Callable[..., StepRunStore]]:
    """Makes stores on a port of this machine, given the kind of the client."""
    with contextlib.ExitStack() as opened:

        def connect(
            kind: str, port: int, db: int = 0, client: Any = MappingProxyType({}), **settings: Any
        ) -> StepRunStore:
            url = f"redis://127.0.0.1:{port}/{db}"
            if kind == "own":
                store = bench.from_url(url, **client, **settings)
                opened.callback(store.close)
                return store
            options: dict[str, Any] = {"socket_timeout": 1.0, "socket_connect_timeout": 0.5, "protocol": 2, **client}
            if kind == "RESP3":
                options["protocol"] = 3
            is_asyncio = bench.runner is not None
            if kind == "hooked, with retries":
                options["retry"] = (AsyncRetry if is_asyncio else Retry)(NoBackoff(), 3)
                options["retry_on_error"] = [redis.exceptions.ConnectionError]
            made = finish(bench, _client(kind, url, options)) if is_asyncio else _blocking_client(kind, url, options)
            opened.callback(lambda: finish(bench, made.connection_pool.disconnect()))
            settings = {"prefix": bench.prefix, **settings}
            if bench.runner is None:
                return StepRunStore(made, **settings)
            return cast("StepRunStore", Driven(AsyncStepRunStore(made, **settings), bench.runner))

        yield connect


def _blocking_client(kind: str, url: str, options: dict[str, Any]) -> Any:
    if kind.endswith("blocking pool"):
        pool = redis.BlockingConnectionPool.from_url(url, timeout=5, **options)
        return (HookedRedis if kind.startswith("hooked") else redis.Redis)(connection_pool=pool)
    return (HookedRedis if kind.startswith("hooked") else redis.Redis).from_url(url, **options)


async def _client(kind: str, url: str, options: dict[str, Any]) -> Any:
    if kind.endswith("blocking pool"):
        pool: Any = redis.asyncio.BlockingConnectionPool.from_url(url, timeout=5, **options)
        return (HookedAsyncRedis if kind.startswith("hooked") else redis.asyncio.Redis)(connection_pool=pool)
    return (HookedAsyncRedis if kind.startswith("hooked") else redis.asyncio.Redis).from_url(url, **options)


@pytest.fixture
def proxy(bench: Bench) -> Iterator[Proxy]:
    with Proxy.to(bench.backend.raw) as proxy:
        yield proxy


@pytest.fixture
def known(bench: Bench) -> None:
    """The server knows all scripts."""
    for path in directory().glob("*.lua"):
        bench.backend.raw.script_load(script(path.stem).source)


def pool_connection(client: Any) -> Any:
    """Borrows a connection of a client's pool, with any version of redis-py; on asyncio, returns a coroutine."""
    return ask(client.connection_pool)
