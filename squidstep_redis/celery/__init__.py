"""The Celery integration: the steps of a task take effect once, no matter how often Celery delivers the task.

`step`, under `@app.task`, makes the function of a task a step. `steps` and `current_run` make it a run of several
steps. The guide, tests/guide/celery.md in the repository, describes what happens in each failure.
"""

from squidstep_redis.celery.decorators import step, steps
from squidstep_redis.celery.execution import owner
from squidstep_redis.celery.installed import OLDEST
from squidstep_redis.celery.runs import Run, current_run, default_run_id
from squidstep_redis.celery.stores import configure, store
from squidstep_redis.protocol.arguments import RunIdOf
from squidstep_redis.task_queue_runs import OnBusy

__all__ = [
    "OLDEST",
    "OnBusy",
    "Run",
    "RunIdOf",
    "configure",
    "current_run",
    "default_run_id",
    "owner",
    "step",
    "steps",
    "store",
]
