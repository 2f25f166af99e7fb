"""Tasks that fail, are retried, exceed their time limits or lose their workers, in real workers."""

from __future__ import annotations

import pytest
from support import celery_app
from support.celery_harness import CeleryWorker, Harness

from squidstep_redis import PermanentError, StepFailedError

pytest_plugins = ["support.celery_fixtures"]


@pytest.mark.parametrize(("error", "raised"), [("permanent", PermanentError), ("lookup", KeyError)])
def test_permanent_failure_stops_autoretry(harness: Harness, error: str, raised: type[Exception]) -> None:
    task = celery_app.charge_or_fail.delay(harness.number, error)

    assert harness.ended(task)[0] == "FAILURE"
    with pytest.raises(raised):
        task.get()
    assert harness.effects() == {error: 1}

    another = celery_app.charge_or_fail.delay(harness.number, error)  # of the same run
    assert harness.ended(another)[0] == "FAILURE"
    with pytest.raises(StepFailedError):
        another.get()
    assert harness.effects() == {error: 1}


def test_other_failure_is_retried_by_autoretry(harness: Harness) -> None:
    task = celery_app.charge_or_fail.delay(harness.number, "other")

    assert harness.results(task, 1) == [{"charged": harness.number}]
    assert harness.outcomes(f"charge-{harness.number}", "charge") == ["failed", "completed"]


def test_retry_of_the_function_is_not_a_failure(harness: Harness) -> None:
    task = celery_app.charge_and_retry.delay(harness.number)

    assert harness.results(task, 1) == [[harness.number, 3]]
    assert harness.effects() == {"called 0": 1, "called 1": 1, "called 2": 1}
    assert harness.outcomes(task.id, "charge") == ["released", "released", "completed"]


def test_retry_later_uses_none_of_the_tasks_retries(harness: Harness) -> None:
    task = celery_app.charge_later.delay(harness.number)

    assert harness.results(task, 1) == [[harness.number, 0]]
    assert harness.outcomes(task.id, "charge") == ["failed", "completed"]


def test_rejected_task_is_executed_by_its_next_delivery(harness: Harness) -> None:
    task = celery_app.charge_or_give_up.delay(harness.number, "reject")

    assert harness.ended(task)[0] == "REJECTED"
    assert harness.ended(task) == ("SUCCESS", {"charged": harness.number})
    assert harness.outcomes(task.id, "charge") == ["released", "completed"]


def test_ignored_task_leaves_its_step_released(harness: Harness) -> None:
    task = celery_app.charge_or_give_up.delay(harness.number, "ignore")

    assert harness.ended(task)[0] == "IGNORED"
    assert harness.outcomes(task.id, "charge") == ["released"]


def test_replacing_task_continues_the_run(harness: Harness) -> None:
    task = celery_app.hand_over.delay(harness.number)

    assert task.get(timeout=60) == {"charged": harness.number}
    assert harness.store.completed_steps(task.id) == ["charge"]
    assert harness.effects() == {"hand over": 1, "charge": 1}


def test_soft_time_limit_is_recorded_as_a_failure(harness: Harness) -> None:
    task = celery_app.overstay.delay(harness.number)

    assert harness.results(task, 1) == [{"charged": harness.number}]
    first, _ = harness.store.attempts(task.id, "charge")
    assert first.outcome == "failed"
    assert "SoftTimeLimitExceeded" in str(first.error)


def test_redelivery_after_a_hard_time_limit_executes_the_step(harness: Harness) -> None:
    task = celery_app.overstay_hard.delay(harness.number)
    harness.reached(f"overstaying {harness.number}")
    harness.redeliver(task)  # Celery 5.3 waits for the visibility timeout

    assert harness.results(task, 1) == [{"charged": harness.number}]
    first, second = harness.outcomes(task.id, "charge")
    assert first in ("failed", "lease_expired")  # Celery gives the child 0.1 seconds after SIGTERM
    assert second == "completed"
    assert harness.effects() == {"charge": 1}


def test_step_of_a_killed_worker_is_taken_over(harness: Harness, worker: CeleryWorker) -> None:
    task = celery_app.charge_unless_killed.delay(harness.number)
    child = harness.reached(f"charging {harness.number}")
    worker.kill()
    harness.wait_dead(child)  # on Linux, it dies with the worker
    worker.start()
    harness.wait_ready()
    harness.redeliver(task)

    assert harness.results(task, 1) == [{"charged": harness.number}]
    assert harness.outcomes(task.id, "charge") == ["lease_expired", "completed"]
    assert harness.effects() == {"charge": 1}


def test_task_of_several_steps_continues_after_the_completed_ones(harness: Harness) -> None:
    task = celery_app.ship.delay(harness.number)
    harness.kill(harness.reached(f"between {harness.number}"))
    harness.reached(f"between {harness.number}")
    harness.resume(f"between {harness.number}")

    assert harness.results(task, 1) == [[f"parcel of {harness.number}", f"parcel of {harness.number}, announced"]]
    assert harness.effects() == {"reserve": 1, "announce": 1}
