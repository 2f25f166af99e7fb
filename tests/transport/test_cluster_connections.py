"""The connections of a blocking store to the nodes of a cluster: whose they are, and when they end."""

from __future__ import annotations

import contextlib
import gc
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import redis
from redis.credentials import CredentialProvider
from support.backends import Backend, Bench
from support.internals import close_idle_connections, idle_connections, learn_slots, node_connections
from support.interruptions import at_call, at_line
from support.records import begun
from support.servers import wait_until
from support.storm_length import StormLength

from squidstep_redis import NotSentError, StepRunStore
from squidstep_redis.transport.client import idle_of

pytestmark = [
    pytest.mark.servers("cluster"),
    pytest.mark.parametrize("bench", ["blocking"], indirect=True),
]

RUNS = [f"run-{number}" for number in range(30)]  # on all nodes


def send_to_all(store: StepRunStore) -> None:
    assert store.batch([store.calls.get_run(run) for run in RUNS]) == [[]] * len(RUNS)


def test_a_store_keeps_one_connection_to_each_node(bench: Bench) -> None:
    store = bench.store()
    for _ in range(3):
        send_to_all(store)
        assert [store.get_run(run) for run in RUNS] == [[]] * len(RUNS)
    assert idle_connections(store) == 3


def test_connections_end_with_those_of_the_client(bench: Bench) -> None:
    stores = [bench.store()]
    client: Any = stores[0].client
    stores.append(StepRunStore(client, prefix=bench.prefix))
    for store in stores:
        send_to_all(store)
    client.disconnect_connection_pools()
    assert [idle_connections(store) for store in stores] == [0, 0]

    for store in stores:
        send_to_all(store)
    assert client.get("key") is None
    assert [idle_connections(store) for store in stores] == [3, 3]


def test_closing_a_store_ends_its_connections_alone(bench: Bench) -> None:
    store = bench.store()
    other = StepRunStore(store.client, prefix=bench.prefix)
    send_to_all(store)
    send_to_all(other)
    store.close()
    assert [idle_connections(store), idle_connections(other)] == [0, 3]


def test_a_connection_in_use_ends_with_its_round_trip(bench: Bench) -> None:
    store = bench.store()
    client: Any = store.client

    def close_and_read(_: int, reply: Any) -> Any:
        client.disconnect_connection_pools()
        return reply

    node = node_connections(store, b"key")
    assert node.send([(b"ECHO", b"hello")], close_and_read) == [b"hello"]
    assert idle_connections(store) == 0


def test_an_abandoned_store_leaves_nothing_in_the_pools(bench: Bench) -> None:
    client: Any = bench.store().client
    for _ in range(5):
        send_to_all(StepRunStore(client, prefix=bench.prefix))
    gc.collect()
    store = StepRunStore(client, prefix=bench.prefix)
    send_to_all(store)

    pools = [node.redis_connection.connection_pool for node in client.get_primaries()]
    assert [len(pool.disconnect._beside) for pool in pools] == [1, 1, 1]


def test_the_limit_of_the_clients_pools_holds(bench: Bench) -> None:
    store = bench.store(client_options={"max_connections": 1}, timeout=0.1)
    send_to_all(store)
    client: Any = store.client
    pools = [node.redis_connection.connection_pool for node in client.get_primaries()]
    assert idle_connections(store) == 0
    assert [pool._created_connections for pool in pools] == [1, 1, 1]


class Credentials(CredentialProvider):
    """Fails as often as it is told, and then returns the credentials of a user."""

    failures = 0

    def __init__(self, user: str) -> None:
        self.user = user

    def get_credentials(self) -> tuple[str, str]:
        self.failures -= 1
        if self.failures >= 0:
            raise RuntimeError("the token server is away")
        return self.user, "secret"


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_asking_for_slots_leaves_no_connection_without_credentials(bench: Bench, failures: int) -> None:
    cluster: Any = bench.backend.raw
    user = bench.prefix
    cluster.execute_command("ACL SETUSER", user, "on", ">secret", "+@all", "~*", target_nodes="primaries")
    try:
        credentials = Credentials(user)
        store = bench.store(client_options={"credential_provider": credentials}, timeout=20)
        client: Any = store.client
        client.disconnect_connection_pools()
        credentials.failures = failures

        assert learn_slots(store) == (failures < 3)

        assert credentials.failures <= 0
        credentials.failures = 0
        whoami = [node.redis_connection.execute_command("ACL WHOAMI") for node in client.get_primaries()]
        assert {name.decode() if isinstance(name, bytes) else name for name in whoami} == {user}
    finally:
        cluster.execute_command("ACL DELUSER", user, target_nodes="primaries")


class HookedCluster(redis.RedisCluster):
    def execute_command(self, *args: Any, **options: Any) -> Any:
        return super().execute_command(*args, **options)


class TestHookedClient:
    """redis-py itself connects again, after its connections were lost."""

    def store(self, bench: Bench, timeout: float) -> tuple[StepRunStore, Credentials]:
        credentials = Credentials("default")
        url = str(bench.backend.url)
        client: Any = HookedCluster.from_url(url, protocol=2, credential_provider=credentials)
        store = StepRunStore(client, prefix=bench.prefix, timeout=timeout)
        assert [store.get_run(run) for run in RUNS] == [[]] * len(RUNS)
        for node in client.get_nodes():
            for connection in idle_of(node.redis_connection.connection_pool):
                if connection._sock is not None:
                    connection._sock.shutdown(socket.SHUT_RDWR)
        return store, credentials

    def test_failing_provider_of_credentials_is_retried(self, bench: Bench) -> None:
        store, credentials = self.store(bench, 20)
        credentials.failures = 1
        assert [store.get_run(run) for run in RUNS] == [[]] * len(RUNS)
        store.close()

    def test_text_of_a_failing_provider_is_not_shown(self, bench: Bench) -> None:
        store, credentials = self.store(bench, 0.1)
        credentials.failures = 1_000_000
        for _ in range(5):
            with pytest.raises(NotSentError, match="RuntimeError") as caught:
                store.get_run("run")
            assert "token server" not in str(caught.value)
        store.close()

    def test_exception_of_a_signal_handler_is_raised(self, bench: Bench) -> None:
        store, credentials = self.store(bench, 20)

        def raise_error(*_: object) -> None:
            raise ValueError("of the handler")

        before = signal.signal(signal.SIGUSR1, raise_error)
        try:
            credentials.get_credentials = lambda: signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(ValueError, match="of the handler"):
                store.get_run("run")
        finally:
            signal.signal(signal.SIGUSR1, before)
            store.close()


class Recording(redis.Connection):
    seen: list[bytes]

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        packed = list(command) if not isinstance(command, bytes) else [command]
        Recording.seen.extend(packed)
        parent: Any = super()  # parts of its types are unknown
        parent.send_packed_command(packed, check_health)


def test_a_connection_class_of_the_user_sees_every_command(bench: Bench, backend: Backend) -> None:
    Recording.seen = []
    store = bench.store(client_options={"connection_class": Recording})
    send_to_all(store)
    assert store.get_run("run") == []

    assert idle_connections(store) == 0
    assert sum(b"EVALSHA" in packed for packed in Recording.seen) >= 4


@pytest.mark.parametrize("connection", ["own", "borrowed"])
def test_a_batch_reaches_all_nodes_before_the_first_reply(bench: Bench, connection: str) -> None:
    store = bench.store(client_options={"max_connections": 5} if connection == "borrowed" else {}, timeout=20)
    send_to_all(store)
    client: Any = store.client
    blocked = client.get_primaries()[0]
    calls = [store.calls.begin_step(run, "pay", {}) for run in RUNS]
    others = [call.run_id for call in calls if client.get_node_from_key(call.keys[0].decode()).name != blocked.name]
    batch = threading.Thread(target=store.batch, args=(calls,))
    blocked.redis_connection.client_pause(20_000, all=False)
    try:
        batch.start()
        wait_until(lambda: all(store.step_statuses(str(run)) for run in others))
        assert batch.is_alive()
    finally:
        blocked.redis_connection.client_unpause()
        batch.join()


class Interruption(BaseException):
    pass


def interrupt() -> None:
    raise Interruption


@pytest.fixture
def sockets_closed_late() -> Iterator[None]:
    """Python closes a socket that was made in the interrupted line when it is collected, and warns."""
    with mock.patch.object(sys, "unraisablehook"):
        yield
        gc.collect()


FILES = tuple(f"/squidstep_redis/transport/{name}.py" for name in ("blocking", "cluster", "connection", "helper"))
Trap = Callable[[int], contextlib.AbstractContextManager[object]]
TRAPS: dict[str, Trap] = {
    "line": lambda number: at_line(number, FILES, interrupt),
    "call": lambda number: at_call(number, ("squidstep_redis", "redis", "threading"), interrupt),
}


@pytest.mark.usefixtures("sockets_closed_late")
class TestInterruptions:
    """An exception at any place leaves no lock held, and no reply to a later call."""

    @pytest.mark.parametrize("where", TRAPS)
    @pytest.mark.parametrize("is_connected", [True, False], ids=["connected", "not connected"])
    def test_interrupted_batches_leave_nothing_behind(
        self, bench: Bench, where: str, is_connected: bool, storm_length: StormLength
    ) -> None:
        store = bench.store(timeout=20)
        for storm in storm_length.rounds(1):
            place, misses = 0, 0
            while misses < 3:
                place += random.randint(1, 40)
                if not is_connected:
                    close_idle_connections(store)
                calls = [store.calls.begin_step(run, f"{storm}-{place}", {}) for run in RUNS[:6]]
                misses += 1
                try:
                    with TRAPS[where](place):
                        store.batch(calls)
                except Interruption:
                    misses = 0
                check(store, calls)
            assert place > 100
        wait_until(lambda: not any("squidstep" in thread.name for thread in threading.enumerate()))

    @pytest.mark.parametrize("where", TRAPS)
    def test_interrupted_refresh_leaves_nothing_behind(self, bench: Bench, where: str) -> None:
        store = bench.store(timeout=20)
        connections = node_connections(store, None)
        place, misses = 0, 0
        while misses < 3:
            place += random.randint(1, 3)
            misses += 1
            try:
                with TRAPS[where](place):
                    connections.refresh(time.monotonic(), time.monotonic() + 20)
            except Interruption:
                misses = 0
            connections.refresh(time.monotonic(), time.monotonic() + 20)
            client: Any = store.client
            assert len(client.nodes_manager.slots_cache) == 16_384
            assert store.get_run("run") == []


def check(store: StepRunStore, calls: Sequence[Any]) -> None:
    outcomes: list[Any] = store.batch(calls)
    assert [begun(outcome).attempt for outcome in outcomes] == [1] * len(calls)
    assert [begun(outcome).run_id for outcome in outcomes] == RUNS[: len(calls)]
    assert idle_connections(store) <= 12  # threads of interrupted batches may finish connecting later
