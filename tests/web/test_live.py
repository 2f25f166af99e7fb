"""Live updates: polls that viewers share, and that end with the last viewer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.backends import Bench
from support.http import serving
from support.records import begun
from support.web import Site

from squidstep_redis import SquidstepError
from squidstep_redis.web import live
from squidstep_redis.web.live import Hub, Latest, TooManyViewersError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_INTERVAL", 0.01)
    monkeypatch.setattr(live, "_SHARE", 0)


class Source:
    """Something that is watched."""

    def __init__(self) -> None:
        self.version = "1"
        self.polls = 0

    async def read(self) -> str:
        self.polls += 1
        if self.version == "error":
            raise SquidstepError
        if self.version == "bug":
            raise KeyError
        return self.version


async def next_change(stream: AsyncIterator[str]) -> str:
    async for event in stream:
        if "event: change" in event:
            return event
    raise AssertionError("the stream has ended")


async def open_all(streams: list[AsyncIterator[str]]) -> None:
    for stream in streams:
        assert (await anext(stream)).startswith("retry: ")


class TestHub:
    def test_viewers_share_polls_and_see_each_change(self, runner: asyncio.Runner) -> None:
        async def main() -> None:
            hub, source = Hub(), Source()
            streams: list[Any] = [hub.stream("run 1", "1", source.read) for _ in range(20)]
            await open_all(streams)
            assert hub.polled == 1
            for version in ("2", "3"):
                source.version = version
                events = await asyncio.gather(*map(next_change, streams))
                assert set(events) == {f"id: {version}\nevent: change\ndata: {version}\n\n"}
            await asyncio.gather(*(stream.aclose() for stream in streams))

        runner.run(main())

    def test_nothing_is_polled_without_a_viewer(self, runner: asyncio.Runner) -> None:
        async def main() -> None:
            hub, source = Hub(), Source()
            streams: list[Any] = [hub.stream(f"run {number % 2}", "", source.read) for number in range(4)]
            await asyncio.sleep(0.02)
            assert source.polls == 0
            await open_all(streams)
            assert hub.polled == 2
            for number, stream in enumerate(streams):
                await stream.aclose()
                assert hub.polled == (2 if number < 2 else 3 - number)
            polls = source.polls
            await asyncio.sleep(0.05)
            assert source.polls <= polls + 1

        runner.run(main())

    def test_a_viewer_that_knows_the_version_waits(self, runner: asyncio.Runner) -> None:
        async def main() -> None:
            hub, source = Hub(), Source()
            stream: Any = hub.stream("", "1", source.read)
            await open_all([stream])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(next_change(stream), 0.1)
            await stream.aclose()
            late: Any = hub.stream("", "0", source.read)
            assert "data: 1" in await next_change(late)
            await late.aclose()

        runner.run(main())

    @pytest.mark.parametrize("problem", ["error", "bug"])
    def test_polling_continues_after_an_error(self, runner: asyncio.Runner, problem: str) -> None:
        async def main() -> None:
            hub, source = Hub(), Source()
            stream: Any = hub.stream("", "1", source.read)
            await open_all([stream])
            source.version = problem
            assert "data: error" in await next_change(stream)
            source.version = "2"
            assert "data: 2" in await next_change(stream)
            await stream.aclose()

        runner.run(main())

    def test_a_stream_ends_so_that_rights_are_checked_again(
        self, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(live, "_STREAM_SECONDS", 0.05)

        async def main() -> None:
            hub = Hub()
            events = [event async for event in hub.stream("", "1", Source().read)]
            assert events == ["retry: 500\n\n", ": unchanged\n\n"]
            assert hub.polled == 0

        runner.run(main())

    def test_the_number_of_streams_is_limited(self, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(live, "MAX_VIEWERS", 2)

        async def main() -> None:
            hub, source = Hub(), Source()
            streams: list[Any] = [hub.stream("", "", source.read) for _ in range(2)]
            await open_all(streams)
            with pytest.raises(TooManyViewersError):
                hub.stream("", "", source.read)
            await streams[0].aclose()
            hub.stream("", "", source.read)
            await streams[1].aclose()

        runner.run(main())


class TestLatest:
    def test_simultaneous_updates_share_one_read(self, runner: asyncio.Runner) -> None:
        async def main() -> None:
            source = Source()
            latest = Latest(source.read)
            assert await asyncio.gather(*(latest.recent() for _ in range(50))) == ["1"] * 50
            source.version = "2"
            assert await latest.recent() == "1"
            assert source.polls == 1
            assert await latest.fresh() == "2"  # a page that is loaded shows what its user has just changed
            assert await latest.recent() == "2"

        runner.run(main())

    def test_an_old_result_is_read_again(self, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(live, "_RECENT", -1)

        async def main() -> None:
            source = Source()
            latest = Latest(source.read)
            assert [await latest.recent(), await latest.recent()] == ["1", "1"]
            assert source.polls == 2

        runner.run(main())

    def test_a_viewer_that_leaves_does_not_cancel_the_read(self, runner: asyncio.Runner) -> None:
        async def main() -> None:
            gate = asyncio.Event()

            async def read() -> int:
                await gate.wait()
                return 1

            latest = Latest(read)
            first, second = (asyncio.create_task(latest.recent()) for _ in range(2))
            await asyncio.sleep(0.01)
            first.cancel()
            await asyncio.sleep(0.01)
            gate.set()
            assert await second == 1

        runner.run(main())

    def test_an_error_is_not_kept(self, runner: asyncio.Runner) -> None:
        async def main() -> None:
            source = Source()
            latest = Latest(source.read)
            source.version = "error"
            results = await asyncio.gather(*(latest.recent() for _ in range(3)), return_exceptions=True)
            assert [type(result) for result in results] == [SquidstepError] * 3
            source.version = "2"
            assert await latest.recent() == "2"

        runner.run(main())


@contextlib.asynccontextmanager
async def events_of(port: int, path: str) -> AsyncIterator[AsyncIterator[str]]:
    """Provides the lines of a stream of events, as a browser receives them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())

    async def lines() -> AsyncIterator[str]:
        while line := await reader.readline():
            yield line.decode().strip()

    try:
        yield lines()
    finally:
        writer.close()


async def until(lines: AsyncIterator[str], start: str) -> str:
    async for line in lines:
        if line.startswith(start):
            return line
    raise AssertionError(f"the stream ended before {start}")


@pytest.mark.servers("valkey")
class TestStreams:
    def watched(self, bench: Bench, path: str, change: Any) -> None:
        """Watches a page over HTTP, changes the store, and leaves."""
        site = Site(bench)
        prepared = site.get(path)
        assert prepared.status == 200
        events = next(part for part in prepared.html.split('"') if "/events?" in part).replace("&amp;", "&")
        hub = next(each for each in vars_of(site.app) if isinstance(each, Hub))

        async def main() -> None:
            async with serving(site.app) as server, events_of(server.port, events) as lines:
                assert "200" in await until(lines, "HTTP/1.1")
                assert await until(lines, "content-type") == "content-type: text/event-stream; charset=utf-8"
                await until(lines, "retry")
                await change(site.asyncio_store)
                assert await until(lines, "event") == "event: change"
                assert hub.polled == 1

        site.run(main())

        async def left() -> None:
            async with asyncio.timeout(30):
                while hub.polled:
                    await asyncio.sleep(0.01)

        site.run(left())

    def test_a_change_of_a_run_is_sent(self, bench: Bench) -> None:
        store: Any = bench.store()
        store.schedule_step("run-1", "pay", {})

        async def change(store: Any) -> None:
            await store.begin_step("run-1", "pay", {}, lease=60)

        self.watched(bench, "/run?id=run-1", change)

    def test_a_change_of_the_store_is_sent(self, bench: Bench) -> None:
        async def change(store: Any) -> None:
            await store.begin_step("run-1", "pay", {}, lease=60)

        self.watched(bench, "/", change)

    def test_an_expired_lease_is_a_change(self, bench: Bench) -> None:
        store: Any = bench.store()
        claim = begun(store.begin_step("run-1", "pay", {}, lease=0.7))

        async def change(store: Any) -> None:
            assert claim

        self.watched(bench, "/run?id=run-1", change)


def vars_of(app: Any) -> list[Any]:
    """Returns what the handlers of an application hold."""
    found: list[Any] = []
    for route in app.routes:
        for cell in getattr(route.endpoint, "__closure__", None) or ():
            handler = getattr(cell.cell_contents, "__self__", None)
            found += vars(handler).values() if handler is not None else ()
    return found


def test_a_missing_run_has_its_own_version(site: Site) -> None:
    assert live.version_of_run(site.run(site.asyncio_store.explain_run("nope"))) == "missing"


def test_a_finished_run_has_one_version(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.store.complete_step(begun(site.store.begin_step("run-1", "pay", {})), {})
    explained = site.run(site.asyncio_store.explain_run("run-1"))
    later = explained._replace(read_at=explained.read_at.replace(year=2031))
    assert live.version_of_run(explained) == live.version_of_run(later)
    site.store.schedule_step("run-1", "ship", {})
    explained = site.run(site.asyncio_store.explain_run("run-1"))
    later = explained._replace(read_at=explained.read_at.replace(year=2031))
    assert live.version_of_run(explained) != live.version_of_run(later)
