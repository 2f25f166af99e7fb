"""Executes a function call as a step of a job."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from squidstep_redis import PayloadError, StaleStepRunError, StepBusyError, StepDelayedError, StepRunStore
from squidstep_redis.claims.request import ClaimSettings
from squidstep_redis.functions.checks import is_coroutine_function
from squidstep_redis.functions.execution import FunctionCall, execute, explain, pauses, raise_if_own, result_in
from squidstep_redis.functions.inputs import Inputs
from squidstep_redis.rq.installed import Job, Retry
from squidstep_redis.rq.notes import start_of
from squidstep_redis.rq.stores import store_for
from squidstep_redis.task_queues import owner_of


def owner(job: Job | None, pid: int | None = None) -> str:
    """Returns the owner of a job's claims: `host:pid job-id`. The job id distinguishes jobs if a pid is reused.

    Args:
        job: the job that claims the step; None: outside a job, where the owner is `host:pid`.
        pid: the process that claims the step; None: this process.
    """
    return owner_of(None if job is None else job.id, pid)


def inputs_of(job: Job | None) -> Inputs:
    """Returns the inputs of the steps that were called in this execution of a job.

    They are kept with the job, because each `current_run()` of a function without a decorator makes a run. The start
    distinguishes the executions of a job that RQ runs again in the same process.

    Args:
        job: the current job; None: outside a job, where each run has its own inputs.
    """
    if job is None or (start := start_of(job)) is None:
        return Inputs()
    return Inputs(vars(job).setdefault("_squidstep_inputs", {}), start)


def execute_in_job(job: Job | None, call: FunctionCall) -> Any:
    """Executes a function as a step, once across all deliveries, and returns its stored result.

    If the function returns RQ's Retry, the step is released, and the Retry is returned.

    Args:
        job: the current job; None: outside a job.
        call: the call of the function. For a coroutine function, a coroutine is returned.
    """
    store = store_for(job)
    call = call._replace(settings={**call.settings, "owner": owner(job)})
    if is_coroutine_function(call.fn):
        return _execute_coroutine(store, call)
    return execute(store, call, _asks_for_retry)


async def _execute_coroutine(store: StepRunStore, call: FunctionCall) -> Any:
    # A call of the blocking store delays other tasks of the job by a round trip. To wait for a busy step, it would stop
    # them, although one of them may hold the step.
    waits, settings = call.settings.get("on_busy") == "wait", {**call.settings, "on_busy": "raise"}
    next_pauses = pauses()
    while True:
        claim: Any = store.claim_step(call.run_id, call.step, call.input, **cast("ClaimSettings", settings))
        try:
            with call.with_one_input(), claim:
                if claim.decision == "execute":
                    arguments = call.arguments(claim.input)
                    result = await call.fn(*arguments.args, **arguments.kwargs)
                    if _asks_for_retry(claim, result):
                        return result
                    if not claim.ended:
                        claim.complete({"result": result})
            return result_in(claim.result())
        except BaseException as error:
            claim.exit_again(error)
            if isinstance(error, PayloadError):
                explain(error)
            if isinstance(error, StepBusyError):
                raise_if_own(error)
            seconds = _seconds_to_wait(claim, error, next(next_pauses) if waits else None)
            if seconds is None:
                raise
        await asyncio.sleep(seconds)


def _seconds_to_wait(claim: Any, error: BaseException, pause: float | None) -> float | None:
    """Returns the seconds until the step is to be claimed again; None if the error is to be raised.

    Args:
        claim: the claim that the error has ended, or kept from being acquired.
        error: the error.
        pause: seconds to wait for another worker; None: do not wait.

    Raises:
        StepBusyError: instead of a StaleStepRunError: another worker has taken over.
    """
    if isinstance(error, StaleStepRunError):
        try:
            claim.raise_unless_taken_over(error)
        except StepBusyError:
            if pause is None:
                raise
            return pause
        return 0
    is_not_now = claim.decision is None and isinstance(error, StepBusyError | StepDelayedError)
    if pause is None or not is_not_now:
        return None
    return min(pause, cast("StepBusyError", error).retry_in or pause)


def _asks_for_retry(claim: Any, result: object) -> bool:
    """Returns whether RQ must run the job again because the function returned Retry. The claim is then released.

    RQ does not have to if the claim was lost to a worker that has completed the step.
    """
    return isinstance(result, Retry) and not claim.ended and claim.release().status == "pending"
