"""One step with several inputs: refused inside one job, and between jobs with `fingerprint=`.

The jobs run inside enqueue(), on fakeredis and on a real server, and in a real worker.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rq import Queue, Retry, SimpleWorker
from support import rq_input_jobs as jobs
from support.process_state import restored
from support.rq_harness import RQ_MARKS, Harness, assert_contains, result_of, traceback_of

from squidstep_redis import InputMismatchError, InvalidArgumentError, StepRunStore
from squidstep_redis.rq import configure, current_run, step

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS


class TestOneJob:
    @pytest.mark.parametrize(
        "job",
        [
            jobs.reserve_in_a_loop,
            jobs.reserve_in_a_loop_asyncio,
            jobs.reserve_at_the_same_time,
            jobs.reserve_with_current_run,
            jobs.reserve_without_decorator,
            jobs.announce_in_a_loop,
            jobs.announce_without_decorator,
            jobs.reserve_in_threads,
        ],
    )
    def test_a_different_input_for_the_same_step_fails_the_job(
        self, harness: Harness, queue: Queue, job: Callable[..., Any]
    ) -> None:
        traceback = traceback_of(queue.enqueue(job, [1, 2, 3]))
        assert_contains(
            traceback, "InputMismatchError: run ", "step 'each'", "In a loop, give each call its own step name"
        )
        assert sum(harness.effects().values()) == 1

    def test_the_same_arguments_return_the_same_result(self, harness: Harness, queue: Queue) -> None:
        assert result_of(queue.enqueue(jobs.reserve_in_a_loop, [1, 1, 1])) == ["1 eu"] * 3
        assert result_of(queue.enqueue(jobs.reserve_in_several_ways)) == ["1 eu"] * 4
        assert harness.effects() == {"reserve 1": 2}

    def test_runs_and_steps_are_distinguished(self, queue: Queue) -> None:
        assert result_of(queue.enqueue(jobs.reserve_in_several_runs, [1, 2])) == ["1 eu", "2 eu"]
        assert result_of(queue.enqueue(jobs.reserve_under_several_names, [1, 2])) == ["1 eu", "2 eu"]

    def test_a_failed_call_may_be_followed_by_another_input(self, queue: Queue) -> None:
        assert result_of(queue.enqueue(jobs.reserve_an_alternative, [0, 2])) == "2 eu"

    def test_each_execution_of_a_job_starts_afresh(self, harness: Harness) -> None:
        job = harness.enqueue(jobs.reserve_the_attempt, retry=Retry(max=1))
        worker = SimpleWorker([harness.queue], connection=harness.connection)
        with restored():
            worker.work(burst=True)
        assert result_of(job) == "1 eu"  # the stored result: the step has no fingerprint between executions

    def test_a_job_that_is_enqueued_again_starts_afresh(self, queue: Queue) -> None:
        job = queue.enqueue(jobs.reserve_the_next, [1])
        assert result_of(job) == "1 eu"
        assert result_of(queue.enqueue_job(job)) == "1 eu"

    def test_outside_a_job_each_run_object_is_a_scope(self, queue: Queue) -> None:
        configure(lambda: queue.connection)
        run = current_run("order-1")
        assert run.call("each", jobs.reserve_quietly, 1) == run.call("each", jobs.reserve_quietly, 1) == 1
        with pytest.raises(InputMismatchError):
            run.call("each", jobs.reserve_quietly, 2)
        assert current_run("order-1").call("each", jobs.reserve_quietly, 2) == 1

    def test_arguments_that_only_the_codec_accepts_are_not_compared(self, queue: Queue) -> None:
        configure(lambda: queue.connection, codec=jobs.PickleCodec())
        run = current_run("order-1")
        assert run.call("each", jobs.reserve_path, Path("a")) == run.call("each", jobs.reserve_path, Path("b")) == "a"


class TestSeveralJobs:
    @pytest.mark.parametrize("job", [jobs.charge_once, jobs.charge_once_asyncio, jobs.ship_once])
    def test_a_different_input_of_another_job_is_refused(
        self, harness: Harness, queue: Queue, job: Callable[..., Any]
    ) -> None:
        assert result_of(queue.enqueue(job, 7, amount=1)) == 1
        assert result_of(queue.enqueue(job, 7, amount=1)) == 1
        other = queue.enqueue(job, 7, amount=2)
        assert_contains(traceback_of(other), "InputMismatchError: run 'order-7', step 'charge': the input has the")
        assert harness.effects() == {"charge": 1}
        assert StepRunStore(queue.connection).completed_outputs("order-7") == [{"result": 1}]

    def test_a_function_picks_the_arguments(self, queue: Queue) -> None:
        assert result_of(queue.enqueue(jobs.charge_by_amount, 7, amount=1, note="a")) == 1
        assert result_of(queue.enqueue(jobs.charge_by_amount, 7, amount=1, note="b")) == 1
        assert_contains(traceback_of(queue.enqueue(jobs.charge_by_amount, 7, amount=2, note="a")), "InputMismatchError")

    def test_the_setting_of_the_store_can_be_overridden(self, queue: Queue) -> None:
        configure(lambda: queue.connection, fingerprint=True)
        assert current_run("order-1").call("each", jobs.reserve_quietly, 1) == 1
        with pytest.raises(InputMismatchError):
            current_run("order-1").call("each", jobs.reserve_quietly, 2)
        assert current_run("order-1", fingerprint=False).call("each", jobs.reserve_quietly, 2) == 1

    def test_a_malformed_fingerprint_is_rejected_when_decorating(self) -> None:
        with pytest.raises(InvalidArgumentError, match="^fingerprint: must be"):
            step("pay", fingerprint=7)


@pytest.mark.parametrize(
    ("job", "given"),
    [
        (jobs.log_in, {"user": "ada"}),
        (jobs.log_in_asyncio, {"user": "ada"}),
        (jobs.log_in_with_steps, {"user": "ada"}),
        (jobs.log_in_with_current_run, {"user": "ada"}),
        (jobs.Account("ada").log_in, {}),
    ],
    ids=["step", "asyncio", "steps", "current_run", "method"],
)
def test_excluded_arguments_reach_the_function_and_not_the_store(
    harness: Harness, queue: Queue, job: Callable[..., Any], given: dict[str, str]
) -> None:
    configure(lambda: queue.connection)
    assert result_of(queue.enqueue(job, *given.values(), "hunter2")) == "ada h"
    assert result_of(queue.enqueue(job, *given.values(), "swordfish")) == "ada h"
    (step_run,) = StepRunStore(queue.connection).get_run("user-ada")
    assert step_run.input == given
    assert harness.effects() == {"log in": 1}
