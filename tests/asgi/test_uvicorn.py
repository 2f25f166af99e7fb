"""Real servers and clients: uvicorn, Starlette, connections."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Route
from support.asgi import Gate, Site
from support.backends import Bench
from support.http import Server, encoded, post, serving

from squidstep_redis import AsyncStepRunStore
from squidstep_redis.asgi import IdempotencyMiddleware

KEYS = 50
TESTS = Path(__file__).parents[1]


def key_of(number: int) -> str:
    return f"key-{number % KEYS}"


@pytest.mark.servers("valkey", "redis-7", "redis-6", "cluster")
class TestManyRequests:
    """Up to 1,000 concurrent requests over 50 keys, on two servers."""

    @pytest.fixture
    def sites(self, bench: Bench) -> list[Site]:
        own = bench.backend.name != "cluster"  # as with from_url: one connection for all tasks
        return [Site(bench, bench.store(own_connections=own)) for _ in range(2)]

    def check(self, sites: list[Site], replies: list[Any]) -> None:
        """One effect per key; each client has the response of that effect."""
        effects = Counter(body for site in sites for body in site.effects)
        assert effects == {key_of(number).encode(): 1 for number in range(KEYS)}
        assert all(reply.status == 201 for reply in replies)
        for number, reply in enumerate(replies):
            assert reply.body == b"done " + key_of(number).encode()
        assert sum(not reply.is_replay for reply in replies) == KEYS

    @pytest.mark.parametrize(
        ("waits", "requests"),
        [
            pytest.param(True, 1_000, id="until all others conflict", marks=pytest.mark.not_on("cluster")),
            pytest.param(False, 300, id="not"),
        ],
    )
    def test_each_key_has_one_effect(self, sites: list[Site], waits: bool, requests: int) -> None:
        async def main() -> None:
            conflicts = 0
            opened = asyncio.Event()
            responded = {key_of(number): asyncio.Event() for number in range(KEYS)}

            async def handler(body: bytes) -> tuple[int, bytes]:
                await (opened.wait() if waits else asyncio.sleep(0))
                return 201, b"done " + body

            async def client(server: Server, number: int) -> Any:
                nonlocal conflicts
                key = key_of(number)
                reply = await post(server.port, key.encode(), key=key)
                if reply.status == 409:
                    assert 1 <= int(reply.headers["retry-after"]) <= 30
                    conflicts += 1
                    if conflicts == requests - KEYS:
                        opened.set()
                    await responded[key].wait()
                    reply = await post(server.port, key.encode(), key=key)
                responded[key].set()
                return reply

            for site in sites:
                site.handler = handler
            async with serving(sites[0].middleware) as one, serving(sites[1].middleware) as other:
                servers = (one, other)
                replies = await asyncio.gather(*(client(servers[n // KEYS % 2], n) for n in range(requests)))
            self.check(sites, replies)
            assert conflicts == requests - KEYS or not waits

        sites[0].run(main())


@pytest.mark.all_buckets
@pytest.mark.servers("valkey")
def test_a_killed_server_is_taken_over_after_its_lease(bench: Bench) -> None:
    assert bench.backend.url is not None
    environment = {
        **os.environ,
        "SQUIDSTEP_REDIS_URL": bench.backend.url,
        "SQUIDSTEP_PREFIX": bench.prefix,
        "LEASE": "1.5",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        fd = str(listening.fileno())
        command = [sys.executable, "-m", "uvicorn", "support.asgi_hanging:app", "--fd", fd]
        process = subprocess.Popen(command, env=environment, pass_fds=[listening.fileno()], stderr=subprocess.DEVNULL)
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(encoded(b"{}", "key-1", "/charges"))
            assert bench.backend.raw.blpop("entered", 60) == (b"entered", b"/charges")
            process.kill()
            assert connection.recv(1) == b""
    finally:
        process.kill()
        process.wait()
    site = Site(bench)
    gate = site.handler = Gate()
    gate.opened.set()
    assert site.request().status == 409
    bench.lapse(site.step_run())
    assert site.request().body == b"attempt 2"
    assert site.request().is_replay


@pytest.mark.slow
def test_a_retry_after_a_broken_connection_receives_the_response(site: Site) -> None:
    async def main() -> None:
        gate = site.handler = Gate()
        async with serving(site.middleware) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(encoded(b"{}", "key-1", "/charges"))
            await gate.entered.wait()
            writer.transport.abort()
            gate.opened.set()
            reply = await post(server.port)
            while reply.status == 409:
                reply = await post(server.port)
            assert (reply.body, reply.is_replay) == (b"attempt 1", True)

    site.run(main())
    assert len(site.effects) == 1


class TestStarlette:
    @pytest.fixture
    def runs(self) -> Counter[str]:
        return Counter()

    def app(self, store: AsyncStepRunStore, runs: Counter[str], tmp_path: Path, **options: Any) -> Starlette:
        (tmp_path / "file").write_bytes(b"of a file")
        finished = asyncio.Event()

        async def respond(request: Any) -> Any:
            kind = request.url.path[1:]
            runs[kind] += 1
            body = (await request.body()).decode()
            assert not await request.is_disconnected()
            if kind == "json":
                return JSONResponse({"echo": body}, 201)
            if kind == "file":
                return FileResponse(tmp_path / "file")
            if kind == "background":
                return JSONResponse("soon", background=BackgroundTask(finished.wait))
            if kind == "finish":
                finished.set()
                return JSONResponse("finished")
            if kind == "busy":
                raise HTTPException(429, headers={"Retry-After": "7"})
            if kind == "broken":
                raise RuntimeError("broken")
            assert kind == "stream"
            return StreamingResponse(self.parts())

        async def inner(request: Any, call_next: Any) -> Any:
            return await call_next(request)

        kinds = ("json", "file", "background", "finish", "busy", "broken", "stream")
        app = Starlette(routes=[Route(f"/{kind}", respond, methods=["POST"]) for kind in kinds])
        app.add_middleware(BaseHTTPMiddleware, dispatch=inner)
        app.add_middleware(IdempotencyMiddleware, store=store, tenant=None, **options)
        return app

    async def parts(self) -> Any:
        while True:  # until the client is gone
            yield b"part"
            await asyncio.sleep(0)

    @pytest.mark.slow
    def test_responses_of_each_kind_are_stored(self, site: Site, runs: Counter[str], tmp_path: Path) -> None:
        async def main() -> None:
            async with serving(self.app(site.store, runs, tmp_path)) as server:
                for kind in ("json", "file", "background"):
                    first = await post(server.port, b"hello", key=kind, path=f"/{kind}")
                    again = await post(server.port, b"hello", key=kind, path=f"/{kind}")
                    assert (first.is_replay, again.is_replay, runs[kind]) == (False, True, 1)
                    assert (again.status, again.body) == (first.status, first.body)
                    assert len(again.headers["date"]) == len(first.headers["date"])  # the server's own, not twice
                for _ in range(2):
                    busy = await post(server.port, key="busy", path="/busy")
                    assert (busy.status, busy.headers["retry-after"]) == (429, "7")
                    broken = await post(server.port, key="broken", path="/broken")
                    assert broken.status == 500
                await post(server.port, key="finish", path="/finish")
            assert (runs["busy"], runs["broken"]) == (2, 2)

        site.run(main())

    @pytest.mark.slow
    def test_an_endless_stream_is_refused_and_ends(self, site: Site, runs: Counter[str], tmp_path: Path) -> None:
        async def main() -> None:
            async with serving(self.app(site.store, runs, tmp_path)) as server:
                for title in ("The response cannot be stored", "The request failed permanently"):
                    reply = await post(server.port, path="/stream")
                    assert (reply.status, reply.title) == (500, title)

        site.run(main())
        assert runs["stream"] == 1

    @pytest.mark.slow
    def test_an_endless_stream_is_passed_until_the_client_leaves(
        self, site: Site, runs: Counter[str], tmp_path: Path
    ) -> None:
        async def main() -> None:
            async with serving(self.app(site.store, runs, tmp_path, unstorable="pass")) as server:
                reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(encoded(b"{}", "key-1", "/stream"))
                await reader.readuntil(b"part")
                writer.transport.abort()
                again = await post(server.port, path="/stream")
                assert (again.status, again.title) == (500, "The request failed permanently")

        site.run(main())
        assert runs["stream"] == 1
