"""The pytest plugin: fixtures for those who test code that uses a store; `squidstep_redis.testing` is what they give.

pytest loads it wherever this library is installed, so it imports nothing before a test asks for a fixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from squidstep_redis import AsyncStepRunStore, StepRunStore
    from squidstep_redis.testing import StepClock, StepFaults, StepKit

_WHERE = "'fakeredis' (the default), 'embedded' for a Valkey that comes and goes with the tests, or the URL of a server"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option, and the same in the ini file."""
    group = parser.getgroup("squidstep")
    group.addoption("--squidstep-server", metavar="WHERE", help=f"where step_store keeps its runs: {_WHERE}")
    parser.addini("squidstep_server", f"where step_store keeps its runs: {_WHERE}", default="fakeredis")


@pytest.fixture(scope="session")
def step_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the stores of this session keep their runs: "fakeredis", or a URL."""
    where: str = request.config.getoption("--squidstep-server") or request.config.getini("squidstep_server")
    if where != "embedded":
        yield where
        return
    from squidstep_redis.embedded import EmbeddedServer

    with EmbeddedServer() as server:
        yield server.url


@pytest.fixture
def step_settings() -> dict[str, Any]:
    """Settings of the stores, such as `run_ttl` or `codec`: override it in your conftest.py."""
    return {}


@pytest.fixture
def step_kit(request: pytest.FixtureRequest, step_server: str, step_settings: dict[str, Any]) -> Iterator[StepKit]:
    """All that the other fixtures give, in one: a `squidstep_redis.testing.StepKit`."""
    from squidstep_redis.testing import StepKit

    failed_before = request.session.testsfailed
    with StepKit(step_server, **step_settings) as kit:
        yield kit
        pending = kit.faults.pending()
    if pending and request.session.testsfailed == failed_before:  # a test that failed has said enough
        pytest.fail("faults that the test asked for never struck: " + "; ".join(pending), pytrace=False)


@pytest.fixture
def step_store(step_kit: StepKit) -> StepRunStore:
    """A store of the test's own: on fakeredis, or where `--squidstep-server` says."""
    return step_kit.store


@pytest.fixture
def async_step_store(step_kit: StepKit) -> AsyncStepRunStore:
    """The same for asyncio, with the same runs; it connects in the loop that uses it, and is closed by itself."""
    return step_kit.async_store


@pytest.fixture
def step_clock(step_kit: StepKit) -> StepClock:
    """The clock of both stores: `step_clock.advance(30)` ends leases without any sleep."""
    return step_kit.clock


@pytest.fixture
def step_faults(step_kit: StepKit) -> StepFaults:
    """What can go wrong for both stores: lost replies, takeovers, a worker that is killed, a server that is away."""
    return step_kit.faults
