"""A running server rejects calls: they are retried until the deadline, then raise a typed error and write nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from support.backends import contents
from support.proxy import Proxy
from support.records import begun
from support.servers import wait_until

from squidstep_redis import BeginResult, NotReplicatedError, RefusedError, StepRun, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.keys import Keys

from .kit import Stores
from .topologies import REPLICATION, connected, replicate

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")

PREFIX: Final = "squidstep"
Heal = Callable[[], object]
"""Ends the condition that makes a server reject calls."""


@contextlib.contextmanager
def busy(server: EmbeddedServer) -> Iterator[Heal]:
    """A script of another client runs until it is killed."""

    def run_for_ever() -> None:
        with contextlib.suppress(redis.ResponseError), redis.Redis.from_url(server.url) as client:
            client.eval("while true do end", 0)

    thread = threading.Thread(target=run_for_ever)
    with connected(server) as client:
        client.config_set("lua-time-limit", 1)
        thread.start()
        try:
            wait_until(lambda: "BUSY" in reply_of(client))
            yield client.script_kill
        finally:
            with contextlib.suppress(redis.ResponseError):
                client.script_kill()
            thread.join()


@contextlib.contextmanager
def read_only(server: EmbeddedServer) -> Iterator[Heal]:
    """The server has become a replica."""
    with EmbeddedServer(binary=server._binary, port=0, options=REPLICATION) as master:
        # A replica copies its master's data, so the master copies the server's data first.
        replicate(master, server)
        with connected(master) as client:
            client.execute_command("REPLICAOF NO ONE")
        replicate(server, master)
        with connected(server) as client:
            yield lambda: client.execute_command("REPLICAOF NO ONE")


@contextlib.contextmanager
def master_down(server: EmbeddedServer) -> Iterator[Heal]:
    """The server is a replica without its master, and serves no stale data."""
    with connected(server) as client:
        client.config_set("replica-serve-stale-data", "no")
        client.execute_command("REPLICAOF", "127.0.0.1", 1)
        yield lambda: client.execute_command("REPLICAOF NO ONE")


@contextlib.contextmanager
def too_few_replicas(server: EmbeddedServer) -> Iterator[Heal]:
    with connected(server) as client:
        client.config_set("min-replicas-to-write", 1)
        yield lambda: client.config_set("min-replicas-to-write", 0)


@contextlib.contextmanager
def loading(server: EmbeddedServer) -> Iterator[Heal]:
    """The server restarts and loads many keys slowly."""
    with connected(server) as client:
        # While loading, it replies once per two megabytes, and sleeps at each key.
        client.mset({f"filler-{number}": "x" * 200_000 for number in range(300)})
        client.save()
    server.kill()
    starting = threading.Thread(target=server.start)
    starting.start()

    def replies() -> bool:
        with contextlib.suppress(redis.ConnectionError), connected(server) as client:
            return "LOADING" in reply_of(client)
        return False

    def hurry() -> None:
        with connected(server) as client, contextlib.suppress(redis.ResponseError):  # Redis 6.2 rejects it
            client.config_set("key-load-delay", 0)
        starting.join()

    try:
        wait_until(replies)
        yield hurry
    finally:
        starting.join()


def reply_of(client: Any) -> str:
    """Returns a server's reply to a read, as text."""
    try:
        return str(client.get("key"))
    except redis.BusyLoadingError:
        return "LOADING"
    except redis.ResponseError as error:
        return str(error)


CONDITIONS: Final = {
    "BUSY": busy,
    "READONLY": read_only,
    "MASTERDOWN": master_down,
    "NOREPLICAS": too_few_replicas,
    "LOADING": loading,
}


# Redis 6.2 lets scripts write without replicas: `test_redis_6_lets_scripts_write_without_replicas`.
APPLICABLE: Final = [
    pytest.param(name, marks=[pytest.mark.not_on("redis-6")] if name == "NOREPLICAS" else []) for name in CONDITIONS
]


@pytest.fixture
def server(binary: Path) -> Iterator[EmbeddedServer]:
    options = {**REPLICATION, "key-load-delay": "10000", "rdbcompression": "no"}
    with EmbeddedServer(binary=binary, port=0, options=options) as server:
        yield server


@pytest.fixture
def held(server: EmbeddedServer) -> StepRun:
    with StepRunStore.from_url(server.url) as store:
        store.begin_step("run", "pay", {})
        return begun(store.begin_step("run", "mail", {}, lease=600))


@pytest.mark.servers("redis-6")
def test_redis_6_lets_scripts_write_without_replicas(server: EmbeddedServer, stores: Stores) -> None:
    """There, min-replicas-to-write does not stop an old master's writes, but wait_replicas reports them."""
    with too_few_replicas(server), connected(server) as client:
        with pytest.raises(redis.ResponseError, match="NOREPLICAS"):
            client.set("key", "value")
        assert begun(stores.from_url(server.url).begin_step("run", "pay", {})).attempt == 1
        with pytest.raises(NotReplicatedError):
            stores.from_url(server.url, wait_replicas=1, wait_timeout=0.05).begin_step("run", "mail", {})


class TestTransientErrors:
    @pytest.mark.parametrize("condition", APPLICABLE)
    def test_calls_are_rejected_at_the_deadline_and_nothing_is_written(
        self, server: EmbeddedServer, stores: Stores, held: StepRun, condition: str
    ) -> None:
        with redis.Redis.from_url(server.url) as client:
            store = stores.from_url(server.url, timeout=0.3, socket_timeout=30)
            before = contents(client, PREFIX)
            begin, complete = store.calls.begin_step("run", "ship", {}), store.calls.complete_step(held, {})
            with CONDITIONS[condition](server) as heal:
                with pytest.raises(RefusedError, match="nothing was written.*What to do") as caught:
                    store.send(begin)
                try:
                    outcomes = store.batch([begin, complete])
                except RefusedError:  # for the whole batch: redis-py treats LOADING as a broken connection
                    assert condition == "LOADING"
                else:
                    assert [type(outcome) for outcome in outcomes] == [RefusedError, RefusedError]
                heal()
            assert caught.value.transient
            assert contents(client, PREFIX) == before

    @pytest.mark.parametrize(
        ("condition", "batch"),
        [
            *(pytest.param(*each.values, False, marks=each.marks) for each in APPLICABLE),
            ("BUSY", True),
            ("LOADING", True),
        ],
    )
    def test_calls_succeed_if_the_error_ends_before_the_deadline(
        self, server: EmbeddedServer, stores: Stores, held: StepRun, condition: str, batch: bool
    ) -> None:
        with Proxy((server.host, server.port)) as proxy, CONDITIONS[condition](server) as heal:
            store = stores.from_url(f"redis://127.0.0.1:{proxy.port}", timeout=60)
            begin, complete = store.calls.begin_step("run", "ship", {}), store.calls.complete_step(held, {"to": 7})
            proxy.after(9 if batch else 3, heal)  # a try of a batch has more commands, because it loads scripts first

            outcomes = store.batch([begin, complete]) if batch else [store.send(begin), store.send(complete)]

        assert isinstance(outcomes[0], BeginResult)
        assert begun(outcomes[0]).attempt == 1
        assert isinstance(outcomes[1], StepRun)
        assert outcomes[1].output == {"to": 7}


class TestOutOfMemory:
    def test_writes_are_rejected_reads_work_and_completion_can_be_retried(
        self, server: EmbeddedServer, stores: Stores
    ) -> None:
        store = stores.from_url(server.url, timeout=60)
        store.complete_step(begun(store.begin_step("run", "done", {})), {"receipt": 7})
        claim = begun(store.begin_step("run", "pay", {}))
        store.schedule_step("run", "later", {})
        store.begin_step("other", "leased", {}, lease=600)
        with redis.Redis.from_url(server.url) as client:
            free = fill(client)
            before = contents(client, PREFIX)
            calls = [
                store.calls.begin_step("run", "new", {}),
                store.calls.begin_step("run", "later", {}),
                store.calls.begin_step("new", "pay", {}, lease=60),
                store.calls.begin_step("new", "pay", {}),
                store.calls.schedule_step("run", "new", {}),
                store.calls.schedule_steps("run", {"new": {}, "newer": {}}),
                store.calls.complete_step(claim, {"receipt": 8}),
                store.calls.fail_step(claim, {"why": "not"}),
            ]
            for call in calls:
                with pytest.raises(RefusedError, match="OOM|maxmemory") as caught:
                    store.send(call)
                assert caught.value.transient
                assert "nothing was written" in str(caught.value)
            assert {type(outcome) for outcome in store.batch(calls)} == {RefusedError}
            assert contents(client, PREFIX) == before

            # Reads work, and so do begins that write nothing.
            assert store.step_statuses("run") == {"done": "completed", "pay": "running", "later": "pending"}
            assert store.completed_outputs("run") == [{"receipt": 7}]
            assert store.begin_step("run", "done", {}).step_run.output == {"receipt": 7}
            assert store.begin_step("run", "pay", {}).busy
            assert [step_run.step for step_run in store.live_claims()] == ["leased"]

            free()
            assert store.complete_step(claim, {"receipt": 8}).output == {"receipt": 8}
            assert store.completed_steps("run") == ["done", "pay"]

    @pytest.mark.parametrize("lease", [None, 60])
    def test_a_full_server_accepts_no_new_run_that_expires(
        self, server: EmbeddedServer, stores: Stores, lease: float | None
    ) -> None:
        """Nor if the call, by its random token, is one of those that drop entries of expired runs from the index."""
        store = stores.from_url(server.url, run_ttl=60)
        with redis.Redis.from_url(server.url) as client:
            index = Keys(PREFIX.encode()).run("new").keys.claims.replace(b":claims", b":runs")
            client.zadd(index, {f"6:gone{number:02}": 1 for number in range(20)})
            fill(client)
            before = contents(client, PREFIX)
            for _ in range(30):
                calls = [
                    store.calls.begin_step("new", "pay", {}, lease=lease),
                    store.calls.begin_steps("new", {"pay": {}, "mail": {}}, lease=lease),
                    store.calls.schedule_step("new", "pay", {}),
                    store.calls.schedule_steps("new", {"pay": {}}),
                ]
                for call in calls:
                    with pytest.raises(RefusedError, match="nothing was written"):
                        store.send(call)
            assert contents(client, PREFIX) == before

    def test_full_server_rejects_checkpoints_of_claims_without_a_lease(
        self, server: EmbeddedServer, stores: Stores
    ) -> None:
        store = stores.from_url(server.url)
        claim = begun(store.begin_step("run", "pay", {}))
        with redis.Redis.from_url(server.url) as client:
            fill(client)
            before = contents(client, PREFIX)
            with pytest.raises(RefusedError, match="nothing was written"):
                store.extend_claim(claim, None, progress={"pages": 7})
            assert contents(client, PREFIX) == before

    def test_live_claims_are_listed_although_an_entry_cannot_be_corrected(
        self, server: EmbeddedServer, stores: Stores
    ) -> None:
        store = stores.from_url(server.url)
        claim = begun(store.begin_step("run", "pay", {}, lease=600))
        with redis.Redis.from_url(server.url) as client:
            index = Keys(PREFIX.encode()).run("run").keys.claims
            client.zincrby(index, 60_000, client.zrange(index, 0, -1)[0])
            fill(client)
            assert [found.lease_ends_at for found in store.live_claims()] == [claim.lease_ends_at]

    @pytest.mark.all_buckets  # the runs do not share entries
    def test_a_recreated_run_keeps_its_entry_in_the_index(self, server: EmbeddedServer, stores: Stores) -> None:
        """The entry of the expired run is the same one."""
        store = stores.from_url(server.url, run_ttl=60)
        with redis.Redis.from_url(server.url) as client:
            for number in range(30):
                run_id = f"run-{number}"
                steps, _, claims, _ = Keys(PREFIX.encode()).run(run_id).keys
                store.schedule_step(run_id, "pay", {})
                client.delete(steps)
                store.schedule_step(run_id, "pay", {})
                assert client.zcard(claims.replace(b":claims", b":runs")) == 1


def fill(client: Any) -> Heal:
    """Writes until the server is out of memory; returns a function that frees it."""
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 1_000_000)
    with contextlib.suppress(redis.OutOfMemoryError):
        while True:
            client.append("filler", "x" * 50_000)

    def free() -> None:
        client.delete("filler")
        client.config_set("maxmemory", 0)

    return free
