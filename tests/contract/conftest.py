"""The contract holds on three kinds of stores: blocking, asyncio, and stores of a test kit with an advanced clock."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.backends import Backend, Bench, buckets_of

from squidstep_redis import StepRun
from squidstep_redis.testing import StepKit

_prefixes = (f"contract-{number}" for number in itertools.count())

DAY = 86_400
MOVED_CLOCK = "moved clock"
# The servers with the moved clock; on others it is tested by kit/test_clock.py.
MOVED_CLOCK_SERVERS = ("fakeredis",)


class KitBench(Bench):
    """Makes blocking stores on the client of a kit, and expires leases by moving its clock, without waiting."""

    def __init__(self, kit: StepKit) -> None:
        backend: Any = SimpleNamespace(
            name="kit",
            connect=lambda: kit.store.client,
            now=lambda: kit.clock.now().timestamp(),
            raw=kit.observer.client,
        )
        super().__init__(cast("Backend", backend), None, kit.prefix)
        self.kit = kit

    def lapse(self, step_run: StepRun) -> None:
        assert step_run.lease_ends_at is not None
        self.kit.clock.advance_to(step_run.lease_ends_at)


@pytest.hookimpl(tryfirst=True)  # before tests are marked as quick
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not _needs_another_server(item)]
    for item in items:
        if _parameters(item).get("bench") == MOVED_CLOCK:
            item.add_marker("slow")


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _needs_another_server(item: pytest.Item) -> bool:
    parameters = _parameters(item)
    return parameters.get("bench") == MOVED_CLOCK and parameters["backend"] not in MOVED_CLOCK_SERVERS


@pytest.fixture(params=["blocking", "asyncio", MOVED_CLOCK])
def bench(request: pytest.FixtureRequest, backend: Backend) -> Iterator[Bench]:
    """Makes stores: on each server, of each of the three kinds."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(buckets_of(request.node))
        if request.param == MOVED_CLOCK:
            kit = stack.enter_context(StepKit(backend.url or "fakeredis"))
            kit.clock.advance(DAY + 0.0015)
            bench: Bench = KitBench(kit)
        else:
            runner = request.getfixturevalue("runner") if request.param == "asyncio" else None
            bench = Bench(backend, runner, next(_prefixes))
        yield bench
        bench.close()
