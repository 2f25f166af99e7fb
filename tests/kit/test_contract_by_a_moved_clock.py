"""The contract once more, row by row, on the stores of a kit: by a clock that is ahead, and without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.backends import Backend, Bench
from test_contract import (  # noqa: F401 -- pytest collects them from here
    TestAdvanceStep,
    TestBeginStep,
    TestClaimsAreCarriedByBeginAlone,
    TestCompleteStep,
    TestExtendClaim,
    TestFailStep,
    TestReleaseStep,
    TestScheduleStep,
)

from squidstep_redis import StepRun, StepRunStore
from squidstep_redis.testing import StepKit

pytestmark = pytest.mark.servers("fakeredis", "valkey")  # on a cluster the clock is tried by test_clock.py

DAY = 86_400


class KitBench(Bench):
    """Makes stores on the clients of a kit."""

    def __init__(self, kit: StepKit) -> None:
        backend: Any = SimpleNamespace(
            connect=lambda: kit.store.client,
            now=lambda: kit.clock.now().timestamp(),
            raw=kit.observer.client,
        )
        super().__init__(cast("Backend", backend), None, kit.prefix)
        self.kit = kit

    def lapse(self, step_run: StepRun) -> None:
        assert step_run.lease_ends_at is not None
        self.kit.clock.advance_to(step_run.lease_ends_at)


@pytest.fixture
def bench(kit: StepKit) -> Iterator[Bench]:
    kit.clock.advance(DAY + 0.0015)
    bench = KitBench(kit)
    yield bench
    bench.close()


@pytest.fixture
def store(bench: Bench) -> StepRunStore:
    return bench.store()
