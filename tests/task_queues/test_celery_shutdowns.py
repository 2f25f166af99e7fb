"""Workers that are shut down, and tasks that are revoked, with real workers."""

from __future__ import annotations

import signal
from uuid import uuid4

from support import celery_app
from support.celery_harness import DEADLINE, CeleryWorker, Harness
from support.servers import wait_until

pytest_plugins = ["support.celery_fixtures"]


def revoke(task_id: str, **options: object) -> None:
    """Revokes a task, and waits until the worker knows it. A worker misses what is sent before it has subscribed."""
    wait_until(lambda: celery_app.app.control.revoke(task_id, reply=True, limit=1, timeout=5, **options), DEADLINE)


def restart(harness: Harness, worker: CeleryWorker) -> None:
    worker.start()
    harness.wait_ready()


def test_warm_shutdown_lets_the_task_complete_its_step(harness: Harness, worker: CeleryWorker) -> None:
    task = celery_app.charge.delay(harness.number)
    harness.reached(f"charging {harness.number}")
    worker.send(signal.SIGTERM)
    harness.until(lambda: worker.has_logged("Warm shutdown"))
    harness.resume(f"charging {harness.number}")
    worker.wait()

    assert harness.results(task, 1) == [{"charged": harness.number}]
    assert harness.outcomes(task.id, "charge") == ["completed"]
    assert not harness.is_in_broker(task.id)
    restart(harness, worker)


def test_step_of_a_cold_shutdown_is_executed_again(harness: Harness, worker: CeleryWorker) -> None:
    task = celery_app.charge_unless_killed.delay(harness.number)
    child = harness.reached(f"charging {harness.number}")
    worker.send(signal.SIGQUIT)
    worker.wait()
    harness.wait_dead(child)
    restart(harness, worker)
    harness.redeliver(task)

    assert harness.results(task, 1) == [{"charged": harness.number}]
    first, second = harness.outcomes(task.id, "charge")
    assert first in ("failed", "lease_expired")  # the child may have no time to record its failure
    assert second == "completed"
    assert harness.effects() == {"charge": 1}


def test_task_revoked_before_it_begins_has_no_step(harness: Harness) -> None:
    id = str(uuid4())
    revoke(id)
    task = celery_app.charge_at_once.apply_async((harness.number,), task_id=id)

    harness.until(lambda: task.state == "REVOKED")
    harness.until(lambda: not harness.is_in_broker(id))
    assert harness.store.runs(run_id_prefix=id).runs == []
    assert harness.effects() == {}


def test_running_task_revoked_without_terminate_completes_its_step(harness: Harness) -> None:
    task = celery_app.charge.delay(harness.number)
    harness.reached(f"charging {harness.number}")
    revoke(task.id)
    harness.resume(f"charging {harness.number}")

    assert harness.results(task, 1) == [{"charged": harness.number}]
    assert harness.outcomes(task.id, "charge") == ["completed"]


def test_task_terminated_by_sigterm_records_its_failure(harness: Harness) -> None:
    task = celery_app.charge.delay(harness.number)
    harness.reached(f"charging {harness.number}")
    revoke(task.id, terminate=True)

    harness.until(lambda: harness.outcomes(task.id, "charge") == ["failed"])
    harness.until(lambda: task.state == "REVOKED")
    harness.until(lambda: not harness.is_in_broker(task.id))
    assert harness.effects() == {}


def test_claim_of_a_task_terminated_by_sigkill_expires(harness: Harness) -> None:
    task = celery_app.charge.delay(harness.number)
    child = harness.reached(f"charging {harness.number}")
    revoke(task.id, terminate=True, signal="SIGKILL")

    harness.wait_dead(child)
    harness.until(lambda: task.state == "REVOKED")
    harness.until(lambda: not harness.is_in_broker(task.id))
    assert [each.run_id for each in harness.store.lapsed_claims()] == [task.id]
    harness.store.delete_run(task.id)
    assert harness.effects() == {}
