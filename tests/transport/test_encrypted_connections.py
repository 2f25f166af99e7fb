"""Idle connections with TLS: the check before they are used again says whether a call was sent."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import redis
from redis._parsers import _HiredisParser
from support.backends import Backend
from support.internals import check_every_connection, retry_for
from support.tls import CLIENT_OPTIONS, TlsFront

from squidstep_redis import NotSentError, StepRunStore
from squidstep_redis.transport.connection import OwnConnections

from .conftest import HookedRedis

pytestmark = pytest.mark.servers("valkey")

OPTIONS: dict[str, Any] = {**CLIENT_OPTIONS, "protocol": 2, "socket_timeout": 20, "socket_connect_timeout": 20}


@pytest.fixture(autouse=True)
def check_idle_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    check_every_connection(monkeypatch)


@pytest.fixture
def front(backend: Backend, tmp_path: Path) -> Iterator[TlsFront]:
    with TlsFront(backend.raw.connection_pool.connection_kwargs["path"], tmp_path / "server.pem") as front:
        yield front
    backend.flush()


@contextlib.contextmanager
def opened_store(front: TlsFront, kind: str) -> Iterator[StepRunStore]:
    """Yields a store that has an idle connection."""
    with (HookedRedis if kind == "hooked" else redis.Redis)(port=front.port, **OPTIONS) as client:
        store = StepRunStore(client, own_connections=kind == "own")
        with contextlib.closing(store):
            store.schedule_step("run", "before", {})
            yield store


@pytest.mark.parametrize("kind", ["own", "plain", "hooked"])
def test_server_gone_between_two_calls_is_not_sent_encrypted(front: TlsFront, kind: str) -> None:
    with opened_store(front, kind) as store:
        retry_for(store, 0.05)
        front.end()
        with pytest.raises(NotSentError, match="nothing was sent"):
            store.begin_step("run", "pay", {})


def test_closed_encrypted_connection_is_not_idle(front: TlsFront) -> None:
    client = redis.Redis(port=front.port, **OPTIONS)
    connections = OwnConnections(client)
    connections.connect(0)
    assert connections.has_idle()
    front.end()
    assert not connections.has_idle()


def test_open_encrypted_connection_is_used_again(front: TlsFront) -> None:
    with opened_store(front, "own") as store:
        accepted = front.accepted
        store.schedule_step("run", "pay", {})
        assert front.accepted == accepted


@pytest.mark.parametrize("error", [ValueError, TimeoutError])
def test_error_of_a_handler_during_the_check_is_raised(front: TlsFront, error: type[Exception]) -> None:
    def handler(number: int, frame: object) -> None:
        raise error("of the handler")

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGUSR1)

    with opened_store(front, "own") as store:
        before = signal.signal(signal.SIGUSR1, handler)
        try:
            with (
                mock.patch.object(_HiredisParser, "can_read", side_effect=interrupt),
                pytest.raises(error, match="of the handler"),
            ):
                store.begin_step("run", "pay", {})
        finally:
            signal.signal(signal.SIGUSR1, before)
