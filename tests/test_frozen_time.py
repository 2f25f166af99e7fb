"""A library that freezes time for a test, such as freezegun, does not stop the timeouts and heartbeats of a store."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import NotSentError, StepRunStore, WaitTimeoutError

pytestmark = pytest.mark.servers("fakeredis", "valkey")


@pytest.fixture
def frozen_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replaces the monotonic clock in all modules of the package, as such a library does, and in `time` itself."""
    real, frozen = time.monotonic, time.monotonic()
    for name, module in list(sys.modules.items()):
        if name == "time" or name.startswith("squidstep_redis"):
            for attribute, value in list(vars(module).items()):
                if value is real:
                    monkeypatch.setattr(module, attribute, lambda: frozen)
    yield
    monkeypatch.undo()


# An event loop has its own clock, which such a library freezes unless it is configured otherwise.
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@pytest.mark.timeout(20)
@pytest.mark.usefixtures("frozen_time")
class TestFrozenTime:
    def test_waiting_ends_with_its_timeout(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))
        with pytest.raises(WaitTimeoutError):
            store.wait_for_step("run", "pay", timeout=0.1)

    @pytest.mark.usefixtures("bench")
    def test_call_to_an_unreachable_server_ends_with_its_timeout(self) -> None:
        with pytest.raises(NotSentError, match="could not connect within 0.2 s"):
            StepRunStore.from_url("redis://127.0.0.1:1", timeout=0.2).begin_step("run", "pay", {})

    def test_leases_are_extended(self, bench: Bench, store: StepRunStore) -> None:
        def work(_: object) -> dict[str, int]:
            first = stored(bench.store()).lease_ends_at
            assert first is not None
            for _ in range(200):
                threading.Event().wait(0.02)
                ends = stored(bench.store()).lease_ends_at
                if ends is not None and ends > first:
                    return {"extended": 1}
            return {"extended": 0}

        assert store.run_step("run", "pay", work, {}, lease=0.6) == {"extended": 1}
