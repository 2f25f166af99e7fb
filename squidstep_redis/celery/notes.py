"""What a task remembers from one delivery to the next one: a header of its messages, which retries pass on."""

from __future__ import annotations

from typing import Any, Final, cast

from squidstep_redis.celery.installed import Request
from squidstep_redis.task_queues import BusyNotes

_KEY: Final = "squidstep_redis"


class Notes(BusyNotes, total=False):
    """The notes of a task that is delivered again.

    Attributes:
        run_id: the run to continue, if the task id does not determine it.
    """

    run_id: str


def notes_of(request: Request) -> Notes:
    """Returns the notes of the delivery before.

    Args:
        request: the current delivery.
    """
    return cast("Notes", (request.headers or {}).get(_KEY, {}))


def headers_with(request: Request, notes: Notes) -> dict[str, Any]:
    """Returns the headers for the next delivery.

    Args:
        request: the current delivery.
        notes: the notes to add to those of the current delivery.
    """
    return {**(request.headers or {}), _KEY: {**notes_of(request), **notes}}
