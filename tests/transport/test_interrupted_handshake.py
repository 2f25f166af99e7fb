"""A handshake that is interrupted leaves no connection with the wrong database or user behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from math import inf
from pathlib import Path
from typing import Any, cast

import hiredis
import pytest
import redis
from redis.credentials import CredentialProvider
from support.backends import Bench
from support.internals import close_idle_connections, plain_store
from support.interruptions import AlarmError, at_call, at_line, sigalrm_raises
from support.proxy import Proxy
from support.records import begun
from support.storm_length import StormLength

from squidstep_redis import StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.transport.pool import borrow
from transport.conftest import Connect

pytestmark = pytest.mark.servers("valkey")

DATABASE = 3
INTERRUPTED_FILES = ("/redis/connection.py", "/squidstep_redis/transport/")
WAITS_FOR_CREDENTIALS = pytest.mark.skipif(
    not hasattr(CredentialProvider, "get_credentials_async"), reason="redis-py 5.0 asks for credentials without waiting"
)
MODULES = ("squidstep_redis", "redis", "queue", "threading")
KINDS = pytest.mark.parametrize("kind", ["own", "plain", "RESP3", "blocking pool", "hooked"], indirect=True)


class Credentials(CredentialProvider):
    """Provides the user after some turns of the event loop."""

    def __init__(self, turns: int = 0, seconds: float = 0) -> None:
        self.turns = turns
        self.seconds = seconds

    def get_credentials(self) -> tuple[str, str]:
        return "worker", "secret"

    async def get_credentials_async(self) -> tuple[str, str]:
        for _ in range(self.turns):
            await asyncio.sleep(0)
        await asyncio.sleep(self.seconds)
        return self.get_credentials()


@pytest.fixture(autouse=True)
def user(bench: Bench) -> Iterator[None]:
    raw = bench.backend.raw
    raw.execute_command("ACL SETUSER worker reset on >secret ~* +@all")
    yield
    raw.execute_command("ACL DELUSER worker")


def check(bench: Bench) -> None:
    """Checks that every script ran as the user, in the database."""
    ran = [c for c in bench.backend.raw.client_list() if c["cmd"] in ("eval", "evalsha") and c["name"] == bench.prefix]
    assert ran
    assert {(client["user"], client["db"]) for client in ran} == {("worker", str(DATABASE))}
    assert bench.dump() == {}  # in database 0


def options(bench: Bench, credentials: Credentials | None = None) -> dict[str, Any]:
    return {"client_name": bench.prefix, "credential_provider": credentials or Credentials()}


def disconnect_idle(pool: Any) -> None:
    if "inuse_connections" in signature(pool.disconnect).parameters:
        pool.disconnect(inuse_connections=False)
    else:  # the blocking pool of redis-py 5.0
        for connection in filter(None, list(pool.pool.queue)):
            connection.disconnect()


class Interruption(BaseException):
    pass


def interrupt() -> None:
    raise Interruption


@pytest.fixture
def sockets_closed_late() -> Iterator[None]:
    """Python closes a socket that was made in the interrupted line when it is collected, and warns.

    An alarm would interrupt pytest's hook, too.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    yield
    gc.collect()
    sys.unraisablehook = hook


CLOSED_LATE = pytest.mark.usefixtures("sockets_closed_late")


@CLOSED_LATE
@pytest.mark.slow
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@KINDS
def test_exception_at_any_line_leaves_no_half_made_connection(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, storm_length: StormLength
) -> None:
    numbers = itertools.count()
    for _ in storm_length.rounds(1):
        line, misses = 0, 0
        while misses < 3:
            line += random.randint(1, 25)
            store = connect_to(kind, proxy.port, DATABASE, options(bench), timeout=2)
            with at_line(line, INTERRUPTED_FILES, interrupt) as was_interrupted, contextlib.suppress(Interruption):
                store.schedule_step("run", "pay", {})
            misses = 0 if was_interrupted() else misses + 1
            assert begun(store.begin_step(f"run-{next(numbers)}", "pay", {})).attempt == 1
            check(bench)
        assert line > 100


@CLOSED_LATE
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@pytest.mark.parametrize("kind", ["plain"], indirect=True)
def test_next_handshake_restores_what_an_interrupted_one_replaced(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str
) -> None:
    """Otherwise, each one would wrap the last one, which takes exceptions from outside for errors of the user's."""
    line, was_interrupted = 0, lambda: True
    while was_interrupted():
        line += 1
        given = options(bench)
        pool: Any = connect_to(kind, proxy.port, DATABASE, {**given, "max_connections": 1}).client.connection_pool
        with (
            at_line(line, ("/transport/handshake.py",), interrupt) as was_interrupted,
            contextlib.suppress(Interruption),
        ):
            borrow(pool, inf).give_back()
        connection = borrow(pool, time.monotonic()).connection
        assert connection.redis_connect_func is None
        assert connection.credential_provider is given["credential_provider"]
    assert line > 20


@CLOSED_LATE
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@pytest.mark.parametrize("kind", ["plain", "blocking pool"], indirect=True)
def test_exception_at_any_line_of_borrowing_loses_no_connection(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str
) -> None:
    line, misses = 0, 0
    while misses < 3:
        line += random.randint(1, 8)
        client = {**options(bench), "max_connections": 1}
        pool: Any = connect_to(kind, proxy.port, DATABASE, client).client.connection_pool
        with at_line(line, INTERRUPTED_FILES, interrupt) as was_interrupted, contextlib.suppress(Interruption):
            borrow(pool, inf)
        if was_interrupted():
            misses = 0
            borrow(pool, time.monotonic()).give_back()
        else:
            misses += 1
    assert line > 100


@CLOSED_LATE
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@pytest.mark.parametrize("kind", ["plain", "blocking pool"], indirect=True)
def test_interrupted_call_leaks_neither_a_connection_nor_a_lock(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str
) -> None:
    """The exception arrives wherever the interpreter lets one in."""
    number, was_interrupted = 0, True
    while was_interrupted:
        store = connect_to(kind, proxy.port, DATABASE, {**options(bench), "max_connections": 1}, timeout=2)
        pool: Any = store.client.connection_pool
        store.schedule_step("run", "pay", {})
        with contextlib.suppress(Interruption), at_call(number, MODULES, interrupt) as place:
            store.schedule_step("run", "pay", {})
        was_interrupted = bool(place)
        assert kind == "plain" or not pool.pool.mutex.locked(), place
        borrow(pool, time.monotonic()).give_back()
        number += 1
    assert number > 50


class ClosedConnection(redis.Connection):
    """A connection that another thread closes at the end of its first handshake, as `disconnect` of its pool does."""

    is_open = True

    def on_connect(self) -> None:
        super().on_connect()
        if self.is_open:
            self.is_open = False
            self._sock.close()


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@pytest.mark.parametrize("kind", ["plain", "blocking pool"], indirect=True)
def test_call_survives_a_close_by_another_thread_while_connecting(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str
) -> None:
    client = {**options(bench), "connection_class": ClosedConnection}
    begun(connect_to(kind, proxy.port, DATABASE, client, timeout=2).begin_step("run", "pay", {}))
    check(bench)


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@pytest.mark.parametrize("kind", ["plain", "blocking pool"], indirect=True)
def test_call_survives_a_disconnect_of_its_pool(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def borrow_and_disconnect(pool: Any, deadline: float) -> Any:
        loan = borrow(pool, deadline)
        monkeypatch.undo()
        loan.connection.disconnect()
        return loan

    store = connect_to(kind, proxy.port, DATABASE, options(bench), timeout=2)
    monkeypatch.setattr("squidstep_redis.transport.connection.borrow", borrow_and_disconnect)
    begun(store.begin_step("run", "pay", {}))
    check(bench)


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@KINDS
def test_no_handshake_formats_an_int_with_hiredis(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hiredis crashes the process if a signal handler raises meanwhile."""
    words: list[Any] = []
    pack = cast("Any", hiredis).pack_command
    monkeypatch.setattr(hiredis, "pack_command", lambda command: words.extend(command) or pack(command))
    store = connect_to(kind, proxy.port, DATABASE, options(bench), timeout=2)
    for number in range(2):
        begun(store.begin_step(f"run-{number}", "pay", {}))
        store.client.connection_pool.disconnect()
        close_idle_connections(store)
    assert not [word for word in words if isinstance(word, int)]


@CLOSED_LATE
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@KINDS
def test_signals_at_random_moments_leave_no_half_made_connection(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, storm_length: StormLength
) -> None:
    """Other threads use the same pool, and must not be handed a half-made connection either."""
    store = connect_to(kind, proxy.port, DATABASE, options(bench), timeout=2)
    wanted = connect_to("own", proxy.port, DATABASE, options(bench))
    is_over = threading.Event()

    def work(thread: int) -> int:
        count = 0
        while not is_over.is_set():
            assert begun(store.begin_step(f"thread-{thread}-{count}", "pay", {})).attempt == 1
            count += 1
        return count

    with ThreadPoolExecutor(2) as threads, sigalrm_raises() as raised:
        working = [threads.submit(work, thread) for thread in range(2)]
        try:
            for number in storm_length.rounds(100):
                with contextlib.suppress(AlarmError):
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(0.000_01, 0.004))
                    disconnect_idle(store.client.connection_pool)
                    store.schedule_step(f"run-{number}", "pay", {})
                    time.sleep(0.005)  # Event.wait can turn the alarm into another error
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            is_over.set()
        assert sum(future.result(20) for future in working) > 0
    assert raised
    assert wanted.schedule_step("run-after", "pay", {}).decision == "schedule"
    begun(store.begin_step("after", "pay", {}))
    check(bench)


@pytest.mark.parametrize("bench", ["asyncio"], indirect=True)
@pytest.mark.parametrize("cancellations", [1, 2])
@KINDS
def test_cancellation_at_any_moment_leaves_no_half_made_connection(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, cancellations: int, storm_length: StormLength
) -> None:
    store = connect_to(kind, proxy.port, DATABASE, options(bench, Credentials(turns=10)), timeout=2)
    plain: Any = plain_store(store)

    async def main(storm: int) -> int:
        turns, finished = 0, 0
        while finished < 3:
            turns += 1 + turns // 15  # every turn at first; how many there are depends on the machine
            await plain.client.connection_pool.disconnect()
            close_idle_connections(plain)
            task = asyncio.ensure_future(plain.schedule_step(f"cancelled-{storm}-{turns}", "pay", {}))
            for _ in range(turns):
                await asyncio.sleep(0.000_1 if turns % 2 else 0)
            for _ in range(cancellations):
                task.cancel()
                await asyncio.sleep(0)
            try:
                await task
                finished += 1
            except asyncio.CancelledError:
                finished = 0
            at_once = [plain.begin_step(f"run-{storm}-{turns}-{number}", "pay", {}) for number in range(3)]
            assert [begun(result).attempt for result in await asyncio.gather(*at_once)] == [1, 1, 1]
            if turns % 5 == 0:
                check(bench)
        return turns

    assert bench.runner is not None
    for number in storm_length.rounds(1):
        assert bench.runner.run(main(number)) > 10
    check(bench)
    pool: Any = plain.client.connection_pool
    assert not pool._in_use_connections


@WAITS_FOR_CREDENTIALS
@pytest.mark.parametrize("bench", ["asyncio"], indirect=True)
@KINDS
def test_slow_credential_provider_outlives_the_cancelled_call(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str
) -> None:
    store = connect_to(kind, proxy.port, DATABASE, options(bench, Credentials(seconds=0.6)), timeout=5)
    plain: Any = plain_store(store)

    async def main() -> None:
        for number in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(plain.begin_step(f"cancelled-{number}", "pay", {}), 0.05)
        tasks = [asyncio.ensure_future(plain.begin_step(f"run-{number}", "pay", {})) for number in range(5)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()  # the one that connects, perhaps
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert [begun(result).attempt for result in results[1:]] == [1] * 4

    assert bench.runner is not None
    bench.runner.run(main())
    check(bench)


# A signal is pending when redis-py packs a command that has a number in it. Its handler raises.
@pytest.mark.timeout(method="thread")  # the other method uses SIGALRM itself
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
def test_alarm_is_raised_after_the_handshake(bench: Bench, connect_to: Connect, proxy: Proxy) -> None:
    """It would leave locks of other modules held: with RESP3, redis-py's handshake takes that of `logging`."""
    finished: list[bool] = []

    class AlarmingCredentials(Credentials):
        def get_credentials(self) -> tuple[str, str]:
            if not finished:
                signal.raise_signal(signal.SIGALRM)
                finished.append(True)
            return super().get_credentials()

    store = connect_to("own", proxy.port, DATABASE, options(bench, AlarmingCredentials()), timeout=2)
    with sigalrm_raises(), pytest.raises(AlarmError):
        store.schedule_step("run", "pay", {})
    assert finished == [True]
    begun(store.begin_step("run", "ship", {}))
    check(bench)


@WAITS_FOR_CREDENTIALS
def test_pool_is_full_again_after_interrupted_handshakes(bench: Bench, connect_to: Connect, proxy: Proxy) -> None:
    """A pool of two connections survives ten interruptions: none of its places is lost."""
    credentials = Credentials(seconds=0.05)
    client: dict[str, Any] = {**options(bench, credentials), "max_connections": 2}
    store: StepRunStore = connect_to("blocking pool", proxy.port, DATABASE, client, timeout=2)
    for number in range(10):
        if bench.runner is None:
            original, armed = redis.Connection.on_connect, [True]

            def on_connect(connection: Any, original: Any = original, armed: list[bool] = armed) -> None:
                if armed.pop() if armed else False:
                    raise Interruption
                original(connection)

            with pytest.MonkeyPatch.context() as patch:
                for name in ("on_connect", "on_connect_check_health"):
                    if hasattr(redis.Connection, name):
                        patch.setattr(redis.Connection, name, lambda self, *_, **__: on_connect(self))
                with pytest.raises(Interruption):
                    store.schedule_step(f"cancelled-{number}", "pay", {})
        else:
            call = plain_store(store).schedule_step(f"cancelled-{number}", "pay", {})
            with pytest.raises(asyncio.TimeoutError):
                bench.runner.run(asyncio.wait_for(call, 0.02))
    credentials.seconds = 0
    for number in range(5):
        assert begun(store.begin_step(f"run-{number}", "pay", {})).attempt == 1
    check(bench)


FIRST_CALL = """
import asyncio, sys
from squidstep_redis import AsyncStepRunStore, StepRunStore

async def main():
    async with AsyncStepRunStore.from_url(sys.argv[1]) as store:
        before = set(sys.modules)
        await store.run_step("run", "asyncio", charge, {}, lease=5)
        return set(sys.modules) - before

async def charge(input):
    return {}

with StepRunStore.from_url(sys.argv[1]) as store:
    before = set(sys.modules)
    store.run_step("run", "blocking", lambda input: {}, {}, lease=5)
    print(sorted(set(sys.modules) - before), sorted(asyncio.run(main())))
"""


def test_first_call_imports_nothing(binary: Path) -> None:
    """An exception from outside during an import can leave the lock of a module held, for which other threads wait."""
    with EmbeddedServer(binary=binary, port=0) as server:
        command = [sys.executable, "-c", FIRST_CALL, server.url]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("[] []\n", "")
