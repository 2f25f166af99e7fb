"""Which error says why a step is not executed. No I/O."""

from __future__ import annotations

from squidstep_redis.errors import (
    SquidstepError,
    StepBusyError,
    StepDelayedError,
    StepExhaustedError,
    StepFailedError,
)
from squidstep_redis.model import BeginResult


def skip_error(result: BeginResult) -> SquidstepError | None:
    """Returns what `run_step` raises if `begin_step` has skipped; None if the same request is to be sent again."""
    if result.exhausted:
        return StepExhaustedError(result.step_run)
    if result.failed:
        return StepFailedError(result.step_run)
    if result.delayed:
        return StepDelayedError(result.step_run, result.retry_in or 0.0)
    if result.busy:
        return StepBusyError(result.step_run, result.retry_in)
    return None
