"""The pools of Celery that have no child processes: threads, and gevent with its monkey patches."""

from __future__ import annotations

from datetime import datetime
from uuid import uuid4

import pytest
from support import celery_app
from support.celery_harness import Harness

pytest_plugins = ["support.celery_fixtures"]
pytestmark = pytest.mark.parametrize("worker", ["threads", "gevent"], indirect=True, scope="module")


def test_task_beyond_its_visibility_timeout_takes_effect_once(harness: Harness) -> None:
    task = celery_app.charge.delay(harness.number)
    harness.reached(f"charging {harness.number}")
    harness.redeliver(task)
    assert harness.ended(task)[0] == "RETRY"
    harness.resume(f"charging {harness.number}")

    assert harness.results(task, 2) == [{"charged": harness.number}] * 2
    assert harness.effects() == {"charge": 1}


def test_duplicates_at_the_same_time_take_effect_once(harness: Harness) -> None:
    ids = [str(uuid4()) for _ in range(10)]
    for _ in range(3):
        for number, id in enumerate(ids, harness.number):
            celery_app.charge_at_once.apply_async((number,), task_id=id)

    for number, id in enumerate(ids, harness.number):
        assert harness.results(id, 3) == [{"charged": number}] * 3
    assert harness.effects() == {"charge": 10}


def test_lease_is_extended_while_the_task_waits(harness: Harness) -> None:
    task = celery_app.charge_under_a_short_lease.delay(harness.number)
    harness.reached(f"charging {harness.number}")
    first = _lease_ends_at(harness, task.id)
    harness.until(lambda: _lease_ends_at(harness, task.id) > first)
    harness.resume(f"charging {harness.number}")

    assert harness.results(task, 1) == [{"charged": harness.number}]
    assert harness.outcomes(task.id, "charge") == ["completed"]


def test_concurrent_tasks_keep_their_runs_apart(harness: Harness) -> None:
    numbers = range(harness.number, harness.number + 3)
    tasks = [celery_app.ship.delay(number) for number in numbers]
    for number in numbers:
        harness.reached(f"between {number}")
    for number in numbers:
        harness.resume(f"between {number}")

    for number, task in zip(numbers, tasks, strict=True):
        assert harness.results(task, 1) == [[f"parcel of {number}", f"parcel of {number}, announced"]]
        assert harness.store.completed_steps(task.id) == ["reserve", "announce"]


def _lease_ends_at(harness: Harness, run_id: str) -> datetime:
    found = harness.store.get_step_run(run_id, "charge")
    assert found is not None
    assert found.lease_ends_at is not None
    return found.lease_ends_at
