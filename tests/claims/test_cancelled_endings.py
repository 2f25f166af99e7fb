"""Tasks that are cancelled while they end their claim: the work is done, so its result is stored, and not a failure."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import anyio
import pytest
from support.asyncio_stores import either_kind, opened, wait_for_status
from support.proxy import Proxy
from support.records import stored

from squidstep_redis import AsyncStepRunStore, StepRunStore, StepStatus
from squidstep_redis.asgi import IdempotencyMiddleware
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.servers("valkey")

MARK = b"the result of the work"


@pytest.fixture
def proxy(observer: StepRunStore) -> Iterator[Proxy]:
    with Proxy.to(observer.client) as proxy:
        yield proxy


@contextlib.contextmanager
def lost_requests(proxy: Proxy) -> Generator[None]:
    """The connection is closed, twice, before the server has received the completion."""
    proxy.cut(2, script="complete_step")
    yield


@contextlib.contextmanager
def late_request(proxy: Proxy) -> Generator[None]:
    """The server receives the first completion after everything that is sent on other connections."""
    released = proxy.hold_requests(script="complete_step")
    timer = threading.Timer(0.8, released.set)
    timer.start()
    yield
    timer.join()


faults = pytest.mark.parametrize("fault", [lost_requests, late_request])
Fault = Callable[[Proxy], contextlib.AbstractContextManager[None]]


async def sends_completion(proxy: Proxy) -> None:
    while not any(MARK in b" ".join(command) for command in proxy.commands):
        await asyncio.sleep(0)


async def charge(input: dict[str, Any]) -> dict[str, Any]:
    return {"mark": MARK}


async def cancel_once(proxy: Proxy, work: Callable[[], Any]) -> None:
    task = asyncio.ensure_future(work())
    await sends_completion(proxy)
    task.cancel()
    await asyncio.wait([task])


async def cancel_with_a_scope(proxy: Proxy, work: Callable[[], Any]) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(work)
        await sends_completion(proxy)
        group.cancel_scope.cancel()


ways = pytest.mark.parametrize("cancel", [cancel_once, cancel_with_a_scope])


@ways
@faults
@either_kind
def test_result_of_finished_work_is_stored(
    server: EmbeddedServer, observer: StepRunStore, proxy: Proxy, kind: str, fault: Fault, cancel: Any
) -> None:
    async def main() -> None:
        async with opened(f"redis://127.0.0.1:{proxy.port}", kind) as store:
            await cancel(proxy, lambda: store.run_step("run", "pay", charge, {}))

    with fault(proxy):
        asyncio.run(main())
        wait_for_status(observer, "pay", StepStatus.COMPLETED, StepStatus.FAILED)

    assert stored(observer).status is StepStatus.COMPLETED


@ways
@faults
def test_response_of_a_cancelled_request_is_stored(
    server: EmbeddedServer, observer: StepRunStore, proxy: Proxy, fault: Fault, cancel: Any
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": MARK})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        """Receives nothing: the client is gone."""

    async def main() -> None:
        async with AsyncStepRunStore.from_url(f"redis://127.0.0.1:{proxy.port}") as store:
            middleware = IdempotencyMiddleware(app, store=store, tenant=None)
            headers = [(b"idempotency-key", b"key")]
            scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
            await cancel(proxy, lambda: middleware(scope, receive, send))

    with fault(proxy):
        asyncio.run(main())

    (run,) = observer.runs().runs
    assert observer.step_statuses(run.run_id) == {"request": StepStatus.COMPLETED}
