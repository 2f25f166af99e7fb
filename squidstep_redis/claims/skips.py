"""The error for each reason why a step is not executed. No I/O."""

from __future__ import annotations

from squidstep_redis.errors import (
    RunCancelledError,
    SquidstepError,
    StepBusyError,
    StepDelayedError,
    StepExhaustedError,
    StepFailedError,
)
from squidstep_redis.model import BeginResult, StepRun


def skip_error(result: BeginResult) -> SquidstepError | None:
    """Returns the error that `run_step` raises after a skip; None if the same request must be sent again."""
    if result.cancelled:
        return cancelled_error(result.step_run)
    if result.exhausted:
        return StepExhaustedError(result.step_run)
    if result.failed:
        return StepFailedError(result.step_run)
    if result.delayed:
        return StepDelayedError(result.step_run, result.retry_in or 0.0)
    if result.busy:
        return StepBusyError(result.step_run, result.retry_in)
    return None


def cancelled_error(step_run: StepRun) -> RunCancelledError:
    """Returns the error for a step run whose run is cancelled."""
    return RunCancelledError(step_run.run_id, step_run.step, step_run.cancel_reason or "")
