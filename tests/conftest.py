"""Fixtures: one behaviour suite, every server, both stores."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support.backends import ALL_SERVERS, DEFAULT_SERVERS, Backend, Bench, running
from support.servers import find_binary

from squidstep_redis import StepRunStore

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("soak", settings.get_profile("default"), max_examples=5_000, stateful_step_count=100)
settings.load_profile("default")

_prefixes = (f"test-{number}" for number in itertools.count())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--servers",
        default=",".join(DEFAULT_SERVERS),
        help=f"comma-separated, of {', '.join(ALL_SERVERS)}, or 'all'. One that is named and not there is an error.",
    )
    parser.addoption("--soak-seconds", default=300, type=int, help="how long -m soak lasts")


def pytest_configure(config: pytest.Config) -> None:
    names = config.getoption("--servers")
    wanted = ALL_SERVERS if names == "all" else tuple(names.split(","))
    if unknown := set(wanted) - set(ALL_SERVERS):
        raise pytest.UsageError(f"--servers: unknown {sorted(unknown)}; there are {', '.join(ALL_SERVERS)}")
    config.stash[SERVERS] = wanted
    if "PYTEST_XDIST_WORKER" in os.environ and sys.platform == "linux":
        # When the run is killed, its workers would go on with what they have been given.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


SERVERS: pytest.StashKey[tuple[str, ...]] = pytest.StashKey()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    only = metafunc.definition.get_closest_marker("servers")
    wanted = [name for name in metafunc.config.stash[SERVERS] if only is None or name in only.args]
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", wanted, indirect=True, scope="session")
    if "binary" in metafunc.fixturenames:
        names = [name for name in wanted if name in ("valkey", "redis-7", "redis-6")]
        metafunc.parametrize("binary", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with running(request.param) as backend:
        yield backend


@pytest.fixture(scope="session")
def binary(request: pytest.FixtureRequest) -> Path:
    """The server binary, of each real server that was asked for."""
    return find_binary(request.param)


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=["blocking", "asyncio"])
def bench(request: pytest.FixtureRequest, backend: Backend) -> Iterator[Bench]:
    """Makes stores: on each server, blocking and asyncio."""
    runner = request.getfixturevalue("runner") if request.param == "asyncio" else None
    bench = Bench(backend, runner, next(_prefixes))
    yield bench
    bench.close()


@pytest.fixture
def store(bench: Bench) -> StepRunStore:
    """A store with the default settings: on each server, blocking and asyncio."""
    return bench.store()
