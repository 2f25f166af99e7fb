"""Each operation of a store, performed once, and results that two stores can be compared by."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from squidstep_redis import (
    Attempt,
    BeginResult,
    Call,
    Calls,
    RunPage,
    ScheduleResult,
    StepPage,
    StepRun,
    StepRunStore,
)
from squidstep_redis.model import step_run_id
from support.backends import Bench
from support.records import begun

PAYLOAD = {"bytes": bytes(range(256)), "text": "naïve ☃ 𝄞 \r\n\0", "int": 2**64 - 1, "list": [None, True, 1.5, {}]}

OPERATIONS = {name: make for name, make in inspect.getmembers(Calls, inspect.isfunction) if name[0] != "_"}
SCANS = ("runs", "purge")
WORKFLOWS = [name for name, make in OPERATIONS.items() if str(make.__annotations__["return"]).startswith("Workflow[")]
WORKFLOWS.remove("wait_for_step")  # one call, for a step that has ended
CALLS = [name for name in OPERATIONS if name not in WORKFLOWS]

# One call of each operation on what `prepare` leaves behind. An operation that is missing here fails every test below.
EXAMPLES: dict[str, Callable[[StepRunStore, StepRun], tuple[Any, ...]]] = {
    "schedule_step": lambda store, claim: (claim.run_id, "new", PAYLOAD),
    "schedule_steps": lambda store, claim: (claim.run_id, {"new": PAYLOAD, "pending": {}, "newer": {}}),
    "begin_step": lambda store, claim: (claim.run_id, "pending", {}),
    "complete_step": lambda store, claim: (claim, PAYLOAD),
    "advance_step": lambda store, claim: (claim, PAYLOAD, "pending", {}),
    "fail_step": lambda store, claim: (claim, PAYLOAD),
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
    "expire_run": lambda store, claim: (claim.run_id, 60),
    "delete_run": lambda store, claim: (claim.run_id,),
    "retry_step": lambda store, claim: (claim.run_id, "failed"),
    "retry_run": lambda store, claim: (claim.run_id,),
    "export_run": lambda store, claim: (claim.run_id,),
    "import_run": lambda store, claim: (EXPORTED,),
    "runs": lambda store, claim: (),
    "purge": lambda store, claim: (60,),
    "batch": lambda store, claim: (mixed(store, 7),),
    "lapsed_claims": lambda store, claim: (),
    "live_claims": lambda store, claim: (),
    "failed_steps": lambda store, claim: (),
    "count_claims": lambda store, claim: (),
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
ACROSS_RUNS = {"lapsed_claims": "lapsed", "live_claims": "running", "failed_steps": "failed"}  # and what each finds


def prepare(bench: Bench, store: StepRunStore, run_id: str = "run") -> StepRun:
    """Creates a run with a step in every state; returns the claim of the running one."""
    store.schedule_step(run_id, "pending", PAYLOAD)
    store.complete_step(begun(store.begin_step(run_id, "completed", PAYLOAD)), PAYLOAD)
    store.fail_step(begun(store.begin_step(run_id, "failed", {})), PAYLOAD)
    bench.lapse(begun(store.begin_step(run_id, "lapsed", {}, lease=0.001)))
    return begun(store.begin_step(run_id, "running", PAYLOAD, lease=60))


def perform(store: StepRunStore, operation: str, claim: StepRun) -> Any:
    return getattr(store, operation)(*EXAMPLES[operation](store, claim))


def mixed(store: StepRunStore, count: int) -> list[Call[Any]]:
    """So many calls, of seven operations, on runs that lie on all nodes of a cluster."""
    calls = store.calls
    made: list[Call[Any]] = []
    for number in range(count // 7 + 1):
        run, step = f"run-{number}", step_run_id(calls.prefix, f"run-{number}", "pay")
        made += [
            calls.schedule_step(run, "pay", {"number": number}),
            calls.begin_step(run, "pay", {}),
            calls.extend_claim(step, 60),
            calls.get_step_run(run, "pay"),
            calls.complete_step(step, {"number": number}, schedule={"mail": PAYLOAD}),
            calls.complete_step(step, {"another": number}),  # stale
            calls.get_run(run),
        ]
    return made[:count]


def seen(answer: Any) -> Any:
    """What an answer shows, without the times: the same for the same history."""
    if isinstance(answer, StepRun):
        shown = (answer.run_id, answer.step, answer.status, answer.attempt)
        return (*shown, answer.input, answer.output, answer.last_error, bool(answer.token))
    if isinstance(answer, Attempt):
        return answer[:4]
    if isinstance(answer, BeginResult | ScheduleResult):
        return tuple(map(seen, answer))
    if isinstance(answer, StepPage):
        return [seen(each) for each in answer.step_runs]
    if isinstance(answer, RunPage):  # two stores change their runs at different times, so their orders differ
        return sorted(each._replace(changed_at=None) for each in answer.runs)
    if isinstance(answer, dict) and "squidstep_run" in answer:
        return [(each["step"], each["state"], each["input"], each["output"]) for each in answer["steps"]]
    if isinstance(answer, list):
        return [seen(each) for each in answer]
    return type(answer) if isinstance(answer, Exception) else answer


def state(store: StepRunStore, run_id: str = "run") -> Any:
    """What there is to see of a run."""
    step_runs = store.get_run(run_id)
    attempts = [store.attempts(run_id, step_run.step) for step_run in step_runs]
    return seen(step_runs), seen(attempts), store.completed_steps(run_id)


def finish(bench: Bench, answer: Any) -> Any:
    """Waits for the answer of a redis-py client, if it is an asyncio one."""

    async def wait() -> Any:
        return await answer

    return bench.runner.run(wait()) if bench.runner is not None and inspect.isawaitable(answer) else answer


@contextlib.contextmanager
def pipeline_of(bench: Bench, store: StepRunStore, **options: bool) -> Iterator[Any]:
    """A pipeline that gives its connection back even if it was never executed."""
    pipeline: Any = store.client.pipeline(**options)
    try:
        yield pipeline
    finally:
        finish(bench, pipeline.reset())
