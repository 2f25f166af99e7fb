"""What connecting may cost: the client's own retries, its look-ups of names, and dead addresses extend no call."""

from __future__ import annotations

import socket
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

from squidstep_redis import NotSentError, StepRunStore
from squidstep_redis.transport.client import idle_of

from .conftest import HookedRedis

pytestmark = pytest.mark.servers("valkey")

SHORT: Any = {"socket_timeout": 0.3, "socket_connect_timeout": 0.3}
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
