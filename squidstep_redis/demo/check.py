"""The final check of a demo: compares the store and the workers' reports with a sequential computation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest

from squidstep_redis import Outcome, SquidstepError
from squidstep_redis.demo.scenario import Fault, Key, Scenario, describe
from squidstep_redis.demo.work import STEPS


def find_problems(scenario: Scenario) -> list[str]:
    """Compares the results of a scenario with a sequential computation, and returns the problems."""
    problems = [problem for run_id in scenario.run_ids for problem in _check_run(scenario, run_id)]
    for key, fault in scenario.kill_plan.items():
        problems += _check_attempts(scenario, key, fault)
    takeovers = sum(map(_is_taken_over, scenario.kill_plan.values()))
    if scenario.counts["takeovers"] != takeovers:
        problems.append(f"there were {scenario.counts['takeovers']} takeovers instead of {takeovers}")
    return [*problems, *scenario.find_problems()]


def _check_run(scenario: Scenario, run_id: str) -> Iterator[str]:
    store = scenario.context.store
    try:
        expected = scenario.expected(scenario.context.files[run_id])
        stored = [(step_run.step, step_run.input, step_run.output) for step_run in store.get_run(run_id)]
        order, outputs = store.completed_steps(run_id), store.completed_outputs(run_id)
    except (OSError, SquidstepError) as error:
        yield f"{run_id}: {error}"
        return
    for found, computed in zip_longest(stored, expected):
        if found != computed:
            yield f"{run_id}: the store has {found}, a sequential computation returns {computed}"
    if (order, outputs) != (list(STEPS), [output for _, _, output in expected]):
        yield f"{run_id}: the completed steps are {order}, in this order, with {outputs}"
    for step in STEPS:
        key = (run_id, step)
        counts = (scenario.started[key], scenario.finished[key])
        if counts != (2 if _is_taken_over(scenario.kill_plan.get(key)) else 1, 1):
            yield f"{run_id}: {step} was started {counts[0]} times and finished {counts[1]} times"


def _check_attempts(scenario: Scenario, key: Key, fault: Fault) -> Iterator[str]:
    attempts, event = scenario.context.store.attempts(*key), scenario.kills.get(key)
    outcomes = [attempt.outcome for attempt in attempts]
    expected = [Outcome.LEASE_EXPIRED, Outcome.COMPLETED] if _is_taken_over(fault) else [Outcome.COMPLETED]
    if event is None:
        yield f"{describe(key)}: no {fault} was killed"
    elif outcomes != expected:
        yield f"{describe(key)}: after a {fault} was killed, its attempts are {attempts}"
    elif not re.search(rf"[ :]{event.pid}\b", str(attempts[0].owner)):
        yield f"{describe(key)}: process {event.pid} was killed, but the first attempt's owner is {attempts[0].owner}"


def _is_taken_over(fault: Fault | None) -> bool:
    return fault is not None and fault != "worker without work-horse"
