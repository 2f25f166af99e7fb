"""Executes a function call as a step."""

from __future__ import annotations

from collections.abc import Callable
from inspect import BoundArguments, iscoroutinefunction
from typing import Any, Final, Literal, TypedDict, TypeVar, cast

from squidstep_redis import PayloadError, StaleStepRunError, current_claim
from squidstep_redis.claims.failures import Backoff, Permanent
from squidstep_redis.claims.request import default_owner
from squidstep_redis.escaping import without_controls
from squidstep_redis.protocol.arguments import Seconds, Step
from squidstep_redis.protocol.fingerprints import Fingerprint
from squidstep_redis.rq.functions import explain, result_of, stored_arguments
from squidstep_redis.rq.inputs import Inputs
from squidstep_redis.rq.installed import Job, Retry
from squidstep_redis.rq.stores import store_for

T = TypeVar("T")

_MAX_OWNER_BYTES: Final = 256


class StepSettings(TypedDict):
    """Arguments of `run_step` that the decorators and `current_run` accept, too."""

    lease: Seconds | None
    max_attempts: int | None
    permanent: Permanent
    backoff: Backoff | None
    on_busy: Literal["raise", "wait"]
    fingerprint: Fingerprint | None


def owner(job: Job | None, pid: int | None = None) -> str:
    """Returns the owner of a job's claims: `host:pid job-id`. The job id distinguishes jobs if a pid is reused.

    Args:
        job: the job that claims the step; None: outside a job, where the owner is `host:pid`.
        pid: the process that claims the step; None: this process.
    """
    text = default_owner() if pid is None else f"{default_owner().rpartition(':')[0]}:{pid}"
    if job is not None:
        text = without_controls(f"{text} {job.id}")
    return text.encode(errors="replace")[:_MAX_OWNER_BYTES].decode(errors="ignore")


def execute(
    run_id: str,
    job: Job | None,
    inputs: Inputs,
    step: Step,
    fn: Callable[..., T],
    bound: BoundArguments,
    settings: StepSettings,
) -> T:
    """Executes a function as a step, once across all deliveries, and returns its stored result.

    If the function returns RQ's Retry, the step is released, and the Retry is returned.

    Args:
        run_id: the run of the step.
        job: the current job; None: outside a job.
        inputs: those of the steps that the job has called.
        step: the name of the step.
        fn: the function. For a coroutine function, a coroutine is returned.
        bound: the arguments of the call. They are the input of the step.
        settings: how it is claimed, and what a failure means.
    """
    store, input = store_for(job), dict(bound.arguments)
    claimed_by = owner(job)

    def work(stored: dict[str, Any]) -> dict[str, Any]:
        result: Any = result_of(fn, stored_arguments(bound, stored))
        if _asks_for_retry(current_claim(), result):
            raise _RetryReturned(result)
        return {"result": result}

    async def work_async() -> Any:
        # The blocking store delays no other task, because RQ runs each coroutine in its own event loop and process.
        while True:
            claim = store.claim_step(run_id, step, input, owner=claimed_by, **settings)
            try:
                with inputs.one_of(run_id, step, bound), claim:
                    if claim.decision == "execute":
                        arguments = stored_arguments(bound, claim.input)
                        result = await cast("Any", fn)(*arguments.args, **arguments.kwargs)
                        if _asks_for_retry(claim, result):
                            return result
                        if not claim.ended:
                            claim.complete({"result": result})
                return _result(claim.result())
            except StaleStepRunError as error:
                claim.raise_unless_taken_over(error)
            except PayloadError as error:
                explain(error)
                raise

    if iscoroutinefunction(fn):
        return cast("T", work_async())
    try:
        with inputs.one_of(run_id, step, bound):
            return _result(store.run_step(run_id, step, work, input, owner=claimed_by, **settings))
    except _RetryReturned as returned:
        return cast("T", returned.retry)
    except PayloadError as error:
        explain(error)
        raise


class _RetryReturned(Exception):  # noqa: N818 -- it is a result, not an error
    """The function has returned RQ's Retry, and its claim was released."""

    def __init__(self, retry: Retry) -> None:
        super().__init__(retry)
        self.retry = retry


def _asks_for_retry(claim: Any, result: object) -> bool:
    """Returns whether RQ must run the job again because the function returned Retry. The claim is then released.

    It is not if the claim was lost to a worker that has completed the step.
    """
    return isinstance(result, Retry) and not claim.ended and claim.release().status == "pending"


def _result(output: dict[str, Any]) -> Any:
    """Returns the function's result, or the whole output if the step was completed in another way."""
    return output["result"] if output.keys() == {"result"} else output
