"""The pytest plugin: fixtures for testing code that uses a store, built on `squidstep_redis.testing`.

pytest loads the plugin wherever the library is installed. So the plugin imports the library only when a test uses a
fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from squidstep_redis import AsyncStepRunStore, StepRunStore
    from squidstep_redis.testing import StepClock, StepFaults, StepKit

_has_passed = pytest.StashKey[bool]()  # whether the body of a test has passed
_SERVERS = "'fakeredis' (the default), 'embedded' (a Valkey server for this test session), or the URL of a server"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the command-line option and the ini setting.

    Args:
        parser: pytest's parser.
    """
    group = parser.getgroup("squidstep")
    group.addoption("--squidstep-server", metavar="SERVER", help=f"the server of step_store: {_SERVERS}")
    parser.addini("squidstep_server", f"the server of step_store: {_SERVERS}", default="fakeredis")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Notes whether the body of a test has passed.

    Args:
        item: the test.
        call: the part of it that has ended.
    """
    if call.when == "call":
        item.stash[_has_passed] = call.excinfo is None


@pytest.fixture(scope="session")
def step_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The server of this session's stores: "fakeredis" or a URL."""
    server: str = request.config.getoption("--squidstep-server") or request.config.getini("squidstep_server")
    if server != "embedded":
        yield server
        return
    from squidstep_redis.embedded import EmbeddedServer

    with EmbeddedServer() as embedded:
        yield embedded.url


@pytest.fixture
def step_settings() -> dict[str, Any]:
    """Settings of the stores, such as `run_ttl` or `codec`. Override this fixture in your conftest.py."""
    return {}


@pytest.fixture
def step_kit(request: pytest.FixtureRequest, step_server: str, step_settings: dict[str, Any]) -> Iterator[StepKit]:
    """A `squidstep_redis.testing.StepKit`, which has everything that the other fixtures provide."""
    from squidstep_redis.testing import StepKit

    with StepKit(step_server, **step_settings) as kit:
        yield kit
        pending = kit.faults.pending()
    # A failed test is already reported, and a skipped test never reached its faults.
    if pending and request.node.stash.get(_has_passed, False):
        pytest.fail("faults that the test requested did not occur: " + "; ".join(pending), pytrace=False)


@pytest.fixture
def step_store(step_kit: StepKit) -> StepRunStore:
    """A store with no runs, on fakeredis or on the server that `--squidstep-server` names."""
    return step_kit.store


@pytest.fixture
def async_step_store(step_kit: StepKit) -> AsyncStepRunStore:
    """An asyncio store of the same runs. It connects in the loop that uses it, and is closed automatically."""
    return step_kit.async_store


@pytest.fixture
def step_clock(step_kit: StepKit) -> StepClock:
    """The clock of both stores: `step_clock.advance(30)` expires leases without sleeping."""
    return step_kit.clock


@pytest.fixture
def step_faults(step_kit: StepKit) -> StepFaults:
    """Faults for both stores: lost replies, takeovers, a killed worker, an unreachable server."""
    return step_kit.faults
