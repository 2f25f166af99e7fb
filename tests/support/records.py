"""Short helpers that read step runs and results, or choose run ids."""

from __future__ import annotations

import itertools
from typing import Any

from squidstep_redis import BeginResult, StepRun, StepRunStore
from squidstep_redis.protocol.keys import Keys


def begun(result: BeginResult) -> StepRun:
    """Returns the step run of a `begin_step` whose decision must be "execute"."""
    step_run, decision = result
    assert decision == "execute"
    return step_run


def stored(store: StepRunStore, run_id: str = "run", step: str = "pay") -> StepRun:
    """Returns the stored step run, which must exist."""
    step_run = store.get_step_run(run_id, step)
    assert step_run is not None
    return step_run


def in_batch(store: StepRunStore, calls: list[Any]) -> list[Any]:
    """Returns the results of a batch, and raises the first error among them."""
    results = store.batch(calls)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def runs_of_one_bucket(number: int, like: str = "run") -> list[str]:
    """Returns run ids that have the same index as another one."""
    keys = Keys(b"squidstep")  # the bucket does not depend on the prefix
    index = keys.of_run(like.encode()).claims
    others = (f"{like}-{count}" for count in itertools.count())
    return list(itertools.islice((run for run in others if keys.of_run(run.encode()).claims == index), number))
