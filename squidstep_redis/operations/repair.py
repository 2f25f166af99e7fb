"""The operations that give failed steps new attempts."""

from __future__ import annotations

from operator import attrgetter
from typing import Final

from squidstep_redis.errors import CorruptRunError, StaleStepRunError, StepRunNotFoundError
from squidstep_redis.model import StepRun, StepStatus
from squidstep_redis.operations.context import Context
from squidstep_redis.operations.runs import raise_unless_corrupt, scan_runs
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Step
from squidstep_redis.protocol.call import Call, Reply, new_token
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import SendBatch, Workflow

_STEPS_PER_BATCH: Final = 1_000


def retry_step(context: Context, run_id: RunId, step: Step, *, owner: str | None = None) -> Call[StepRun]:
    """Resets a failed step to pending, with its input, its progress, and a reset attempt counter.

    One round trip. The next `begin_step` executes it, for any `max_attempts`. This call executes nothing:
    redeliver the step. The history keeps the failed attempt, and records the retry as one more: `released`, by `owner`,
    as if the caller had claimed and released the step. A step whose lease has expired counts as failed. A pending step
    is left unchanged. A re-sent call returns the same result.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
            str, else its name).
        owner: who retries, for the history: a str of up to 256 bytes without control characters; None: not stored.

    Returns:
        The pending step run.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        StaleStepRunError: the step is completed, or a claim on it is live; nothing was written.
        StepRunNotFoundError: there is no such record; RunDeletedError if the run was deleted.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)
    name = arguments.step(step)

    def parse(reply: Reply) -> StepRun:
        if reply[0] == b"missing":
            raise StepRunNotFoundError(run.text, name.text, "there is no such step run; nothing was written")
        values = [*reply[2:4], None, None, reply[4]] if reply[0] == b"retried" else reply[2:]
        step_run = context.records.record(run.text, name.text, values, run.keys.steps)
        if reply[0] == b"stale":
            why = "is completed" if step_run.status is StepStatus.COMPLETED else "is running"
            raise StaleStepRunError(step_run, f"retry_step was refused: the step {why}. Nothing was written")
        return step_run

    args = (new_token(), name.data, run.member, arguments.owner(owner))
    return Call(run.text, script("retry_step"), run.keys, args, parse, step=name.text)


def retry_run(context: Context, run_id: RunId, *, owner: str | None = None) -> Workflow[list[StepRun]]:
    """Resets all failed steps of a run to pending, each as `retry_step` does.

    Two round trips for a run of ordinary size, one more for every 500 fields and each thousand failed steps. Each step
    is atomic by itself; a step that another worker claims in the meantime is skipped.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        owner: who retries, for the history: a str of up to 256 bytes without control characters; None: not stored.

    Returns:
        The step runs that had failed and are pending now, in order of creation.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        StepRunNotFoundError: there is no such run.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)
    arguments.owner(owner)
    return _retry_run(context, run.text, owner)


def _retry_run(context: Context, run_id: str, owner: str | None) -> Workflow[list[StepRun]]:
    scans = yield from scan_runs(context, "retry_run", [run_id.encode()])
    if not scans:
        raise StepRunNotFoundError(run_id, None, "there is no such run; nothing was written")
    if scans[0].problem is not None:
        raise CorruptRunError(run_id, context.keys.run(run_id).keys.steps.decode(), scans[0].problem)
    failed = [each for each in scans[0].unfinished(context) if each.status is StepStatus.FAILED]
    failed.sort(key=attrgetter("position"))
    retried: list[StepRun] = []
    for first in range(0, len(failed), _STEPS_PER_BATCH):
        steps = failed[first : first + _STEPS_PER_BATCH]
        results = yield SendBatch([retry_step(context, run_id, each.step, owner=owner) for each in steps])
        changed = (StaleStepRunError, StepRunNotFoundError)  # by another worker, in the meantime
        results = [result for result in results if not isinstance(result, changed)]
        raise_unless_corrupt(results)
        for result in results:
            if isinstance(result, CorruptRunError):
                raise result
            retried.append(result)
    return retried
