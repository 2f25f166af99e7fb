"""On asyncio, all tasks of an event loop share one connection of the store's own client."""

from __future__ import annotations

import asyncio
import errno
import random
import select
import time
from collections.abc import Coroutine
from math import inf
from typing import Any

import pytest
import redis.asyncio
from support.address import Address
from support.backends import Bench
from support.claims import until
from support.internals import plain_store, retry_for, shared_socket
from support.proxy import Fault, Proxy
from support.records import begun
from support.servers import wait_until
from support.storm_length import StormLength

from squidstep_redis import AsyncStepRunStore, BeginResult, NotSentError, OutcomeUnknownError, ServerError
from squidstep_redis.transport.link import Link
from transport.conftest import Connect

pytestmark = [
    pytest.mark.servers("valkey"),
    pytest.mark.parametrize("bench", ["asyncio"], indirect=True),
]

LARGE = {"data": b"x" * 100_000}


@pytest.fixture
def store(bench: Bench, connect_to: Connect, proxy: Proxy) -> AsyncStepRunStore:
    return plain_store(connect_to("own", proxy.port, client={"client_name": bench.prefix}, timeout=5))


def run(bench: Bench, main: Coroutine[Any, Any, Any]) -> Any:
    assert bench.runner is not None
    return bench.runner.run(main)


def connected(bench: Bench) -> list[str]:
    return [client["id"] for client in bench.backend.raw.client_list() if client["name"] == bench.prefix]


async def begin_at_once(store: AsyncStepRunStore, name: str, count: int) -> None:
    results = await asyncio.gather(*[store.begin_step(f"{name}-{n}", "pay", {"n": n}) for n in range(count)])
    assert [(begun(result).attempt, begun(result).input["n"]) for result in results] == [(1, n) for n in range(count)]


def test_hundred_tasks_use_one_connection(bench: Bench, store: AsyncStepRunStore) -> None:
    for name in ("first", "second"):
        run(bench, begin_at_once(store, name, 100))
        assert len(connected(bench)) == 1


def test_calls_of_one_loop_iteration_share_few_writes(
    bench: Bench, store: AsyncStepRunStore, known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write is about as large as all before it, so that the server always has something to do."""
    writes: list[int] = []
    flush = Link._flush

    def counted(link: Link) -> None:
        writes.append(len(link._unsent))
        flush(link)

    async def main() -> None:
        await store.schedule_step("run", "before", {})
        monkeypatch.setattr(Link, "_flush", counted)
        await begin_at_once(store, "run", 100)

    run(bench, main())
    sizes = [size for size in writes if size]
    assert (sizes[0], sum(sizes)) == (1, 100)
    assert len(sizes) <= 9


def test_mixed_calls_and_batches_get_their_own_replies(
    bench: Bench, store: AsyncStepRunStore, storm_length: StormLength
) -> None:
    async def single(number: int) -> None:
        await asyncio.sleep(random.uniform(0, 0.02))
        assert begun(await store.begin_step(f"run-{number}", "pay", {"n": number})).input == {"n": number}
        assert [each.input for each in await store.get_run(f"run-{number}")] == [{"n": number}]

    async def many(number: int) -> None:
        await asyncio.sleep(random.uniform(0, 0.02))
        calls = [store.calls.begin_step(f"batch-{number}-{n}", "pay", {"n": n}) for n in range(20)]
        results: list[Any] = await store.batch(calls)
        assert [begun(result).input["n"] for result in results] == list(range(20))

    async def main() -> None:
        for storm in storm_length.rounds(1):
            numbers = range(50 * storm, 50 * storm + 50)
            await asyncio.gather(*[each(number) for number in numbers for each in (single, many)])

    run(bench, main())
    assert len(connected(bench)) == 1


def test_cancelled_call_leaves_the_others_their_replies(
    bench: Bench, store: AsyncStepRunStore, storm_length: StormLength
) -> None:
    async def main() -> None:
        await store.schedule_step("run", "before", {})
        for turns in storm_length.rounds(30):
            tasks = [asyncio.ensure_future(store.begin_step(f"run-{turns}-{n}", "pay", {"n": n})) for n in range(20)]
            for _ in range(turns % 10):
                await asyncio.sleep(0)
            cancelled = set(random.sample(range(20), 7))
            for number in cancelled:
                tasks[number].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for number, result in enumerate(results):
                if isinstance(result, BaseException):
                    assert isinstance(result, asyncio.CancelledError)
                    assert number in cancelled
                else:
                    assert begun(result).input == {"n": number}

    run(bench, main())
    assert len(connected(bench)) == 1


def test_next_call_after_a_cancelled_one_gets_its_own_reply(
    bench: Bench, store: AsyncStepRunStore, proxy: Proxy, known: None
) -> None:
    async def main() -> None:
        await store.schedule_step("run", "before", {})
        before = connected(bench)
        held = proxy.hold_replies(script="begin_step")
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(store.begin_step("run", "cancelled", {}), 0.1)
        later = asyncio.ensure_future(store.begin_step("run", "later", {"n": 1}))
        await asyncio.sleep(0.05)
        held.set()
        assert begun(await later).input == {"n": 1}
        assert (await store.step_statuses("run"))["cancelled"] == "running"
        assert connected(bench) == before

    run(bench, main())


def test_lost_connection_makes_every_pending_call_retry(
    bench: Bench, store: AsyncStepRunStore, proxy: Proxy, known: None
) -> None:
    async def main() -> None:
        await store.schedule_step("run", "before", {})
        proxy.drop(3, "begin_step")  # three times, in the middle of what is under way
        await begin_at_once(store, "run", 100)

    run(bench, main())
    wait_until(lambda: len(connected(bench)) == 1)


def test_call_that_is_not_retried_fails_with_its_connection(
    bench: Bench, store: AsyncStepRunStore, proxy: Proxy, known: None
) -> None:
    async def main() -> None:
        await store.schedule_step("run", "before", {})
        proxy.drop(1, "begin_step")
        calls = [store.calls.begin_step(f"run-{n}", "pay", {})._replace(retryable=False) for n in range(20)]
        results = await asyncio.gather(*map(store.send, calls), return_exceptions=True)
        assert type(results[0]) is OutcomeUnknownError
        # The calls are sent in several writes. A write that comes after the loss fails at once; later ones reconnect.
        assert {type(result) for result in results} <= {OutcomeUnknownError, NotSentError, BeginResult}
        for number, result in enumerate(results):
            if isinstance(result, NotSentError):
                assert await store.get_run(f"run-{number}") == []

    run(bench, main())


class TestExclusiveConnections:
    """Large payloads and blocking reads would delay the calls of others."""

    def test_large_payload_has_its_own_connection(self, bench: Bench, store: AsyncStepRunStore) -> None:
        async def main() -> None:
            await store.schedule_step("run", "small", {})
            assert len(connected(bench)) == 1
            await store.schedule_step("run", "large", LARGE)
            assert len(connected(bench)) == 2
            for number in range(5):  # it is kept
                await store.schedule_step("run", f"large-{number}", LARGE)
            assert len(connected(bench)) == 2
            await asyncio.gather(*[store.schedule_step("many", f"large-{number}", LARGE) for number in range(40)])
            await asyncio.sleep(0.05)
            assert len(connected(bench)) <= 17  # no more are kept

        run(bench, main())

    def test_large_payload_does_not_delay_small_calls(
        self, bench: Bench, store: AsyncStepRunStore, proxy: Proxy, known: None
    ) -> None:
        async def main() -> None:
            await store.schedule_step("run", "small", {})
            held = proxy.hold_requests(script="begin_step")
            large = asyncio.ensure_future(store.begin_step("run", "large", LARGE))
            await asyncio.sleep(0.05)
            await asyncio.wait_for(store.schedule_step("run", "other", {}), 20)
            assert not large.done()
            held.set()
            assert begun(await large).input == LARGE

        run(bench, main())

    def test_waiting_does_not_delay_other_calls(self, bench: Bench, store: AsyncStepRunStore) -> None:
        async def main() -> None:
            await store.schedule_step("run", "pay", {})
            waiting = [asyncio.ensure_future(store.wait_for_step("run", "pay", 60)) for _ in range(5)]
            await asyncio.sleep(0.2)
            await asyncio.wait_for(begin_at_once(store, "run", 50), 20)
            assert not any(task.done() for task in waiting)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)

        run(bench, main())

    def test_cancelled_large_call_closes_its_connection(
        self, bench: Bench, store: AsyncStepRunStore, proxy: Proxy, known: None
    ) -> None:
        async def main() -> None:
            await store.schedule_step("run", "small", {})
            held = proxy.hold_replies(script="begin_step")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(store.begin_step("run", "large", LARGE), 0.1)
            held.set()
            await store.schedule_step("run", "later", LARGE)
            await asyncio.sleep(0.05)
            assert len(connected(bench)) == 2

        run(bench, main())


class TestBoundedBuffers:
    def test_calls_wait_while_the_server_reads_nothing(
        self, bench: Bench, connect_to: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A thousand calls of 60 kB: without a bound, 60 MB would wait in the connection's buffer."""
        largest = 0
        flush = Link._flush

        def measure(link: Link) -> None:
            nonlocal largest
            flush(link)
            largest = max(largest, link._transport.get_write_buffer_size())

        monkeypatch.setattr(Link, "_flush", measure)
        with Proxy.to(bench.backend.raw) as proxy, Address(proxy.port) as address:
            store: AsyncStepRunStore = plain_store(
                connect_to("own", address.port, client={"socket_timeout": 20}, timeout=30)
            )

            async def main() -> None:
                await store.schedule_step("run", "before", {})
                address.stall()
                payload = {"data": b"x" * 60_000}
                tasks = [asyncio.ensure_future(store.schedule_step("run", f"{n}", payload)) for n in range(1_000)]
                await until(lambda: largest > 0)  # the kernel's buffers are full
                await asyncio.sleep(0.3)
                assert not any(task.done() for task in tasks)
                address.resume()
                results = await asyncio.gather(*tasks)
                assert {result.decision for result in results} == {"schedule"}

            run(bench, main())
        assert 0 < largest < 4_000_000

    def test_waiting_calls_fail_at_their_deadline(self, bench: Bench, connect_to: Connect, proxy: Proxy) -> None:
        with Address(proxy.port) as address:
            client = {"socket_timeout": 0.4, "socket_connect_timeout": 0.2}
            store: AsyncStepRunStore = plain_store(connect_to("own", address.port, client=client, timeout=0.8))

            async def main() -> float:
                await store.schedule_step("run", "before", {})
                address.stall()
                payload = {"data": b"x" * 60_000}
                began = time.monotonic()
                tasks = [store.schedule_step("run", f"{n}", payload) for n in range(300)]
                results = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(result, Exception) for result in results)
                return time.monotonic() - began

            assert run(bench, main()) < 0.8 + 0.6 + 1.5
            address.resume()

    def test_push_and_stray_replies_close_no_other_connection(
        self, bench: Bench, store: AsyncStepRunStore, proxy: Proxy, known: None
    ) -> None:
        async def main() -> None:
            await store.schedule_step("run", "before", {})
            proxy.add_fault(Fault(reply=lambda reply: reply + b"+stray\r\n", script="schedule_step"))
            await store.schedule_step("run", "stray", {})
            await begin_at_once(store, "run", 20)

        run(bench, main())

    @pytest.mark.parametrize("slow", ["reads", "replies"])
    def test_calls_before_it_do_not_prolong_a_call(
        self, bench: Bench, connect_to: Connect, proxy: Proxy, known: None, slow: str
    ) -> None:
        """Their deadlines are later, and a server that is slow always makes progress with one of them."""
        with Address(proxy.port) as address:
            client = {"socket_timeout": 1.0}
            store: AsyncStepRunStore = plain_store(connect_to("own", address.port, client=client, timeout=60))

            async def main() -> tuple[float, ServerError]:
                await store.schedule_step("run", "before", {})
                address.pause, address.reading_pause = (0.0, 0.3) if slow == "reads" else (0.005, 0.0)
                payload = {"data": b"x" * (60_000 if slow == "reads" else 1)}
                earlier = [asyncio.ensure_future(store.schedule_step("run", f"{n}", payload)) for n in range(300)]
                await asyncio.sleep(0.1)
                began = time.monotonic()
                with pytest.raises(ServerError) as caught:
                    await store._transport.limited(0.2).send(store.calls.schedule_step("run", "pay", {}))
                took = time.monotonic() - began
                for task in earlier:
                    task.cancel()
                await asyncio.wait(earlier)
                return took, caught.value

            took, error = run(bench, main())
            address.disconnect()
        assert isinstance(error, NotSentError if slow == "reads" else OutcomeUnknownError)
        assert took < 5


@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
def test_call_on_a_connection_that_was_reset_is_not_sent(
    bench: Bench, store: AsyncStepRunStore, proxy: Proxy, batch: bool
) -> None:
    """The event loop has not noticed the reset before it writes, and nobody listens after it."""
    poll = select.poll()

    async def main() -> None:
        await store.get_run("run")
        retry_for(store, 0.05)
        poll.register(shared_socket(store), 0)
        proxy.refuse()
        proxy.reset()
        wait_until(lambda: poll.poll(0) != [])  # blocks the loop
        call = store.calls.begin_step("run", "pay", {})
        with pytest.raises(NotSentError):
            await (store.batch([call, call]) if batch else store.send(call))

    run(bench, main())


def test_call_on_a_connection_whose_end_was_read_is_not_sent(
    bench: Bench, store: AsyncStepRunStore, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transport is closing, and reports it only in the next iteration of the loop."""
    calls: list[asyncio.Task[Any]] = []

    def begin(link: Link) -> None:
        calls.append(asyncio.ensure_future(store.begin_step("run", "pay", {})))

    async def main() -> None:
        await store.get_run("run")
        retry_for(store, 0.05)
        monkeypatch.setattr(Link, "eof_received", begin)
        proxy.refuse()
        proxy.disconnect()
        await asyncio.to_thread(wait_until, lambda: calls != [])
        with pytest.raises(NotSentError):
            await calls[0]

    run(bench, main())


class ScarceConnection(redis.asyncio.Connection):
    """redis-py 8 reads a file when it makes a connection."""

    failures = 0.0

    def __init__(self, **options: Any) -> None:
        ScarceConnection.failures -= 1
        if ScarceConnection.failures >= 0:
            raise OSError(errno.EMFILE, "Too many open files", "METADATA")
        super().__init__(**options)


@pytest.mark.parametrize("size", [0, 100_000], ids=["shared", "alone"])
def test_lack_of_file_descriptors_raises_not_sent(bench: Bench, store: AsyncStepRunStore, size: int) -> None:
    async def main() -> None:
        client: Any = store.client
        client.connection_pool.connection_class = ScarceConnection
        retry_for(store, 0.05)
        ScarceConnection.failures = inf
        with pytest.raises(NotSentError, match="Too many open files"):
            await store.schedule_step("run", "pay", {"data": "x" * size})
        retry_for(store, 20)
        ScarceConnection.failures = 1
        await store.schedule_step("run", "pay", {"data": "x" * size})

    run(bench, main())
