"""Fixtures of the Celery tests. A test file loads them by `pytest_plugins`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from celery import Celery

from squidstep_redis.celery import configure, stores
from squidstep_redis.embedded import EmbeddedServer
from support.celery_harness import CeleryWorker, Harness
from support.servers import find_binary


@pytest.fixture(scope="session")
def celery_broker() -> Iterator[str]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server.url


@pytest.fixture
def fresh_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the stores of this process, as if `configure` had not been called."""
    monkeypatch.setattr(stores, "_stores", stores.TaskStores())


@pytest.fixture(scope="session")
def session_harness(celery_broker: str) -> Iterator[Harness]:
    harness = Harness(celery_broker)
    yield harness
    harness.close()


@pytest.fixture(scope="module", params=["prefork"])
def worker(
    request: pytest.FixtureRequest, session_harness: Harness, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CeleryWorker]:
    """A worker with the pool that the test module names; it ends with the module, because it takes seconds to start."""
    with start_worker(session_harness, request.param, tmp_path_factory) as worker:
        yield worker


@contextmanager
def start_worker(
    harness: Harness, pool: str, directories: pytest.TempPathFactory, **environment: str
) -> Iterator[CeleryWorker]:
    """Starts a worker, which ends with the block."""
    log = directories.mktemp("celery") / f"{pool}.log"
    worker = CeleryWorker(harness.url, pool, log, **environment)
    try:
        harness.wait_ready()
        yield worker
    finally:
        worker.close()
        print(f"--- {log.name}\n{log.read_text()[-20_000:]}")  # noqa: T201 -- pytest shows it where a test fails


@pytest.fixture
def harness(session_harness: Harness, worker: CeleryWorker, fresh_stores: None) -> Harness:
    session_harness.number += 1_000
    return session_harness


@pytest.fixture
def step_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server for the steps alone, which keeps what it has acknowledged when it is killed."""
    options = {"appendonly": "yes", "appendfsync": "always"}
    directory = tmp_path / "steps"
    with EmbeddedServer(binary=find_binary("valkey"), options=options, port=0, directory=directory) as server:
        yield server


@pytest.fixture
def harness_of_steps(
    session_harness: Harness, step_server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory, fresh_stores: None
) -> Iterator[Harness]:
    """A harness with a worker whose steps are on `step_server`."""
    session_harness.number += 1_000
    with start_worker(session_harness, "prefork", tmp_path_factory, SQUIDSTEP_REDIS_URL=step_server.url):
        yield session_harness


@pytest.fixture
def eager(fresh_stores: None) -> Iterator[Any]:
    """An application whose tasks run inside delay(), with the steps on fakeredis."""
    connection = fakeredis.FakeStrictRedis()
    configure(lambda: connection)
    app: Any = Celery("eager", broker="memory://", set_as_current=False)
    app.conf.task_always_eager = True
    app.task = partial(app.task, shared=False)  # other applications get no tasks of the same names
    yield app
    connection.close()
