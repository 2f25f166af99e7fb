"""Fixtures of the claim tests: a worker under test, and the store of the other workers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
from support.asyncio_stores import embedded
from support.backends import Backend, Bench
from support.claims import Worker, connected
from support.interruptions import clear_unraised_exceptions, raise_in, sigalrm_raises
from support.proxy import Proxy

from squidstep_redis import StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.scripts import directory, script


@pytest.fixture
def worker(bench: Bench) -> Iterator[Worker]:
    worker = Worker(bench)
    yield worker
    worker.settle()


@pytest.fixture
def others(bench: Bench) -> Iterator[StepRunStore]:
    """The store of the other workers: a test observes the step with it, or takes it over."""
    with contextlib.closing(bench.backend.connect()) as client:
        yield StepRunStore(client, prefix=bench.prefix)


@pytest.fixture
def proxied(bench: Bench) -> Iterator[tuple[Worker, Proxy]]:
    """A worker whose calls pass through a proxy, to a server that knows all scripts."""
    for path in directory().glob("*.lua"):
        bench.backend.raw.script_load(script(path.stem).source)
    with Proxy.to(bench.backend.raw) as proxy, connected(bench, f"redis://127.0.0.1:{proxy.port}") as worker:
        yield worker, proxy


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """Each SIGALRM raises `AlarmError`, and is listed here."""
    with sigalrm_raises() as raised:
        yield raised


@pytest.fixture
def raise_in_thread() -> Iterator[Callable[[threading.Thread], None]]:
    """Raises OutsideError in a thread, wherever it is."""
    yield raise_in
    clear_unraised_exceptions()


@pytest.fixture(scope="module")
def started(backend: Backend) -> Iterator[tuple[EmbeddedServer, StepRunStore]]:
    """A server of the module's own, and a blocking store on it."""
    with embedded(backend.name) as started:
        yield started


@pytest.fixture
def server(started: tuple[EmbeddedServer, StepRunStore]) -> Iterator[EmbeddedServer]:
    """An empty server, which a test may pause."""
    server, observer = started
    observer.client.flushall()
    yield server
    server.resume()


@pytest.fixture
def observer(started: tuple[EmbeddedServer, StepRunStore]) -> StepRunStore:
    """A blocking store on `server`, in addition to the asyncio stores under test."""
    return started[1]
