"""The assertions check what they claim, and their failures show the run."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from typing import Any

import fakeredis
import pytest
from support.backends import Backend
from support.records import begun
from support.servers import wait_until

from squidstep_redis import AsyncStepRunStore, StepRunStore
from squidstep_redis.claims.heartbeat import Heartbeat
from squidstep_redis.testing import (
    StepKit,
    assert_completed,
    assert_executed_once,
    assert_failed,
    assert_not_begun,
    describe_run,
)

pytestmark = pytest.mark.servers("fakeredis", "valkey")


@pytest.fixture(params=["blocking", "asyncio"])
def asserted(request: pytest.FixtureRequest, kit: StepKit) -> Any:
    """The store that the assertions get; neither kind needs an await."""
    return kit.store if request.param == "blocking" else kit.async_store


def failing(message: str) -> Any:
    return pytest.raises(AssertionError, match=message)


def test_assert_completed_checks_status_and_output(kit: StepKit, asserted: Any) -> None:
    with failing("^step 'pay' of run 'run' has no record\n\nrun 'run' has no steps$"):
        assert_completed(asserted, "run", "pay")
    step_run = begun(kit.store.begin_step("run", "pay", {"amount": 42}, owner="worker-1"))
    with failing("^step 'pay' of run 'run' is running, not completed\n"):
        assert_completed(asserted, "run", "pay")
    kit.store.complete_step(step_run, {"charged": 42})

    assert assert_completed(asserted, "run", "pay").attempt == 1
    assert assert_completed(asserted, "run", "pay", {"charged": 42}).output == {"charged": 42}
    with failing("has the output {'charged': 42}, not {'charged': 7}"):
        assert_completed(asserted, "run", "pay", {"charged": 7})
    with failing("has the output {'charged': 42}, not None"):
        assert_completed(asserted, "run", "pay", None)
    with failing("is completed, not failed"):
        assert_failed(asserted, "run", "pay")


def test_assert_failed_checks_status_and_error(kit: StepKit, asserted: Any) -> None:
    kit.store.fail_step(begun(kit.store.begin_step("run", "pay", {})), ValueError("card declined"))
    kit.store.fail_step(begun(kit.store.begin_step("run", "mail", {})), {"code": 550})

    assert assert_failed(asserted, "run", "pay").last_error is not None
    assert_failed(asserted, "run", "pay", match="^ValueError: card declined$")
    assert_failed(asserted, "run", "mail", match="'code': 550")
    with failing("failed with 'ValueError: card declined', which does not match 'timeout'"):
        assert_failed(asserted, "run", "pay", match="timeout")
    with failing("is failed, not completed"):
        assert_executed_once(asserted, "run", "pay")


def test_assert_executed_once_counts_takeovers_but_not_releases(kit: StepKit, asserted: Any) -> None:
    kit.store.release_step(begun(kit.store.begin_step("run", "pay", {})))
    kit.store.complete_step(begun(kit.store.begin_step("run", "pay", {})), {})
    assert assert_executed_once(asserted, "run", "pay").attempt == 2

    begun(kit.store.begin_step("run", "mail", {}))
    kit.faults.take_over("run", "mail", output={})
    with failing("was executed 2 times, not once\n"):
        assert_executed_once(asserted, "run", "mail")


def test_assert_not_begun_accepts_a_scheduled_step(kit: StepKit, asserted: Any) -> None:
    assert_not_begun(asserted, "run", "pay")
    kit.store.schedule_step("run", "pay", {})
    assert_not_begun(asserted, "run", "pay")
    kit.store.release_step(begun(kit.store.begin_step("run", "pay", {})))

    with failing("was claimed, and is pending"):
        assert_not_begun(asserted, "run", "pay")


def test_describe_run_shows_steps_and_attempts(kit: StepKit, asserted: Any) -> None:
    kit.store.fail_step(begun(kit.store.begin_step("run", "pay", {}, owner="worker-1")), ValueError("card\ndeclined"))
    kit.store.complete_step(begun(kit.store.begin_step("run", "pay", {}, owner="worker-2")), {"text": "x" * 100})
    kit.store.schedule_step("run", "mail", {"to": "Bergen"})

    *lines, first, second = describe_run(asserted, "run").splitlines()

    assert lines == [
        "run 'run'",
        "  step  status     attempt  owner     input             output or error",
        "  pay   completed  2        worker-2  {}                " + "{'text': '" + "x" * 49 + "…",
        "  mail  pending    0                  {'to': 'Bergen'}",
        "attempts at 'pay'",
    ]
    assert re.fullmatch(r"  1  failed     worker-1  \d+\.\d{3} s  ValueError: card declined", first)
    assert re.fullmatch(r"  2  completed  worker-2  \d+\.\d{3} s", second)


def test_without_a_kit_only_a_blocking_store_works() -> None:
    server = fakeredis.FakeServer()
    blocking = StepRunStore(fakeredis.FakeStrictRedis(server=server))
    blocking.complete_step(begun(blocking.begin_step("run", "pay", {})), {"paid": 1})
    assert_completed(blocking, "run", "pay", {"paid": 1})

    asynchronous = AsyncStepRunStore(fakeredis.FakeAsyncRedis(server=server))
    with pytest.raises(TypeError, match="must be a blocking store, or the asyncio store of a StepKit"):
        assert_completed(asynchronous, "run", "pay")
    asyncio.run(asynchronous.client.aclose())


def test_assertions_reject_the_asyncio_store_of_a_closed_kit() -> None:
    with StepKit() as kit:
        pass
    with pytest.raises(TypeError, match="asyncio store of a StepKit"):
        assert_completed(kit.async_store, "run", "pay")


def test_store_on_the_kits_client_keeps_its_own_prefix(kit: StepKit) -> None:
    other = StepRunStore(kit.store.client, prefix=f"{kit.prefix}:other")
    other.complete_step(begun(other.begin_step("run", "pay", {})), {})

    assert_completed(other, "run", "pay")
    with failing("has no record"):
        assert_completed(kit.store, "run", "pay")


def test_prefix_of_a_kit_cannot_be_set() -> None:
    with pytest.raises(TypeError, match="prefix"):
        StepKit(prefix="production")


@pytest.mark.parametrize("own_connections", [False, True])
def test_threads_of_a_kit_end_with_its_block(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, own_connections: bool
) -> None:
    monkeypatch.setattr(Heartbeat, "IDLE", 60.0)
    threads = set(threading.enumerate())
    with StepKit(backend.url or "fakeredis", own_connections=own_connections) as kit:
        kit.store.run_step("run", "pay", lambda _: {}, {})
        with kit.faults.killed_at("complete_step"):
            kit.store.run_step("run", "ship", lambda _: {}, {})
        wait_until(lambda: "squidstep-heartbeat" in {each.name for each in set(threading.enumerate()) - threads})
    wait_until(lambda: set(threading.enumerate()) <= threads)


def test_kit_without_fakeredis_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fakeredis", None)
    with pytest.raises(ImportError, match=r"needs fakeredis: pip install 'squidstep_redis\[testing\]'"), StepKit():
        pass
