"""An example call of each operation, and results in a form that can be compared between stores."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from squidstep_redis import (
    Attempt,
    BeginResult,
    Call,
    Calls,
    PayloadNotReadError,
    RunExplanation,
    RunPage,
    RunSummary,
    ScheduleResult,
    StepExplanation,
    StepPage,
    StepRun,
    StepRunStore,
    StoreOverview,
)
from squidstep_redis.model import step_run_id
from support.backends import Bench
from support.records import begun

PAYLOAD = {"bytes": bytes(range(256)), "text": "naïve ☃ 𝄞 \r\n\0", "int": 2**64 - 1, "list": [None, True, 1.5, {}]}

MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \([^)]*\)")  # in an explanation

OPERATIONS = {name: make for name, make in inspect.getmembers(Calls, inspect.isfunction) if name[0] != "_"}
WORKFLOWS = [name for name, make in OPERATIONS.items() if str(make.__annotations__["return"]).startswith("Workflow[")]
WORKFLOWS.remove("wait_for_step")  # one call, for a step that has ended
CALLS = [name for name in OPERATIONS if name not in WORKFLOWS]

# The arguments of one call of each operation, on the run that `prepare` creates. Every operation must have an entry.
EXAMPLES: dict[str, Callable[[StepRunStore, StepRun], tuple[Any, ...]]] = {
    "schedule_step": lambda store, claim: (claim.run_id, "new", PAYLOAD),
    "schedule_steps": lambda store, claim: (claim.run_id, {"new": PAYLOAD, "pending": {}, "newer": {}}),
    "begin_step": lambda store, claim: (claim.run_id, "pending", {}),
    "begin_steps": lambda store, claim: (claim.run_id, {"pending": {}, "new": PAYLOAD, "completed": {}}),
    "complete_step": lambda store, claim: (claim, PAYLOAD),
    "complete_steps": lambda store, claim: (
        [(claim, PAYLOAD), (step_run_id(store.calls.prefix, claim.run_id, "pending"), {})],
    ),
    "advance_step": lambda store, claim: (claim, PAYLOAD, "pending", {}),
    "fail_step": lambda store, claim: (claim, PAYLOAD),
    "checkpoint_step": lambda store, claim: (claim, PAYLOAD),
    "extend_claim": lambda store, claim: (claim, 120),
    "expire_claim": lambda store, claim: (claim,),
    "release_step": lambda store, claim: (claim,),
    "delete_pending_steps": lambda store, claim: (claim.run_id, ["pending", "running", "unknown"]),
    "get_step_run": lambda store, claim: (claim.run_id, "completed"),
    "get_run": lambda store, claim: (claim.run_id,),
    "scan_steps": lambda store, claim: (claim.run_id,),
    "attempts": lambda store, claim: (claim.run_id, "failed"),
    "completed_steps": lambda store, claim: (claim.run_id,),
    "completed_outputs": lambda store, claim: (claim.run_id,),
    "step_statuses": lambda store, claim: (claim.run_id,),
    "explain_step": lambda store, claim: (claim.run_id, "failed"),
    "explain_run": lambda store, claim: (claim.run_id,),
    "cancel_run": lambda store, claim: (claim.run_id, "wrong address"),
    "resume_run": lambda store, claim: (claim.run_id,),
    "summarize_run": lambda store, claim: (claim.run_id,),
    "expire_run": lambda store, claim: (claim.run_id, 60),
    "delete_run": lambda store, claim: (claim.run_id,),
    "retry_step": lambda store, claim: (claim.run_id, "failed"),
    "retry_run": lambda store, claim: (claim.run_id,),
    "export_run": lambda store, claim: (claim.run_id,),
    "import_run": lambda store, claim: (EXPORTED,),
    "fork_run": lambda store, claim: (claim.run_id, "forked"),
    "runs": lambda store, claim: (),
    "count_runs": lambda store, claim: (),
    "purge": lambda store, claim: (60,),
    "batch": lambda store, claim: (mixed(store, 7),),
    "lapsed_claims": lambda store, claim: (),
    "live_claims": lambda store, claim: (),
    "failed_steps": lambda store, claim: (),
    "count_failed": lambda store, claim: (),
    "count_claims": lambda store, claim: (),
    "overview": lambda store, claim: (1_000,),
    "wait_for_step": lambda store, claim: (claim.run_id, "completed", 10),
}
EXPORTED = {
    "squidstep_run": 1,
    "run_id": "imported",
    "ttl": None,
    "steps_created": 1,
    "completed": [],
    "steps": [
        {
            "step": "pending",
            "position": 1,
            "state": "pending",
            "created_at": "2026-01-01T00:00:00.000+00:00",
            "attempt": 0,
            "attempts_released": 0,
            "token": "",
            "scheduled_by": "",
            "input": {},
            "history": [],
        }
    ],
}
ACROSS_RUNS = {
    "lapsed_claims": "lapsed",
    "live_claims": "running",
    "failed_steps": "failed",
}  # and the step that each finds


def prepare(bench: Bench, store: StepRunStore, run_id: str = "run") -> StepRun:
    """Creates a run with a step in every state; returns the claim of the running one."""
    store.schedule_step(run_id, "pending", PAYLOAD)
    store.complete_step(begun(store.begin_step(run_id, "completed", PAYLOAD)), PAYLOAD)
    store.fail_step(begun(store.begin_step(run_id, "failed", {})), PAYLOAD)
    bench.lapse(begun(store.begin_step(run_id, "lapsed", {}, lease=0.001)))
    return begun(store.begin_step(run_id, "running", PAYLOAD, lease=60))


def perform(store: StepRunStore, operation: str, claim: StepRun) -> Any:
    """Performs the example call of an operation."""
    return getattr(store, operation)(*EXAMPLES[operation](store, claim))


def mixed(store: StepRunStore, count: int) -> list[Call[Any]]:
    """Returns `count` calls of seven operations, on runs on all nodes of a cluster."""
    calls = store.calls
    mixture: list[Call[Any]] = []
    for number in range(count // 7 + 1):
        run, step = f"run-{number}", step_run_id(calls.prefix, f"run-{number}", "pay")
        mixture += [
            calls.schedule_step(run, "pay", {"number": number}),
            calls.begin_step(run, "pay", {}),
            calls.extend_claim(step, 60),
            calls.get_step_run(run, "pay"),
            calls.complete_step(step, {"number": number}, schedule={"mail": PAYLOAD}),
            calls.complete_step(step, {"another": number}),  # stale
            calls.get_run(run),
        ]
    return mixture[:count]


def payloads_of(step_run: StepRun) -> tuple[Any, ...]:
    """Returns the payloads of a step run, or the error if they were not read."""
    try:
        return step_run.input, step_run.output, step_run.last_error, step_run.progress
    except PayloadNotReadError:
        return None, None, step_run.last_error, None


def seen(result: Any) -> Any:
    """Converts a result to a form without times, which is equal for equal histories."""
    if isinstance(result, StepRun):
        head = (result.run_id, result.step, result.status, result.attempt)
        return (*head, *payloads_of(result), bool(result.token))
    if isinstance(result, Attempt):
        return result[:4]
    if isinstance(result, BeginResult | ScheduleResult):
        return tuple(map(seen, result))
    if isinstance(result, StepPage):
        return [seen(each) for each in result.step_runs]
    if isinstance(result, RunSummary):
        return result._replace(changed_at=None, created_at=None)
    if isinstance(result, StepExplanation):
        texts = {"why": MOMENT.sub("…", result.why), "next": MOMENT.sub("…", result.next)}
        return result._replace(started_at=None, until=None, **texts)
    if isinstance(result, RunExplanation):
        return seen(result.summary), [seen(each) for each in result.steps], result.omitted
    if isinstance(result, RunPage):  # two stores create their runs at different times, so their orders may differ
        return sorted(seen(each) for each in result.runs)
    if isinstance(result, StoreOverview):
        return (
            result[:4],
            [sorted(map(seen, step_runs), key=repr) for step_runs in result[4:7]],
            seen(RunPage(result.runs, None)),
        )
    if isinstance(result, dict) and "squidstep_run" in result:
        return [(each["step"], each["state"], each["input"], each["output"]) for each in result["steps"]]
    if isinstance(result, dict):
        return {key: seen(each) for key, each in result.items()}
    if isinstance(result, list):
        return [seen(each) for each in result]
    return type(result) if isinstance(result, Exception) else result


def state(store: StepRunStore, run_id: str = "run") -> Any:
    """Returns everything that the reads return of a run, in the form of `seen`."""
    step_runs = store.get_run(run_id)
    attempts = [store.attempts(run_id, step_run.step) for step_run in step_runs]
    return seen(step_runs), seen(attempts), store.completed_steps(run_id)


def finish(bench: Bench, result: Any) -> Any:
    """Returns the result of a redis-py client, awaited if the client is an asyncio one."""

    async def wait() -> Any:
        return await result

    return bench.runner.run(wait()) if bench.runner is not None and inspect.isawaitable(result) else result


@contextlib.contextmanager
def pipeline_of(bench: Bench, store: StepRunStore, **options: bool) -> Iterator[Any]:
    """Provides a pipeline, and releases its connection even if it was never executed."""
    pipeline: Any = store.client.pipeline(**options)
    try:
        yield pipeline
    finally:
        finish(bench, pipeline.reset())
