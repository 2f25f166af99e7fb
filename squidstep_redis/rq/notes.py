"""What a job remembers from one delivery to the delivery that it asks RQ for. RQ saves it in `job.meta`."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Any, Final, cast

from redis.exceptions import RedisError

from squidstep_redis.rq.installed import Job
from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.task_queues import BusyNotes

_KEY: Final = "squidstep_redis"


class Notes(BusyNotes, total=False):
    """The notes of a job that was rescheduled.

    Attributes:
        run_id: the run to continue, if the job id does not determine it.
        returned: how often the function itself has returned Retry. RQ counts these and our own together.
    """

    run_id: str
    returned: int


def start_of(job: Job) -> datetime | None:
    """Returns when this execution of a job started, in UTC and without a time zone.

    It distinguishes the executions of one job object in one process. `Job.refresh` in the job's function does not
    change it, although RQ then reads an earlier time than the worker set.

    Args:
        job: the current job.
    """
    attributes = vars(job)
    start: datetime | None = attributes.get("_squidstep_start")
    now = None if job.started_at is None else job.started_at.replace(tzinfo=None)  # RQ 2.1 reads it without a zone
    if start is None or (now is not None and now > start):
        attributes["_squidstep_start"] = start = now
    return start


def notes_of(job: Job) -> Notes:
    """Returns the notes of the delivery before, and removes them from the job.

    They are read once per delivery; each further call returns the same dict.

    One round trip to RQ's server if there are notes, otherwise none.

    Args:
        job: the current job.
    """
    attributes = vars(job)
    read_at, notes = attributes.get("_squidstep_notes", (None, None))
    start = start_of(job)
    if notes is None or read_at != start:  # a queue with `is_async=False` may run one job object again
        notes = cast("Notes", job.meta.pop(_KEY, {}))
        attributes["_squidstep_notes"] = start, notes
        if notes:
            if "returned" in notes:
                job.number_of_retries = notes["returned"]
            with defer_sigalrm(), suppress(RedisError):  # without harm, they stay until a later delivery
                job.save_meta()
    return notes


def leave_notes(job: Job, notes: Notes) -> None:
    """Sets the notes for the next delivery. RQ saves them with the job when it reschedules it.

    Args:
        job: the current job, which is about to return Retry.
        notes: the notes, apart from the run to continue.
    """
    if (run_id := notes_of(job).get("run_id")) is not None:
        notes["run_id"] = run_id
    if notes:
        meta: dict[str, Any] = job.meta
        meta[_KEY] = notes
