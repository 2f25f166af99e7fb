"""Tools for testing code that uses a store: pip install 'squidstep_redis[testing]'.

pytest finds the fixtures `step_store`, `async_step_store`, `step_clock` and `step_faults` by itself. Without pytest,
`StepKit` provides all four. The guide is tests/guide/testing.md.
"""

from squidstep_redis.testing.asserts import (
    assert_completed,
    assert_executed_once,
    assert_failed,
    assert_not_begun,
    describe_run,
)
from squidstep_redis.testing.clock import StepClock
from squidstep_redis.testing.faults import StepFaults, WorkerKilled
from squidstep_redis.testing.kit import StepKit

__all__ = [
    "StepClock",
    "StepFaults",
    "StepKit",
    "WorkerKilled",
    "assert_completed",
    "assert_executed_once",
    "assert_failed",
    "assert_not_begun",
    "describe_run",
]
