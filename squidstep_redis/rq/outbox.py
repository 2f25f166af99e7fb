"""An outbox: completes a step and enqueues the next job in one transaction."""

from __future__ import annotations

from typing import Any

from squidstep_redis import InvalidArgumentError, Queued, StepRun, current_claim
from squidstep_redis.protocol.arguments import StepInputs


def queue_completion(pipeline: Any, result: Any, *, schedule: StepInputs | None = None) -> Queued[StepRun]:
    """Adds the completion of the current step to your pipeline.

    Enqueue the next job in the same transaction before you call this. Then both take effect, or neither does. The RQ
    guide (tests/guide/rq.md) has an example.

    Args:
        pipeline: a redis-py transaction on the server that stores the steps.
        result: the stored result of the step, which every later call returns.
        schedule: steps of the same run to schedule in the same transaction, as `{step: input}`; None: no steps.

    Returns:
        A reader of the reply: `queued.result(pipeline.execute())` returns the step run.

    Raises:
        InvalidArgumentError: called outside the function of a step.
        PayloadError: the result cannot be stored in a payload; nothing was added to the pipeline.
    """
    claim = current_claim()
    if claim is None:
        raise InvalidArgumentError("claim", "queue_completion must be called by the function of a step, while it runs")
    return claim.queue_completion(pipeline, {"result": result}, schedule=schedule)
