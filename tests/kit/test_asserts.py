"""The assertions hold what they say, and a failure shows the run."""

from __future__ import annotations

import asyncio
from typing import Any

import fakeredis
import pytest
from support.records import begun

from squidstep_redis import AsyncStepRunStore, StepRunStore
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
def looked_at(request: pytest.FixtureRequest, kit: StepKit) -> Any:
    """The store that is handed to the assertions: nothing to await on either."""
    return kit.store if request.param == "blocking" else kit.async_store


def failing(message: str) -> Any:
    return pytest.raises(AssertionError, match=message)


def test_completed(kit: StepKit, looked_at: Any) -> None:
    with failing("^step 'pay' of run 'run' has no record\n\nrun 'run' has no steps$"):
        assert_completed(looked_at, "run", "pay")
    step_run = begun(kit.store.begin_step("run", "pay", {"amount": 42}, owner="worker-1"))
    with failing("^step 'pay' of run 'run' is running, not completed\n"):
        assert_completed(looked_at, "run", "pay")
    kit.store.complete_step(step_run, {"charged": 42})

    assert assert_completed(looked_at, "run", "pay").attempt == 1
    assert assert_completed(looked_at, "run", "pay", {"charged": 42}).output == {"charged": 42}
    with failing("gave {'charged': 42}, not {'charged': 7}"):
        assert_completed(looked_at, "run", "pay", {"charged": 7})
    with failing("gave {'charged': 42}, not None"):
        assert_completed(looked_at, "run", "pay", None)
    with failing("is completed, not failed"):
        assert_failed(looked_at, "run", "pay")


def test_failed(kit: StepKit, looked_at: Any) -> None:
    kit.store.fail_step(begun(kit.store.begin_step("run", "pay", {})), ValueError("card declined"))
    kit.store.fail_step(begun(kit.store.begin_step("run", "mail", {})), {"code": 550})

    assert assert_failed(looked_at, "run", "pay").last_error is not None
    assert_failed(looked_at, "run", "pay", match="^ValueError: card declined$")
    assert_failed(looked_at, "run", "mail", match="'code': 550")
    with failing("failed with 'ValueError: card declined', in which 'timeout' is not found"):
        assert_failed(looked_at, "run", "pay", match="timeout")
    with failing("is failed, not completed"):
        assert_executed_once(looked_at, "run", "pay")


def test_executed_once(kit: StepKit, looked_at: Any) -> None:
    kit.store.release_step(begun(kit.store.begin_step("run", "pay", {})))
    kit.store.complete_step(begun(kit.store.begin_step("run", "pay", {})), {})
    assert assert_executed_once(looked_at, "run", "pay").attempt == 2

    begun(kit.store.begin_step("run", "mail", {}))
    kit.faults.take_over("run", "mail", output={})
    with failing("was executed 2 times, not once\n"):
        assert_executed_once(looked_at, "run", "mail")


def test_not_begun(kit: StepKit, looked_at: Any) -> None:
    assert_not_begun(looked_at, "run", "pay")
    kit.store.schedule_step("run", "pay", {})
    assert_not_begun(looked_at, "run", "pay")
    kit.store.release_step(begun(kit.store.begin_step("run", "pay", {})))

    with failing("was begun: it is pending"):
        assert_not_begun(looked_at, "run", "pay")


def test_a_failure_shows_the_run(kit: StepKit, looked_at: Any) -> None:
    kit.store.fail_step(begun(kit.store.begin_step("run", "pay", {}, owner="worker-1")), ValueError("card\ndeclined"))
    kit.store.complete_step(begun(kit.store.begin_step("run", "pay", {}, owner="worker-2")), {"text": "x" * 100})
    kit.store.schedule_step("run", "mail", {"to": "Bergen"})

    *lines, first, second = describe_run(looked_at, "run").splitlines()

    assert lines == [
        "run 'run'",
        "  step  status     attempt  owner     input             output or error",
        "  pay   completed  2        worker-2  {}                " + "{'text': '" + "x" * 49 + "…",
        "  mail  pending    0                  {'to': 'Bergen'}",
        "attempts at 'pay'",
    ]
    assert first.startswith("  1  failed     worker-1  0.0")
    assert first.endswith(" s  ValueError: card declined")
    assert second.startswith("  2  completed  worker-2  0.0")


def test_stores_of_no_kit() -> None:
    server = fakeredis.FakeServer()
    mine = StepRunStore(fakeredis.FakeStrictRedis(server=server))
    mine.complete_step(begun(mine.begin_step("run", "pay", {})), {"paid": 1})
    assert_completed(mine, "run", "pay", {"paid": 1})

    theirs = AsyncStepRunStore(fakeredis.FakeAsyncRedis(server=server))
    with pytest.raises(TypeError, match="must be a blocking one, or of a kit"):
        assert_completed(theirs, "run", "pay")
    asyncio.run(theirs.client.aclose())


def test_the_stores_of_a_kit_that_has_ended_are_looked_at_no_more() -> None:
    with StepKit() as kit:
        pass
    with pytest.raises(TypeError, match="of a kit"):
        assert_completed(kit.async_store, "run", "pay")


def test_another_store_on_the_kits_client_is_looked_at_by_its_own_prefix(kit: StepKit) -> None:
    mine = StepRunStore(kit.store.client, prefix=f"{kit.prefix}:mine")
    mine.complete_step(begun(mine.begin_step("run", "pay", {})), {})

    assert_completed(mine, "run", "pay")
    with failing("has no record"):
        assert_completed(kit.store, "run", "pay")


def test_nobody_names_the_prefix_of_a_kit() -> None:
    with pytest.raises(TypeError, match="prefix"):
        StepKit(prefix="production")
