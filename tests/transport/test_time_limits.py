"""How long a call takes when the server is slow, trickles, hangs or comes back."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final
from unittest import mock

import pytest
import redis
from support.address import Address
from support.backends import Bench
from support.internals import retry_for
from support.operations import finish
from support.proxy import Proxy
from support.records import begun
from support.servers import find_binary, wait_until

from squidstep_redis import (
    NotSentError,
    OutcomeUnknownError,
    RefusedError,
    ServerError,
    StepRunStore,
    WaitTimeoutError,
)
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.transport.aio_cluster import ClusterConnections
from squidstep_redis.transport.retry import RoundTripError
from transport.conftest import Connect, pool_connection

pytestmark = pytest.mark.servers("valkey")

STALL = 0.7  # seconds that a shared machine may add
TRIES = 5  # of which one has to end in time: the machine may also stall for longer

# The ways to send that have a time limit of their own. The client's pool has one for all protocols and kinds of pools.
own_and_plain = pytest.mark.parametrize("kind", ["own", "plain"], indirect=True)
# A hooked client reads by itself, with a timeout for each piece of a reply.
each_way = pytest.mark.parametrize("kind", ["own", "plain", "hooked"], indirect=True)


LATE: Final = 30.0  # seconds: a bug takes longer, and a machine that stalls does not


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server


@pytest.fixture
def address(server: EmbeddedServer) -> Iterator[Address]:
    with Address(server.port) as address:
        yield address
    with redis.Redis(port=server.port) as admin:
        admin.flushall()


def seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def fails(call: Callable[[], object], *errors: type[ServerError]) -> float:
    def run() -> None:
        with pytest.raises(errors or ServerError):
            call()

    return seconds(run)


def fails_within(
    limit: float, call: Callable[[], object], *errors: type[ServerError], before: Callable[[], object] = lambda: None
) -> float:
    """Returns how long a call takes to fail. If the machine stalled, the call is made again."""
    for _ in range(TRIES):
        before()
        if (took := fails(call, *errors)) < limit + STALL:
            return took
    pytest.fail(f"took longer than {limit} seconds, {TRIES} times")


def call_in_peace(store: StepRunStore, address: Address) -> None:
    """Makes a call without a time limit, on a server without faults."""
    address.pause = address.reading_pause = 0
    address.resume()
    retry_for(store, 30)
    assert store.get_run("run-of-no-step") == []


@own_and_plain
class TestTricklingServer:
    """A byte every 20 ms: a reply of 2,000 bytes takes 40 s, although no pause is long."""

    @pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
    def test_trickling_reply_does_not_extend_the_timeout(
        self, connect_to: Connect, address: Address, kind: str, batch: bool
    ) -> None:
        store = connect_to(kind, address.port, client={"socket_timeout": 0.15, "socket_connect_timeout": 0.15})
        calls = [store.calls.begin_step(f"run-{number}", "pay", {"x": "x" * 2_000}) for number in range(20)]

        def trickle() -> None:
            call_in_peace(store, address)
            address.pause = 0.02
            retry_for(store, 0.2)

        fails_within(
            # The timeout; then an attempt: the handshake, whose replies trickle, too, and a reply.
            0.2 + 3 * 0.15,
            lambda: store.batch(calls) if batch else store.send(calls[0]),
            *(OutcomeUnknownError, NotSentError),
            before=trickle,
        )
        call_in_peace(store, address)

    def test_trickling_handshake_does_not_extend_the_timeout(
        self, connect_to: Connect, address: Address, kind: str
    ) -> None:
        """Each byte of the reply to SELECT arrives in time, but not all of them: the call itself is never sent."""
        client = {"socket_timeout": 0.12, "socket_connect_timeout": 0.12}
        store = connect_to(kind, address.port, db=1, client=client, timeout=0.3)
        address.pause = 0.05
        fails(lambda: store.begin_step("run", "pay", {}), NotSentError)
        call_in_peace(store, address)

    def test_slow_reply_within_the_timeout_is_read(self, connect_to: Connect, address: Address, kind: str) -> None:
        store = connect_to(kind, address.port, client={"socket_timeout": 20})
        call_in_peace(store, address)
        address.pause = 0.002
        call = store.calls.begin_step("run", "pay", {})._replace(retryable=False)
        assert begun(store.send(call)).attempt == 1

    def test_slow_batch_ends_with_the_deadline_and_an_attempt(
        self, connect_to: Connect, address: Address, kind: str
    ) -> None:
        """Each reply arrives well within the client's timeout, but there are many."""
        store = connect_to(kind, address.port, client={"socket_timeout": 0.3})
        calls = [store.calls.begin_step(f"run-{number}", "pay", {}) for number in range(100)]

        def slow_down() -> None:
            call_in_peace(store, address)
            address.pause = 0.002  # some 0.15 s for a reply
            retry_for(store, 0.2)

        fails_within(0.2 + 0.3 + 0.3, lambda: store.batch(calls), OutcomeUnknownError, before=slow_down)


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@pytest.mark.parametrize("kind", ["own", "plain", "blocking pool", "hooked"], indirect=True)
def test_handshake_ends_with_the_attempt(connect_to: Connect, address: Address, kind: str) -> None:
    """Each of its replies arrives in time. Without the limit, the handshake takes 1.6 s, and the call is sent."""
    client = {"socket_timeout": 0.6, "socket_connect_timeout": 0.1, "client_name": "slow"}
    store = connect_to(kind, address.port, db=1, client=client, timeout=0.1)
    address.pause = 0.08
    fails(lambda: store.get_run("run"), NotSentError)
    call_in_peace(store, address)


@pytest.mark.parametrize("kind", ["plain", "blocking pool"], indirect=True)
def test_trickling_reply_is_limited_with_health_checks(connect_to: Connect, address: Address, kind: str) -> None:
    """redis-py writes and reads such a connection, with a timeout for each piece of a reply."""
    client = {"socket_timeout": 0.15, "socket_connect_timeout": 0.15, "health_check_interval": 60}
    store = connect_to(kind, address.port, client=client)
    call = store.calls.begin_step("run", "pay", {"x": "x" * 2_000})

    def trickle() -> None:
        call_in_peace(store, address)
        address.pause = 0.02
        retry_for(store, 0.2)

    fails_within(0.2 + 3 * 0.15, lambda: store.send(call), OutcomeUnknownError, NotSentError, before=trickle)
    call_in_peace(store, address)
    assert begun(store.send(call)).attempt == 1


@own_and_plain
@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
def test_server_that_reads_slowly_does_not_extend_the_call(
    connect_to: Connect, address: Address, kind: str, batch: bool
) -> None:
    """It reads 64 KiB every 0.1 s: 30 MB take 46 s, although the client never waits long to write more."""
    store = connect_to(kind, address.port, client={"socket_timeout": 0.3}, max_payload_bytes=40_000_000)
    size = 1_000_000 if batch else 30_000_000
    calls = [store.calls.begin_step(f"run-{number}", "pay", {"x": "x" * size}) for number in range(30 if batch else 1)]

    def slow_down() -> None:
        call_in_peace(store, address)
        address.reading_pause = 0.1
        retry_for(store, 0.2)

    fails_within(0.2 + 0.3 + 0.3, lambda: store.batch(calls) if batch else store.send(calls[0]), before=slow_down)
    address.disconnect()
    call_in_peace(store, address)


@own_and_plain
def test_calls_of_a_batch_share_its_deadline(connect_to: Connect, proxy: Proxy, kind: str) -> None:
    """The server forgets the scripts within the batch, and then hangs: each call has to be sent again by itself."""
    store = connect_to(kind, proxy.port, client={"socket_timeout": 0.2, "socket_connect_timeout": 0.2}, timeout=0.3)
    calls = [store.calls.begin_step(f"run-{number}", "pay", {}) for number in range(30)]
    names = (b"SCRIPT", b"MULTI", b"EXEC")
    proxy.translate = lambda real: real if proxy.commands[-1][0] in names else b"-NOSCRIPT no\r\n"
    hook = threading.Event()
    proxy.after(4 + len(calls) - 1, lambda: setattr(proxy, "translate", lambda _: hook.wait(LATE) and b""))
    took = seconds(lambda: calls_that_failed(store.batch(calls)))
    hook.set()
    assert took < 0.3 + 0.2 + 0.2 + 5 * STALL  # one by one, they take 6 s


def calls_that_failed(results: list[Any]) -> None:
    assert {type(result) for result in results} <= {OutcomeUnknownError, NotSentError, RefusedError}


@pytest.mark.servers("cluster")
@pytest.mark.parametrize("bench", ["asyncio"], indirect=True)
def test_nodes_that_hang_do_not_delay_the_last_attempt(bench: Bench) -> None:
    """The client asks one node after another for the slots, and waits for each."""
    store = bench.store(timeout=0.3)
    assert store.get_run("run") == []  # learns the nodes
    call = store.calls.get_run("run")

    async def hang(*_: object, **__: object) -> None:
        await asyncio.sleep(LATE)

    nodes: Any = store.client.nodes_manager
    away = RoundTripError(redis.ConnectionError("away"), sent=False)
    with (
        mock.patch.object(type(nodes), "initialize", hang),
        mock.patch.object(ClusterConnections, "execute", side_effect=away),
    ):
        assert fails(lambda: store.send(call), NotSentError) < LATE / 2


@pytest.mark.parametrize("kind", ["blocking pool"], indirect=True)
def test_exhausted_pool_does_not_delay_the_doctor(
    bench: Bench, connect_to: Connect, address: Address, kind: str
) -> None:
    """The pool would wait for a connection without a limit."""
    store = connect_to(kind, address.port, client={"max_connections": 1}, timeout=0.2)
    pool: Any = store.client.connection_pool
    pool.timeout = LATE
    borrowed = finish(bench, pool_connection(store.client))
    took = seconds(store.doctor)
    finish(bench, pool.release(borrowed))
    assert took < LATE / 2


@pytest.mark.parametrize(
    ("kind", "batch"),
    [
        ("own", False),
        ("own", True),
        ("plain", False),
        ("plain", True),
        ("RESP3", False),
        ("hooked, with retries", False),
    ],
    indirect=["kind"],
)
def test_hanging_server_costs_the_timeout_and_one_attempt(
    connect_to: Connect, address: Address, kind: str, batch: bool
) -> None:
    store = connect_to(kind, address.port, client={"socket_timeout": 0.1, "socket_connect_timeout": 0.1})
    call = store.calls.begin_step("run", "pay", {})

    def hang() -> None:
        call_in_peace(store, address)
        address.stall()
        retry_for(store, 0.15)

    sends = 4 if kind == "hooked, with retries" else 1  # by itself
    took = fails_within(
        0.15 + sends * (0.1 + 0.1),
        lambda: store.batch([call, call]) if batch else store.send(call),
        OutcomeUnknownError,
        before=hang,
    )
    assert took >= 0.15
    call_in_peace(store, address)
    assert begun(store.send(call)).attempt == 1


@pytest.mark.parametrize(
    ("kind", "batch"), [("own", False), ("own", True), ("plain", False), ("hooked", False)], indirect=["kind"]
)
def test_call_waits_for_a_server_that_comes_back(
    connect_to: Connect, server: EmbeddedServer, kind: str, batch: bool
) -> None:
    with Address(server.port, is_open=False) as address:
        store = connect_to(kind, address.port, timeout=30)
        call = store.calls.begin_step("run", "pay", {})
        opening = threading.Timer(0.15, address.open)
        opening.start()
        result: Any = store.batch([call])[0] if batch else store.send(call)
        assert begun(result).attempt == 1
        opening.join()


@each_way
def test_call_waits_for_a_server_that_resumes(connect_to: Connect, address: Address, kind: str) -> None:
    store = connect_to(kind, address.port, client={"socket_timeout": 0.1, "socket_connect_timeout": 0.1})
    call_in_peace(store, address)
    accepted = address.accepted
    address.stall()

    def resume() -> None:
        wait_until(lambda: address.accepted >= accepted + 2)  # the idle connection and another have timed out
        address.resume()

    resuming = threading.Thread(target=resume)
    resuming.start()
    assert begun(store.begin_step("run", "pay", {})).attempt == 1
    resuming.join()


@own_and_plain
@pytest.mark.parametrize("timeout", [0.05, 0.3])
def test_call_to_a_closed_port_uses_its_timeout(connect_to: Connect, kind: str, timeout: float) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        store = connect_to(kind, bound.getsockname()[1], timeout=timeout)
        assert timeout <= fails_within(timeout, lambda: store.get_run("run"), NotSentError)


@pytest.mark.parametrize("wait", [0.05, 20])
def test_call_waits_for_an_exhausted_pool_until_the_deadline(
    bench: Bench, connect_to: Connect, address: Address, wait: float
) -> None:
    store = connect_to("blocking pool", address.port, client={"max_connections": 2}, timeout=0.2)
    pool: Any = store.client.connection_pool
    pool.timeout = wait
    borrowed = [finish(bench, pool_connection(store.client)) for _ in range(2)]
    assert fails(lambda: store.get_run("run"), NotSentError) < 10
    for connection in borrowed:
        finish(bench, pool.release(connection))
    retry_for(store, 30)
    assert store.get_run("run") == []


@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
def test_hooked_client_waits_for_its_pool_until_the_deadline(
    bench: Bench, connect_to: Connect, address: Address, batch: bool
) -> None:
    store = connect_to("hooked blocking pool", address.port, client={"max_connections": 1}, timeout=0.2)
    pool: Any = store.client.connection_pool
    pool.timeout = LATE
    borrowed = finish(bench, pool_connection(store.client))
    calls = [store.calls.get_run("run"), store.calls.get_run("other")]
    call = (lambda: store.batch(calls)) if batch else (lambda: store.get_run("run"))
    assert fails(call, NotSentError) < LATE / 2
    finish(bench, pool.release(borrowed))
    retry_for(store, 30)
    assert store.get_run("run") == []


def test_exhausted_pool_does_not_prolong_a_wait(bench: Bench, connect_to: Connect, address: Address) -> None:
    store = connect_to("blocking pool", address.port, client={"max_connections": 1}, timeout=LATE)
    connection = finish(bench, pool_connection(store.client))
    assert 0.3 <= fails(lambda: store.wait_for_step("run", "pay", 0.3), NotSentError) < LATE / 2
    finish(bench, store.client.connection_pool.release(connection))
    retry_for(store, 30)
    with pytest.raises(WaitTimeoutError):
        store.wait_for_step("run", "pay", 0.05)


@each_way
@pytest.mark.parametrize("polled", [False, True])
def test_server_that_hangs_prolongs_a_wait_by_one_attempt(
    connect_to: Connect, proxy: Proxy, kind: str, polled: bool, known: None
) -> None:
    store = connect_to(kind, proxy.port, timeout=LATE, client={"socket_timeout": 1.0, "socket_connect_timeout": 0.5})
    store.schedule_step("run", "pay", {})

    def prepare() -> None:
        proxy.clear()
        store.get_run("run")
        proxy.after(int(polled), lambda: proxy.hold_replies(100))

    error: Any = WaitTimeoutError if polled else OutcomeUnknownError
    fails_within(0.5 + 1.5, lambda: store.wait_for_step("run", "pay", 0.5), error, before=prepare)


@own_and_plain
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
def test_timeout_error_of_a_signal_handler_is_raised(connect_to: Connect, proxy: Proxy, kind: str, known: None) -> None:
    """A handler that raises Python's own TimeoutError: it must not be taken for one of the socket."""

    def handler(number: int, frame: object) -> None:
        raise TimeoutError("of the handler")

    store = connect_to(kind, proxy.port, timeout=20, client={"socket_timeout": 20})
    store.schedule_step("run", "before", {})
    held = proxy.hold_replies()
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(TimeoutError, match="of the handler"):
            store.begin_step("run", "pay", {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        held.set()
    assert store.step_statuses("run")["pay"] == "running"
