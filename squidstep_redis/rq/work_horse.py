"""Releases the claims of a work-horse that was killed."""

from __future__ import annotations

import logging
from typing import Final

from squidstep_redis import StaleStepRunError
from squidstep_redis.escaping import escaped
from squidstep_redis.rq.execution import owner
from squidstep_redis.rq.installed import Job
from squidstep_redis.rq.stores import store_for

_MAX_CLAIMS: Final = 1_000

_log = logging.getLogger("squidstep_redis.rq")


def release_killed_work_horse(job: Job, pid: int | None, status: int | None, usage: object) -> None:
    """Releases the claims of a killed work-horse, so that another worker can take them over at once.

    Pass it to the worker: `Worker(work_horse_killed_handler=release_killed_work_horse)`. Without it, the claims are
    released when their leases expire. Claims without a lease (`lease=None`) are not found, and nothing else ends them.
    It needs two or three round trips per server. It raises no errors: they are logged as warnings, because an exception
    would stop RQ's worker.

    Args:
        job: the job that the work-horse was running.
        pid: the process id of the work-horse; None: there was no work-horse, and nothing is released.
        status: the exit status of the work-horse. Not used.
        usage: the resource usage of the work-horse. Not used.
    """
    del status, usage
    try:
        if pid:
            store = store_for(job)
            claims = store.live_claims(_MAX_CLAIMS, owner=owner(job, pid), payloads=False)
            for result in store.batch([store.calls.expire_claim(claim) for claim in claims]):
                if isinstance(result, Exception) and not isinstance(result, StaleStepRunError):
                    raise result
    except Exception as error:  # noqa: BLE001 -- an exception would stop RQ's worker, and the leases expire anyway
        _log.warning(
            "could not release the claims of work-horse %s of job %s; they expire with their leases: %s",
            pid,
            escaped(job.id),
            escaped(str(error)),
        )
