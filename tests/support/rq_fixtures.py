"""Fixtures of the RQ tests. A test file loads them by `pytest_plugins`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from rq import Queue

from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.rq import stores
from support.rq_harness import LEAVES_LOOPS_OPEN, Harness
from support.servers import find_binary


@pytest.fixture(scope="session")
def session_rq_server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server


@pytest.fixture
def rq_server(session_rq_server: EmbeddedServer) -> EmbeddedServer:
    """One server for the session, emptied by `harness`; a test class can override this fixture."""
    return session_rq_server


@pytest.fixture
def fresh_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the stores of this process, as if `configure` had not been called."""
    monkeypatch.setattr(stores, "_stores", stores.JobStores())


@pytest.fixture
def harness(
    rq_server: EmbeddedServer, fresh_stores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Harness]:
    with Harness(rq_server.url, tmp_path) as harness:
        harness.connection.flushall()
        for name, value in harness.environment.items():
            monkeypatch.setenv(name, value)
        yield harness
    if LEAVES_LOOPS_OPEN:
        gc.collect()


@pytest.fixture(params=["fakeredis", "valkey"])
def queue(request: pytest.FixtureRequest, harness: Harness) -> Queue:
    """A queue that runs its jobs inside enqueue()."""
    connection: Any = fakeredis.FakeStrictRedis() if request.param == "fakeredis" else harness.connection
    return Queue("steps", is_async=False, connection=connection)
