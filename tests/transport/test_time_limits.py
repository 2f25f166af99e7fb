"""How long a call takes when the server is slow, trickles, hangs or comes back."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from support.address import Address
from support.backends import Bench
from support.internals import plain_store
from support.proxy import Proxy
from support.records import begun
from support.servers import find_binary

from squidstep_redis import NotSentError, OutcomeUnknownError, ServerError
from squidstep_redis.embedded import EmbeddedServer
from transport.conftest import CLIENTS, Connect

pytestmark = pytest.mark.servers("valkey")

# A hooked client reads by itself, with a timeout for each piece of a reply. So does redis-py in the handshake of a
# client's pool, which is long with RESP3.
NOT_HOOKED = [kind for kind in CLIENTS if not kind.startswith("hooked")]
STALL = 0.7  # seconds that a shared machine may add


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server


@pytest.fixture
def address(server: EmbeddedServer) -> Iterator[Address]:
    with Address(server.port or 0) as address:
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


@pytest.mark.parametrize("kind", [kind for kind in NOT_HOOKED if kind != "RESP3"], indirect=True)
class TestTricklingServer:
    """A byte every 50 ms: a reply of 60 bytes takes 3 s, although no pause is long."""

    @pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
    def test_trickling_reply_does_not_prolong_the_timeout(
        self, connect_to: Connect, address: Address, kind: str, batch: bool
    ) -> None:
        store = connect_to(
            kind, address.port, client={"socket_timeout": 0.3, "socket_connect_timeout": 0.3}, timeout=0.5
        )
        store.schedule_step("run", "before", {})
        calls = [store.calls.begin_step(f"run-{number}", "pay", {"x": "x" * 50}) for number in range(20)]
        address.pause = 0.05
        took = fails(lambda: store.batch(calls) if batch else store.send(calls[0]), OutcomeUnknownError, NotSentError)
        # The timeout; then an attempt: the handshake, whose replies trickle, too, and a reply.
        assert took < 0.5 + 3 * 0.3 + STALL
        address.pause = 0
        assert begun(store.begin_step("run-after", "pay", {})).attempt == 1

    def test_slow_reply_within_the_timeout_is_read(self, connect_to: Connect, address: Address, kind: str) -> None:
        store = connect_to(kind, address.port, client={"socket_timeout": 3}, timeout=3)
        store.schedule_step("run", "before", {})
        address.pause = 0.005
        call = store.calls.begin_step("run", "pay", {})._replace(retryable=False)
        assert begun(store.send(call)).attempt == 1

    def test_slow_batch_ends_with_the_deadline_and_an_attempt(
        self, connect_to: Connect, address: Address, kind: str
    ) -> None:
        """Each reply arrives well within the client's timeout, but there are many."""
        store = connect_to(kind, address.port, client={"socket_timeout": 0.4}, timeout=0.6)
        store.schedule_step("run", "before", {})
        calls = [store.calls.begin_step(f"run-{number}", "pay", {}) for number in range(100)]
        address.pause = 0.002  # some 0.1 s for a reply
        assert fails(lambda: store.batch(calls), OutcomeUnknownError) < 0.6 + 0.4 + 0.4 + STALL


@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
def test_hanging_server_costs_the_timeout_and_one_attempt(
    connect_to: Connect, address: Address, kind: str, batch: bool
) -> None:
    client = {"socket_timeout": 0.4, "socket_connect_timeout": 0.2}
    store = connect_to(kind, address.port, client=client, timeout=1)
    store.schedule_step("run", "before", {})
    address.stall()
    call = store.calls.begin_step("run", "pay", {})
    took = fails(lambda: store.batch([call, call]) if batch else store.send(call), OutcomeUnknownError)
    sends = 4 if kind == "hooked, with retries" else 1  # by itself
    assert 1 <= took < 1 + sends * (0.2 + 0.4) + STALL
    address.resume()
    assert begun(store.send(call)).attempt == 1


@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
def test_server_that_is_away_for_most_of_the_timeout_is_waited_for(connect_to: Connect, kind: str, batch: bool) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    opened = contextlib.ExitStack()
    with opened:
        store = connect_to(kind, port, timeout=2)
        starting = threading.Timer(
            1.3, lambda: opened.enter_context(EmbeddedServer(binary=find_binary("valkey"), port=port))
        )
        starting.start()
        try:
            call = store.calls.begin_step("run", "pay", {})
            began = time.monotonic()
            result: Any = store.batch([call])[0] if batch else store.send(call)
            assert 1.2 < time.monotonic() - began < 2 + STALL
        finally:
            starting.join()
        assert begun(result).attempt == 1


def test_server_that_hangs_for_most_of_the_timeout_is_waited_for(
    connect_to: Connect, address: Address, kind: str
) -> None:
    client = {"socket_timeout": 0.5, "socket_connect_timeout": 0.2}
    store = connect_to(kind, address.port, client=client, timeout=2)
    store.schedule_step("run", "before", {})
    address.stall()
    resuming = threading.Timer(1.4, address.resume)
    resuming.start()
    assert begun(store.begin_step("run", "pay", {})).attempt == 1
    resuming.join()


@pytest.mark.parametrize("kind", ["own", "plain"], indirect=True)
@pytest.mark.parametrize("timeout", [0.05, 0.3, 1])
def test_call_to_a_closed_port_uses_its_timeout(connect_to: Connect, kind: str, timeout: float) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        store = connect_to(kind, bound.getsockname()[1], timeout=timeout)
        took = fails(lambda: store.get_run("run"), NotSentError)
    assert timeout <= took < timeout + STALL


@pytest.mark.parametrize("wait", [0.1, 20])
def test_exhausted_pool_is_waited_for_until_the_deadline(
    bench: Bench, connect_to: Connect, address: Address, wait: float
) -> None:
    store = connect_to("blocking pool", address.port, client={"max_connections": 2}, timeout=1)
    pool: Any = store.client.connection_pool
    pool.timeout = wait
    address.stall()
    if bench.runner is None:
        waiting = [threading.Thread(target=lambda: fails(lambda: store.get_run("run"))) for _ in range(2)]
        for thread in waiting:
            thread.start()
        time.sleep(0.1)
        took = fails(lambda: store.get_run("other"), NotSentError, OutcomeUnknownError)
        for thread in waiting:
            thread.join()
    else:
        plain = plain_store(store)

        async def main() -> None:
            results = await asyncio.gather(*[plain.get_run("run") for _ in range(3)], return_exceptions=True)
            assert all(isinstance(result, ServerError) for result in results)

        took = seconds(lambda: bench.runner.run(main()))
    assert took < 1 + 0.5 + 1 + STALL
    address.resume()
    assert store.get_run("run") == []


@pytest.mark.parametrize("kind", ["own", "plain", "RESP3"], indirect=True)
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
def test_timeout_error_of_a_signal_handler_is_raised(connect_to: Connect, proxy: Proxy, kind: str, known: None) -> None:
    """A handler that raises Python's own TimeoutError: it must not be taken for one of the socket."""

    def handler(number: int, frame: object) -> None:
        raise TimeoutError("of the handler")

    store = connect_to(kind, proxy.port, timeout=5, client={"socket_timeout": 5})
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
