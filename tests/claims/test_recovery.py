"""Claims that their own code cannot end: it was interrupted, or the server did not reply."""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import redis
from support.backends import Bench
from support.claims import (
    DeclinedError,
    UnreachableClient,
    Worker,
    blocking_only,
    charge,
    connected,
    fakeredis_only,
    heartbeat_of,
    outcomes,
    real_server,
    until_extended,
)
from support.internals import replace_client
from support.interruptions import AlarmError, OutsideError, raise_in, sigusr1_raises
from support.records import stored
from support.servers import find_binary, wait_until

from squidstep_redis import (
    NotSentError,
    Outcome,
    OutcomeUnknownError,
    StepBusyError,
    StepRunStore,
    StepStatus,
    current_claim,
)
from squidstep_redis.embedded import EmbeddedServer

pytestmark = blocking_only


@pytest.fixture
def paused(bench: Bench) -> Iterator[tuple[EmbeddedServer, StepRunStore]]:
    """A server that a test may pause, and a store on it."""
    with (
        EmbeddedServer(binary=find_binary(bench.backend.name), port=0) as server,
        connected(bench, server.url, timeout=20) as worker,
    ):
        worker.store.get_run("run")
        try:
            yield server, worker.plain_store
        finally:
            server.resume()


class TestBeginWithoutReply:
    @fakeredis_only
    @pytest.mark.parametrize("lease", [30, None])
    def test_claim_is_released_once_the_server_replies(
        self, worker: Worker, others: StepRunStore, lease: float | None
    ) -> None:
        client = worker.store.client
        LosingClient(client).replace_client_of(worker.plain_store)

        with pytest.raises(OutcomeUnknownError):
            worker.execute(charge, lease=lease)
        assert stored(others).status is StepStatus.RUNNING
        replace_client(worker.plain_store, client)

        wait_until(lambda: stored(others).status is StepStatus.PENDING)
        assert outcomes(others) == [Outcome.RELEASED]
        assert worker.execute(charge, max_attempts=1) == {"charged": 1}

    @fakeredis_only
    def test_begin_that_claimed_nothing_leaves_nothing_to_do(self, worker: Worker) -> None:
        with worker.claim("ship") as other:
            with pytest.raises(StepBusyError):
                worker.execute(charge, "ship")
            other.release()
        down = UnreachableClient(worker.store.client, redis.ConnectionError("down"), sends=False)
        down.replace_client_of(worker.plain_store)
        with pytest.raises(NotSentError):
            worker.execute(charge)

        assert not heartbeat_of(worker).recovery.has_work()


@real_server
class TestServerThatDoesNotReply:
    """An interrupted block is entered or left within a second, and its claim is ended once the server replies."""

    @pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), DeclinedError("timeout")], ids=repr)
    @pytest.mark.parametrize("moment", ["work", "complete"])
    def test_interrupted_block_is_left_within_a_second(
        self, paused: tuple[EmbeddedServer, StepRunStore], error: BaseException, moment: str
    ) -> None:
        server, store = paused

        def work(input: dict[str, Any]) -> dict[str, Any]:
            server.pause()
            if moment == "work":
                signal.raise_signal(signal.SIGUSR1)
            threading.Timer(0.2, lambda: signal.pthread_kill(main_thread(), signal.SIGUSR1)).start()
            return {}

        took = self.time_of(store, work, error)

        assert took < 1.5
        server.resume()
        wait_until(lambda: outcomes(store) in ([Outcome.FAILED], [Outcome.COMPLETED]))

    def test_interrupted_entry_ends_within_a_second(self, paused: tuple[EmbeddedServer, StepRunStore]) -> None:
        server, store = paused
        server.pause()
        threading.Timer(0.2, lambda: signal.pthread_kill(main_thread(), signal.SIGUSR1)).start()

        took = self.time_of(store, charge, DeclinedError("timeout"))

        assert took < 1.5
        server.resume()
        wait_until(lambda: (store.get_step_run("run", "pay") or stored(store)).status is StepStatus.PENDING)

    def test_alarm_is_not_deferred_until_the_server_replies(
        self, paused: tuple[EmbeddedServer, StepRunStore], alarms: list[int]
    ) -> None:
        server, store = paused
        server.pause()
        signal.setitimer(signal.ITIMER_REAL, 0.1)

        took = time.monotonic()
        with pytest.raises(AlarmError):
            store.run_step("run", "pay", charge, {"amount": 1})
        assert time.monotonic() - took < 1.7
        server.resume()

    def time_of(self, store: StepRunStore, work: Any, error: BaseException) -> float:
        began = time.monotonic()
        with sigusr1_raises(error), pytest.raises(type(error)):
            store.run_step("run", "pay", work, {"amount": 1})
        return time.monotonic() - began


@pytest.mark.timeout(method="thread")  # the other method uses SIGALRM itself
class TestExceptionAtAnyInstruction:
    """An exception raised at the nth place where the interpreter lets one in, for each n."""

    @fakeredis_only
    @pytest.mark.parametrize("fails", [False, True])
    @pytest.mark.parametrize("kind", [DeclinedError, KeyboardInterrupt])
    def test_no_step_stays_running(
        self, worker: Worker, others: StepRunStore, alarms: list[int], fails: bool, kind: type[BaseException]
    ) -> None:
        handler = signal.getsignal(signal.SIGALRM)

        def work(input: dict[str, Any]) -> dict[str, Any]:
            if fails:
                raise ValueError("no funds")
            return {}

        for number in itertools.count():
            step = f"step-{number}"
            with at_instruction(number, kind) as raised, contextlib.suppress(ValueError, kind):
                worker.store.run_step("run", step, work, {}, lease=60)
            if not raised:
                break
            step_run = others.get_step_run("run", step)
            assert step_run is None or step_run.status is not StepStatus.RUNNING, raised
            assert current_claim() is None, raised
            assert signal.getsignal(signal.SIGALRM) is handler, raised
        assert number > 100

        with worker.claim(lease=0.3) as claim:
            until_extended(claim.claim)
            claim.complete({})

    @real_server
    def test_storm_in_threads_stops_neither_steps_nor_heartbeat(
        self, bench: Bench, others: StepRunStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # of exceptions in finalizers
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        url = f"unix://{bench.backend.raw.connection_pool.connection_kwargs['path']}"
        store = StepRunStore.from_url(url, prefix=bench.prefix)
        numbers, stop, done = itertools.count(), time.monotonic() + 4, []

        def execute() -> None:
            while time.monotonic() < stop:
                with contextlib.suppress(OutsideError):
                    while time.monotonic() < stop:
                        store.run_step("run", f"{next(numbers)}", dict, {}, lease=60)
                        done.append(True)

        def execute_guarded() -> None:
            while time.monotonic() < stop:
                with contextlib.suppress(OutsideError):
                    execute()

        threads = [threading.Thread(target=execute_guarded) for _ in range(3)]
        for thread in threads:
            thread.start()
        while time.monotonic() < stop - 0.5:
            for thread in threads:
                raise_in(thread)
                time.sleep(0.002)
        for thread in threads:
            thread.join(30)

        assert not any(thread.is_alive() for thread in threads)
        assert len(done) > 100
        with store.claim_step("run", "after", {}, lease=0.5) as claim:
            until_extended(claim)
            claim.complete({})
        wait_until(lambda: StepStatus.RUNNING not in others.step_statuses("run").values())
        store.close()
        gc.collect()  # connections that were interrupted before they could be closed


@fakeredis_only
class TestSignalHandlerThatUsesTheStore:
    @pytest.mark.parametrize("function", ["add", "discard", "get", "_exit", "__enter__", "__exit__", "_acquire"])
    def test_handler_executes_a_step_amid_another(self, worker: Worker, others: StepRunStore, function: str) -> None:
        before = signal.signal(signal.SIGUSR1, lambda *_: worker.store.run_step("run", "of the handler", dict, {}))

        def strike(frame: FrameType, event: str, argument: object) -> None:
            if event == "call" and frame.f_code.co_name == function and is_ours(frame):
                sys.setprofile(None)
                signal.raise_signal(signal.SIGUSR1)

        try:
            sys.setprofile(strike)
            worker.store.run_step("run", "pay", dict, {})
        finally:
            sys.setprofile(None)
            signal.signal(signal.SIGUSR1, before)

        assert others.step_statuses("run") == {"of the handler": StepStatus.COMPLETED, "pay": StepStatus.COMPLETED}


class LosingClient:
    """A client that executes each command and loses its reply."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def replace_client_of(self, store: Any) -> None:
        UnreachableClient(self.client, redis.TimeoutError("slow")).replace_client_of(store)
        replace_client(store, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self.client.execute_command(*args, **options)
        raise redis.TimeoutError("slow")


def main_thread() -> int:
    return threading.main_thread().ident or 0


def is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("squidstep_redis")


@contextlib.contextmanager
def at_instruction(number: int, kind: type[BaseException]) -> Iterator[list[str]]:
    """In the block, raises an exception after so many calls of the library; the list says where."""
    where: list[str] = []
    left = number

    def strike(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event in ("call", "c_call", "c_return") and is_ours(frame):
            left -= 1
            if left < 0:
                sys.setprofile(None)
                where.append(f"{event} in {frame.f_code.co_qualname}, line {frame.f_lineno}")
                raise kind

    gc.disable()  # an exception in a finalizer is lost
    sys.setprofile(strike)
    try:
        yield where
    finally:
        sys.setprofile(None)
        gc.enable()
