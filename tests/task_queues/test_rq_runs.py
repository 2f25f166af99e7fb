"""The run of a job: which run id it has, and which steps belong to it.

The jobs run inside enqueue(), on fakeredis and on a real server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rq import Queue
from support import rq_jobs
from support.rq_harness import RQ_MARKS, Harness, assert_contains, result_of, traceback_of

import squidstep_redis.rq
from squidstep_redis import InvalidArgumentError, StepRunStore
from squidstep_redis.rq import step, steps

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS


class TestRunIdOfTheArguments:
    def test_format_string_makes_the_run_id(self, harness: Harness, queue: Queue) -> None:
        first, second = queue.enqueue(rq_jobs.charge_order, 7), queue.enqueue(rq_jobs.charge_order, number=7)
        third = queue.enqueue(rq_jobs.charge_order, 7, region="us")
        assert [result_of(job) for job in (first, second, third)] == ["7 eu", "7 eu", "7 us"]
        assert harness.effects() == {"charge 7 eu": 1, "charge 7 us": 1}
        store = StepRunStore(queue.connection)
        assert store.completed_steps("order-7-eu") == store.completed_steps("order-7-us") == ["charge"]

    def test_function_makes_the_run_id(self, harness: Harness, queue: Queue) -> None:
        assert result_of(queue.enqueue(rq_jobs.charge_order_of, {"number": 7})) == 7
        assert result_of(queue.enqueue(rq_jobs.charge_order_of, order={"number": 7}, amount=2)) == 7
        assert harness.effects() == {"charge": 1}
        assert StepRunStore(queue.connection).completed_steps("order-7") == ["charge"]

    @pytest.mark.parametrize("function", [rq_jobs.charge_without_run_id, rq_jobs.ship_without_run_id])
    def test_function_that_returns_none_is_rejected(
        self, harness: Harness, queue: Queue, function: Callable[..., Any]
    ) -> None:
        traceback = traceback_of(queue.enqueue(function, {"id": None}))
        message = "InvalidArgumentError: run_id: must be a non-empty str, but its function returned None"
        assert_contains(traceback, message)
        assert harness.effects() == {}

    @pytest.mark.parametrize("number", ["", "}{0}\0\n"], ids=["empty", "odd"])
    def test_any_short_text_can_be_in_the_run_id(self, harness: Harness, queue: Queue, number: str) -> None:
        job = queue.enqueue(rq_jobs.charge_order, number)
        assert result_of(job) == result_of(queue.enqueue(rq_jobs.charge_order, number)) == f"{number} eu"
        assert StepRunStore(queue.connection).completed_steps(f"order-{number}-eu") == ["charge"]

    @pytest.mark.parametrize(
        ("number", "problem"),
        [("7" * 512, "must be 1 to 512 bytes of UTF-8"), ("\ud800", "has a lone surrogate")],
        ids=["long", "surrogate"],
    )
    def test_text_that_is_not_a_run_id_is_rejected(
        self, harness: Harness, queue: Queue, number: str, problem: str
    ) -> None:
        job = queue.enqueue(rq_jobs.charge_order, number)
        assert_contains(traceback_of(job), "InvalidArgumentError: run_id:", problem)
        assert harness.effects() == {}

    @pytest.mark.parametrize(
        ("run_id", "problem"),
        [
            ("order-{order_id}", "names 'order_id', which is not a parameter"),
            ("order-{id.number}-{order_id[0]}", "names 'order_id[0]', which is not a parameter"),
            ("order-{}", "names '', which is not a parameter"),
            ("order-{0}", "names '0', which is not a parameter"),
            ("order-{id", "is not a valid format string"),
        ],
    )
    @pytest.mark.parametrize(
        "decorator",
        [lambda run_id: step("pay", run_id=run_id), lambda run_id: steps(run_id=run_id)],
        ids=["step", "steps"],
    )
    def test_wrong_format_string_is_rejected_when_decorating(
        self, decorator: Callable[[str], Any], run_id: str, problem: str
    ) -> None:
        def work(id: int) -> None:
            raise NotImplementedError

        with pytest.raises(InvalidArgumentError) as caught:
            decorator(run_id)(work)
        assert caught.value.argument == "run_id"
        assert problem in str(caught.value)


class TestStepsOfOneRun:
    def test_decorated_step_belongs_to_the_run_of_its_caller(self, harness: Harness, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.ship_order, 7)
        again = queue.enqueue(rq_jobs.ship_order, 7)
        assert result_of(job) == result_of(again) == ["parcel of 7", "parcel of 7, announced"]
        store = StepRunStore(queue.connection)
        assert store.completed_steps("order-7") == ["reserve", "announce"]
        assert store.get_run(job.id) == []
        assert harness.effects() == {"reserve": 1, "announce": 1}

    def test_steps_of_an_undecorated_function_belong_to_the_job(self, harness: Harness, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.without_decorator, 7)
        assert result_of(job) == result_of(queue.enqueue_job(job)) == ["parcel of 7", "{'charged': 7}"]
        assert StepRunStore(queue.connection).completed_steps(job.id) == ["reserve", "charge"]
        assert harness.effects() == {"reserve": 1, "charge": 1}

    def test_jobs_inside_enqueue_have_their_own_runs(self, harness: Harness, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.ship_several, [1, 2])
        assert result_of(job) == [{"charged": 1}, {"charged": 2}]
        assert StepRunStore(queue.connection).get_run(job.id) == []
        assert harness.effects() == {"charge": 2}

    def test_threads_of_a_job_can_work_on_its_run(self, harness: Harness, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.reserve_in_threads, [1, 2])
        assert result_of(job) == ["parcel of 1", "parcel of 2"]
        found = StepRunStore(queue.connection).get_run(job.id)
        assert {(each.step, each.status, each.owner) for each in found} == {
            (f"reserve {amount}", "completed", squidstep_redis.rq.owner(job)) for amount in (1, 2)
        }
