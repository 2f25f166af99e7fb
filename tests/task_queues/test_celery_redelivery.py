"""Tasks that Celery delivers more than once, in real workers: each step takes effect once."""

from __future__ import annotations

from uuid import uuid4

from celery import chain, chord, group
from support import celery_app
from support.celery_harness import Harness

pytest_plugins = ["support.celery_fixtures"]


def test_task_beyond_its_visibility_timeout_takes_effect_once(harness: Harness) -> None:
    task = celery_app.charge.delay(harness.number)
    harness.reached(f"charging {harness.number}")
    harness.redeliver(task)
    assert harness.ended(task)[0] == "RETRY"  # it found the step busy
    harness.resume(f"charging {harness.number}")

    assert harness.results(task, 2) == [{"charged": harness.number}] * 2
    assert task.get() == {"charged": harness.number}
    assert harness.effects() == {"charge": 1}
    assert harness.outcomes(task.id, "charge") == ["completed"]


def test_step_of_a_killed_child_is_taken_over(harness: Harness) -> None:
    task = celery_app.charge_unless_killed.delay(harness.number)
    harness.kill(harness.reached(f"charging {harness.number}"))

    assert harness.results(task, 1) == [{"charged": harness.number}]
    assert harness.effects() == {"charge": 1}
    assert harness.outcomes(task.id, "charge") == ["lease_expired", "completed"]


def test_hundred_duplicates_of_fifty_tasks_leave_fifty_effects(harness: Harness) -> None:
    ids = [str(uuid4()) for _ in range(50)]
    for _ in range(3):
        for number, id in enumerate(ids, harness.number):
            celery_app.charge_at_once.apply_async((number,), task_id=id)

    for number, id in enumerate(ids, harness.number):
        assert harness.results(id, 3) == [{"charged": number}] * 3
    assert harness.effects() == {"charge": 50}


def test_busy_step_uses_none_of_the_tasks_retries(harness: Harness) -> None:
    held, _ = harness.store.begin_step(f"order-{harness.number}", "charge", {"number": harness.number}, lease=600)
    task = celery_app.charge_order.delay(harness.number)
    for _ in range(2):
        assert harness.ended(task)[0] == "RETRY"
    harness.store.expire_claim(held)

    assert harness.results(task, 1) == [[harness.number, 0]]
    assert harness.effects() == {"charge": 1}


def test_redelivered_chain_executes_each_link_once(harness: Harness) -> None:
    result = chain(celery_app.charge.s(harness.number), celery_app.add_amount.s(1)).apply_async()
    first = result.parent
    harness.reached(f"charging {harness.number}")
    harness.redeliver(first)
    assert harness.ended(first)[0] == "RETRY"
    harness.resume(f"charging {harness.number}")

    assert harness.results(first, 2) == [{"charged": harness.number}] * 2
    assert harness.results(result, 2) == [harness.number + 1] * 2
    assert harness.effects() == {"charge": 1, "add": 1}


def test_redelivered_chord_executes_its_body_once(harness: Harness) -> None:
    members = group(celery_app.add.s(harness.number, 1), celery_app.add.s(2))
    result = chord(members, celery_app.add.s()).apply_async()

    assert harness.results(result, 1) == [harness.number + 3]
    celery_app.add.apply_async(([harness.number + 1, 2],), task_id=result.id)  # as a redelivery
    assert harness.results(result, 1) == [harness.number + 3]
    assert harness.effects() == {"add 1": 1, "add 3": 1}


def test_redelivery_of_a_chosen_task_id_continues_the_run(harness: Harness) -> None:
    task = celery_app.charge.apply_async((harness.number,), task_id=f"nightly {harness.number}")
    harness.reached(f"charging {harness.number}")
    harness.redeliver(task)
    assert harness.ended(task)[0] == "RETRY"
    harness.resume(f"charging {harness.number}")
    assert harness.results(task, 2) == [{"charged": harness.number}] * 2
    assert harness.effects() == {"charge": 1}

    celery_app.charge.apply_async((harness.number,), task_id=f"nightly {harness.number}")  # the next night
    harness.reached(f"charging {harness.number}")
    harness.resume(f"charging {harness.number}")
    harness.results(task, 1)
    assert harness.effects() == {"charge": 2}


def test_callback_of_link_needs_a_run_id(harness: Harness) -> None:
    links = [celery_app.add_amount.s(1), celery_app.charge_parcel.s()]
    task = celery_app.charge_at_once.apply_async((harness.number,), link=links)
    harness.results(task, 1)
    celery_app.charge_at_once.apply_async((harness.number,), task_id=task.id, link=links)  # as a redelivery
    harness.results(task, 1)

    harness.until(lambda: harness.effects().total() == 4)
    assert harness.effects() == {"charge": 1, "add": 2, "charge parcel": 1}
