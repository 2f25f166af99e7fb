"""What connecting may cost: the client's own retries, its look-ups of names, and dead addresses extend no call."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.backoff import AbstractBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPoolProxy
from support.backends import Backend
from support.proxy import Proxy
from support.servers import wait_until

from squidstep_redis import NotSentError, StepRunStore
from squidstep_redis.transport.client import idle_of

from .conftest import HookedRedis

pytestmark = pytest.mark.servers("valkey")

SHORT: Any = {"socket_timeout": 0.3, "socket_connect_timeout": 0.3}
PATIENT: Any = {"socket_timeout": 20, "socket_connect_timeout": 20}
KINDS = ["own", "plain", "hooked", "blocking pool", "own class of connection"]


class OwnConnection(redis.Connection):
    """A class of a user, whose connections redis-py writes and reads."""

    def read_response(self, *args: Any, **options: Any) -> Any:
        return super().read_response(*args, **options)


def client_of(kind: str, **options: Any) -> redis.Redis:
    if kind == "blocking pool":
        return redis.Redis(connection_pool=redis.BlockingConnectionPool(**options))
    if kind == "own class of connection":
        return redis.Redis(connection_pool=ConnectionPool(connection_class=OwnConnection, **options))
    return (HookedRedis if kind == "hooked" else redis.Redis)(**options)


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


class CountingBackoff(AbstractBackoff):
    """Counts how often redis-py asks for a pause, also in copies."""

    pauses = 0

    def compute(self, failures: int) -> float:
        CountingBackoff.pauses += 1
        return 0


@pytest.fixture
def retry() -> Retry:
    return Retry(CountingBackoff(), 3)


class TestRetriesOfTheClient:
    @pytest.mark.parametrize("kind", KINDS)
    def test_client_does_not_retry_while_the_store_connects(self, closed_port: int, kind: str, retry: Retry) -> None:
        with client_of(kind, port=closed_port, retry=retry, **SHORT) as client:
            store = StepRunStore(client, own_connections=kind == "own", timeout=0.1)
            before = CountingBackoff.pauses  # the store asks for the facts about its client
            with pytest.raises(NotSentError, match="nothing was sent"):
                store.get_run("run")
        assert CountingBackoff.pauses == before

    @pytest.mark.parametrize("own_connections", [False, True])
    def test_sentinel_client_does_not_retry_while_the_store_connects(
        self, monkeypatch: pytest.MonkeyPatch, closed_port: int, own_connections: bool, retry: Retry
    ) -> None:
        monkeypatch.setattr(SentinelConnectionPoolProxy, "get_master_address", lambda _: ("127.0.0.1", closed_port))
        with Sentinel([("127.0.0.1", closed_port)], retry=retry, **SHORT).master_for("primary") as client:
            store = StepRunStore(client, own_connections=own_connections, timeout=0.1)
            before = CountingBackoff.pauses  # the store asks for the facts about its client
            with pytest.raises(NotSentError, match="nothing was sent"):
                store.get_run("run")
        assert CountingBackoff.pauses == before

    @pytest.mark.parametrize("kind", KINDS[1:])
    def test_connection_has_its_own_retries_once_it_is_open(self, backend: Backend, kind: str, retry: Retry) -> None:
        with Proxy.to(backend.raw) as proxy, client_of(kind, port=proxy.port, retry=retry) as client:
            StepRunStore(client).get_run("run")
            retries = [connection.retry for connection in idle_of(client.connection_pool)]
        assert [(type(each), each._retries) for each in retries] == [(Retry, 3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"port": 2**70}, {"socket_timeout": 1e12}, {"socket_connect_timeout": 1e12}], ids=str
)
def test_option_that_is_too_large_is_not_sent(kind: str, options: Any) -> None:
    """Python cannot pass it to the system."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        options = {"port": server.getsockname()[1], "retry": None, **SHORT, **options}
        with client_of(kind, **options) as client:
            store = StepRunStore(client, own_connections=kind == "own", timeout=0.1)
            with pytest.raises(NotSentError, match="OverflowError"):
                store.get_run("run")


class Names:
    """Look-ups of names that take their time, and the sockets that are opened for them.

    Attributes:
        ports: the port of each address of the name.
        released: the look-up waits for it.
        threads: the threads that have looked something up.
    """

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.released = threading.Event()
        self.threads: list[threading.Thread] = []
        self._look_up = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, *args: Any, **options: Any) -> Any:
        self.threads.append(threading.current_thread())
        if host != NAME:
            return self._look_up(host, port, *args, **options)
        self.released.wait(LATE)
        return [each for port in self.ports for each in self._look_up("127.0.0.1", port, *args, **options)]

    def have_ended(self) -> bool:
        return not any(thread.name == "squidstep-connect" for thread in threading.enumerate())


NAME = "name.invalid"
LATE = 30.0  # seconds: a call that waits for the look-up takes as long
BOUNDED = ["own", "plain", "hooked", "blocking pool"]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    names = Names()
    monkeypatch.setattr(socket, "getaddrinfo", names)
    yield names
    names.released.set()
    wait_until(names.have_ended)


@contextlib.contextmanager
def full_port() -> Iterator[int]:
    """Yields a port that does not reply: its queue of connections is full."""
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = opened.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield server.getsockname()[1]


class TestNames:
    @pytest.mark.parametrize("kind", BOUNDED)
    def test_slow_look_up_does_not_extend_a_call(self, names: Names, kind: str) -> None:
        with client_of(kind, host=NAME, port=1, retry=None, **SHORT) as client:
            store = StepRunStore(client, own_connections=kind == "own", timeout=0.1)
            began = time.monotonic()
            with pytest.raises(NotSentError, match="Timeout connecting"):
                store.get_run("run")
            assert time.monotonic() - began < LATE / 2

    @pytest.mark.parametrize("kind", BOUNDED)
    def test_many_dead_addresses_do_not_extend_a_call(self, names: Names, kind: str) -> None:
        """The call has 0.8 seconds, and redis-py would try 100 addresses for 0.3 seconds each."""
        names.released.set()
        with full_port() as port, client_of(kind, host=NAME, port=1, retry=None, **SHORT) as client:
            names.ports = [port] * 100
            store = StepRunStore(client, own_connections=kind == "own", timeout=0.2)
            began = time.monotonic()
            with pytest.raises(NotSentError, match="Timeout connecting"):
                store.get_run("run")
            assert time.monotonic() - began < LATE / 2
            names.ports.clear()

    @pytest.mark.parametrize("kind", BOUNDED)
    def test_connection_that_opens_too_late_is_closed(self, names: Names, kind: str) -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            client_of(kind, host=NAME, port=1, retry=None, **SHORT) as client,
        ):
            names.ports = [server.getsockname()[1]]
            store = StepRunStore(client, own_connections=kind == "own", timeout=0.1)
            with pytest.raises(NotSentError, match="Timeout connecting"):
                store.get_run("run")
            names.released.set()
            wait_until(names.have_ended)
            server.settimeout(LATE)
            accepted, _ = server.accept()
            with accepted:
                accepted.settimeout(LATE)
                assert accepted.recv(1) == b""

    @pytest.mark.parametrize("kind", BOUNDED)
    def test_name_that_is_found_in_time_is_connected(self, names: Names, backend: Backend, kind: str) -> None:
        names.released.set()
        with Proxy.to(backend.raw) as proxy, client_of(kind, host=NAME, port=1, **PATIENT) as client:
            names.ports = [proxy.port]
            store = StepRunStore(client, own_connections=kind == "own")
            for _ in range(2):
                assert store.get_run("run") == []
            (thread,) = names.threads
            assert thread is not threading.current_thread()
            for connection in idle_of(client.connection_pool):
                assert "_connect" not in vars(connection)
            store.close()

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
    def test_address_is_connected_without_a_thread(self, names: Names, closed_port: int, host: str) -> None:
        with redis.Redis(host=host, port=closed_port, retry=None, **SHORT) as client, pytest.raises(NotSentError):
            StepRunStore(client, timeout=0.05).get_run("run")
        assert set(names.threads) == {threading.current_thread()}

    def test_signal_handler_interrupts_a_slow_look_up(self, names: Names) -> None:
        class InterruptionError(Exception): ...

        def handler(number: int, frame: object) -> None:
            raise InterruptionError

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            with (
                socket.create_server(("127.0.0.1", 0)) as server,
                redis.Redis(host=NAME, port=1, socket_timeout=LATE) as client,
            ):
                names.ports = [server.getsockname()[1]]
                main = threading.get_ident()
                interrupting = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGUSR1))
                interrupting.start()
                with pytest.raises(InterruptionError):
                    StepRunStore(client, timeout=LATE).get_run("run")
                interrupting.join()
                names.released.set()
                accepted, _ = server.accept()
                with accepted:
                    assert accepted.recv(1) == b""
        finally:
            signal.signal(signal.SIGUSR1, before)
