"""Beside RQ: real workers and work-horses, killed and timed out; whatever happens, a step takes effect once."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
import redis
import redis.sentinel
import rq
from rq import Queue, Retry
from rq.command import send_stop_job_command
from rq.job import Job, JobStatus
from rq.scheduler import RQScheduler
from rq.timeouts import JobTimeoutException
from support import rq_jobs
from support.rq_workers import RQ_VERSION, Site, Visitor
from support.servers import find_binary

import squidstep_redis.rq
from squidstep_redis import InvalidArgumentError, MsgpackCodec, PayloadError, StepRunStore
from squidstep_redis.claims.rules import default_owner
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.rq import configure, current_run, queue_completion, release_killed_work_horse, step, steps, store

if RQ_VERSION < (3,):  # it leaves the loop of a coroutine function open
    pytestmark = [
        pytest.mark.filterwarnings("ignore:unclosed event loop:ResourceWarning"),
        pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    ]

HOST = default_owner().rpartition(":")[0]
SINCE = {"SpawnWorker": (2, 11), "Repeat": (2, 3)}  # SpawnWorker from 2.2, but not beside redis-py 8
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server


@pytest.fixture(autouse=True)
def _stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stores of this process, as if nobody had configured any."""
    monkeypatch.setattr(squidstep_redis.rq, "_stores", type(squidstep_redis.rq._stores)())


@pytest.fixture
def site(server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(server.url, tmp_path) as site:
        site.connection.flushall()
        for name, value in site.environment.items():
            monkeypatch.setenv(name, value)
        yield site


class TestAKilledWorkHorse:
    def test_is_followed_by_another_when_its_lease_is_over(self, site: Site) -> None:
        site.start()
        job = site.enqueue(rq_jobs.charge, 7, retry=Retry(max=3))
        site.visitor("charging").kill()

        site.until(lambda: site.is_scheduled(job))  # RQ ran it again, at once where it can; it found the step busy
        job.refresh()
        assert job.retries_left == 2  # RQ's own count: for the horse, not for the busy step
        site.visitor("charging").go()

        site.finished(job)
        assert job.return_value() == {"charged": 7}
        assert site.outcomes(job, "charge") == ["lease_expired", "completed"]
        assert site.effects() == {"charge": 1}

    def test_is_followed_by_another_at_once_where_the_worker_has_the_handler(self, site: Site) -> None:
        site.start(release_killed=True)
        job = site.enqueue(rq_jobs.charge_with_a_long_lease, 7, retry=Retry(max=3))
        site.visitor("charging").kill()
        site.visitor("charging").kill()
        site.visitor("charging").go()

        site.finished(job)
        assert job.return_value() == {"charged": 7}
        assert site.outcomes(job, "charge") == ["lease_expired", "lease_expired", "completed"]
        assert site.effects() == {"charge": 1}

    def test_by_ones_own_command_is_followed_by_another_when_its_lease_is_over(self, site: Site) -> None:
        site.start(release_killed=True)  # which RQ does not ask here
        job = site.enqueue(rq_jobs.charge, 7, retry=Retry(max=3))
        site.visitor("charging")
        send_stop_job_command(site.connection, job.id)
        site.until(lambda: job.get_status() == JobStatus.STOPPED and site.is_at_rest(job))
        assert site.outcomes(job, "charge") == ["running"]
        job.requeue()
        site.visitor("charging").go()

        site.finished(job)
        assert job.return_value() == {"charged": 7}
        assert site.outcomes(job, "charge") == ["lease_expired", "completed"]
        assert site.effects() == {"charge": 1}

    def test_gives_up_its_own_claims_and_no_others(self, site: Site) -> None:
        site.start(release_killed=True)
        job = site.enqueue(rq_jobs.charge_with_a_long_lease, 1)
        horse = site.visitor("charging")
        site.start(release_killed=True)
        another = site.enqueue(rq_jobs.charge_with_a_long_lease, 2)
        another_horse = site.visitor("charging")
        claimed = f"{HOST}:{horse.pid} {job.id}"
        assert {claim.owner for claim in site.store.live_claims()} == {
            claimed,
            f"{HOST}:{another_horse.pid} {another.id}",
        }
        others = [
            None,
            f"{HOST}:{horse.pid}",
            f"{HOST}:{horse.pid} {another.id}",
            f"{HOST}:{horse.pid}1 {job.id}",
            f"{HOST}:1{horse.pid} {job.id}",
            f"another-{claimed}",
            f"{claimed}2",
        ]
        for index, name in enumerate(others):
            site.store.begin_step(f"of another {index}", "pay", {}, lease=60, owner=name)
        site.store.begin_step("also of the horse", "pay", {}, lease=60, owner=claimed)

        horse.kill()
        assert "Work-horse terminated unexpectedly" in site.failed(job)

        assert {claim.run_id for claim in site.store.lapsed_claims()} == {job.id, "also of the horse"}
        live = {claim.run_id for claim in site.store.live_claims()}
        assert live == {another.id, *(f"of another {index}" for index in range(len(others)))}
        another_horse.go()
        site.finished(another)
        assert site.outcomes(another, "charge") == ["completed"]

    @pytest.mark.parametrize("function", [rq_jobs.ship, rq_jobs.ship_asyncio], ids=["function", "coroutine"])
    def test_between_two_steps_leaves_the_first_done(self, site: Site, function: Callable[..., Any]) -> None:
        site.start(release_killed=True)
        job = site.enqueue(function, 7, retry=Retry(max=1))
        site.visitor("between").kill()
        assert site.store.step_statuses(job.id) == {"reserve": "completed"}
        site.visitor("between").go()

        site.finished(job)
        assert job.return_value() == ["parcel of 7", "parcel of 7, announced"]
        assert site.store.completed_steps(job.id) == ["reserve", "announce"]
        assert site.outcomes(job, "reserve") == site.outcomes(job, "announce") == ["completed"]
        assert site.effects() == {"reserve": 1, "announce": 1}


class TestAKilledWorker:
    def test_leaves_its_horse_at_work_and_the_second_run_answers_what_the_first_gave(self, site: Site) -> None:
        worker = site.start(with_scheduler=False)
        job = site.enqueue(rq_jobs.charge, 7, retry=Retry(max=3))
        orphan = site.visitor("charging")
        site.start()
        worker.kill()

        site.until(lambda: site.is_scheduled(job))  # delivered to the second worker, which found the step busy
        orphan.go()
        site.until(lambda: site.answers(job))
        site.hurry(job)

        site.finished(job, times=2)
        assert site.answers(job) == [{"charged": 7}] * 2
        assert site.outcomes(job, "charge") == ["completed"]
        assert site.effects() == {"charge": 1}

    def test_with_its_horse_is_followed_by_another_when_the_lease_is_over(self, site: Site) -> None:
        worker = site.start(with_scheduler=False)
        job = site.enqueue(rq_jobs.charge, 7, retry=Retry(max=3))
        horse = site.visitor("charging")
        site.start()
        worker.kill()
        horse.kill()
        site.visitor("charging").go()

        site.finished(job)
        assert job.return_value() == {"charged": 7}
        assert site.outcomes(job, "charge") == ["lease_expired", "completed"]
        assert site.effects() == {"charge": 1}


class TestATimeOut:
    def test_is_recorded_and_the_next_run_is_another_attempt(self, site: Site) -> None:
        site.start()
        job = site.enqueue(rq_jobs.overstay, 7, retry=Retry(max=3), job_timeout=1)
        site.visitor("overstaying")

        site.finished(job)
        assert job.return_value() == {"charged": 7}
        assert site.outcomes(job, "charge") == ["failed", "completed"]
        error = site.store.attempts(job.id, "charge")[0].error
        assert error is not None
        assert error["type"] == "rq.timeouts.JobTimeoutException"
        assert "exceeded maximum timeout value (1 seconds)" in error["message"]
        assert site.effects() == {"charge": 1}

    def test_of_a_coroutine_holds_up_the_step_for_no_longer_than_the_lease(self, site: Site) -> None:
        site.start()
        job = site.enqueue(rq_jobs.overstay_asyncio, 7, retry=Retry(max=3), job_timeout=1)

        site.finished(job)
        assert job.return_value() == {"charged": 7}
        # RQ 3 ends the coroutine, which records why; RQ 2 leaves it where it is.
        first, second = site.outcomes(job, "charge")
        assert first in {"failed", "lease_expired"}
        assert second == "completed"
        assert site.effects() == {"charge": 1}


class TestAJobThatIsEnqueuedAgain:
    def test_after_it_finished_answers_the_stored_result(self, site: Site) -> None:
        site.start()
        job = site.enqueue(rq_jobs.charge_at_once, 7)
        site.finished(job)
        site.queue.enqueue_job(job)
        site.finished(job, times=2)

        assert site.answers(job) == [{"charged": 7}] * 2
        assert site.effects() == {"charge": 1}

    def test_after_it_failed_makes_another_attempt(self, site: Site) -> None:
        site.start()
        job = site.enqueue(rq_jobs.stumble, 7, 1)
        assert "LookupError: no such card" in site.failed(job)
        job.requeue()
        site.finished(job)

        assert job.return_value() == {"charged": 7}
        assert site.outcomes(job, "charge") == ["failed", "completed"]
        assert site.effects() == {"charge": 1}

    def test_after_all_its_attempts_failed_makes_no_other(self, site: Site) -> None:
        site.start()
        job = site.enqueue(rq_jobs.stumble, 7, 9, retry=Retry(max=1))
        site.until(lambda: site.outcomes(job, "charge") == ["failed"] * 2)
        site.failed(job)
        rq.requeue_job(job.id, connection=site.connection)
        site.until(lambda: "StepExhaustedError" in site.failed(job))

        assert site.outcomes(job, "charge") == ["failed"] * 2
        assert site.effects() == {}

    @pytest.mark.parametrize("as_new", [False, True])
    def test_while_it_runs_is_rescheduled_and_answers_what_the_first_gave(self, site: Site, as_new: bool) -> None:
        site.start()
        site.start()
        job = site.enqueue(rq_jobs.charge, 7, job_id="the-job")
        first = site.visitor("charging")
        if as_new:
            site.enqueue(rq_jobs.charge, 7, job_id="the-job")
        else:
            site.queue.enqueue_job(job)
        site.until(lambda: site.is_scheduled(job))
        first.go()
        site.until(lambda: site.answers(job))
        site.hurry(job)

        site.finished(job, times=2)
        assert site.answers(job) == [{"charged": 7}] * 2
        assert site.outcomes(job, "charge") == ["completed"]
        assert site.effects() == {"charge": 1}

    def test_before_it_runs_takes_effect_once(self, site: Site) -> None:
        job, _ = (site.enqueue(rq_jobs.charge_at_once, 7, job_id="the-job") for _ in range(2))
        site.start()

        site.finished(job, times=2)
        assert site.answers(job) == [{"charged": 7}] * 2
        assert site.effects() == {"charge": 1}

    def test_while_it_runs_may_wait_for_what_the_first_gives(self, site: Site) -> None:
        site.start()
        site.start()
        job = site.enqueue(rq_jobs.charge_or_wait, 7)
        first = site.visitor("charging")
        site.queue.enqueue_job(job)
        site.until(lambda: site.connection.zcard(site.queue.started_job_registry.key) == 2)
        first.go()

        site.finished(job, times=2)
        assert site.answers(job) == [{"charged": 7}] * 2
        assert site.outcomes(job, "charge") == ["completed"]
        assert site.effects() == {"charge": 1}

    @pytest.mark.skipif(SINCE["Repeat"] > RQ_VERSION, reason="this RQ has no Repeat")
    def test_by_repeat_is_a_run_of_its_own_each_time(self, site: Site) -> None:
        site.start()
        job = site.enqueue(rq_jobs.charge_at_once, 7, repeat=rq.Repeat(times=2))
        site.finished(job, times=3)
        assert site.effects() == {"charge": 3}
        job.refresh()
        site.queue.enqueue_job(job)  # the last one, again
        site.finished(job, times=4)

        assert site.effects() == {"charge": 3}
        for run_id in (f"{job.id}#2", f"{job.id}#1", f"{job.id}#0"):
            assert site.store.completed_steps(run_id) == ["charge"]
        assert site.store.get_run(job.id) == []


class TestRedisAway:
    """For five seconds; it keeps what it has acknowledged."""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[EmbeddedServer]:
        options = {"appendonly": "yes", "appendfsync": "always"}
        binary, directory = find_binary("valkey"), tmp_path / "server"
        with EmbeddedServer(binary=binary, options=options, port=0, directory=directory) as server:
            yield server

    def test_as_steps_end_and_as_jobs_end_loses_none_and_repeats_none(self, site: Site, server: EmbeddedServer) -> None:
        def begin(function: Callable[[int], Any], amount: int, at: str, interval: int) -> tuple[Job, Visitor]:
            site.start(job_monitoring_interval=interval)
            return site.enqueue(function, amount, retry=Retry(max=3)), site.visitor(at)

        # One worker sees that Redis is away while its horse is at work, and quits; the other does not look.
        charged = [begin(rq_jobs.charge_and_meet, interval, "charged", interval) for interval in (1, 30)]
        # Here the next step does not get through; there the job's own end. Both jobs run again.
        shipped = [
            begin(rq_jobs.ship_impatiently, 7, "between", 1),
            begin(rq_jobs.ship_and_meet, 8, "shipped", 1),
        ]

        server.kill()
        for _, visitor in charged + shipped:
            visitor.go()
        time.sleep(5)
        server.start()
        # RQ's scheduler has died meanwhile; its lock would outlive it by a minute.
        site.connection.delete(RQScheduler.get_locking_key(site.queue.name))
        for at in ("between", "shipped"):
            site.visitor(at).go()

        for amount, (job, _) in zip((1, 30), charged, strict=True):
            self.wait(site, job)
            assert all(answer == {"charged": amount} for answer in site.answers(job))
            assert site.outcomes(job, "charge") == ["completed"]
        for (job, _), answer in zip(shipped, (["parcel of 7", "parcel of 7, announced"], "parcel of 8"), strict=True):
            self.wait(site, job)
            assert site.answers(job) == [answer]
            assert site.outcomes(job, "reserve") == ["completed"]
        assert site.effects() == {"charge": 2, "reserve": 2, "announce": 1}

    @staticmethod
    def wait(site: Site, job: Job) -> None:
        """For the job's end; if RQ has given up a run that is at work yet, then also for the end of the next one."""

        def is_finished() -> bool:
            if answers := site.answers(job):
                site.hurry(job)
            return bool(answers) and site.is_at_rest(job)

        site.until(is_finished)
        assert job.get_status() == JobStatus.FINISHED


class TestAStormOfAlarms:
    @pytest.mark.timeout(300)
    def test_tears_no_call_and_leaks_no_connection(self, site: Site) -> None:
        """RQ's time-out is an alarm whose handler raises, at any instruction: here by thousands."""
        site.start(with_scheduler=False)
        job = site.enqueue(rq_jobs.storm, 7_000, job_timeout=240)
        site.until(lambda: site.is_at_rest(job) and job.get_status() != JobStatus.QUEUED, timeout=240)

        assert job.is_finished, site.failed(job)
        found = job.return_value()
        assert found["wrong"] == []
        assert (found["raised"], found["caught"]) == (7_000, 7_000)
        assert found["held"] == []
        assert found["in use"] == 0
        assert found["more connections"] <= 1  # the heartbeat's
        # It is calls that were struck, each of them at many places.
        assert found["struck"].keys() == {function.__name__ for function in rq_jobs.STORMED}
        assert min(found["struck"].values()) > 7_000 / len(rq_jobs.STORMED) / 10

    def test_is_told_as_such_when_it_strikes_while_a_payload_is_decoded(self, site: Site) -> None:
        codec = Struck()
        configure(site.url, codec=codec)
        assert rq_jobs.charge_order(7) == "7 eu"
        codec.is_struck = True
        with strikes(), pytest.raises(JobTimeoutException):
            rq_jobs.charge_order(7)
        assert rq_jobs.charge_order(7) == "7 eu"
        assert site.effects() == {"charge 7 eu": 1}

    def test_is_told_when_it_strikes_while_an_error_is_put_into_words(self, site: Site) -> None:
        class UnluckyError(Exception):
            def __str__(self) -> str:
                signal.raise_signal(signal.SIGALRM)
                return "in words"

        configure(site.url)
        claim, _ = store().begin_step("run", "pay", {})
        with strikes(), pytest.raises(JobTimeoutException):
            store().fail_step(claim, UnluckyError())

    @pytest.mark.parametrize("variable", ["_run", "_inside"])
    def test_leaves_nothing_of_its_run_to_the_next_job_of_the_process(
        self, site: Site, variable: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        configure(site.url)
        struck = StruckVariable(getattr(squidstep_redis.rq, variable))
        monkeypatch.setattr(squidstep_redis.rq, variable, struck)
        with pytest.raises(JobTimeoutException):
            rq_jobs.ship_order(7)
        assert struck.get() is struck.default


class StruckVariable:
    """The alarm strikes just after it was set for the first time."""

    def __init__(self, variable: Any) -> None:
        self.get, self.set_it = variable.get, variable.set
        self.default = variable.get()
        self.was_set = False

    def set(self, value: object) -> object:
        token = self.set_it(value)
        if not self.was_set:
            self.was_set = True
            raise JobTimeoutException
        return token


class Struck(MsgpackCodec):
    """The alarm strikes while it decodes what a function answered; RQ's strikes once."""

    is_struck = False

    def decode(self, data: bytes) -> dict[str, Any]:
        payload = super().decode(data)
        if self.is_struck and "result" in payload:
            self.is_struck = False
            signal.raise_signal(signal.SIGALRM)
        return payload


@contextlib.contextmanager
def strikes() -> Iterator[None]:
    """Inside, an alarm does what RQ's does."""

    def strike(_number: int, _frame: object) -> None:
        raise JobTimeoutException

    handler = signal.signal(signal.SIGALRM, strike)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=pytest.mark.skipif(
                SINCE.get(kind, ()) > RQ_VERSION, reason=f"this RQ has no {kind}, or none that works"
            ),
        )
        for kind in ("Worker", "SimpleWorker", "SpawnWorker")
    ],
)
class TestEveryKindOfWorker:
    def test_reschedules_a_busy_step_and_spends_none_of_the_retries_of_the_job(self, site: Site, kind: str) -> None:
        held, _ = site.store.begin_step("the-job", "charge", {"amount": 7})
        another, _ = site.store.begin_step("another-job", "reserve", {"amount": 7})
        site.start(kind)
        job = site.enqueue(rq_jobs.charge_at_once, 7, job_id="the-job", retry=Retry(max=1))
        several = site.enqueue(rq_jobs.ship_at_once, 7, job_id="another-job", retry=Retry(max=1))
        site.until(lambda: site.is_scheduled(job) and site.is_scheduled(several))
        site.store.expire_claim(held)
        site.store.complete_step(another, {"result": "a parcel of somebody's"})

        site.finished(job)
        site.finished(several)
        assert job.return_value() == {"charged": 7}
        assert site.outcomes(job, "charge") == ["lease_expired", "completed"]
        assert several.return_value() == "a parcel of somebody's"
        for each in (job, several):
            each.refresh()
            assert each.retries_left == 1
        assert site.effects() == {"charge": 1}

    def test_is_known_by_the_process_that_works(self, site: Site, kind: str) -> None:
        worker = site.start(kind)
        job = site.enqueue(rq_jobs.owner)
        site.finished(job)
        process, id = job.return_value().split()
        host, _, pid = process.rpartition(":")
        assert (host, id) == (HOST, job.id)
        assert (int(pid) == worker.pid) == (kind == "SimpleWorker")

    def test_has_a_client_of_its_own_in_each_process(self, site: Site, kind: str) -> None:
        site.start(kind, worker_ttl=420)
        job = site.enqueue(rq_jobs.clients)
        site.finished(job)
        found = job.return_value()
        assert found.pop("RQ's time-out") in ((415, None) if kind == "SpawnWorker" else (415,))
        assert found == {
            "is RQ's": False,
            "time-out": 3.0,
            "protocol": 2,
            "the same in this process": True,
            "another in a fork": True,
        }

    def test_runs_coroutine_functions(self, site: Site, kind: str) -> None:
        site.start(kind)
        job = site.enqueue(rq_jobs.charge_asyncio, 7)
        site.finished(job)
        site.queue.enqueue_job(job)
        site.finished(job, times=2)
        assert site.answers(job) == [{"charged": 7}] * 2
        assert site.effects() == {"charge": 1}


class TestAJobThatIsRescheduled:
    """Because its step was busy."""

    def test_has_neither_succeeded_nor_failed_to_those_who_wait_for_that(self, site: Site) -> None:
        held, _ = site.store.begin_step("the-job", "charge", {"amount": 7}, lease=60)
        callbacks: Any = {"on_success": rq.Callback(rq_jobs.succeeded), "on_failure": rq.Callback(rq_jobs.failed)}
        job = site.enqueue(rq_jobs.charge_at_once, 7, job_id="the-job", **callbacks)
        dependent = site.enqueue(rq_jobs.charge_at_once, 8, depends_on=job)
        site.start()
        site.until(lambda: site.is_scheduled(job))
        assert dependent.get_status() == JobStatus.DEFERRED
        assert site.effects() == {}
        site.store.complete_step(held, {"result": 9})
        site.hurry(job)

        site.finished(job)
        site.finished(dependent)
        assert (job.return_value(), dependent.return_value()) == (9, {"charged": 8})
        site.until(lambda: site.effects() == {"succeeded with 9": 1, "charge": 1})

    def test_comes_back_when_the_lease_is_over(self, site: Site) -> None:
        before = time.time()
        site.store.begin_step("the-job", "charge", {"amount": 7}, lease=600)
        job = site.enqueue(rq_jobs.charge_at_once, 7, job_id="the-job")
        site.start()
        site.until(lambda: site.is_scheduled(job))

        at = site.connection.zscore(site.queue.scheduled_job_registry.key, job.id)
        assert isinstance(at, float)
        spent = time.time() - before
        assert 600 - spent - 1 <= at - before <= 600 + 60 + spent + 1  # RQ keeps whole seconds

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
    def test_does_not_come_back_with_all_others_at_once(self, rest: float | None, lease: Any, seconds: range) -> None:
        busy: Any = SimpleNamespace(retry_in=rest)
        assert {squidstep_redis.rq._interval(busy, lease) for _ in range(1_000)} == set(seconds)


class TestABusyStepThatIsNotRescheduled:
    @pytest.mark.parametrize("burst", [False, True])
    def test_for_want_of_a_scheduler_raises_and_the_retries_of_the_job_take_over(self, site: Site, burst: bool) -> None:
        site.store.begin_step("the-job", "charge", {"amount": 7})
        job = site.enqueue(rq_jobs.charge_at_once, 7, job_id="the-job", retry=Retry(max=1))
        site.start(with_scheduler=False, burst=burst)

        assert_notes(site.failed(job), "StepBusyError", "no worker of its queue has a scheduler (--with-scheduler)")
        job.refresh()
        assert job.retries_left == 0
        assert site.outcomes(job, "charge") == ["running"]
        assert site.effects() == {}

    def test_for_it_is_not_of_the_function_of_the_job_raises(self, site: Site) -> None:
        site.store.begin_step("the-job", "charge", {"amount": 7})
        job = site.enqueue(rq_jobs.without_decorator, 7, job_id="the-job")
        site.start()

        error = site.failed(job)
        assert "StepBusyError" in error
        assert "not rescheduled" not in error
        assert site.store.completed_steps(job.id) == ["reserve"]
        assert site.effects() == {"reserve": 1}


class TestTheOutbox:
    def test_a_death_before_the_commit_loses_nothing_and_enqueues_nothing(self, site: Site) -> None:
        site.start(release_killed=True)
        job = site.enqueue(rq_jobs.order, 7, retry=Retry(max=1))
        site.visitor("before the commit").kill()
        again = site.visitor("before the commit")
        assert site.store.step_statuses("order-7") == {"order": "running"}
        assert jobs_of(site) == {job.id}
        again.go()
        site.visitor("after the commit").go()

        site.finished(job)
        assert job.return_value() == {"ordered": 7}
        self.check_delivered_once(site, job, ["lease_expired", "completed"])

    def test_a_death_after_the_commit_enqueues_once(self, site: Site) -> None:
        site.start(release_killed=True)
        job = site.enqueue(rq_jobs.order, 7, retry=Retry(max=1))
        site.visitor("before the commit").go()
        site.visitor("after the commit").kill()

        site.finished(job)
        assert job.return_value() == {"ordered": 7}
        self.check_delivered_once(site, job, ["completed"])

    @staticmethod
    def check_delivered_once(site: Site, job: Job, outcomes: list[str]) -> None:
        (next_id,) = jobs_of(site) - {job.id}
        next_job = site.queue.fetch_job(next_id)
        assert next_job is not None
        site.finished(next_job)
        assert site.effects() == {"deliver": 1}
        site.finished(twice := site.enqueue(rq_jobs.deliver, 7))

        assert twice.return_value() == next_job.return_value() == "7 is on its way"
        assert site.effects() == {"deliver": 1}
        assert [str(attempt.outcome) for attempt in site.store.attempts("order-7", "order")] == outcomes
        assert site.store.completed_steps("order-7") == ["order", "deliver"]
        assert site.store.step_statuses("order-7")["bill"] == "pending"

    def test_is_for_the_function_of_a_step(self, site: Site) -> None:
        with site.connection.pipeline() as pipeline, pytest.raises(InvalidArgumentError, match="while it runs"):
            queue_completion(pipeline, 7)

    def test_refuses_a_result_that_cannot_be_kept_and_queues_nothing(self, site: Site) -> None:
        def work(_: dict[str, Any]) -> dict[str, Any]:
            with site.connection.pipeline() as pipeline:
                with pytest.raises(PayloadError, match="result"):
                    queue_completion(pipeline, Decimal(1))
                assert len(pipeline) == 0
            return {"went": "on"}

        assert site.store.run_step("run", "pay", work, {}) == {"went": "on"}


def assert_notes(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text


def jobs_of(site: Site) -> set[str]:
    return {key.decode().rpartition(":")[2] for key in site.connection.scan_iter("rq:job:*", _type="hash")}


@pytest.fixture(params=["fakeredis", "valkey"])
def queue(request: pytest.FixtureRequest, site: Site) -> Queue:
    """Runs its jobs as they are enqueued."""
    connection: Any = fakeredis.FakeStrictRedis() if request.param == "fakeredis" else site.connection
    return Queue("steps", is_async=False, connection=connection)


def failure(job: Job) -> str:
    assert job.get_status() == JobStatus.FAILED
    result = job.latest_result()
    assert result is not None
    return str(result.exc_string)


def answer(job: Job) -> Any:
    assert job.get_status() == JobStatus.FINISHED, failure(job)
    return job.return_value()


class TestAQueueThatIsNotAsync:
    def test_takes_effect_once_and_answers_the_stored_result(self, site: Site, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.charge_at_once, 7)
        assert answer(job) == {"charged": 7}
        assert answer(queue.enqueue_job(job)) == {"charged": 7}
        assert answer(queue.enqueue(rq_jobs.charge_at_once, amount=9)) == {"charged": 9}
        assert site.effects() == {"charge": 2}

    @pytest.mark.parametrize("function", [rq_jobs.charge_at_once, rq_jobs.charge_asyncio, rq_jobs.ship_at_once])
    def test_raises_when_a_step_is_busy(self, site: Site, queue: Queue, function: Callable[..., Any]) -> None:
        own = StepRunStore(queue.connection)
        for name in ("charge", "reserve"):
            own.begin_step("the-job", name, {"amount": 7}, owner="somebody")
        error = failure(queue.enqueue(function, 7, job_id="the-job", retry=Retry(max=1)))
        assert_notes(error, "StepBusyError", "by somebody", "RQ runs it within enqueue(), and knows no Retry there")
        assert site.effects() == {}

    def test_raises_as_it_is_told_to_when_a_step_is_busy(self, site: Site, queue: Queue) -> None:
        StepRunStore(queue.connection).begin_step("the-job", "charge", {"amount": 7})
        error = failure(queue.enqueue(rq_jobs.charge_or_raise, 7, job_id="the-job"))
        assert "StepBusyError" in error
        assert "not rescheduled" not in error

    def test_answers_a_tuple_as_a_list_the_first_time_too(self, site: Site, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.pair, "a")
        assert answer(job) == ["a", [1, 2]]
        assert answer(queue.enqueue_job(job)) == ["a", [1, 2]]
        assert site.effects() == {"pair": 1}

    def test_refuses_arguments_that_cannot_be_kept_before_anything_happens(self, site: Site, queue: Queue) -> None:
        error = failure(queue.enqueue(rq_jobs.charge_at_once, Decimal(7)))
        assert_notes(error, "PayloadError", "input['amount']")
        assert site.effects() == {}
        assert list(queue.connection.scan_iter("squidstep:*")) == []

    def test_records_that_a_result_cannot_be_kept(self, site: Site, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.answer_what_cannot_be_kept)
        assert_notes(failure(job), "PayloadError", "output['result']", "Hand over plain data, such as an id")
        assert_notes(failure(queue.enqueue_job(job)), "PayloadError", "output['result']")
        (step_run,) = StepRunStore(queue.connection).get_run(job.id)
        assert (step_run.status, step_run.attempt) == ("failed", 2)

    def test_calls_a_step_that_was_scheduled_with_the_arguments_it_was_scheduled_with(
        self, site: Site, queue: Queue
    ) -> None:
        own = StepRunStore(queue.connection)
        own.schedule_step("charge-9", "charge", {"amount": 9})
        assert answer(queue.enqueue(rq_jobs.charge_at_once, 7, job_id="charge-9")) == {"charged": 9}
        scheduled = {"first": 1, "second": 2, "rest": [3, 4], "named": 5, "others": {"more": 6}}
        own.schedule_step("all", "mix", scheduled)
        assert answer(queue.enqueue(rq_jobs.mix, 0, 0, job_id="all")) == [1, 2, [3, 4], 5, {"more": 6}]
        own.schedule_step("some", "mix", {"second": 2})
        assert answer(queue.enqueue(rq_jobs.mix, 0, 0, 7, job_id="some", more=8)) == [0, 2, [7], 4, {"more": 8}]
        own.schedule_step("async", "charge", {"amount": 9})
        assert answer(queue.enqueue(rq_jobs.charge_asyncio, 7, job_id="async")) == {"charged": 9}

    def test_refuses_a_step_that_was_scheduled_with_what_its_function_does_not_take(
        self, site: Site, queue: Queue
    ) -> None:
        StepRunStore(queue.connection).schedule_step("the-job", "charge", {"amout": 9})
        error = failure(queue.enqueue(rq_jobs.charge_at_once, 7, job_id="the-job"))
        assert_notes(error, "InvalidArgumentError", "was scheduled with ['amout'], which its function does not take")
        assert site.effects() == {}

    def test_answers_whole_what_a_step_was_completed_with_in_another_way(self, site: Site, queue: Queue) -> None:
        own = StepRunStore(queue.connection)
        for output in ({"total": 3}, {"result": 3, "currency": "EUR"}, {}):
            run_id = f"job-{len(output)}-{'result' in output}"
            claim, _ = own.begin_step(run_id, "charge", {})
            own.complete_step(claim, output)
            assert answer(queue.enqueue(rq_jobs.charge_at_once, 7, job_id=run_id)) == output
        assert site.effects() == {}

    def test_names_the_run_by_the_arguments_of_the_function(self, site: Site, queue: Queue) -> None:
        first, second = queue.enqueue(rq_jobs.charge_order, 7), queue.enqueue(rq_jobs.charge_order, number=7)
        third = queue.enqueue(rq_jobs.charge_order, 7, region="us")
        assert [answer(job) for job in (first, second, third)] == ["7 eu", "7 eu", "7 us"]
        assert site.effects() == {"charge 7 eu": 1, "charge 7 us": 1}
        own = StepRunStore(queue.connection)
        assert own.completed_steps("order-7-eu") == own.completed_steps("order-7-us") == ["charge"]

    def test_names_the_run_by_a_function_of_the_arguments(self, site: Site, queue: Queue) -> None:
        assert answer(queue.enqueue(rq_jobs.charge_order_of, {"number": 7})) == 7
        assert answer(queue.enqueue(rq_jobs.charge_order_of, order={"number": 7}, amount=2)) == 7
        assert site.effects() == {"charge": 1}
        assert StepRunStore(queue.connection).completed_steps("order-7") == ["charge"]

    @pytest.mark.parametrize("function", [rq_jobs.charge_nobody, rq_jobs.ship_to_nobody])
    def test_refuses_a_function_of_the_arguments_that_names_no_run(
        self, site: Site, queue: Queue, function: Callable[..., Any]
    ) -> None:
        error = failure(queue.enqueue(function, {"id": None}))
        assert_notes(error, "InvalidArgumentError: run_id: must be a non-empty str, and its function answered None")
        assert site.effects() == {}

    @pytest.mark.parametrize(
        ("number", "problem"),
        [
            ("7" * 512, "must be 1 to 512 bytes of UTF-8"),
            ("\ud800", "has a lone surrogate"),
            ("", None),
            ("}{0}\0\n", None),
        ],
        ids=["long", "surrogate", "empty", "odd"],
    )
    def test_takes_whatever_the_arguments_hold_into_the_name_of_a_run_or_refuses_it(
        self, site: Site, queue: Queue, number: str, problem: str | None
    ) -> None:
        job = queue.enqueue(rq_jobs.charge_order, number)
        if problem is not None:
            assert_notes(failure(job), "InvalidArgumentError: run_id:", problem)
            assert site.effects() == {}
        else:
            assert answer(job) == answer(queue.enqueue(rq_jobs.charge_order, number)) == f"{number} eu"
            assert StepRunStore(queue.connection).completed_steps(f"order-{number}-eu") == ["charge"]

    def test_makes_a_decorated_function_that_another_calls_a_step_of_the_same_run(
        self, site: Site, queue: Queue
    ) -> None:
        job = queue.enqueue(rq_jobs.ship_order, 7)
        assert answer(job) == answer(queue.enqueue(rq_jobs.ship_order, 7)) == ["parcel of 7", "parcel of 7, announced"]
        own = StepRunStore(queue.connection)
        assert own.completed_steps("order-7") == ["reserve", "announce"]
        assert own.get_run(job.id) == []
        assert site.effects() == {"reserve": 1, "announce": 1}

    def test_keeps_the_steps_of_a_function_without_decorator_in_the_run_of_the_job(
        self, site: Site, queue: Queue
    ) -> None:
        job = queue.enqueue(rq_jobs.without_decorator, 7)
        assert answer(job) == answer(queue.enqueue_job(job)) == ["parcel of 7", "{'charged': 7}"]
        assert StepRunStore(queue.connection).completed_steps(job.id) == ["reserve", "charge"]
        assert site.effects() == {"reserve": 1, "charge": 1}

    def test_keeps_the_run_of_a_job_apart_from_those_of_jobs_that_run_as_it_enqueues_them(
        self, site: Site, queue: Queue
    ) -> None:
        job = queue.enqueue(rq_jobs.ship_several, [1, 2])
        assert answer(job) == [{"charged": 1}, {"charged": 2}]
        assert StepRunStore(queue.connection).get_run(job.id) == []
        assert site.effects() == {"charge": 2}

    def test_lets_the_threads_of_a_job_work_on_its_run(self, site: Site, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.reserve_in_threads, [1, 2])
        assert answer(job) == ["parcel of 1", "parcel of 2"]
        steps = StepRunStore(queue.connection).get_run(job.id)
        assert {(each.step, each.status, each.owner) for each in steps} == {
            (f"reserve {amount}", "completed", squidstep_redis.rq.owner(job)) for amount in (1, 2)
        }

    def test_is_also_for_methods_whose_steps_are_of_their_run(self, site: Site, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.Shop("eu").sell, 7)
        assert answer(job) == answer(queue.enqueue_job(job)) == "7 eu"
        assert site.effects() == {"sell": 1}

    @pytest.mark.parametrize("of", ["sell_at_once", "__call__", "open"])
    def test_says_what_to_do_about_a_method_that_is_a_step(self, site: Site, queue: Queue, of: str) -> None:
        shop = rq_jobs.Shop("eu")
        error = failure(queue.enqueue(shop if of == "__call__" else getattr(shop, of), 7))
        kept = "input['cls']" if of == "open" else "input['self']"
        assert_notes(error, f"PayloadError: {kept}", "use a function, or current_run().call(name, self.method, …)")
        assert site.effects() == {}

    def test_keeps_the_arguments_that_were_given_and_leaves_defaults_to_the_function(
        self, site: Site, queue: Queue
    ) -> None:
        job = queue.enqueue(rq_jobs.measure, 7)
        assert answer(job) == answer(queue.enqueue_job(job)) == "7 cm"
        (step_run,) = StepRunStore(queue.connection).get_run("measured-7-cm")
        assert step_run.input == {"length": 7}

    def test_refuses_a_function_that_answers_a_coroutine_and_is_no_coroutine_function(
        self, site: Site, queue: Queue
    ) -> None:
        error = failure(queue.enqueue(rq_jobs.charge_wrapped, 7))
        assert_notes(error, "InvalidArgumentError: fn:", "charge_wrapped", "make the step of what it wraps")
        assert site.effects() == {}
        job = queue.enqueue(rq_jobs.wrapped_charge, 7)
        assert answer(job) == answer(queue.enqueue_job(job)) == {"charged": 7}
        assert site.effects() == {"charge": 1}

    @pytest.mark.timeout(30)
    def test_refuses_a_step_that_would_wait_for_itself(self, site: Site, queue: Queue) -> None:
        error = failure(queue.enqueue(rq_jobs.reserve_for_ever, 7))
        assert_notes(error, "InvalidArgumentError: on_busy: 'wait' would be for ever: step 'reserve' of run ")

    def test_grants_so_many_attempts(self, site: Site, queue: Queue) -> None:
        job = queue.enqueue(rq_jobs.stumble, 7, 9)
        errors = [failure(job), failure(queue.enqueue_job(job)), failure(queue.enqueue_job(job))]
        assert ["LookupError: no such card" in error for error in errors] == [True, True, False]
        assert "StepExhaustedError" in errors[2]

    def test_may_keep_its_steps_elsewhere(self, site: Site, queue: Queue) -> None:
        elsewhere = fakeredis.FakeStrictRedis()
        configure(lambda: elsewhere, prefix="elsewhere")
        job = queue.enqueue(rq_jobs.charge_at_once, 7)
        assert answer(job) == {"charged": 7}
        assert StepRunStore(elsewhere, prefix="elsewhere").completed_steps(job.id) == ["charge"]
        assert list(queue.connection.scan_iter("*squidstep*")) == []


class TestOutsideAJob:
    def test_a_function_runs_as_if_it_were_not_decorated(self, site: Site) -> None:
        for _ in range(2):
            assert rq_jobs.charge_at_once(7) == {"charged": 7}
            assert asyncio.run(rq_jobs.charge_asyncio(7)) == {"charged": 7}
            assert rq_jobs.ship_at_once(7) == "parcel of 7"
            assert rq_jobs.pair("a") == ("a", (1, 2))
        assert site.effects() == {"charge": 4, "reserve": 2, "pair": 2}
        assert current_run().id is None

    @pytest.mark.parametrize("function", [rq_jobs.charge_order, rq_jobs.ship_order])
    def test_a_run_of_its_own_wants_a_server(self, site: Site, function: Callable[[int], Any]) -> None:
        with pytest.raises(InvalidArgumentError, match=r"call squidstep_redis\.rq\.configure\(url\) first"):
            function(7)
        assert site.effects() == {}
        configure(site.url)
        assert function(7) == function(7)
        assert set(site.effects().values()) == {1}

    def test_the_store_is_what_was_configured(self, site: Site) -> None:
        with pytest.raises(InvalidArgumentError, match="outside a job the server is not known"):
            store()
        made: list[redis.Redis] = []

        def connect() -> redis.Redis:
            made.append(redis.Redis.from_url(site.url))
            return made[-1]

        configure(connect, prefix="mine", run_ttl=60)
        assert made == []
        store().schedule_step("run", "pay", {})
        assert store().client is made[0]
        assert [len(made), site.connection.exists("mine:{%x}:run:steps")] == [1, 0]
        assert StepRunStore(site.connection, prefix="mine").get_step_run("run", "pay") is not None
        (key,) = site.connection.scan_iter("mine:*")
        assert 0 < site.connection.ttl(key) <= 60
        made[0].close()
        configure(site.url)
        assert store().get_run("run") == []

    def test_the_environment_may_say_where_the_store_is(self, site: Site) -> None:
        code = "from squidstep_redis.rq import store; store().schedule_step('run', 'pay', {})"
        environment = {**os.environ, "SQUIDSTEP_REDIS_URL": f"{site.url}?client_name=mine"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        assert site.store.step_statuses("run") == {"pay": "pending"}


class TestTheStoreBesideRQ:
    """It leads where RQ's connection leads, by the same right, in a way of its own."""

    @pytest.fixture
    def beside(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], StepRunStore]:
        def beside(connection: Any) -> StepRunStore:
            monkeypatch.setattr(squidstep_redis.rq, "get_current_job", lambda: Job("the-job", connection=connection))
            return store()

        return beside

    def test_is_on_the_same_database_by_the_same_user(
        self, site: Site, server: EmbeddedServer, beside: Callable[[Any], StepRunStore]
    ) -> None:
        site.connection.acl_setuser("them", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all"])
        login: Any = {"username": "them", "password": "secret"}
        provided: Any = {"credential_provider": redis.UsernamePasswordCredentialProvider("them", "secret")}
        for number, options in enumerate(
            [
                {"host": server.host, "port": server.port},
                {"host": server.host, "port": server.port, **login},
                {"host": server.host, "port": server.port, **provided},
                {"unix_socket_path": server.socket_path},
                {"unix_socket_path": server.socket_path, **login},
            ],
            start=1,
        ):
            for own in (True, False):
                with redis.Redis(db=number, decode_responses=own, **options) as connection:
                    found = beside(connection)
                    found.schedule_step(f"run-{own}", "pay", {"n": number})
                    assert StepRunStore(connection).step_statuses(f"run-{own}") == {"pay": "pending"}
                    assert found.client.acl_whoami() == (
                        "them" if options.keys() & {"username", *provided} else "default"
                    )
                    assert found.client is not connection
                    assert beside(connection) is found
                    found.close()
        site.connection.acl_deluser("them")

    def test_speaks_tls_where_rq_does(self, beside: Callable[[Any], StepRunStore]) -> None:
        connection = redis.Redis(ssl=True, ssl_ca_certs="/etc/ours.pem", ssl_check_hostname=True, socket_timeout=415)
        pool: Any = beside(connection).client.connection_pool
        assert issubclass(pool.connection_class, redis.SSLConnection)
        assert pool.connection_kwargs["ssl_ca_certs"] == "/etc/ours.pem"
        assert pool.connection_kwargs["ssl_check_hostname"] is True
        assert pool.connection_kwargs["socket_timeout"] == 3

    def test_is_not_made_by_guess_where_sentinel_decides(self, beside: Callable[[Any], StepRunStore]) -> None:
        sentinel = redis.sentinel.Sentinel([("127.0.0.1", 1)])
        with pytest.raises(InvalidArgumentError, match=r"call configure\(lambda: sentinel\.master_for\(…\)\)"):
            beside(sentinel.master_for("mymaster"))
        master = sentinel.master_for("mymaster")
        configure(lambda: master)
        assert beside(master).client is master


class TestTheDecorators:
    def test_keep_what_the_function_is(self) -> None:
        assert rq_jobs.charge_order.__name__ == "charge_order"
        assert str(inspect.signature(rq_jobs.charge_order)) == "(number: 'int', *, region: 'str' = 'eu') -> 'str'"
        assert inspect.iscoroutinefunction(rq_jobs.charge_asyncio)
        assert inspect.iscoroutinefunction(rq_jobs.ship_asyncio)
        assert not inspect.iscoroutinefunction(rq_jobs.ship)

    @pytest.mark.parametrize(
        ("run_id", "problem"),
        [
            ("order-{order_id}", "names 'order_id', no parameter"),
            ("order-{id.number}-{order_id[0]}", "names 'order_id[0]', no parameter"),
            ("order-{}", "names '', no parameter"),
            ("order-{0}", "names '0', no parameter"),
            ("order-{id", "is no format string"),
        ],
    )
    @pytest.mark.parametrize(
        "decorator", [lambda run_id: step("pay", run_id=run_id), lambda run_id: steps(run_id=run_id)]
    )
    def test_refuse_a_run_id_that_the_arguments_do_not_make(
        self, decorator: Callable[[str], Any], run_id: str, problem: str
    ) -> None:
        def work(id: int) -> None:
            raise NotImplementedError

        with pytest.raises(InvalidArgumentError) as caught:
            decorator(run_id)(work)
        assert caught.value.argument == "run_id"
        assert problem in str(caught.value)

    @pytest.mark.parametrize("decorator", [lambda **options: step("pay", **options), steps])
    def test_refuse_an_on_busy_that_is_none(self, decorator: Callable[..., Any]) -> None:
        with pytest.raises(InvalidArgumentError, match="'reschedule', 'raise' or 'wait', not 'skip'"):
            decorator(on_busy="skip")

    def test_name_the_owner_by_process_and_job(self) -> None:
        assert squidstep_redis.rq.owner(None) == f"{HOST}:{os.getpid()}"
        job: Any = SimpleNamespace(id="a\n\x7fb\udcff")
        assert squidstep_redis.rq.owner(job, 7) == f"{HOST}:7 a??b?"
        job = SimpleNamespace(id="é" * 300)
        assert 254 < len(squidstep_redis.rq.owner(job).encode()) <= 256


class TestReleaseDeadHorse:
    def test_logs_what_goes_wrong_and_raises_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        job = Job("the-job", connection=redis.Redis(port=1))
        with caplog.at_level(logging.WARNING):
            release_killed_work_horse(job, 7, 9, None)
        (record,) = caplog.records
        assert_notes(record.getMessage(), "the claims of work-horse 7, job the-job, could not be freed: ", ":1.")

    def test_not_even_what_nobody_thought_of(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(StepRunStore, "live_claims", lambda *_args, **_options: 1 / 0)
        release_killed_work_horse(Job("the-job", connection=redis.Redis(port=1)), 7, 9, None)
        assert "could not be freed: division by zero" in caplog.text

    def test_has_nothing_to_do_for_no_horse(self, caplog: pytest.LogCaptureFixture) -> None:
        release_killed_work_horse(Job("the-job", connection=redis.Redis(port=1)), None, None, None)
        assert caplog.records == []


class TestTheVersionOfRQ:
    def imported(self, *path: Path) -> str:
        """What becomes of the import, with these directories in front."""
        found = os.pathsep.join(map(str, path))
        return subprocess.run(
            [sys.executable, "-S", "-c", "import squidstep_redis.rq"],
            env={"PYTHONPATH": found},
            check=False,
            stderr=subprocess.PIPE,
            text=True,
        ).stderr

    def packages(self, directory: Path) -> Path:
        """All that is installed beside redis-py, except for RQ."""
        directory.mkdir()
        for path in Path(redis.__file__).parents[1].iterdir():
            if not path.name.startswith("rq"):
                (directory / path.name).symlink_to(path)
        return directory

    def test_is_asked_for_where_there_is_none(self, tmp_path: Path) -> None:
        error = self.imported(REPOSITORY, self.packages(tmp_path / "packages"))
        assert "ImportError: squidstep_redis.rq needs RQ: pip install 'squidstep_redis[rq]'" in error

    @pytest.mark.parametrize(
        ("installed", "is_refused"), [("1.16.2", True), ("2.0", True), ("2.1b1", False), ("10.0", False)]
    )
    def test_is_2_1_or_later(self, tmp_path: Path, installed: str, is_refused: bool) -> None:
        metadata = tmp_path / "old" / f"rq-{installed}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: rq\nVersion: {installed}\n")
        error = self.imported(tmp_path / "old", REPOSITORY, *map(Path, sys.path))
        said = "squidstep_redis.rq needs RQ 2.1 or later, where a job can answer Retry; this is RQ"
        assert (f"ImportError: {said} {installed}" in error) == is_refused
        assert (error == "") != is_refused
