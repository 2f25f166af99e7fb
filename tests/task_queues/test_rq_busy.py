"""A step that another worker holds: its job is rescheduled, or raises StepBusyError where RQ cannot reschedule."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import rq
from rq import Queue, Retry
from rq.job import Job, JobStatus
from support import rq_jobs, rq_retry_jobs
from support.rq_harness import (
    ANOTHER_JOB,
    KINDS_OF_WORKER,
    RQ_MARKS,
    THE_JOB,
    Harness,
    assert_contains,
    result_of,
    traceback_of,
)

from squidstep_redis import InvalidArgumentError, RetryLater, StepRunStore
from squidstep_redis.rq import step, steps
from squidstep_redis.task_queues import reschedule_delay

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS


@pytest.mark.parametrize("kind", KINDS_OF_WORKER)
def test_busy_step_uses_none_of_the_jobs_retries(harness: Harness, kind: str) -> None:
    held, _ = harness.store.begin_step(THE_JOB, "charge", {"amount": 7}, lease=600)
    another, _ = harness.store.begin_step(ANOTHER_JOB, "reserve", {"amount": 7}, lease=600)
    harness.start(kind)
    job = harness.enqueue(rq_jobs.charge_at_once, 7, job_id=THE_JOB, retry=Retry(max=1))
    several = harness.enqueue(rq_jobs.ship_at_once, 7, job_id=ANOTHER_JOB, retry=Retry(max=1))
    harness.until(lambda: harness.is_scheduled(job) and harness.is_scheduled(several))
    harness.store.expire_claim(held)
    harness.store.complete_step(another, {"result": "another parcel"})
    harness.run_scheduled_now(job)
    harness.run_scheduled_now(several)

    harness.wait_finished(job)
    harness.wait_finished(several)
    assert job.return_value() == {"charged": 7}
    assert harness.outcomes(job, "charge") == ["lease_expired", "completed"]
    assert several.return_value() == "another parcel"
    for each in (job, several):
        each.refresh()
        assert each.retries_left == 1
    assert harness.effects() == {"charge": 1}


def test_rescheduled_job_has_neither_succeeded_nor_failed(harness: Harness) -> None:
    held, _ = harness.store.begin_step(THE_JOB, "charge", {"amount": 7}, lease=600)
    callbacks: Any = {"on_success": rq.Callback(rq_jobs.succeeded), "on_failure": rq.Callback(rq_jobs.failed)}
    job = harness.enqueue(rq_jobs.charge_at_once, 7, job_id=THE_JOB, **callbacks)
    dependent = harness.enqueue(rq_jobs.charge_at_once, 8, depends_on=job)
    harness.start()
    harness.until(lambda: harness.is_scheduled(job))
    assert dependent.get_status() == JobStatus.DEFERRED
    assert harness.effects() == {}
    harness.store.complete_step(held, {"result": 9})
    harness.run_scheduled_now(job)

    harness.wait_finished(job)
    harness.wait_finished(dependent)
    assert (job.return_value(), dependent.return_value()) == (9, {"charged": 8})
    harness.until(lambda: harness.effects() == {"succeeded with 9": 1, "charge": 1})


def test_job_looks_again_at_growing_intervals(harness: Harness) -> None:
    held, _ = harness.store.begin_step(THE_JOB, "charge", {"amount": 7}, lease=600)
    job = harness.enqueue(rq_jobs.charge_at_once, 7, job_id=THE_JOB)
    harness.start()
    for looks in range(1, 8):
        harness.until(lambda looks=looks: harness.looks(job) >= looks and harness.is_scheduled(job))
        before = time.time()
        harness.run_scheduled_now(job)
    assert _delay(harness, job, 8, before) >= 2**7 - 1

    harness.store.expire_claim(held)  # another worker takes over: its work begins now
    harness.store.begin_step(THE_JOB, "charge", {"amount": 7}, lease=600)
    before = time.time()
    harness.run_scheduled_now(job)
    assert _delay(harness, job, 1, before) < 60


def test_next_run_removes_the_notes_of_a_busy_step(harness: Harness) -> None:
    held, _ = harness.store.begin_step(THE_JOB, "charge", {"amount": 7}, lease=600)
    job = harness.enqueue(rq_jobs.charge_at_once, 7, job_id=THE_JOB, meta={"user": "ann"})
    harness.start()
    harness.until(lambda: harness.looks(job) >= 1 and harness.is_scheduled(job))
    harness.store.release_step(held)
    harness.run_scheduled_now(job)
    harness.wait_finished(job)
    assert job.get_meta(refresh=True) == {"user": "ann"}


def _delay(harness: Harness, job: Job, looks: int, since: float) -> float:
    harness.until(lambda: harness.looks(job) == looks and harness.is_scheduled(job))
    at = harness.connection.zscore(harness.queue.scheduled_job_registry.key, job.id)
    assert isinstance(at, float)
    return at - since


def test_duplicate_of_a_running_job_ends_soon_after_it(harness: Harness) -> None:
    harness.start()
    harness.start()
    first, second = harness.enqueue(rq_jobs.charge_slowly, 7), harness.enqueue(rq_jobs.charge_slowly, 7)
    running = harness.reached("charging")
    harness.until(lambda: harness.is_scheduled(first) or harness.is_scheduled(second))
    running.resume()

    before = time.monotonic()
    harness.wait_finished(first)
    harness.wait_finished(second)
    assert time.monotonic() - before < 30  # the lease lasts for 600 seconds
    assert harness.effects() == {"charge": 1}


each_wrapped = pytest.mark.parametrize(
    "function", [rq_retry_jobs.charge_dropped, rq_retry_jobs.charge_dropped_asyncio, rq_retry_jobs.charge_replaced]
)


@each_wrapped
@pytest.mark.parametrize("kind", KINDS_OF_WORKER)
def test_wrapper_that_drops_the_result_loses_no_job(harness: Harness, function: Callable[..., Any], kind: str) -> None:
    held, _ = harness.store.begin_step(THE_JOB, "charge", {"amount": 7}, lease=600)
    callbacks: Any = {"on_success": rq.Callback(rq_jobs.succeeded), "on_failure": rq.Callback(rq_jobs.failed)}
    harness.start(kind)
    job = harness.enqueue(function, 7, job_id=THE_JOB, **callbacks)
    harness.until(lambda: harness.is_scheduled(job))
    assert harness.effects() == {}
    harness.store.expire_claim(held)

    harness.wait_finished(job)
    result = {"took": 7, "result": "None"} if function is rq_retry_jobs.charge_replaced else None
    assert job.return_value() == result
    harness.until(lambda: harness.effects() == {"charge": 1, f"succeeded with {result}": 1})


@pytest.mark.parametrize(
    ("rest", "lease", "seconds"),
    [
        (60.0, 1, range(60, 67)),
        (59.01, 1, range(60, 67)),
        (0.2, 1, range(1, 3)),
        (0.0, 1, range(1, 3)),
        (None, 20, range(20, 23)),
        (None, timedelta(seconds=20), range(20, 23)),
        (None, None, range(30, 34)),
    ],
)
def test_reschedule_delays_have_jitter(rest: float | None, lease: Any, seconds: range) -> None:
    error: Any = SimpleNamespace(retry_in=rest)
    assert {reschedule_delay(error, lease) for _ in range(1_000)} == set(seconds)


@pytest.mark.parametrize("delay", [-1, 0, float("inf"), float("nan"), 1e12, 10**30, None, "60"], ids=repr)
def test_invalid_delay_of_retry_later_is_the_shortest(delay: Any) -> None:
    """Its step can be claimed at once."""
    assert {reschedule_delay(RetryLater(delay), 30) for _ in range(100)} == {1, 2}


def test_delay_of_retry_later_can_be_a_timedelta() -> None:
    assert 60 <= reschedule_delay(RetryLater(timedelta(minutes=1)), 30) <= 66


def test_retry_later_of_a_subclass_needs_no_delay() -> None:
    class ClosedError(RetryLater):
        def __init__(self, bank: str) -> None:
            self.bank = bank

    assert str(ClosedError("north")) == "retry in 0 s"
    assert reschedule_delay(ClosedError("north"), 30) <= 2


@pytest.mark.parametrize(
    ("looks", "rest", "seconds"),
    [
        (0, 30.0, [1]),
        (1, 30.0, [2]),
        (3, 30.0, [8]),
        (4, 30.0, [16, 17]),
        (5, 30.0, [30, 31, 32, 33]),
        (1_000_000, 30.0, [30, 31, 32, 33]),
        (2, 0.5, [1, 2]),
        (3, None, [8]),
    ],
)
def test_delays_double_until_the_end_of_the_lease(looks: int, rest: float | None, seconds: list[int]) -> None:
    error: Any = SimpleNamespace(retry_in=rest)
    assert {reschedule_delay(error, 30, looks) for _ in range(1_000)} == set(seconds)


@pytest.mark.parametrize("burst", [False, True])
def test_busy_step_raises_without_a_scheduler(harness: Harness, burst: bool) -> None:
    harness.store.begin_step(THE_JOB, "charge", {"amount": 7})
    job = harness.enqueue(rq_jobs.charge_at_once, 7, job_id=THE_JOB, retry=Retry(max=1))
    harness.start(with_scheduler=False, burst=burst)

    traceback = harness.wait_failed(job)
    assert_contains(traceback, "StepBusyError", "no worker of its queue has a scheduler (--with-scheduler)")
    job.refresh()
    assert job.retries_left == 0
    assert harness.outcomes(job, "charge") == ["running"]
    assert harness.effects() == {}


def test_busy_step_raises_in_a_job_without_decorator(harness: Harness) -> None:
    harness.store.begin_step(THE_JOB, "charge", {"amount": 7})
    job = harness.enqueue(rq_jobs.without_decorator, 7, job_id=THE_JOB)
    harness.start()

    traceback = harness.wait_failed(job)
    assert "StepBusyError" in traceback
    assert "not rescheduled" not in traceback
    assert harness.store.completed_steps(job.id) == ["reserve"]
    assert harness.effects() == {"reserve": 1}


@pytest.mark.parametrize("function", [rq_jobs.charge_at_once, rq_jobs.charge_asyncio, rq_jobs.ship_at_once])
def test_busy_step_raises_inside_enqueue(harness: Harness, queue: Queue, function: Callable[..., Any]) -> None:
    store = StepRunStore(queue.connection)
    for name in ("charge", "reserve"):
        store.begin_step(THE_JOB, name, {"amount": 7}, owner="another worker")
    traceback = traceback_of(queue.enqueue(function, 7, job_id=THE_JOB, retry=Retry(max=1)))
    assert_contains(traceback, "StepBusyError", "by another worker", "it runs inside enqueue(), where RQ ignores Retry")
    assert harness.effects() == {}


def test_busy_step_raises_with_on_busy_raise(harness: Harness, queue: Queue) -> None:
    StepRunStore(queue.connection).begin_step(THE_JOB, "charge", {"amount": 7})
    traceback = traceback_of(queue.enqueue(rq_jobs.charge_or_raise, 7, job_id=THE_JOB))
    assert "StepBusyError" in traceback
    assert "not rescheduled" not in traceback


@pytest.mark.timeout(60)
def test_tasks_of_a_job_can_wait_for_each_other(harness: Harness, queue: Queue) -> None:
    assert result_of(queue.enqueue(rq_jobs.reserve_side_by_side, 7)) == ["parcel of 7"] * 3
    assert harness.effects() == {"reserve": 1}


@pytest.mark.timeout(60)
def test_step_that_would_wait_for_itself_raises(harness: Harness, queue: Queue) -> None:
    traceback = traceback_of(queue.enqueue(rq_jobs.reserve_forever, 7))
    assert_contains(traceback, "InvalidArgumentError: on_busy: 'wait' ", "step 'reserve' of run ")


@pytest.mark.parametrize("function", [rq_jobs.charge_recursively, rq_jobs.charge_recursively_asyncio])
def test_step_within_itself_fails_instead_of_being_rescheduled(harness: Harness, function: Callable[..., Any]) -> None:
    """No rerun would find it free."""
    harness.start()
    traceback = harness.wait_failed(harness.enqueue(function, 7))
    assert_contains(traceback, "InvalidArgumentError: step: this code itself", "step 'charge' of run 'order-7'")
    assert harness.effects() == {"charge": 1}


@pytest.mark.parametrize("decorator", [lambda **options: step("pay", **options), steps], ids=["step", "steps"])
def test_unknown_on_busy_is_rejected(decorator: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="'reschedule', 'raise' or 'wait', not 'skip'"):
        decorator(on_busy="skip")
