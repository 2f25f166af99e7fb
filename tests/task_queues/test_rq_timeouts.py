"""RQ's job timeout: an alarm whose handler raises JobTimeoutException at any instruction of the job."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from rq import Queue, Retry
from rq.job import Job, JobStatus
from rq.timeouts import JobTimeoutException
from support import rq_jobs, rq_storm
from support.claims import DeclinedError
from support.interruptions import at_line
from support.rq_harness import RQ_MARKS, Harness, result_of, traceback_of
from support.servers import wait_until
from support.storm_length import StormLength

from squidstep_redis import MsgpackCodec, StepRunStore
from squidstep_redis.rq import Run, busy, configure, step, store

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS


def test_timeout_is_recorded_and_the_retry_is_another_attempt(harness: Harness) -> None:
    harness.start()
    job = harness.enqueue(rq_jobs.overstay, 7, retry=Retry(max=3), job_timeout=600)

    harness.wait_finished(job)
    assert job.return_value() == {"charged": 7}
    assert harness.outcomes(job, "charge") == ["failed", "completed"]
    error = harness.store.attempts(job.id, "charge")[0].error
    assert error is not None
    assert error["type"] == "rq.timeouts.JobTimeoutException"
    assert "exceeded maximum timeout value (600 seconds)" in error["message"]
    assert harness.effects() == {"charge": 1}


def test_timeout_of_a_coroutine_blocks_no_longer_than_the_lease(harness: Harness) -> None:
    harness.start()
    job = harness.enqueue(rq_jobs.overstay_asyncio, 7, retry=Retry(max=3), job_timeout=600)

    harness.wait_finished(job)
    assert job.return_value() == {"charged": 7}
    # RQ 3 ends the coroutine, and the step fails. RQ 2 leaves it suspended, and the lease expires.
    first, second = harness.outcomes(job, "charge")
    assert first in {"failed", "lease_expired"}
    assert second == "completed"
    assert harness.effects() == {"charge": 1}


def test_random_alarms_break_no_call_and_leak_no_connection(harness: Harness, storm_length: StormLength) -> None:
    harness.start(with_scheduler=False)
    timeout = 200 + round(storm_length.least)
    job = harness.enqueue(rq_storm.storm, 1_050, storm_length, job_timeout=timeout)
    harness.until(lambda: harness.is_at_rest(job) and job.get_status() != JobStatus.QUEUED, timeout)

    assert job.is_finished, harness.wait_failed(job)
    found = job.return_value()
    alarms = found["alarms"]
    assert alarms >= 1_050
    assert found["wrong"] == []
    # What a handler raises during a destructor is lost: Python ignores it, or redis-py's `__del__` does.
    assert [each for each in found["ignored"] if "__del__" not in each] == []
    assert found["raised"] == alarms
    assert alarms - 2 <= found["caught"] <= alarms
    assert found["held"] == []
    assert found["more connections"] <= 1  # the heartbeat's
    # The alarms hit the calls themselves, each kind of call many times.
    assert found["interrupted"].keys() == {function.__name__ for function in rq_storm.INTERRUPTED}
    assert min(found["interrupted"].values()) > alarms / len(rq_storm.INTERRUPTED) / 10


@pytest.mark.parametrize("is_given", [False, True], ids=["url", "store"])
def test_alarm_during_decoding_is_raised_after_the_call(harness: Harness, is_given: bool) -> None:
    codec = InterruptedCodec()
    if is_given:
        configure(store=StepRunStore.from_url(harness.url, codec=codec))
    else:
        configure(harness.url, codec=codec)
    assert rq_jobs.charge_order(7) == "7 eu"
    codec.is_armed = True
    with alarms_raise(), pytest.raises(JobTimeoutException):
        rq_jobs.charge_order(7)
    assert rq_jobs.charge_order(7) == "7 eu"
    assert harness.effects() == {"charge 7 eu": 1}
    codec.is_armed, codec.went_on = True, 0
    with alarms_raise(), pytest.raises(JobTimeoutException):
        store().completed_outputs("order-7-eu")  # no claim defers the alarm here
    assert codec.went_on == 1
    store().close()


def test_alarm_while_an_error_is_formatted_is_raised(harness: Harness) -> None:
    class InterruptedError(Exception):
        def __str__(self) -> str:
            signal.raise_signal(signal.SIGALRM)
            return "formatted"

    configure(harness.url)
    claim, _ = store().begin_step("run", "pay", {})
    with alarms_raise(), pytest.raises(JobTimeoutException):
        store().fail_step(claim, InterruptedError())


def test_timeout_while_a_coroutine_fails_leaves_no_step_running(harness: Harness) -> None:
    @step("charge", run_id="order-{number}", lease=None)  # no lease would ever end the claim
    async def decline(number: int) -> None:
        raise DeclinedError

    configure(harness.url)
    for line in itertools.count(1):
        expected = contextlib.suppress(JobTimeoutException, DeclinedError)
        with alarms_raise(), expected, at_line(line, ("claims/claim.py",), _raise_alarm) as is_reached:
            asyncio.run(decline(line))
        if not is_reached():
            break
        wait_until(lambda line=line: store().step_statuses(f"order-{line}").get("charge") != "running")
    assert line > 20
    store().close()


def _raise_alarm() -> None:
    signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize(("place", "name"), [(Run, "current"), (busy, "_inside")], ids=["run", "inside"])
def test_timeout_leaves_nothing_to_the_next_job(
    harness: Harness, place: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(harness.url)
    variable = InterruptedVariable(getattr(place, name))
    monkeypatch.setattr(place, name, variable)
    with pytest.raises(JobTimeoutException):
        rq_jobs.ship_order(7)
    assert variable.get() is variable.default


def test_next_job_inherits_nothing_from_an_interrupted_job(harness: Harness, queue: Queue) -> None:
    """A timeout in the very instruction that resets a variable, in a worker that does not fork."""
    job = queue.enqueue(rq_jobs.charge_at_once, 7)
    before = Job.fetch(job.id, connection=queue.connection)  # the same job, at its delivery before
    left = Run.current.set(Run("left", before, {})), busy._inside.set(before)
    try:
        StepRunStore(queue.connection).begin_step("order-7-eu", "charge", {})
        again = queue.enqueue_job(Job.fetch(job.id, connection=queue.connection))
        other = queue.enqueue(rq_jobs.charge_order, 7)
    finally:
        Run.current.reset(left[0])
        busy._inside.reset(left[1])
    assert result_of(again) == {"charged": 7}
    assert harness.effects() == {"charge": 1}
    assert StepRunStore(queue.connection).get_run("left") == []
    assert "it runs inside enqueue(), where RQ ignores Retry" in traceback_of(other)  # so it would be rescheduled


class InterruptedVariable:
    """A context variable; the timeout occurs just after it was set for the first time."""

    def __init__(self, variable: Any) -> None:
        self.get, self._set = variable.get, variable.set
        self.default = variable.get()
        self._was_set = False

    def set(self, value: object) -> object:
        token = self._set(value)
        if not self._was_set:
            self._was_set = True
            raise JobTimeoutException
        return token


class InterruptedCodec(MsgpackCodec):
    """A codec; once it is armed, the alarm occurs while it decodes the result of a function."""

    is_armed = False
    went_on = 0

    def decode(self, data: bytes) -> dict[str, Any]:
        payload = super().decode(data)
        if self.is_armed and "result" in payload:
            self.is_armed = False
            signal.raise_signal(signal.SIGALRM)
            self.went_on += 1
        return payload


@contextlib.contextmanager
def alarms_raise() -> Iterator[None]:
    """Within the block, an alarm raises what RQ's handler raises."""

    def raise_timeout(_number: int, _frame: object) -> None:
        raise JobTimeoutException

    handler = signal.signal(signal.SIGALRM, raise_timeout)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
