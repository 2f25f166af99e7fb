"""The store of a job: which server it uses, and what happens outside a job."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import fakeredis
import pytest
import redis
import redis.sentinel
from rq import Queue
from rq.job import Job
from support import rq_jobs
from support.rq_harness import RQ_MARKS, THE_JOB, Harness, result_of, traceback_of

from squidstep_redis import AsyncStepRunStore, Event, InvalidArgumentError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.rq import configure, current_run, store, stores
from squidstep_redis.testing import StepKit

pytest_plugins = ["support.rq_fixtures"]
pytestmark = RQ_MARKS


class TestConfiguredStore:
    def test_configure_can_name_another_server(self, harness: Harness, queue: Queue) -> None:
        elsewhere = fakeredis.FakeStrictRedis()
        configure(lambda: elsewhere, prefix="elsewhere")
        job = queue.enqueue(rq_jobs.charge_at_once, 7)
        assert result_of(job) == {"charged": 7}
        assert StepRunStore(elsewhere, prefix="elsewhere").completed_steps(job.id) == ["charge"]
        assert list(queue.connection.scan_iter("*squidstep*")) == []

    def test_configure_makes_the_client_at_first_use(self, harness: Harness) -> None:
        made: list[redis.Redis] = []

        def connect() -> redis.Redis:
            made.append(redis.Redis.from_url(harness.url))
            return made[-1]

        configure(connect, prefix="mine", run_ttl=600)
        assert made == []
        store().schedule_step("run", "pay", {})
        assert store().client is made[0]
        assert [len(made), harness.connection.exists("mine:{%x}:run:steps")] == [1, 0]
        assert StepRunStore(harness.connection, prefix="mine").get_step_run("run", "pay") is not None
        (key,) = harness.connection.scan_iter("mine:*:steps")
        assert 0 < harness.connection.ttl(key) <= 600
        made[0].close()
        configure(harness.url)
        assert store().get_run("run") == []

    def test_configured_store_is_used_as_it_is(self, harness: Harness, queue: Queue) -> None:
        mine = StepRunStore(fakeredis.FakeStrictRedis(), prefix="mine")
        events: list[Event] = []
        mine.on_event(events.append)
        configure(store=mine)
        configure(store=mine)
        job = queue.enqueue(rq_jobs.charge_at_once, 7)
        another = queue.enqueue(rq_jobs.charge_asyncio, 9)
        assert (result_of(job), result_of(another)) == ({"charged": 7}, {"charged": 9})
        assert store() is mine
        assert [event.run_id for event in events if event.kind == "complete"] == [job.id, another.id]
        assert mine.completed_steps(job.id) == ["charge"]
        assert list(queue.connection.scan_iter("*squidstep*")) == []

    def test_faults_and_the_clock_of_a_kit_apply_to_jobs(self, harness: Harness, queue: Queue) -> None:
        with StepKit() as kit:
            configure(store=kit.store)
            with kit.faults.killed_at("complete_step"):
                queue.enqueue(rq_jobs.charge_order, 7)
            assert "StepBusyError" in traceback_of(queue.enqueue(rq_jobs.charge_order, 7))
            kit.clock.advance(30)
            kit.faults.lose_reply("complete_step")
            assert result_of(queue.enqueue(rq_jobs.charge_order, 7)) == "7 eu"
            with kit.faults.server_away():
                assert "NotSentError" in traceback_of(queue.enqueue(rq_jobs.charge_order, 8))
        assert harness.effects() == {"charge 7 eu": 2}

    def test_configured_store_excludes_everything_else(self, harness: Harness) -> None:
        wrong: Any = configure
        mine = StepRunStore(fakeredis.FakeStrictRedis())
        for given in ({"connect": harness.url}, {"connect": lambda: harness.connection}, {"prefix": "mine"}):
            with pytest.raises(InvalidArgumentError, match="^store: is used as it is: pass no URL, function or"):
                wrong(**given, store=mine)
        for store_of_a_kind in (harness.connection, harness.url, AsyncStepRunStore(fakeredis.FakeAsyncRedis())):
            with pytest.raises(InvalidArgumentError, match="^store: must be a StepRunStore, not of type") as caught:
                wrong(store=store_of_a_kind)
            assert harness.url not in str(caught.value)  # it may contain a password
        for settings in ({}, {"prefix": "mine"}):
            with pytest.raises(InvalidArgumentError, match="^connect: must be a URL, or a function"):
                wrong(**settings)

    def test_mistakes_are_rejected_when_configuring(self) -> None:
        """Not by each job, in the worker."""
        given: Any = configure

        async def connect_asyncio() -> Any:
            raise NotImplementedError

        client = redis.Redis(password="hunter2")
        for connect in (client, 6379, connect_asyncio, lambda url: client):
            with pytest.raises(InvalidArgumentError, match="^connect: ") as caught:
                given(connect)
            assert "hunter2" not in str(caught.value)
        with pytest.raises(InvalidArgumentError, match="url: must be redis://"):
            given("localhost:6379")
        for valid in ("redis://localhost:6379/0", lambda: client):
            with pytest.raises(InvalidArgumentError, match="^run_ttl: "):
                given(valid, run_ttl=-1)
            with pytest.raises(TypeError, match="run_tll"):
                given(valid, run_tll=60)

    def test_environment_variable_can_name_the_server(self, harness: Harness) -> None:
        code = "from squidstep_redis.rq import store; store().schedule_step('run', 'pay', {})"
        environment = {**os.environ, "SQUIDSTEP_REDIS_URL": f"{harness.url}?client_name=mine"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        assert harness.store.step_statuses("run") == {"pay": "pending"}


class TestOutsideAJob:
    def test_function_runs_as_if_it_were_not_decorated(self, harness: Harness) -> None:
        for _ in range(2):
            assert rq_jobs.charge_at_once(7) == {"charged": 7}
            assert asyncio.run(rq_jobs.charge_asyncio(7)) == {"charged": 7}
            assert rq_jobs.ship_at_once(7) == "parcel of 7"
            assert rq_jobs.pair("a") == ("a", (1, 2))
        assert harness.effects() == {"charge": 4, "reserve": 2, "pair": 2}
        assert current_run().id is None

    @pytest.mark.parametrize("function", [rq_jobs.charge_order, rq_jobs.ship_order])
    def test_function_with_a_run_id_needs_a_configured_server(
        self, harness: Harness, function: Callable[[int], Any]
    ) -> None:
        with pytest.raises(InvalidArgumentError, match=r"call squidstep_redis\.rq\.configure\(url\) first"):
            function(7)
        assert harness.effects() == {}
        configure(harness.url)
        assert function(7) == function(7)
        assert set(harness.effects().values()) == {1}

    def test_store_needs_a_configured_server(self) -> None:
        with pytest.raises(InvalidArgumentError, match="no server is configured outside a job"):
            store()


class TestStoreOnRQsServer:
    """Without `configure`, the store connects to RQ's server as RQ's user, with a client of its own."""

    @pytest.fixture
    def store_on(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], StepRunStore]:
        def store_on(connection: Any) -> StepRunStore:
            monkeypatch.setattr(stores, "get_current_job", lambda: Job(THE_JOB, connection=connection))
            return store()

        return store_on

    def test_uses_rqs_database_and_user(
        self, harness: Harness, rq_server: EmbeddedServer, store_on: Callable[[Any], StepRunStore]
    ) -> None:
        harness.connection.acl_setuser("them", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all"])
        login: Any = {"username": "them", "password": "secret"}
        provided: Any = {"credential_provider": redis.UsernamePasswordCredentialProvider("them", "secret")}
        for number, options in enumerate(
            [
                {"host": rq_server.host, "port": rq_server.port},
                {"host": rq_server.host, "port": rq_server.port, **login},
                {"host": rq_server.host, "port": rq_server.port, **provided},
                {"unix_socket_path": rq_server.socket_path},
                {"unix_socket_path": rq_server.socket_path, **login},
            ],
            start=1,
        ):
            for decoded in (True, False):
                with redis.Redis(db=number, decode_responses=decoded, **options) as connection:
                    found = store_on(connection)
                    found.schedule_step(f"run-{decoded}", "pay", {"n": number})
                    assert StepRunStore(connection).step_statuses(f"run-{decoded}") == {"pay": "pending"}
                    assert found.client.acl_whoami() == (
                        "them" if options.keys() & {"username", *provided} else "default"
                    )
                    assert found.client is not connection
                    assert store_on(connection) is found
                    found.close()
        harness.connection.acl_deluser("them")

    def test_uses_tls_if_rq_does(self, store_on: Callable[[Any], StepRunStore]) -> None:
        connection = redis.Redis(ssl=True, ssl_ca_certs="/etc/ours.pem", ssl_check_hostname=True, socket_timeout=415)
        pool: Any = store_on(connection).client.connection_pool
        assert issubclass(pool.connection_class, redis.SSLConnection)
        assert pool.connection_kwargs["ssl_ca_certs"] == "/etc/ours.pem"
        assert pool.connection_kwargs["ssl_check_hostname"] is True
        assert pool.connection_kwargs["socket_timeout"] == 3

    def test_needs_configure_if_rq_uses_sentinel(self, store_on: Callable[[Any], StepRunStore]) -> None:
        sentinel = redis.sentinel.Sentinel([("127.0.0.1", 1)])
        with pytest.raises(InvalidArgumentError, match=r"call configure\(lambda: sentinel\.master_for\(…\)\)"):
            store_on(sentinel.master_for("mymaster"))
        primary = sentinel.master_for("mymaster")
        configure(lambda: primary)
        assert store_on(primary).client is primary
