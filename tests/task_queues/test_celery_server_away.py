"""The server of the steps is killed while a task runs, and comes back with all it has acknowledged.

Not in a file with other tests of workers: their worker would take the task, and its steps are on the broker.
"""

from __future__ import annotations

from support import celery_app
from support.celery_harness import Harness

from squidstep_redis import StepRunStore, StepStatus
from squidstep_redis.embedded import EmbeddedServer

pytest_plugins = ["support.celery_fixtures"]


def test_result_is_stored_when_the_server_is_back(harness_of_steps: Harness, step_server: EmbeddedServer) -> None:
    harness = harness_of_steps
    task = celery_app.charge.delay(harness.number)
    harness.reached(f"charging {harness.number}")
    step_server.kill()
    harness.resume(f"charging {harness.number}")
    harness.until(lambda: harness.effects() == {"charge": 1})  # the function is about to return
    step_server.start()

    assert harness.results(task, 1) == [{"charged": harness.number}]
    with StepRunStore.from_url(step_server.url) as store:
        assert [each.status for each in store.get_run(task.id)] == [StepStatus.COMPLETED]
        assert [str(each.outcome) for each in store.attempts(task.id, "charge")] == ["completed"]
    assert harness.effects() == {"charge": 1}
