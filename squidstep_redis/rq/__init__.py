"""The RQ integration: the steps of a job take effect once, no matter how often RQ runs the job.

`step` makes a job function a step. `steps` and `current_run` make it a run of several steps. The guide,
tests/guide/rq.md in the repository, describes what happens in each failure.
"""

from squidstep_redis.protocol.arguments import RunIdOf
from squidstep_redis.rq.busy import MAX_RESCHEDULES
from squidstep_redis.rq.decorators import step, steps
from squidstep_redis.rq.execution import owner
from squidstep_redis.rq.installed import OLDEST
from squidstep_redis.rq.outbox import queue_completion
from squidstep_redis.rq.runs import Run, current_run, default_run_id
from squidstep_redis.rq.stores import configure, store
from squidstep_redis.rq.work_horse import release_killed_work_horse
from squidstep_redis.task_queue_runs import OnBusy

__all__ = [
    "MAX_RESCHEDULES",
    "OLDEST",
    "OnBusy",
    "Run",
    "RunIdOf",
    "configure",
    "current_run",
    "default_run_id",
    "owner",
    "queue_completion",
    "release_killed_work_horse",
    "step",
    "steps",
    "store",
]
