"""On asyncio, a CancelledError that did not cancel the operation is a failure to connect."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis.asyncio
from redis.credentials import CredentialProvider
from support.asyncio_stores import embedded

from squidstep_redis import AsyncStepRunStore, NotSentError
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.servers("valkey")

LARGE = {"data": "x" * 100_000}


class Token(CredentialProvider):
    """Awaits a task that requests the credentials for all connections."""

    def __init__(self) -> None:
        self.request = asyncio.ensure_future(asyncio.sleep(3_600))
        self.was_asked = asyncio.Event()

    def get_credentials(self) -> tuple[str]:
        raise NotImplementedError

    async def get_credentials_async(self) -> Any:
        self.was_asked.set()
        return await asyncio.shield(self.request)


@pytest.fixture
def server(binary: Path) -> Iterator[EmbeddedServer]:
    with embedded("valkey") as (server, _):
        yield server


@pytest.fixture(params=["shared", "alone", "pool", "blocking pool"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def begin(server: EmbeddedServer, kind: str, provider: Token, timeout: float) -> Any:
    options: Any = {"credential_provider": provider, "socket_connect_timeout": 60, "socket_timeout": 60}
    if kind == "blocking pool":
        pool = redis.asyncio.BlockingConnectionPool.from_url(server.url, **options)
        client = redis.asyncio.Redis(connection_pool=pool)
    else:
        client = redis.asyncio.Redis.from_url(server.url, **options)
    store = AsyncStepRunStore(client, timeout=timeout, own_connections="pool" not in kind)
    return store.begin_step("run", "step", LARGE if kind == "alone" else {})


def test_cancelled_task_of_a_provider_cancels_no_operation(server: EmbeddedServer, kind: str) -> None:
    async def main() -> None:
        provider = Token()
        operation = asyncio.ensure_future(begin(server, kind, provider, timeout=0.1))
        await provider.was_asked.wait()
        provider.request.cancel()
        await asyncio.wait([operation])
        assert not operation.cancelled()
        assert isinstance(operation.exception(), NotSentError)

    asyncio.run(main())


def test_cancelled_operation_is_cancelled_while_it_connects(server: EmbeddedServer, kind: str) -> None:
    async def main() -> None:
        provider = Token()
        operation = asyncio.ensure_future(begin(server, kind, provider, timeout=60))
        await provider.was_asked.wait()
        operation.cancel()
        await asyncio.wait([operation])
        assert operation.cancelled()

    asyncio.run(main())


def test_operation_that_is_cancelled_before_it_connects_is_cancelled(server: EmbeddedServer, kind: str) -> None:
    async def cancel_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await begin(server, kind, Token(), timeout=60)

    async def main() -> None:
        task = asyncio.ensure_future(cancel_itself())
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(main())


def test_scopes_end_an_operation_that_connects(server: EmbeddedServer, kind: str) -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await begin(server, kind, Token(), timeout=60)
        with anyio.move_on_after(0.05) as scope:
            await begin(server, kind, Token(), timeout=60)
        assert scope.cancelled_caught

    asyncio.run(main())
