"""Fixtures of the whole suite: each server that `--servers` names, and on it the blocking and the asyncio store."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from support import caches
from support.backends import ALL_SERVERS, DEFAULT_SERVERS, Backend, Bench, buckets_of, running
from support.claims import interrupted_seconds
from support.process_state import process_state
from support.servers import find_binary
from support.storm_length import StormLength

from squidstep_redis import StepRunStore
from squidstep_redis.claims.heartbeat import Heartbeat

settings.register_profile(
    "default",
    deadline=None,
    max_examples=30,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.register_profile(  # CI: a failure is shown at once and not made smaller, which can take minutes
    "thorough", settings.get_profile("default"), max_examples=250, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("soak", settings.get_profile("default"), max_examples=5_000, stateful_step_count=100)
settings.load_profile("default")

SERVERS: pytest.StashKey[tuple[str, ...]] = pytest.StashKey()
NO_SERVER = "no server that was asked for"  # a parameter of tests that are deselected

caches.install()
gc.disable()  # until all tests are collected: the collector would look at many new objects, and find little garbage

_prefixes = (f"test-{number}" for number in itertools.count())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--servers",
        default=None,
        help=f"comma-separated, of {', '.join(ALL_SERVERS)}, or 'all'; by default {', '.join(DEFAULT_SERVERS)}, and "
        "with -m quick fakeredis alone. A server that is named and missing is an error.",
    )
    parser.addoption("--soak-seconds", default=300, type=int, help="how long -m soak lasts")
    parser.addoption("--storm-seconds", default=0, type=float, help="how long each storm lasts; 0: its short form")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns the workers of `-n auto`: every worker collects all tests, so a quick run has fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Tests wait for leases and timeouts, and those that are not quick for servers, too.
    return cores + 1 if config.getoption("markexpr") == "quick" else min(3 * cores, 8)


def pytest_configure(config: pytest.Config) -> None:
    names = config.getoption("--servers")
    if names is None:
        wanted = ("fakeredis",) if config.getoption("markexpr") == "quick" else DEFAULT_SERVERS
    else:
        wanted = ALL_SERVERS if names == "all" else tuple(names.split(","))
    if unknown := set(wanted) - set(ALL_SERVERS):
        raise pytest.UsageError(f"--servers: unknown {sorted(unknown)}; there are {', '.join(ALL_SERVERS)}")
    config.stash[SERVERS] = wanted
    # pytest-randomly, if it is not disabled: the order alone is random. Seeding generators costs CPU in every test.
    config.option.randomly_reset_seed = False
    if "PYTEST_XDIST_WORKER" in os.environ and sys.platform == "linux":
        # A worker must not continue its tests when the run is killed.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


# Which tests there are


# Almost every test in these directories starts processes or servers. Importing them takes as long as many quick tests.
NOT_QUICK = {"commands", "faults", "task_queues", "transport", "wire"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return (collection_path.name in NOT_QUICK and config.getoption("markexpr") == "quick") or None


@pytest.hookimpl(tryfirst=True)  # before pytest collects
def pytest_collection(session: pytest.Session) -> None:
    """Imports a worker's share of the modules first: in a fresh clone each is compiled once, not by every worker."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        share = slice(int(worker.removeprefix("gw")), None, int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
        tests = Path(__file__).parent
        given = [session.config.rootpath / argument for argument in session.config.args]
        modules = [path for directory in given for path in sorted(directory.rglob("test_*.py"))]  # none in a file
        for path in [path for path in modules if not pytest_ignore_collect(path.parent, session.config)][share]:
            with contextlib.suppress(Exception):  # pytest imports it again, and reports the error
                importlib.import_module(".".join(path.relative_to(tests).with_suffix("").parts))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    only = metafunc.definition.get_closest_marker("servers")
    wanted = [name for name in metafunc.config.stash[SERVERS] if only is None or name in only.args]
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", wanted or [NO_SERVER], indirect=True, scope="session")
    if "binary" in metafunc.fixturenames:
        names = [name for name in wanted if name in ("valkey", "redis-7", "redis-6")]
        metafunc.parametrize("binary", names or [NO_SERVER], indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = {item for item in items if not _is_applicable(item)}
    if unwanted:
        config.hook.pytest_deselected(items=list(unwanted))
        items[:] = [item for item in items if item not in unwanted]
    for item in items:
        if _is_quick(item):
            item.add_marker("quick")
        if isinstance(item, pytest.Function) and "storm_length" in item.fixturenames:
            item.add_marker("storm")


def pytest_collection_finish() -> None:
    """Excludes the collected tests from garbage collections: they stay, and some tests collect explicitly."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _is_applicable(item: pytest.Item) -> bool:
    parameters = _parameters(item)
    server = parameters.get("backend", parameters.get("binary"))
    directory = item.path.parent.name
    if parameters.get("bench") == "asyncio" and server == "cluster" and directory not in OF_THE_TRANSPORT:
        return False
    is_default = item.config.stash[SERVERS] is DEFAULT_SERVERS
    if is_default and server == "fakeredis" and _is_quick(item) and directory not in NOT_QUICK:
        return False  # -m quick runs it
    not_on = item.get_closest_marker("not_on")
    return server != NO_SERVER and (not_on is None or server not in not_on.args)


# A module that imports one of these starts processes, servers or proxies.
STARTERS = {
    *("EmbeddedCluster", "EmbeddedServer", "Harness", "Proxy", "demos", "multiprocessing", "pytester", "subprocess")
}


# An asyncio store differs from a blocking one in its transport only. These directories test that. The others do not use
# asyncio stores on a cluster.
OF_THE_TRANSPORT = {"wire", "transport", "faults", "asgi"}


# These tests disturb no connection, so they can share a cluster's client. Making one takes longer than most of them.
UNDISTURBED = {"contract", "payloads", "runs"}


def _is_quick(item: pytest.Item) -> bool:
    """A quick test runs in this process, on fakeredis or on no server."""
    if not isinstance(item, pytest.Function) or any(map(item.get_closest_marker, ("slow", "soak"))):
        return False
    if "backend" in (parameters := _parameters(item)):
        return parameters["backend"] == "fakeredis"
    return not STARTERS & {*vars(item.module), *item.fixturenames}


@pytest.fixture
def storm_length(request: pytest.FixtureRequest) -> StormLength:
    """The length of a test that interrupts calls at random moments."""
    return StormLength(request.config.getoption("--storm-seconds"))


# Servers and stores


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[[str], Backend]]:
    """Starts each server once, at its first use, in any order of the tests."""
    with contextlib.ExitStack() as stack:
        started: dict[str, Backend] = {}

        def start(name: str) -> Backend:
            if name not in started:
                started[name] = stack.enter_context(running(name))
            return started[name]

        yield start


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest, start: Callable[[str], Backend]) -> Backend:
    """Each server that was asked for. Every xdist worker has its own."""
    return start(request.param)


@pytest.fixture(scope="session")
def binary(request: pytest.FixtureRequest) -> Path:
    """The binary of each real server that was asked for."""
    return find_binary(request.param)


@pytest.fixture(scope="session", autouse=True)
def short_lived_heartbeats() -> Iterator[None]:
    """Heartbeat threads end soon after their last claim: tests fork, and some wait for the end."""
    with mock.patch.object(Heartbeat, "IDLE", 0.02):
        yield


@pytest.fixture(scope="session", autouse=True)
def patient_interruptions() -> Iterator[None]:
    """Interrupted blocks wait for as long as a busy machine needs. Tests of their second set it again."""
    with interrupted_seconds(30):
        yield


@pytest.fixture(scope="module", autouse=True)
def unchanged_process() -> Iterator[None]:
    """Fails in the module that changes a setting of the whole process, not in the one that runs after it."""
    before = process_state()
    yield
    assert process_state() == before


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=["blocking", "asyncio"])
def bench(request: pytest.FixtureRequest, backend: Backend) -> Iterator[Bench]:
    """Makes stores: on each server, blocking and asyncio."""
    runner = request.getfixturevalue("runner") if request.param == "asyncio" else None
    bench = Bench(backend, runner, next(_prefixes), shares_client=request.path.parent.name in UNDISTURBED)
    with buckets_of(request.node):
        yield bench
    bench.close()
    backend.flush()  # tests that scan the server must not depend on those that ran before


@pytest.fixture
def store(bench: Bench) -> StepRunStore:
    """A store with the default settings: on each server, blocking and asyncio."""
    return bench.store()


# Commands


@pytest.fixture
def default_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the variables that change what the commands do."""
    for name in ("NO_COLOR", "FORCE_COLOR", "SQUIDSTEP_REDIS_URL", "RQ_REDIS_URL", "SQUIDSTEP_PREFIX"):
        monkeypatch.delenv(name, raising=False)
