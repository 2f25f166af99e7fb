"""How the call of a function becomes a step: its arguments are the input, its result is the output.

The jobs run inside enqueue(), on fakeredis and on a real server.
"""

from __future__ import annotations

import inspect
import os
from datetime import datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from rq import Queue
from support import rq_input_jobs, rq_jobs
from support.rq_harness import HOST, RQ_MARKS, THE_JOB, Harness, assert_contains, result_of, traceback_of

import squidstep_redis.rq
from squidstep_redis import StepRunStore

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS

REPEATED = datetime(2021, 10, 31, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))
SKIPPED = datetime(2021, 3, 28, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"))


def test_step_takes_effect_once_and_returns_the_stored_result(harness: Harness, queue: Queue) -> None:
    job = queue.enqueue(rq_jobs.charge_at_once, 7)
    assert result_of(job) == {"charged": 7}
    assert result_of(queue.enqueue_job(job)) == {"charged": 7}
    assert result_of(queue.enqueue(rq_jobs.charge_at_once, amount=9)) == {"charged": 9}
    assert harness.effects() == {"charge": 2}


def test_job_makes_at_most_max_attempts_attempts(harness: Harness, queue: Queue) -> None:
    job = queue.enqueue(rq_jobs.stumble, 7, 9)
    tracebacks = [traceback_of(job), traceback_of(queue.enqueue_job(job)), traceback_of(queue.enqueue_job(job))]
    assert ["StepExhaustedError" in traceback for traceback in tracebacks] == [False, False, True]
    assert all("LookupError: no such card" in traceback for traceback in tracebacks)  # the last error is quoted


class TestArguments:
    def test_given_arguments_are_stored_and_defaults_are_not(self, harness: Harness, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.measure, 7)
        assert result_of(job) == result_of(queue.enqueue_job(job)) == "7 cm"
        (step_run,) = StepRunStore(queue.connection).get_run("measured-7-cm")
        assert step_run.input == {"length": 7}

    def test_unstorable_arguments_are_rejected(self, harness: Harness, queue: Queue) -> None:
        traceback = traceback_of(queue.enqueue(rq_jobs.charge_at_once, Decimal(7)))
        assert_contains(traceback, "PayloadError", "input['amount']")
        assert harness.effects() == {}
        assert list(queue.connection.scan_iter("squidstep:*")) == []

    def test_scheduled_step_is_called_with_its_scheduled_arguments(self, harness: Harness, queue: Queue) -> None:
        store = StepRunStore(queue.connection)
        run_ids = [str(uuid4()) for _ in range(3)]
        store.schedule_step(THE_JOB, "charge", {"amount": 9})
        assert result_of(queue.enqueue(rq_jobs.charge_at_once, 7, job_id=THE_JOB)) == {"charged": 9}
        scheduled = {"first": 1, "second": 2, "rest": [3, 4], "named": 5, "others": {"more": 6}}
        store.schedule_step(run_ids[0], "mix", scheduled)
        assert result_of(queue.enqueue(rq_jobs.mix, 0, 0, job_id=run_ids[0])) == [1, 2, [3, 4], 5, {"more": 6}]
        store.schedule_step(run_ids[1], "mix", {"second": 2})
        assert result_of(queue.enqueue(rq_jobs.mix, 0, 0, 7, job_id=run_ids[1], more=8)) == [0, 2, [7], 4, {"more": 8}]
        store.schedule_step(run_ids[2], "charge", {"amount": 9})
        assert result_of(queue.enqueue(rq_jobs.charge_asyncio, 7, job_id=run_ids[2])) == {"charged": 9}

    @pytest.mark.parametrize("at", [REPEATED, REPEATED.replace(fold=1), SKIPPED], ids=["first", "second", "skipped"])
    def test_times_of_a_clock_change_arrive_as_given(self, harness: Harness, queue: Queue, at: datetime) -> None:
        store = StepRunStore(queue.connection)
        expected = [at.isoformat()] * 4
        assert result_of(queue.enqueue(rq_input_jobs.times, at, [(at,)], at=at, others={at: at})) == expected
        assert result_of(queue.enqueue(rq_input_jobs.times_asyncio, at, [(at,)], at=at, others={at: at})) == expected
        for given in ({"first": at, "more": [[[at]]], "others": {"at": at, "others": {at: at}}}, {"first": at}):
            run_id = str(uuid4())
            store.schedule_step(run_id, "times", given)
            job = queue.enqueue(rq_input_jobs.times, at, [(at,)], job_id=run_id, at=at, others={at: at})
            assert result_of(job) == expected

    def test_scheduled_arguments_that_are_unknown_are_rejected(self, harness: Harness, queue: Queue) -> None:
        StepRunStore(queue.connection).schedule_step(THE_JOB, "charge", {"amout": 9})
        traceback = traceback_of(queue.enqueue(rq_jobs.charge_at_once, 7, job_id=THE_JOB))
        message = "was scheduled with ['amout'], which its function does not accept"
        assert_contains(traceback, "InvalidArgumentError", message)
        assert harness.effects() == {}


class TestResults:
    def test_tuple_is_returned_as_a_list_from_the_start(self, harness: Harness, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.pair, "a")
        assert result_of(job) == ["a", [1, 2]]
        assert result_of(queue.enqueue_job(job)) == ["a", [1, 2]]
        assert harness.effects() == {"pair": 1}

    def test_unstorable_result_fails_the_step_permanently(self, harness: Harness, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.make_object)
        assert_contains(traceback_of(job), "PayloadError", "output['result']", "Pass plain data, such as an id")
        assert_contains(traceback_of(queue.enqueue_job(job)), "StepFailedError", "output['result']")
        (step_run,) = StepRunStore(queue.connection).get_run(job.id)
        assert (step_run.status, step_run.attempt, step_run.final) == ("failed", 1, True)

    def test_output_of_another_kind_is_returned_whole(self, harness: Harness, queue: Queue) -> None:
        store = StepRunStore(queue.connection)
        for output in ({"total": 3}, {"result": 3, "currency": "EUR"}, {}):
            run_id = str(uuid4())
            claim, _ = store.begin_step(run_id, "charge", {})
            store.complete_step(claim, output)
            assert result_of(queue.enqueue(rq_jobs.charge_at_once, 7, job_id=run_id)) == output
        assert harness.effects() == {}

    def test_plain_function_that_returns_a_coroutine_is_rejected(self, harness: Harness, queue: Queue) -> None:
        for function in (rq_jobs.charge_wrapped, rq_jobs.ship_wrapped):
            traceback = traceback_of(queue.enqueue(function, 7))
            expected = ("InvalidArgumentError: fn:", function.__name__, "decorate the function that it wraps")
            assert_contains(traceback, *expected)
        assert harness.effects() == {}
        job = queue.enqueue(rq_jobs.wrapped_charge, 7)
        assert result_of(job) == result_of(queue.enqueue_job(job)) == {"charged": 7}
        assert harness.effects() == {"charge": 1}


def test_object_whose_call_is_async_can_be_a_step(harness: Harness, queue: Queue) -> None:
    job = queue.enqueue(rq_jobs.charge_by_object, 7)
    assert result_of(job) == result_of(queue.enqueue_job(job)) == {"charged": 7}
    assert harness.effects() == {"charge": 1}


class TestMethods:
    def test_method_can_be_a_run_of_steps(self, harness: Harness, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.Shop("eu").sell, 7)
        assert result_of(job) == result_of(queue.enqueue_job(job)) == "7 eu"
        assert harness.effects() == {"sell": 1}

    @pytest.mark.parametrize("name", ["sell_at_once", "__call__", "open"])
    def test_error_of_a_method_as_step_names_the_alternative(self, harness: Harness, queue: Queue, name: str) -> None:
        shop = rq_jobs.Shop("eu")
        traceback = traceback_of(queue.enqueue(shop if name == "__call__" else getattr(shop, name), 7))
        argument = "input['cls']" if name == "open" else "input['self']"
        alternative = "call a bound method: run.call(name, self.method, …)"
        assert_contains(traceback, f"PayloadError: {argument}", alternative)
        assert harness.effects() == {}


def test_decorated_function_keeps_its_name_and_signature() -> None:
    assert rq_jobs.charge_order.__name__ == "charge_order"
    assert str(inspect.signature(rq_jobs.charge_order)) == "(number: 'int', *, region: 'str' = 'eu') -> 'str'"
    assert inspect.iscoroutinefunction(rq_jobs.charge_asyncio)
    assert inspect.iscoroutinefunction(rq_jobs.ship_asyncio)
    assert not inspect.iscoroutinefunction(rq_jobs.ship)


def test_owner_names_process_and_job() -> None:
    assert squidstep_redis.rq.owner(None) == f"{HOST}:{os.getpid()}"
    job: Any = SimpleNamespace(id="a\n\x9bb\udcff")
    assert squidstep_redis.rq.owner(job, 7) == f"{HOST}:7 a??b?"
    job = SimpleNamespace(id="é" * 300)
    assert 254 < len(squidstep_redis.rq.owner(job).encode()) <= 256


@pytest.mark.parametrize("job", ["ship_labelled", "ship_in_labelled_run", "ship_in_current_run"])
def test_job_labels_its_run(queue: Queue, job: str) -> None:
    enqueued = queue.enqueue(getattr(rq_input_jobs, job), "acme", 7)

    assert result_of(enqueued) == 7
    summary = StepRunStore(queue.connection).summarize_run(enqueued.id)
    assert summary is not None
    assert summary.labels == {"tenant": "acme"}
