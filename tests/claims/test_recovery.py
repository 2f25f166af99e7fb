"""Claims that their own code cannot end: it was interrupted, or the server did not reply."""

from __future__ import annotations

import contextlib
import gc
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from traceback import walk_stack
from types import FrameType, SimpleNamespace
from typing import Any, cast

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
    interrupted_seconds,
    outcomes,
    real_server,
    until_extended,
)
from support.internals import replace_client
from support.interruptions import AlarmError, OutsideError, SignalingClient, sigusr1_raises
from support.records import stored
from support.servers import find_binary, wait_until

from squidstep_redis import (
    Call,
    NotSentError,
    Outcome,
    OutcomeUnknownError,
    StepBusyError,
    StepRunStore,
    StepStatus,
    current_claim,
)
from squidstep_redis.claims.recovery import Recovery
from squidstep_redis.claims.unfinished import UnfinishedClaim
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
    def test_begin_that_claimed_nothing_needs_no_recovery(self, worker: Worker) -> None:
        with worker.claim("ship") as other:
            with pytest.raises(StepBusyError):
                worker.execute(charge, "ship")
            other.release()
        down = UnreachableClient(worker.store.client, redis.ConnectionError("down"), sends=False)
        down.replace_client_of(worker.plain_store)
        with pytest.raises(NotSentError):
            worker.execute(charge)

        assert not heartbeat_of(worker).recovery.has_work()

    @fakeredis_only
    def test_node_that_is_down_does_not_delay_other_claims(self, others: StepRunStore) -> None:
        """However many claims on it come first: each pass tries one of them."""
        tried: list[str | None] = []

        def send(call: Call[Any]) -> Any:
            if call.run_id != "run":
                tried.append(call.run_id)
                raise NotSentError("begin_step", call.run_id, "pay", "no route", True)
            return others.send(call)

        transport: Any = SimpleNamespace(send=send, server_of=lambda call: call.run_id == "run")
        transport.limited = lambda _: transport
        separate: Any = SimpleNamespace(get=lambda: transport)
        recovery = Recovery(others.calls, separate)
        claims = {run_id: UnfinishedClaim() for run_id in ("down-1", "run", "down-2", "down-3")}
        for run_id, unfinished in claims.items():
            unfinished.begin = others.calls.begin_step(run_id, "pay", {}, lease=60)
            recovery.queue.append(unfinished)
        others.send(cast("Any", claims["run"].begin))

        recovery.work()

        assert claims["run"].is_recovered
        assert stored(others).status is StepStatus.PENDING
        assert len(tried) == 1
        wait_until(lambda: recovery.work() and set(tried) == {"down-1", "down-2", "down-3"})


@fakeredis_only
class TestSecondException:
    """It arrives while the code, interrupted by a first exception, waits for its claim to be recovered."""

    @pytest.fixture(autouse=True)
    def interrupted_wait(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wait_for(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Recovery, "wait_for", wait_for)

    def test_claim_of_an_interrupted_entry_is_released(self, worker: Worker, others: StepRunStore) -> None:
        replace_client(worker.store, SignalingClient(worker.store.client, "after"))

        with sigusr1_raises(DeclinedError("timeout")), pytest.raises(KeyboardInterrupt):
            worker.execute(charge, lease=None)

        wait_until(lambda: outcomes(others) == [Outcome.RELEASED])

    @pytest.mark.parametrize("signals_at", ["work", "complete"])
    def test_claim_of_an_interrupted_block_is_recorded_as_failed(
        self, worker: Worker, others: StepRunStore, signals_at: str
    ) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            if signals_at == "work":
                signal.raise_signal(signal.SIGUSR1)
            replace_client(worker.store, SignalingClient(worker.store.client, "before"))
            return {}

        with sigusr1_raises(DeclinedError("timeout")), pytest.raises(KeyboardInterrupt):
            worker.execute(work, lease=None)

        wait_until(lambda: outcomes(others) == [Outcome.FAILED])


@real_server
class TestServerThatDoesNotReply:
    """An interrupted block is entered or left within a second, and its claim is ended once the server replies.

    These tests shorten the second, and tolerate some more: without this rule, a block waits for 20 seconds.
    """

    LIMIT = 10

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
            threading.Thread(target=signal_a_waiting_call).start()
            return {}

        with interrupted_seconds(0.1):
            took = self.time_of(store, work, error)

        assert took < self.LIMIT
        server.resume()
        wait_until(lambda: outcomes(store) in ([Outcome.FAILED], [Outcome.COMPLETED]))

    def test_interrupted_entry_ends_within_a_second(self, paused: tuple[EmbeddedServer, StepRunStore]) -> None:
        server, store = paused
        server.pause()
        threading.Thread(target=signal_a_waiting_call).start()

        with interrupted_seconds(0.1):
            took = self.time_of(store, charge, DeclinedError("timeout"))

        assert took < self.LIMIT
        server.resume()
        wait_until(lambda: store.step_statuses("run") == {"pay": StepStatus.PENDING})

    def test_alarm_is_not_deferred_until_the_server_replies(
        self, paused: tuple[EmbeddedServer, StepRunStore], alarms: list[int]
    ) -> None:
        server, store = paused
        server.pause()
        signal.setitimer(signal.ITIMER_REAL, 0.05)

        began = time.monotonic()
        with interrupted_seconds(0.1), pytest.raises(AlarmError):
            store.run_step("run", "pay", charge, {"amount": 1})
        assert time.monotonic() - began < self.LIMIT
        server.resume()

    def time_of(self, store: StepRunStore, work: Any, error: BaseException) -> float:
        began = time.monotonic()
        with sigusr1_raises(error), pytest.raises(type(error)):
            store.run_step("run", "pay", work, {"amount": 1})
        return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(method="thread")  # the other method uses SIGALRM itself
class TestExceptionAtAnyInstruction:
    """An exception is raised at each place where the interpreter allows one; in a loop, during some passes."""

    @fakeredis_only
    @pytest.mark.parametrize(("kind", "fails"), [(DeclinedError, True), (KeyboardInterrupt, False)])
    def test_no_step_stays_running(
        self, worker: Worker, others: StepRunStore, alarms: list[int], kind: type[BaseException], fails: bool
    ) -> None:
        handler = signal.getsignal(signal.SIGALRM)

        def work(input: dict[str, Any]) -> dict[str, Any]:
            if fails:
                raise ValueError("no funds")
            return {}

        def execute(step: str) -> None:
            with contextlib.suppress(ValueError, kind):
                worker.store.run_step("run", step, work, {}, lease=60)

        execute("before")  # fills caches
        for number in instructions(lambda: execute("without exception")):
            step = f"step-{number}"
            with at_instruction(number, kind) as raised:
                execute(step)
            step_run = others.get_step_run("run", step)
            assert step_run is None or step_run.status is not StepStatus.RUNNING, raised
            assert current_claim() is None, raised
            assert signal.getsignal(signal.SIGALRM) is handler, raised

        with worker.claim(lease=0.3) as claim:
            until_extended(claim.claim)
            claim.complete({})

    @real_server
    def test_storm_in_threads_stops_neither_steps_nor_heartbeat(
        self,
        bench: Bench,
        others: StepRunStore,
        raise_in_thread: Callable[[threading.Thread], None],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # of exceptions in finalizers
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        url = f"unix://{bench.backend.raw.connection_pool.connection_kwargs['path']}"
        store = StepRunStore.from_url(url, prefix=bench.prefix)
        numbers, stop, done = itertools.count(), threading.Event(), []

        def execute() -> None:
            while not stop.is_set():
                with contextlib.suppress(OutsideError):
                    while not stop.is_set():
                        store.run_step("run", f"{next(numbers)}", dict, {}, lease=60)
                        done.append(True)

        def execute_guarded() -> None:
            while not stop.is_set():
                with contextlib.suppress(OutsideError):
                    execute()

        threads = [threading.Thread(target=execute_guarded) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(150):
            for thread in threads:
                raise_in_thread(thread)
                time.sleep(0.002)
        before = len(done)
        wait_until(lambda: len(done) > before + 100)
        stop.set()
        for thread in threads:
            thread.join(30)

        assert not any(thread.is_alive() for thread in threads)
        with store.claim_step("run", "after", {}, lease=0.5) as claim:
            until_extended(claim)
            claim.complete({})
        wait_until(lambda: StepStatus.RUNNING not in others.step_statuses("run").values())
        store.close()
        gc.collect()  # connections that were interrupted before they could be closed


@fakeredis_only
class TestSignalHandlerThatUsesTheStore:
    @pytest.mark.parametrize("function", ["add", "discard", "get", "_exit", "__enter__", "__exit__", "_acquire"])
    def test_handler_executes_a_step_during_another(self, worker: Worker, others: StepRunStore, function: str) -> None:
        before = signal.signal(signal.SIGUSR1, lambda *_: worker.store.run_step("run", "of the handler", dict, {}))

        def intercept(frame: FrameType, event: str, argument: object) -> None:
            if event == "call" and frame.f_code.co_name == function and is_ours(frame):
                sys.setprofile(None)
                signal.raise_signal(signal.SIGUSR1)

        try:
            sys.setprofile(intercept)
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


EVENTS = ("call", "c_call", "c_return")  # of sys.setprofile


def main_thread() -> int:
    return threading.main_thread().ident or 0


def signal_a_waiting_call() -> None:
    """Sends SIGUSR1 to the main thread once it waits for a reply."""
    wait_until(lambda: sys._current_frames()[main_thread()].f_code.co_name == "_receive")
    signal.pthread_kill(main_thread(), signal.SIGUSR1)


def is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("squidstep_redis")


def instructions(run: Callable[[], None]) -> list[int]:
    """Returns numbers for `at_instruction`: one per instruction of a run; for a loop, two passes and the last."""
    passes: dict[Any, list[int]] = {}
    count = itertools.count()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event in EVENTS and is_ours(frame):
            callers = [(id(each.f_code), line) for each, line in walk_stack(frame)]
            passes.setdefault((event, *callers), []).append(next(count))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    assert len(passes) > 100
    return sorted({number for numbers in passes.values() for number in (*numbers[:2], numbers[-1])})


@contextlib.contextmanager
def at_instruction(number: int, kind: type[BaseException]) -> Iterator[list[str]]:
    """In the block, raises an exception after so many calls of the library; the list says where."""
    where: list[str] = []
    left = number

    def intercept(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event in EVENTS and is_ours(frame):
            left -= 1
            if left < 0:
                sys.setprofile(None)
                where.append(f"{event} in {frame.f_code.co_qualname}, line {frame.f_lineno}")
                raise kind

    gc.disable()  # an exception in a finalizer is lost
    sys.setprofile(intercept)
    try:
        yield where
    finally:
        sys.setprofile(None)
        gc.enable()
