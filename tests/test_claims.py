"""`run_step` and `claim_step`: executed once, kept alive meanwhile, told when it is lost, and given back when torn."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import math
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from support.backends import Bench, Driven, ask_instead
from support.proxy import Fault, Proxy
from support.records import begun, stored
from support.servers import find_binary, wait_until

from squidstep_redis import (
    AsyncClaim,
    AsyncStepRunStore,
    BeginResult,
    Call,
    Calls,
    Claim,
    InvalidArgumentError,
    MsgpackCodec,
    Outcome,
    OutcomeUnknownError,
    PayloadError,
    RunDeletedError,
    ServerError,
    StaleStepRunError,
    StepBusyError,
    StepExhaustedError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
    StepStatus,
    current_claim,
)
from squidstep_redis.claims import heartbeat as heartbeats
from squidstep_redis.claims.heartbeat import ExtensionSchedule
from squidstep_redis.claims.rules import BaseClaim
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.scripts import directory, script
from squidstep_redis.signals import defer_sigalrm

Work = Callable[[dict[str, Any]], Mapping[str, Any]]

blocking = pytest.mark.parametrize("bench", ["blocking"], indirect=True)
for_asyncio = pytest.mark.parametrize("bench", ["asyncio"], indirect=True)
on_a_real_server = pytest.mark.servers("valkey", "redis-7", "redis-6")
in_the_client = pytest.mark.servers("fakeredis")  # what no server has a part in

SHORT = 0.3  # a lease that ends, or is found to be lost, within the test


class Block:
    """A claim of either store as a `with` block, called like a blocking one."""

    def __init__(self, claim: Any, runner: asyncio.Runner | None) -> None:
        self.claim = claim
        self.runner = runner

    def __enter__(self) -> Any:
        if self.runner is None:
            self.claim.__enter__()
        else:
            self.runner.run(self._enter())
        return self

    async def _enter(self) -> None:  # answers nothing: a task keeps its answer, and must not keep the claim
        await self.claim.__aenter__()

    def __exit__(self, *raised: Any) -> Any:
        return self.claim.__exit__(*raised) if self.runner is None else self.runner.run(self.claim.__aexit__(*raised))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.claim, name)
        return value if self.runner is None or not inspect.iscoroutinefunction(value) else self._driven(value)

    def _driven(self, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: cast("asyncio.Runner", self.runner).run(method(*args, **kwargs))


class Worker:
    """Executes steps with a store of either flavour, by blocking calls."""

    def __init__(self, bench: Bench, store: StepRunStore | None = None) -> None:
        self.runner = bench.runner
        self.store = store or bench.store()

    @property
    def plain_store(self) -> Any:
        """The store that sends: on it a method can be replaced."""
        return self.store.store if isinstance(self.store, Driven) else self.store

    def execute(self, work: Work, step: str = "pay", **options: Any) -> dict[str, Any]:
        """`run_step`. The work may wait: for asyncio it is done in a thread, beside the loop."""

        async def beside_the_loop(input: dict[str, Any]) -> Mapping[str, Any]:
            with ThreadPoolExecutor(1) as pool:
                context = contextvars.copy_context()
                return await asyncio.get_running_loop().run_in_executor(pool, context.run, work, input)

        fn = work if self.runner is None else cast("Any", beside_the_loop)
        return self.store.run_step("run", step, fn, {"amount": 1}, **options)

    def claim(self, step: str = "pay", **options: Any) -> Any:
        """`claim_step`."""
        return Block(self.store.claim_step("run", step, {"amount": 1}, **options), self.runner)

    def finish(self, answer: Any) -> Any:
        """Waits for the answer of a redis-py client, if it is an asyncio one."""

        async def wait() -> Any:
            return await answer

        return answer if self.runner is None else self.runner.run(wait())

    def wait(self, condition: Callable[[], object]) -> None:
        """Waits; for asyncio in the loop, whose timers go on."""
        if self.runner is None:
            wait_until(condition)
        else:
            self.runner.run(until(condition))

    def settle(self) -> None:
        """Waits for the beat that is under way, if there is one: it would open connections that were closed."""
        heartbeat = heartbeats._async_heartbeats.get(self.store.client)
        self.wait(lambda: heartbeat is None or heartbeat._task is None)

    def wait_for_a_beat(self, *claims: Any) -> None:
        """Waits until each of the claims has been extended once more, or is lost."""
        due = [(claim, claim.next_extension_at) for claim in claims]
        self.wait(lambda: all(claim.lost.is_set() or claim.next_extension_at > before for claim, before in due))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def worker(bench: Bench) -> Iterator[Worker]:
    worker = Worker(bench)
    yield worker
    worker.settle()


@pytest.fixture
def others(bench: Bench) -> Iterator[StepRunStore]:
    """A store for all the others: it looks in on the tested one, or takes over from it."""
    with contextlib.closing(bench.backend.connect()) as client:
        yield StepRunStore(client, prefix=bench.prefix)


@pytest.fixture(autouse=True)
def no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A heartbeat that idles on would be in the way of tests that fork."""
    monkeypatch.setattr(heartbeats.Heartbeat, "IDLE", 0.02)
    yield
    for heartbeat in list(heartbeats._heartbeats.values()):
        with heartbeat._changed:
            heartbeat._changed.notify_all()
    wait_until(lambda: not heartbeat_threads())


def heartbeat_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "squidstep-heartbeat"]


def take_over(others: StepRunStore, step: str = "pay", **options: Any) -> StepRun:
    """Ends the lease and claims the step, as another worker would if the holder were dead."""
    found: list[BeginResult] = []

    def taken() -> bool:  # the holder may extend its claim in between
        expire = others.calls.expire_claim(stored(others, step=step).id)
        begin = others.calls.begin_step("run", step, {"amount": 2}, **options)
        found.append(cast("Any", others.batch([cast("Call[Any]", expire), begin])[1]))
        return found[-1].decision == "execute"

    wait_until(taken)
    return found[-1].step_run


def outcomes(store: StepRunStore, step: str = "pay") -> list[Outcome]:
    return [attempt.outcome for attempt in store.attempts("run", step)]


def receipt(input: dict[str, Any]) -> dict[str, Any]:
    return {"charged": input["amount"]}


def end(claim: Any, ending: str) -> StepRun:
    return claim.release() if ending == "release" else getattr(claim, ending)({})


class DeclinedError(Exception):
    """What the work may raise."""


def decline(input: dict[str, Any]) -> dict[str, Any]:
    raise DeclinedError("no funds")


def when(worker: Worker, seen: Callable[[Any], object], act: Callable[[], object]) -> None:
    """Acts once, right after the worker's store is answered what is looked out for."""
    send, done = worker.plain_store.send, []

    def look(answer: Any) -> Any:
        if not done and seen(answer):
            done.append(True)
            act()
        return answer

    async def send_asyncio(call: Call[Any]) -> Any:
        return look(await send(call))

    worker.plain_store.send = (lambda call: look(send(call))) if worker.runner is None else send_asyncio


def is_busy(answer: Any) -> bool:
    return isinstance(answer, BeginResult) and answer.busy


class TestRunStep:
    def test_of_many_deliveries_one_executes_and_all_are_answered_its_output(self, store: StepRunStore) -> None:
        given: list[dict[str, Any]] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            given.append(input)
            return {"charged": input["amount"]}

        answers = [store.run_step("run", "pay", work, {"amount": number}) for number in range(5)]

        assert answers == [{"charged": 0}] * 5
        assert given == [{"amount": 0}]
        assert (stored(store).status, stored(store).output) == (StepStatus.COMPLETED, {"charged": 0})
        assert outcomes(store) == [Outcome.COMPLETED]

    def test_a_scheduled_input_is_what_the_work_is_given(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {"amount": 1})

        assert store.run_step("run", "pay", receipt, {"amount": 2}) == {"charged": 1}

    def test_the_first_answer_is_the_stored_output_too(self, store: StepRunStore) -> None:
        first = store.run_step("run", "pay", lambda _: {"items": (1, 2)}, {})

        assert first == {"items": [1, 2]}
        assert store.run_step("run", "pay", lambda _: {"items": (1, 2)}, {}) == first

    def test_an_empty_output(self, store: StepRunStore) -> None:
        assert [store.run_step("run", "pay", lambda _: {}, {}) for _ in range(2)] == [{}, {}]

    def test_an_exception_is_recorded_and_raised_and_the_next_delivery_executes(self, store: StepRunStore) -> None:
        declined = DeclinedError("no funds")

        def work(input: dict[str, Any]) -> dict[str, Any]:
            raise declined

        with pytest.raises(DeclinedError) as caught:
            store.run_step("run", "pay", work, {"amount": 1})

        assert caught.value is declined
        assert stored(store).status is StepStatus.FAILED
        assert stored(store).last_error is not None
        assert stored(store).last_error["type"].endswith("DeclinedError")
        assert stored(store).last_error["message"] == "no funds"
        assert "in work" in stored(store).last_error["traceback"]
        assert store.run_step("run", "pay", receipt, {"amount": 2}) == {"charged": 2}
        assert stored(store).attempt == 2
        assert outcomes(store) == [Outcome.FAILED, Outcome.COMPLETED]

    def test_an_output_that_cannot_be_kept_is_a_failure(self, store: StepRunStore) -> None:
        with pytest.raises(PayloadError, match=r"output\['receipt'\]"):
            store.run_step("run", "pay", lambda _: {"receipt": object()}, {})
        with pytest.raises(PayloadError, match="output"):
            store.run_step("run", "mail", lambda _: cast("Any", None), {})

        assert [step_run.status for step_run in store.get_run("run")] == [StepStatus.FAILED] * 2

    def test_with_no_attempt_left_it_is_exhausted(self, store: StepRunStore) -> None:
        for _ in range(2):
            with pytest.raises(DeclinedError):
                store.run_step("run", "pay", decline, {}, max_attempts=2)

        with pytest.raises(StepExhaustedError, match="run 'run', step 'pay': all attempts are used up") as caught:
            store.run_step("run", "pay", receipt, {}, max_attempts=2)

        assert caught.value.current == stored(store)
        assert caught.value.current.last_error is not None
        assert caught.value.current.last_error["message"] == "no funds"

    def test_a_lapsed_claim_with_no_attempt_left_is_exhausted(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.01, max_attempts=1)))

        with pytest.raises(StepExhaustedError) as caught:
            store.run_step("run", "pay", receipt, {}, max_attempts=1, on_busy="wait")

        assert caught.value.current.last_error is not None
        assert caught.value.current.last_error["type"] == "LeaseExpired"

    def test_a_lapsed_claim_is_taken_over(self, bench: Bench, store: StepRunStore) -> None:
        bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.01)))

        assert store.run_step("run", "pay", receipt, {"amount": 2}) == {"charged": 2}
        assert outcomes(store) == [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]

    def test_while_another_holds_the_step_it_is_busy(self, bench: Bench, store: StepRunStore) -> None:
        holder = begun(store.begin_step("run", "pay", {}, lease=60, owner="worker-1"))
        before = bench.dump()

        with pytest.raises(
            StepBusyError, match=r"is being executed by worker-1, as attempt 1; its lease ends in"
        ) as caught:
            store.run_step("run", "pay", receipt, {})

        assert caught.value.current == holder
        assert caught.value.retry_in is not None
        assert 50 < caught.value.retry_in <= 60
        assert bench.dump() == before

    def test_a_claim_without_lease_is_busy_for_nobody_knows_how_long(self, store: StepRunStore) -> None:
        begun(store.begin_step("run", "pay", {}))

        with pytest.raises(StepBusyError, match="is being executed, as attempt 1. Nothing was executed") as caught:
            store.run_step("run", "pay", receipt, {})

        assert caught.value.retry_in is None

    def test_a_deleted_run_is_refused(self, store: StepRunStore) -> None:
        store.schedule_step("run", "pay", {})
        store.delete_run("run")

        with pytest.raises(RunDeletedError):
            store.run_step("run", "pay", receipt, {}, on_busy="wait")

    def test_the_owner_is_host_and_process_unless_said(self, store: StepRunStore) -> None:
        store.run_step("run", "pay", lambda _: {}, {})
        store.run_step("run", "mail", lambda _: {}, {}, owner="worker-1")

        owners = [step_run.owner for step_run in store.get_run("run")]
        assert owners == [f"{socket.gethostname()}:{os.getpid()}", "worker-1"]

    @pytest.mark.parametrize(
        ("refused", "options"),
        [
            ("fn: must be callable, not str 'work'", {"fn": "work"}),
            ("on_busy: must be 'raise' or 'wait', not str 'skip'", {"on_busy": "skip"}),
            ("on_busy: must be", {"on_busy": None}),
            ("lease: must be seconds", {"lease": 0}),
            ("lease: must be seconds", {"lease": "30"}),
            ("lease: must be seconds", {"lease": math.nan}),
            ("max_attempts: must be an int", {"max_attempts": 0}),
            ("owner: must be without control characters", {"owner": "a\nb"}),
            ("run_id: must be a non-empty str", {"run_id": 7}),
            ("step: must be", {"step": ""}),
            (r"input\['amount'\]", {"input": {"amount": object()}}),
        ],
    )
    def test_what_is_refused_is_refused_before_anything_is_sent(
        self, bench: Bench, worker: Worker, refused: str, options: dict[str, Any]
    ) -> None:
        arguments: dict[str, Any] = {"run_id": "run", "step": "pay", "fn": receipt, "input": {"amount": 1}, **options}

        with pytest.raises(InvalidArgumentError, match=refused):
            worker.store.run_step(**arguments)
        if "fn" not in options:
            del arguments["fn"]
            with (
                pytest.raises(InvalidArgumentError, match=refused),
                Block(worker.store.claim_step(**arguments), worker.runner),
            ):
                pass

        assert bench.dump() == {}

    @pytest.mark.timeout(30)
    @pytest.mark.parametrize(
        ("on_busy", "error", "problem"),
        [
            ("raise", StepBusyError, "step 'pay': is being executed by"),
            ("wait", InvalidArgumentError, "for ever: step 'pay' of run 'run' is being executed by this very code"),
        ],
    )
    def test_work_that_asks_for_itself_does_not_wait(
        self, worker: Worker, others: StepRunStore, on_busy: Any, error: type[Exception], problem: str
    ) -> None:
        store = worker.plain_store

        def notify(_: dict[str, Any]) -> Any:
            return store.run_step("run", "pay", receipt, {}, on_busy=on_busy)

        def pay(_: dict[str, Any]) -> Any:
            return store.run_step("run", "notify", notify, {})

        with pytest.raises(error, match=problem):
            worker.store.run_step("run", "pay", pay, {})

        assert outcomes(others) == outcomes(others, "notify") == [Outcome.FAILED]

    @for_asyncio
    def test_a_task_that_the_work_has_started_may_wait_for_it(self, worker: Worker) -> None:
        store: AsyncStepRunStore = worker.plain_store
        waits = asyncio.Event()
        when(worker, is_busy, waits.set)

        async def main() -> list[dict[str, Any]]:
            others: list[asyncio.Task[dict[str, Any]]] = []

            async def work(input: dict[str, Any]) -> dict[str, Any]:
                others.append(asyncio.create_task(store.run_step("run", "pay", decline, {}, on_busy="wait")))
                await waits.wait()
                return receipt(input)

            return [await store.run_step("run", "pay", work, {"amount": 1}), await others[0]]

        assert cast("asyncio.Runner", worker.runner).run(main()) == [{"charged": 1}] * 2

    def test_the_errors_travel_by_pickle(self, store: StepRunStore) -> None:
        step_run = begun(store.begin_step("run", "pay", {}, lease=60))

        for error in (StepBusyError(step_run, 7.5), StepExhaustedError(step_run)):
            again = pickle.loads(pickle.dumps(error))
            assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))

    @for_asyncio
    def test_the_work_is_a_coroutine_function_or_a_plain_one(self, worker: Worker) -> None:
        async def awaited(input: dict[str, Any]) -> dict[str, Any]:
            await asyncio.sleep(0)
            return receipt(input)

        async def main() -> list[dict[str, Any]]:
            works = (awaited, receipt)
            store: AsyncStepRunStore = worker.plain_store
            return [await store.run_step("run", f"{n}", work, {"amount": n}) for n, work in enumerate(works)]

        assert cast("asyncio.Runner", worker.runner).run(main()) == [{"charged": 0}, {"charged": 1}]

    @blocking
    def test_work_that_completes_its_own_claim_is_answered_that_output(
        self, worker: Worker, others: StepRunStore
    ) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            cast("Claim", current_claim()).complete({"by": "work"}, schedule={"ship": {}})
            return {"not": "kept"}

        assert worker.execute(work) == {"by": "work"}
        assert others.step_statuses("run") == {"pay": StepStatus.COMPLETED, "ship": StepStatus.PENDING}

    @for_asyncio
    def test_awaited_work_that_completes_its_own_claim_is_answered_that_output(
        self, worker: Worker, others: StepRunStore
    ) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            await cast("AsyncClaim", current_claim()).complete({"by": "work"}, schedule={"ship": {}})
            return {"not": "kept"}

        assert worker.store.run_step("run", "pay", cast("Any", work), {}) == {"by": "work"}
        assert others.step_statuses("run") == {"pay": StepStatus.COMPLETED, "ship": StepStatus.PENDING}

    @pytest.mark.parametrize("on_busy", ["raise", "wait"])
    @pytest.mark.parametrize("ending", ["fail", "release"])
    def test_work_that_ends_its_own_claim_without_a_result_has_none(
        self, worker: Worker, others: StepRunStore, ending: str, on_busy: Any
    ) -> None:
        async def work_asyncio(input: dict[str, Any]) -> dict[str, Any]:
            claim = cast("AsyncClaim", current_claim())
            await (claim.release() if ending == "release" else claim.fail({"reason": "declined"}))
            return {"not": "kept"}

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = cast("Claim", current_claim())
            claim.release() if ending == "release" else claim.fail({"reason": "declined"})
            return {"not": "kept"}

        fn = cast("Any", work if worker.runner is None else work_asyncio)
        with pytest.raises(StaleStepRunError, match="the work ended its own claim") as caught:
            worker.store.run_step("run", "pay", fn, {}, on_busy=on_busy)

        assert caught.value.current == stored(others)
        assert outcomes(others) == [Outcome.RELEASED if ending == "release" else Outcome.FAILED]

    @on_a_real_server
    def test_it_costs_two_round_trips_to_execute_and_one_to_skip(self, bench: Bench, proxied: Proxied) -> None:
        worker, proxy = proxied
        worker.execute(receipt, "before")  # is connected
        proxy.clear()

        worker.execute(receipt)
        assert proxy.names() == ["EVALSHA"] * 2
        worker.execute(receipt)
        assert proxy.names() == ["EVALSHA"] * 3


Proxied = tuple[Worker, Proxy]


@pytest.fixture
def proxied(bench: Bench) -> Iterator[Proxied]:
    """A worker whose calls go through a proxy, to a server that knows all scripts."""
    for path in directory().glob("*.lua"):
        bench.backend.raw.script_load(script(path.stem).source)
    with Proxy.to(bench.backend.raw) as proxy, connected(bench, f"redis://127.0.0.1:{proxy.port}") as worker:
        yield worker, proxy


@contextlib.contextmanager
def connected(bench: Bench, url: str, **options: Any) -> Iterator[Worker]:
    """A worker whose store is made by `from_url`."""
    made = (StepRunStore if bench.runner is None else AsyncStepRunStore).from_url(url, prefix=bench.prefix, **options)
    store = cast("StepRunStore", made if bench.runner is None else Driven(cast("Any", made), bench.runner))
    worker = Worker(bench, store)
    try:
        yield worker
    finally:
        worker.settle()
        store.close()


class TestWaiting:
    def test_the_winners_output_is_answered(self, worker: Worker, others: StepRunStore) -> None:
        holder = begun(others.begin_step("run", "pay", {}, lease=60))
        when(worker, is_busy, lambda: others.complete_step(holder, {"by": "holder"}))

        assert worker.execute(decline, on_busy="wait") == {"by": "holder"}

    @pytest.mark.parametrize("lease", [60, None])
    def test_it_executes_when_the_holder_fails(self, worker: Worker, others: StepRunStore, lease: float | None) -> None:
        holder = begun(others.begin_step("run", "pay", {}, lease=lease))
        when(worker, is_busy, lambda: others.fail_step(holder, {"reason": "declined"}))

        assert worker.execute(receipt, on_busy="wait") == {"charged": 1}
        assert outcomes(others) == [Outcome.FAILED, Outcome.COMPLETED]

    def test_it_executes_when_the_holder_lets_go(self, worker: Worker, others: StepRunStore) -> None:
        holder = begun(others.begin_step("run", "pay", {"amount": 2}, lease=60))
        when(worker, is_busy, lambda: others.release_step(holder))

        assert worker.execute(receipt, on_busy="wait", max_attempts=1) == {"charged": 2}

    def test_it_takes_over_when_the_holders_lease_ends(self, worker: Worker, others: StepRunStore) -> None:
        begun(others.begin_step("run", "pay", {}, lease=0.1))

        assert worker.execute(receipt, on_busy="wait") == {"charged": 1}
        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]

    def test_of_many_deliveries_at_once_one_executes(self, bench: Bench, worker: Worker) -> None:
        given: list[dict[str, Any]] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            given.append(input)
            return {"position": len(given)}

        if worker.runner is None:
            with ThreadPoolExecutor(8) as pool:
                deliveries = [pool.submit(worker.execute, work, on_busy="wait") for _ in range(8)]
                answers = [delivery.result() for delivery in deliveries]
        else:

            async def main() -> list[dict[str, Any]]:
                store: AsyncStepRunStore = worker.plain_store
                deliveries = (store.run_step("run", "pay", work, {"amount": 1}, on_busy="wait") for _ in range(8))
                return await asyncio.gather(*deliveries)

            answers = worker.runner.run(main())

        assert answers == [{"position": 1}] * 8
        assert given == [{"amount": 1}]


class TestClaimStep:
    def test_nothing_is_sent_before_the_block_is_entered(self, bench: Bench, worker: Worker) -> None:
        claim = worker.claim()

        assert claim.decision is None
        with pytest.raises(InvalidArgumentError, match="has no step run before its `with` block is entered"):
            _ = claim.step_run
        assert bench.dump() == {}

    def test_it_is_completed_in_the_block_and_skipped_ever_after(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(owner="worker-1") as claim:
            assert (claim.decision, claim.input, claim.output) == ("execute", {"amount": 1}, None)
            assert (claim.step_run, claim.step_run.owner) == (stored(others), "worker-1")
            completed = claim.complete({"items": (1, 2)}, schedule={"ship": {"parcels": 2}})

        assert (completed.status, completed.output) == (StepStatus.COMPLETED, {"items": [1, 2]})
        assert completed == claim.step_run == stored(others)
        assert stored(others, step="ship").input == {"parcels": 2}
        with worker.claim() as again:
            assert (again.decision, again.output) == ("skip", {"items": [1, 2]})
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_it_is_failed_in_the_block(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            failed = claim.fail({"reason": "declined"})

        assert failed == stored(others)
        assert failed.last_error == {"reason": "declined"}

    def test_it_is_given_back_in_the_block_and_uses_no_attempt_up(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(max_attempts=1) as claim:
            released = claim.release()
        assert released == stored(others)
        assert released.status is StepStatus.PENDING

        with worker.claim(max_attempts=1) as claim:
            assert (claim.decision, claim.step_run.attempt) == ("execute", 2)
            claim.fail(DeclinedError("no funds"))
        with pytest.raises(StepExhaustedError), worker.claim(max_attempts=1):
            pass

    def test_a_block_that_ends_without_a_result_is_an_error_and_a_failure(
        self, worker: Worker, others: StepRunStore
    ) -> None:
        with pytest.raises(InvalidArgumentError, match="ended without complete.* recorded as failed"), worker.claim():
            pass

        assert stored(others).status is StepStatus.FAILED
        assert "ended without complete" in cast("Any", stored(others).last_error)["message"]

    @pytest.mark.parametrize(
        "error", [DeclinedError("no"), SystemExit(1), KeyboardInterrupt()], ids=lambda e: type(e).__name__
    )
    def test_an_exception_that_leaves_the_block_is_recorded(
        self, worker: Worker, others: StepRunStore, error: BaseException
    ) -> None:
        with pytest.raises(type(error)) as caught, worker.claim():
            raise error

        assert caught.value is error
        assert stored(others).status is StepStatus.FAILED
        assert cast("Any", stored(others).last_error)["type"].endswith(type(error).__name__)

    @pytest.mark.parametrize("ending", ["complete", "fail", "release"])
    def test_an_exception_after_the_end_of_the_claim_changes_nothing(
        self, worker: Worker, others: StepRunStore, ending: str
    ) -> None:
        ended: list[StepRun] = []

        def end_and_raise(claim: Any) -> None:
            ended.append(end(claim, ending))
            raise DeclinedError

        with pytest.raises(DeclinedError), worker.claim() as claim:
            end_and_raise(claim)

        assert stored(others) == ended[0]

    def test_an_output_that_cannot_be_kept_leaves_the_claim_held(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            with pytest.raises(PayloadError):
                claim.complete({"receipt": object()})
            assert stored(others).status is StepStatus.RUNNING
            assert claim.complete({"receipt": 7}).output == {"receipt": 7}

    def test_while_another_holds_the_step_the_block_is_not_entered(self, worker: Worker, others: StepRunStore) -> None:
        begun(others.begin_step("run", "pay", {}, lease=60))

        with pytest.raises(StepBusyError), worker.claim():
            pytest.fail("it was entered")

    def test_it_is_one_blocks_at_a_time(self, worker: Worker, others: StepRunStore) -> None:
        claim = worker.claim()
        with claim:
            with pytest.raises(InvalidArgumentError, match="claim: is one block's at a time"), claim:
                pytest.fail("it was entered")
            claim.complete({"receipt": 7})
        with claim:
            assert (claim.decision, claim.output) == ("skip", {"receipt": 7})
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_it_knows_how_long_nobody_else_can_have_taken_over(self, worker: Worker) -> None:
        with worker.claim(lease=None) as claim:
            assert claim.lease_left == math.inf
            claim.complete({})
        with worker.claim("ship", lease=timedelta(minutes=1)) as claim:
            assert 50 < claim.lease_left <= 60
            claim.complete({})

    def test_it_shows_itself(self, worker: Worker) -> None:
        with worker.claim(owner="worker-1") as claim:
            shown = "<StepRun 'run' 'pay' running attempt=1, owner='worker-1', claimed>"
            assert repr(claim.claim) == f"<{type(claim.claim).__name__} {shown} execute>"
            claim.complete({})

    def test_it_knows_whether_its_block_has_ended_it(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            assert not claim.ended
            claim.complete({})
            assert claim.ended

        with worker.claim("ship") as claim:
            take_over(others, "ship")
            with pytest.raises(StaleStepRunError):
                claim.complete({})
            assert not claim.ended

    @blocking
    def test_a_block_may_be_left_in_another_context(self, worker: Worker, others: StepRunStore) -> None:
        """Frameworks run the two halves of a generator each in a copy of their context."""
        claim = worker.claim().claim
        contextvars.copy_context().run(claim.__enter__)
        claim.complete({"receipt": 7})

        contextvars.copy_context().run(claim.__exit__, None, None, None)

        assert stored(others).status is StepStatus.COMPLETED

    @for_asyncio
    def test_a_block_may_be_left_in_another_task(self, worker: Worker, others: StepRunStore) -> None:
        """As the two halves of a fixture or of a dependency are."""

        async def main() -> None:
            claim = worker.plain_store.claim_step("run", "pay", {})
            await asyncio.create_task(claim.__aenter__())
            await claim.complete({"receipt": 7})
            await asyncio.create_task(claim.__aexit__(None, None, None))

        cast("asyncio.Runner", worker.runner).run(main())

        assert stored(others).status is StepStatus.COMPLETED


@pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")
class TestQueuedCompletion:
    """The claim is completed in a transaction of the user's own."""

    def test_it_commits_with_the_other_commands(self, bench: Bench, worker: Worker, others: StepRunStore) -> None:
        key = f"{bench.prefix}:own"
        with worker.claim() as claim:
            pipeline = worker.store.client.pipeline(transaction=True)
            pipeline.set(key, "mine")
            queued = claim.queue_completion(pipeline, {"items": (1, 2)}, schedule={"ship": {}})
            assert stored(others).status is StepStatus.RUNNING
            completed = queued.result(worker.finish(pipeline.execute()))

            assert (claim.ended, claim.output) == (True, {"items": [1, 2]})
        assert completed == stored(others)
        assert stored(others, step="ship").status is StepStatus.PENDING
        assert bench.backend.raw.get(key) == b"mine"
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_run_step_answers_it(self, worker: Worker, others: StepRunStore) -> None:
        async def work_asyncio(input: dict[str, Any]) -> dict[str, Any]:
            pipeline = worker.plain_store.client.pipeline()
            queued = cast("AsyncClaim", current_claim()).queue_completion(pipeline, {"by": "work"})
            queued.result(await pipeline.execute())
            return {"not": "kept"}

        def work(input: dict[str, Any]) -> dict[str, Any]:
            pipeline = worker.plain_store.client.pipeline()
            queued = cast("Claim", current_claim()).queue_completion(pipeline, {"by": "work"})
            queued.result(pipeline.execute())
            return {"not": "kept"}

        fn = cast("Any", work if worker.runner is None else work_asyncio)
        assert worker.store.run_step("run", "pay", fn, {}) == {"by": "work"}
        assert outcomes(others) == [Outcome.COMPLETED]

    def test_an_output_that_cannot_be_kept_queues_nothing(self, worker: Worker) -> None:
        with worker.claim() as claim:
            pipeline = worker.store.client.pipeline()
            with pytest.raises(PayloadError):
                claim.queue_completion(pipeline, {"receipt": object()})
            assert len(pipeline) == 0
            claim.complete({})

    def test_a_transaction_that_is_never_executed_leaves_the_claim_held(
        self, worker: Worker, others: StepRunStore
    ) -> None:
        with pytest.raises(InvalidArgumentError, match="ended without complete"), worker.claim() as claim:
            claim.queue_completion(worker.store.client.pipeline(), {"receipt": 7})

        assert outcomes(others) == [Outcome.FAILED]

    def test_one_that_was_taken_over_is_stale(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            winner = take_over(others)
            pipeline = worker.store.client.pipeline()
            queued = claim.queue_completion(pipeline, {"by": "zombie"})
            replies = worker.finish(pipeline.execute())
            with pytest.raises(StaleStepRunError) as caught:
                queued.result(replies)
            assert caught.value.current == winner == stored(others)
            with pytest.raises(StaleStepRunError):
                claim.complete({"by": "zombie"})

    def test_a_beat_before_its_reply_is_read_finds_no_loss(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim("ship", lease=SHORT) as beside, worker.claim(lease=SHORT) as claim:
            pipeline = worker.store.client.pipeline()
            queued = claim.queue_completion(pipeline, {"receipt": 7})
            replies = worker.finish(pipeline.execute())
            worker.wait_for_a_beat(beside)
            worker.wait_for_a_beat(beside)
            queued.result(replies)

            assert (claim.lost.is_set(), claim.ended) == (False, True)
            beside.complete({})


class TestCurrentClaim:
    def test_it_is_the_claim_inside_of_the_work_and_none_outside(self, worker: Worker, others: StepRunStore) -> None:
        seen: list[Any] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = current_claim()
            assert claim is not None
            seen.append(claim.step_run)
            return {}

        assert current_claim() is None
        worker.execute(work)
        assert current_claim() is None
        with pytest.raises(DeclinedError):
            worker.execute(decline, "ship")
        assert current_claim() is None

        assert [(claimed.run_id, claimed.step, claimed.attempt) for claimed in seen] == [("run", "pay", 1)]

    @blocking
    def test_blocks_may_lie_in_each_other(self, worker: Worker) -> None:
        with worker.claim() as outer:
            with worker.claim("ship") as inner:
                assert current_claim() is inner.claim
                inner.complete({})
            assert current_claim() is outer.claim
            outer.complete({})
        assert current_claim() is None

    @blocking
    def test_of_two_generators_the_first_may_end_first(self, worker: Worker) -> None:
        def generate(step: str) -> Iterator[Any]:
            with worker.claim(step) as claim:
                yield claim.claim
                claim.complete({})

        with worker.claim() as outer:
            first, second = generate("first"), generate("second")
            next(first)
            inner = next(second)
            assert list(first) == []
            assert current_claim() is inner
            assert list(second) == []
            assert current_claim() is outer.claim
            outer.complete({})
        assert current_claim() is None

    @blocking
    def test_a_skipped_block_is_one_too(self, worker: Worker) -> None:
        worker.execute(receipt)

        with worker.claim() as claim:
            assert current_claim() is claim.claim

    @for_asyncio
    def test_each_task_has_its_own(self, worker: Worker) -> None:
        steps = [f"step-{number}" for number in range(5)]
        everybody = asyncio.Barrier(5)

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            await everybody.wait()
            claim = current_claim()
            assert claim is not None
            return {"step": claim.step_run.step, **claim.input}

        async def main() -> list[dict[str, Any]]:
            store: AsyncStepRunStore = worker.plain_store
            return await asyncio.gather(*(store.run_step("run", step, work, {"of": step}) for step in steps))

        answers = cast("asyncio.Runner", worker.runner).run(main())
        assert answers == [{"step": step, "of": step} for step in steps]


class TestHeartbeat:
    def test_it_keeps_a_claim_alive_for_many_leases(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            first = stored(others).lease_ends_at
            assert first is not None

            def has_moved_on() -> bool:
                assert others.begin_step("run", "pay", {}).busy
                return cast("Any", stored(others).lease_ends_at) > first + timedelta(seconds=1)

            wait_until(has_moved_on)
            claim = current_claim()
            assert claim is not None
            assert (claim.lost.is_set(), 0 < claim.lease_left <= 0.5) == (False, True)
            return {}

        worker.execute(work, lease=0.5)

        assert outcomes(others) == [Outcome.COMPLETED]

    @in_the_client
    def test_a_claim_without_lease_has_none(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            assert heartbeat_threads() == []
            assert stored(others).lease_ends_at is None
            return {}

        worker.execute(work, lease=None)

    @in_the_client
    def test_claims_that_were_begun_at_different_times_fall_into_step(self, worker: Worker) -> None:
        sizes = sizes_of_batches(worker)
        with contextlib.ExitStack() as blocks:
            claims = []
            for step in ("pay", "ship", "mail"):
                claims.append(blocks.enter_context(worker.claim(step, lease=0.6)))
                worker.wait(lambda: claims[-1].lease_left < 0.53)

            worker.wait(lambda: sizes[-3:] == [3, 3, 3])

            for claim in claims:
                claim.complete({})
        assert sizes[sizes.index(3) :] == [3] * sizes.count(3)

    @on_a_real_server
    def test_500_claims_cost_one_round_trip_per_beat(self, proxied: Proxied, others: StepRunStore) -> None:
        worker, proxy = proxied
        sizes = sizes_of_batches(worker)
        steps = [f"step-{number}" for number in range(500)]
        with contextlib.ExitStack() as blocks:
            claims = [blocks.enter_context(worker.claim(step, lease=6)) for step in steps]
            worker.wait(lambda: sizes[-1:] == [500])
            before = others.step_statuses("run"), stored(others, step="step-0").lease_ends_at
            proxy.clear()

            with proxy.batches(500, 500):
                worker.wait(lambda: sizes[-2:] == [500, 500] and proxy.names().count("EVALSHA") == 1_000)

            assert proxy.round_trips == 2
            assert cast("Any", stored(others, step="step-0").lease_ends_at) > before[1]
            assert not any(claim.lost.is_set() for claim in claims)
            for claim in claims:
                claim.complete({})
        assert set(others.step_statuses("run").values()) == {StepStatus.COMPLETED}

    @pytest.mark.parametrize("ending", ["complete", "fail", "release"])
    def test_a_claim_that_ends_within_its_block_takes_no_other_with_it(
        self, worker: Worker, others: StepRunStore, ending: str
    ) -> None:
        with worker.claim("ship", lease=SHORT) as held, worker.claim(lease=SHORT) as over:
            end(over, ending)

            worker.wait_for_a_beat(held)
            worker.wait_for_a_beat(held)

            assert (held.lost.is_set(), over.lost.is_set()) == (False, False)
            held.complete({})

    @in_the_client
    def test_a_claim_that_ends_while_a_beat_is_made_up_still_has_its_part_in_it(self, worker: Worker) -> None:
        with worker.claim(lease=SHORT) as claim:
            claim.complete({})

            assert isinstance(claim.extension(), Call)

    def test_a_claim_that_is_lost_takes_no_other_with_it(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim("ship", lease=SHORT) as held, worker.claim(lease=SHORT) as lost:
            take_over(others)

            worker.wait(lost.lost.is_set)
            worker.wait_for_a_beat(held)

            assert not held.lost.is_set()
            held.complete({})

    @in_the_client
    @pytest.mark.parametrize("error", [redis.ConnectionError("down"), redis.ResponseError("no"), OSError("no")])
    def test_a_beat_that_does_not_get_through_is_made_up_for(
        self, worker: Worker, others: StepRunStore, error: Exception
    ) -> None:
        batch, asked = worker.plain_store.batch, []

        def refuse_twice() -> None:
            asked.append(True)
            if len(asked) <= 2:
                raise error

        def batch_blocking(calls: list[Call[Any]]) -> Any:
            refuse_twice()
            return batch(calls)

        async def batch_asyncio(calls: list[Call[Any]]) -> Any:
            refuse_twice()
            return await batch(calls)

        worker.plain_store.batch = batch_blocking if worker.runner is None else batch_asyncio
        with worker.claim(lease=1) as claim:
            worker.wait_for_a_beat(claim)

            assert (len(asked), claim.lost.is_set()) == (3, False)
            assert others.begin_step("run", "pay", {}).busy
            claim.complete({})

    def test_a_claim_that_nobody_holds_any_more_is_no_longer_extended(
        self, bench: Bench, worker: Worker, others: StepRunStore
    ) -> None:
        block = worker.claim(lease=SHORT)
        block.__enter__()
        worker.wait_for_a_beat(block)
        claim = weakref.ref(block.claim)

        del block
        wait_until(lambda: (gc.collect() and claim() is None) or claim() is None)

        worker.wait(lambda: others.begin_step("run", "pay", {}, lease=60).decision == "execute")
        assert current_claim() is None
        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.RUNNING]

    @in_the_client
    @blocking
    def test_its_thread_ends_when_it_has_had_no_claim_for_a_while(self, worker: Worker, others: StepRunStore) -> None:
        for _ in range(2):
            with worker.claim(lease=SHORT) as claim:
                worker.wait_for_a_beat(claim)
                assert len(heartbeat_threads()) == 1
                claim.release()
            wait_until(lambda: not heartbeat_threads())

    @in_the_client
    @blocking
    def test_its_thread_ends_however_long_the_last_lease_was(self, worker: Worker) -> None:
        with worker.claim("ship", lease=3_600) as long:
            with worker.claim(lease=SHORT) as short:
                worker.wait_for_a_beat(short)
                short.complete({})
            wait_until(lambda: time.monotonic() > short.next_extension_at + 0.05)  # now it waits for the long one
            long.complete({})

        wait_until(lambda: not heartbeat_threads(), timeout=2)

    @in_the_client
    @blocking
    def test_threads_that_share_a_client_share_one_heartbeat(self, worker: Worker, others: StepRunStore) -> None:
        everybody = threading.Barrier(5)

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = current_claim()
            assert claim is not None
            due = claim.next_extension_at
            wait_until(lambda: claim.next_extension_at > due)
            everybody.wait(10)
            assert len(heartbeat_threads()) == 1
            everybody.wait(10)
            return {"step": claim.step_run.step}

        with ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(lambda step: worker.execute(work, step, lease=SHORT), "abcde"))

        assert answers == [{"step": step} for step in "abcde"]

    @on_a_real_server  # redis-py's client of a cluster stays with its first loop
    @for_asyncio
    def test_a_client_may_serve_one_loop_after_another(self, bench: Bench) -> None:
        store = AsyncStepRunStore(cast("Any", bench.backend.connect_asyncio()), prefix=bench.prefix)

        async def main(step: str) -> None:
            async with store.claim_step("run", step, {}, lease=SHORT) as claim:
                due = claim.next_extension_at
                await until(lambda: claim.next_extension_at > due)
                await claim.complete({})
            await store.client.aclose()

        asyncio.run(main("pay"))
        asyncio.run(main("ship"))

    @on_a_real_server
    @for_asyncio
    def test_a_beat_that_is_under_way_ends_with_the_store(self, bench: Bench) -> None:
        path = bench.backend.raw.connection_pool.connection_kwargs["path"]

        async def main() -> None:
            under_way = asyncio.Event()

            async def batch(calls: list[Call[Any]]) -> Any:
                under_way.set()
                await asyncio.Event().wait()

            async with AsyncStepRunStore.from_url(f"unix://{path}", prefix=bench.prefix) as store:
                cast("Any", store).batch = batch
                async with store.claim_step("run", "pay", {}, lease=SHORT) as claim:
                    await under_way.wait()
                    await claim.complete({})
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())

    @on_a_real_server
    @for_asyncio
    def test_one_that_is_under_way_when_the_store_is_closed_is_made_up_for(self, bench: Bench) -> None:
        path = bench.backend.raw.connection_pool.connection_kwargs["path"]

        async def main() -> None:
            under_way = asyncio.Event()
            async with AsyncStepRunStore.from_url(f"unix://{path}", prefix=bench.prefix) as store:
                batch = store.batch

                async def batch_later(calls: list[Call[Any]]) -> Any:
                    cast("Any", store).batch = batch
                    under_way.set()
                    await asyncio.Event().wait()

                cast("Any", store).batch = batch_later
                async with store.claim_step("run", "pay", {}, lease=3) as claim:
                    due = claim.next_extension_at
                    await under_way.wait()
                    await store.close()
                    await until(lambda: claim.next_extension_at > due)
                    await claim.complete({})

        asyncio.run(main())


def sizes_of_batches(worker: Worker) -> list[int]:
    """How many claims each beat extends, from now on."""
    batch, sizes = worker.plain_store.batch, []

    async def batch_asyncio(calls: list[Call[Any]]) -> Any:
        answers = await batch(calls)
        sizes.append(len(calls))
        return answers

    def batch_blocking(calls: list[Call[Any]]) -> Any:
        answers = batch(calls)
        sizes.append(len(calls))
        return answers

    worker.plain_store.batch = batch_blocking if worker.runner is None else batch_asyncio
    return sizes


class TestLost:
    """Another worker takes over, and this one works on: it is told, and its late result is discarded."""

    def test_the_winners_output_is_answered(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = current_claim()
            assert claim is not None
            winner = take_over(others, lease=60)
            wait_until(claim.lost.is_set)
            others.complete_step(winner, {"by": "winner"})
            return {"by": "zombie"}

        assert worker.execute(work, lease=SHORT) == {"by": "winner"}
        assert others.completed_outputs("run") == [{"by": "winner"}]
        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]

    def test_while_the_winner_is_at_it_the_step_is_busy(self, worker: Worker, others: StepRunStore) -> None:
        winners: list[StepRun] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = current_claim()
            assert claim is not None
            winners.append(take_over(others, lease=60, owner="winner"))
            wait_until(claim.lost.is_set)
            return {"by": "zombie"}

        with pytest.raises(StepBusyError, match="executed by winner, as attempt 2") as caught:
            worker.execute(work, lease=SHORT)

        assert caught.value.current == winners[0] == stored(others)

    def test_the_winners_output_is_waited_for(self, worker: Worker, others: StepRunStore) -> None:
        winners: list[StepRun] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = current_claim()
            assert claim is not None
            winners.append(take_over(others, lease=60))
            wait_until(claim.lost.is_set)
            return {"by": "zombie"}

        when(worker, is_busy, lambda: others.complete_step(winners[0], {"by": "winner"}))

        assert worker.execute(work, lease=SHORT, on_busy="wait") == {"by": "winner"}
        assert len(winners) == 1

    def test_an_exception_of_the_work_is_raised_and_the_winner_untouched(
        self, worker: Worker, others: StepRunStore
    ) -> None:
        winners: list[StepRun] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = current_claim()
            assert claim is not None
            winners.append(take_over(others, lease=60))
            wait_until(claim.lost.is_set)
            raise DeclinedError

        with pytest.raises(DeclinedError):
            worker.execute(work, lease=SHORT)

        assert stored(others) == winners[0]

    @pytest.mark.parametrize("noticed", [True, False])
    def test_a_step_that_has_failed_since_is_stale(self, worker: Worker, others: StepRunStore, noticed: bool) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = current_claim()
            assert claim is not None
            others.fail_step(take_over(others) if noticed else claim.step_run.id, {"reason": "operator"})
            wait_until(lambda: not noticed or claim.lost.is_set())
            return {}

        with pytest.raises(StaleStepRunError) as caught:
            worker.execute(work, lease=SHORT if noticed else None, on_busy="wait")

        assert caught.value.current == stored(others)
        assert stored(others).last_error == {"reason": "operator"}

    def test_a_step_that_was_given_back_since_is_stale(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            others.release_step(stored(others).id)
            return {}

        with pytest.raises(StaleStepRunError):
            worker.execute(work, on_busy="wait")

        assert stored(others).status is StepStatus.PENDING

    def test_an_operators_output_stands(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            others.complete_step(stored(others).id, {"by": "operator"})
            return {"by": "worker"}

        assert worker.execute(work) == {"by": "operator"}

    @pytest.mark.parametrize("noticed", [True, False])
    def test_a_deleted_run_is_told(self, worker: Worker, others: StepRunStore, noticed: bool) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = current_claim()
            assert claim is not None
            others.delete_run("run")
            wait_until(lambda: not noticed or claim.lost.is_set())
            return {}

        with pytest.raises(RunDeletedError):
            worker.execute(work, lease=SHORT if noticed else None)

        assert others.get_run("run") == []

    def test_a_run_that_was_deleted_after_the_takeover_is_told(self, worker: Worker, others: StepRunStore) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            claim = current_claim()
            assert claim is not None
            take_over(others, lease=60)
            wait_until(claim.lost.is_set)
            others.delete_run("run")
            return {}

        with pytest.raises(StepRunNotFoundError):
            worker.execute(work, lease=SHORT)

    def test_a_run_that_vanished_is_told(self, bench: Bench, worker: Worker) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            bench.backend.raw.delete(*bench.keys("run")[:2])
            return {}

        with pytest.raises(StepRunNotFoundError):
            worker.execute(work)

        assert not bench.backend.raw.exists(*bench.keys("run")[:2])

    def test_in_a_block_the_winners_step_run_is_answered(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(lease=SHORT) as claim:
            winner = take_over(others, lease=60)
            worker.wait(claim.lost.is_set)
            completed = others.complete_step(winner, {"by": "winner"})

            assert claim.complete({"by": "zombie"}) == completed

        assert claim.output == {"by": "winner"}

    def test_in_a_block_it_is_stale_while_the_winner_is_at_it(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(lease=SHORT) as claim:
            take_over(others, lease=60)
            worker.wait(claim.lost.is_set)
            with pytest.raises(StaleStepRunError) as caught:
                claim.complete({"by": "zombie"})

        assert caught.value.current == stored(others)
        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.RUNNING]

    def test_a_loss_that_no_beat_has_noticed_is_seen_at_the_end(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim(lease=60) as claim:
            take_over(others, lease=60)
            assert not claim.lost.is_set()
            with pytest.raises(StaleStepRunError):
                claim.complete({"by": "zombie"})
            assert claim.lost.is_set()

    def test_a_claim_that_ends_as_it_should_is_not_lost(self, worker: Worker) -> None:
        with worker.claim(lease=SHORT) as claim, worker.claim("ship", lease=SHORT) as other:
            claim.complete({})
            worker.wait_for_a_beat(other)
            other.complete({})

        assert (claim.lost.is_set(), other.lost.is_set()) == (False, False)


@for_asyncio
class TestCancelWhenLost:
    @pytest.fixture
    def store(self, worker: Worker) -> AsyncStepRunStore:
        return worker.plain_store

    def run(self, bench: Bench, main: Callable[[], Any]) -> Any:
        async def as_a_task() -> Any:
            answer = await main()
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0
            await asyncio.sleep(0)  # no cancellation is left over
            return answer

        return cast("asyncio.Runner", bench.runner).run(as_a_task())

    @pytest.mark.parametrize("inner", ["await", "task group", "time-out"])
    def test_the_work_is_cancelled_and_the_winners_output_answered(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore, inner: str
    ) -> None:
        seen: list[str] = []

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            others.complete_step(take_over(others), {"by": "winner"})
            try:
                if inner == "await":
                    await asyncio.Event().wait()
                elif inner == "task group":
                    async with asyncio.TaskGroup() as group:
                        group.create_task(asyncio.Event().wait())
                else:
                    async with asyncio.timeout(60):
                        await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise
            return {}

        answer = self.run(bench, lambda: store.run_step("run", "pay", work, {}, lease=SHORT, cancel_when_lost=True))

        assert (answer, seen) == ({"by": "winner"}, ["cancelled"])
        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]

    def test_work_that_bears_the_cancellation_is_answered_the_same(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            others.complete_step(take_over(others), {"by": "winner"})
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return {"by": "zombie"}

        answer = self.run(bench, lambda: store.run_step("run", "pay", work, {}, lease=SHORT, cancel_when_lost=True))

        assert answer == {"by": "winner"}

    def test_while_the_winner_is_at_it_the_step_is_busy(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            take_over(others)
            await asyncio.Event().wait()
            return {}

        async def main() -> None:
            with pytest.raises(StepBusyError):
                await store.run_step("run", "pay", work, {}, lease=SHORT, cancel_when_lost=True)

        self.run(bench, main)

        assert outcomes(others) == [Outcome.LEASE_EXPIRED, Outcome.RUNNING]

    def test_the_winners_output_is_waited_for(
        self, bench: Bench, worker: Worker, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        winners: list[StepRun] = []

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            winners.append(take_over(others))
            await asyncio.Event().wait()
            return {}

        when(worker, is_busy, lambda: others.complete_step(winners[0], {"by": "winner"}))
        options: dict[str, Any] = {"lease": SHORT, "cancel_when_lost": True, "on_busy": "wait"}

        assert self.run(bench, lambda: store.run_step("run", "pay", work, {}, **options)) == {"by": "winner"}

    def test_a_deleted_run_is_told(self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore) -> None:
        async def work(input: dict[str, Any]) -> dict[str, Any]:
            others.delete_run("run")
            await asyncio.Event().wait()
            return {}

        async def main() -> None:
            with pytest.raises(RunDeletedError):
                await store.run_step("run", "pay", work, {}, lease=SHORT, cancel_when_lost=True)

        self.run(bench, main)

    def test_a_block_ends_as_its_completion_would(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        async def main() -> Any:
            async with store.claim_step("run", "pay", {}, lease=SHORT, cancel_when_lost=True) as claim:
                others.complete_step(take_over(others), {"by": "winner"})
                await asyncio.Event().wait()
            return claim.output

        assert self.run(bench, main) == {"by": "winner"}

    def test_without_it_the_work_goes_on(self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore) -> None:
        seen: list[str] = []

        async def work(input: dict[str, Any]) -> dict[str, Any]:
            others.complete_step(take_over(others), {"by": "winner"})
            claim = current_claim()
            assert claim is not None
            await until(claim.lost.is_set)
            await asyncio.sleep(0)
            seen.append("went on")
            return {"by": "zombie"}

        answer = self.run(bench, lambda: store.run_step("run", "pay", work, {}, lease=SHORT))

        assert (answer, seen) == ({"by": "winner"}, ["went on"])

    @pytest.mark.parametrize("cancel_when_lost", [False, True])
    def test_a_cancellation_of_ones_own_is_raised_and_recorded(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore, cancel_when_lost: bool
    ) -> None:
        async def main() -> None:
            at_work = asyncio.Event()

            async def work(input: dict[str, Any]) -> dict[str, Any]:
                at_work.set()
                await asyncio.Event().wait()
                return {}

            delivery = store.run_step("run", "pay", work, {}, lease=SHORT, cancel_when_lost=cancel_when_lost)
            task = asyncio.create_task(delivery)
            await at_work.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()

        self.run(bench, main)

        assert stored(others).status is StepStatus.FAILED
        assert cast("Any", stored(others).last_error)["type"].endswith("CancelledError")

    def test_a_cancellation_of_ones_own_is_raised_also_when_the_claim_is_lost(
        self, bench: Bench, store: AsyncStepRunStore, others: StepRunStore
    ) -> None:
        async def main() -> None:
            winners: list[StepRun] = []

            async def work(input: dict[str, Any]) -> dict[str, Any]:
                winners.append(take_over(others))
                try:
                    await asyncio.Event().wait()
                finally:  # the claim is lost; and now the user cancels, too
                    task.cancel()
                return {}

            task = asyncio.create_task(store.run_step("run", "pay", work, {}, lease=SHORT, cancel_when_lost=True))
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (task.cancelled(), task.cancelling()) == (True, 1)
            assert stored(others) == winners[0]

        self.run(bench, main)


class TestInterruptedClaiming:
    """What interrupts a delivery before its work has begun leaves no claim behind, and uses no attempt up."""

    def check(self, others: StepRunStore) -> None:
        assert current_claim() is None
        assert [step_run.status for step_run in others.get_run("run")] in ([], [StepStatus.PENDING])
        assert begun(others.begin_step("run", "pay", {}, max_attempts=1, lease=60)).attempt <= 2

    @blocking
    @pytest.mark.parametrize("scheduled", [False, True])
    @pytest.mark.parametrize("moment", ["before", "after"])
    @pytest.mark.parametrize("error", [SystemExit(143), DeclinedError("told to stop"), KeyboardInterrupt()], ids=repr)
    def test_by_a_signal(
        self, worker: Worker, others: StepRunStore, error: BaseException, moment: str, scheduled: bool
    ) -> None:
        if scheduled:
            others.schedule_step("run", "pay", {"amount": 7})
        ask_instead(worker.store, Signalled(worker.store.client, moment))

        with raising(error), pytest.raises(type(error)) as caught:
            worker.execute(decline)

        assert caught.value is error
        assert not scheduled or stored(others).input == {"amount": 7}
        self.check(others)

    @blocking
    @on_a_real_server
    def test_by_a_signal_while_it_waits_for_the_reply(self, proxied: Proxied, others: StepRunStore) -> None:
        worker, proxy = proxied
        worker.execute(receipt, "before")
        error = DeclinedError("told to stop")

        with raising(error) as raised:

            def interrupt(reply: bytes) -> bytes:
                signal.pthread_kill(cast("int", threading.main_thread().ident), signal.SIGUSR1)
                assert raised.wait(10)
                return reply

            proxy.strike(Fault(reply=interrupt))
            with pytest.raises(DeclinedError) as caught:
                worker.execute(decline)

        assert caught.value is error
        assert stored(others).status is StepStatus.PENDING
        assert outcomes(others) == [Outcome.RELEASED]
        assert begun(others.begin_step("run", "pay", {}, max_attempts=1)).attempt == 2

    @blocking
    def test_by_a_signal_while_it_waits_for_another(self, worker: Worker, others: StepRunStore) -> None:
        holder = begun(others.begin_step("run", "pay", {}, lease=60))
        error = DeclinedError("told to stop")

        when(worker, is_busy, lambda: signal.raise_signal(signal.SIGUSR1))

        with raising(error), pytest.raises(DeclinedError):
            worker.execute(receipt, on_busy="wait")

        assert stored(others) == holder

    @for_asyncio
    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_by_a_cancellation(
        self, worker: Worker, others: StepRunStore, moment: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store: AsyncStepRunStore = worker.plain_store
        send = store.send

        async def main() -> None:
            async def send_and_cancel(call: Call[Any]) -> Any:
                monkeypatch.undo()
                answer = await send(call) if moment == "after" else None
                task.cancel()
                await asyncio.sleep(0)
                return answer

            monkeypatch.setattr(store, "send", send_and_cancel)
            task = asyncio.create_task(store.run_step("run", "pay", decline, {}))
            with pytest.raises(asyncio.CancelledError):
                await task

        cast("asyncio.Runner", worker.runner).run(main())

        self.check(others)

    @in_the_client
    @for_asyncio
    def test_by_a_cancellation_while_the_server_is_away(
        self, worker: Worker, others: StepRunStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("squidstep_redis.aio.RELEASE_TIMEOUT", 0.01)

        async def main() -> None:
            sent: list[Call[Any]] = []

            async def send(call: Call[Any]) -> None:
                sent.append(call)
                if len(sent) == 1:
                    task.cancel()
                await asyncio.Event().wait()

            worker.plain_store.send = send
            task = asyncio.create_task(worker.plain_store.run_step("run", "pay", decline, {}))
            await asyncio.wait([task], timeout=10)
            assert (task.cancelled(), len(sent)) == (True, 2)

        cast("asyncio.Runner", worker.runner).run(main())

        self.check(others)

    @for_asyncio
    def test_by_a_cancellation_at_any_point(self, worker: Worker, others: StepRunStore) -> None:
        store: AsyncStepRunStore = worker.plain_store
        done: list[str] = []

        def work(input: dict[str, Any]) -> dict[str, Any]:
            done.append(input["step"])
            return {}

        async def main() -> None:
            for steps in range(40):
                step = f"step-{steps}"
                task = asyncio.create_task(store.run_step("run", step, work, {"step": step}))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

        cast("asyncio.Runner", worker.runner).run(main())

        statuses = others.step_statuses("run")
        assert StepStatus.RUNNING not in statuses.values()
        for step, status in statuses.items():
            assert status in ((StepStatus.COMPLETED, StepStatus.FAILED) if step in done else (StepStatus.PENDING,))


class TestInterruptedCompletion:
    """What interrupts a completion is raised; the step is completed if the server got to know of it, else failed."""

    @blocking
    @pytest.mark.parametrize(("moment", "outcome"), [("before", Outcome.FAILED), ("after", Outcome.COMPLETED)])
    @pytest.mark.parametrize("error", [SystemExit(143), DeclinedError("told to stop")], ids=repr)
    def test_by_a_signal(
        self, worker: Worker, others: StepRunStore, error: BaseException, moment: str, outcome: Outcome
    ) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            ask_instead(worker.store, Signalled(worker.store.client, moment))
            return receipt(input)

        with raising(error), pytest.raises(type(error)) as caught:
            worker.execute(work)

        assert caught.value is error
        assert outcomes(others) == [outcome]
        assert current_claim() is None

    @for_asyncio
    @pytest.mark.parametrize(("moment", "outcome"), [("before", Outcome.FAILED), ("after", Outcome.COMPLETED)])
    def test_by_a_cancellation(self, worker: Worker, others: StepRunStore, moment: str, outcome: Outcome) -> None:
        store: AsyncStepRunStore = worker.plain_store
        send = store.send

        async def main() -> None:
            async def send_and_cancel(call: Call[Any]) -> Any:
                is_completion = call.script.name == "complete_step"
                if is_completion and moment == "before":
                    task.cancel()
                    await asyncio.sleep(0)
                answer = await send(call)
                if is_completion:
                    task.cancel()
                    await asyncio.sleep(0)
                return answer

            cast("Any", store).send = send_and_cancel
            task = asyncio.create_task(store.run_step("run", "pay", receipt, {"amount": 1}))
            await asyncio.wait([task], timeout=10)
            assert task.cancelled()

        cast("asyncio.Runner", worker.runner).run(main())

        assert outcomes(others) == [outcome]


class Signalled:
    """A client at whose first call a signal arrives: before the server has it, or after the script was run."""

    def __init__(self, client: Any, moment: str) -> None:
        self.client = client
        self.moment = moment

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self._signal("before")
        reply = self.client.execute_command(*args, **options)
        self._signal("after")
        return reply

    def _signal(self, moment: str) -> None:
        if moment == self.moment:
            self.moment = ""
            signal.raise_signal(signal.SIGUSR1)


@contextlib.contextmanager
def raising(error: BaseException) -> Iterator[threading.Event]:
    """Inside, SIGUSR1 raises the error; the event tells that it has."""
    raised = threading.Event()

    def raise_it(number: int, frame: object) -> None:
        raised.set()
        raise error

    before = signal.signal(signal.SIGUSR1, raise_it)
    try:
        yield raised
    finally:
        signal.signal(signal.SIGUSR1, before)


class Away:
    """A client whose server does not answer; asking it is counted."""

    def __init__(self, client: Any, error: Exception) -> None:
        self.client = client
        self.error = error
        self.asked = 0

    def takes_over(self, store: Any) -> None:
        """From now on the store asks it, and not for long."""
        ask_instead(store, self)
        store._retry_policy = store._retry_policy._replace(timeout=0.05, last_send=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self.asked += 1
        if isinstance(self.client, redis.Redis | redis.RedisCluster):
            raise self.error
        return self._refuse()

    async def _refuse(self) -> Any:
        raise self.error


class TestServerAway:
    """A result that cannot get through is sent again for as long as the lease."""

    @on_a_real_server
    @pytest.mark.parametrize("how", ["kill", "pause"])
    def test_a_step_is_completed_when_it_is_back(self, bench: Bench, how: str) -> None:
        given: list[dict[str, Any]] = []
        failed: list[Exception] = []
        options = {"appendonly": "yes", "appendfsync": "always"}
        with (  # TCP: over a unix socket redis-py 5.0 knows no time-out
            EmbeddedServer(binary=find_binary(bench.backend.name), options=options, port=0) as server,
            connected(bench, server.url, socket_timeout=0.1, timeout=2) as worker,
        ):

            def work(input: dict[str, Any]) -> dict[str, Any]:
                given.append(input)
                server.kill() if how == "kill" else server.pause()
                return receipt(input)

            def come_back(error: Exception) -> None:
                failed.append(error)
                if how == "pause":
                    server.resume()
                elif len(failed) == 2:
                    server.start()

            when_it_fails(worker, "complete_step", come_back)

            assert worker.execute(work) == {"charged": 1}
            assert worker.execute(work) == {"charged": 1}
            assert worker.store.completed_steps("run") == ["pay"]
            assert outcomes(worker.store) == [Outcome.COMPLETED]
        assert given == [{"amount": 1}]
        assert failed

    def test_a_server_that_stays_away_is_an_error_and_the_claim_ends_with_its_lease(
        self, worker: Worker, others: StepRunStore
    ) -> None:
        away = Away(worker.store.client, redis.ConnectionError("down"))

        def work(input: dict[str, Any]) -> dict[str, Any]:
            away.takes_over(worker.plain_store)
            return receipt(input)

        with pytest.raises(OutcomeUnknownError, match="down") as caught:
            worker.execute(work, lease=SHORT)

        assert away.asked >= 3
        assert any("could not record this failure: OutcomeUnknownError" in note for note in caught.value.__notes__)
        assert outcomes(others) == [Outcome.RUNNING]
        wait_until(lambda: others.begin_step("run", "pay", {}).decision == "execute")

    def test_an_exception_of_the_work_does_not_wait_for_it(self, worker: Worker) -> None:
        away = Away(worker.store.client, redis.TimeoutError("slow"))

        def work(input: dict[str, Any]) -> dict[str, Any]:
            away.takes_over(worker.plain_store)
            raise DeclinedError

        with pytest.raises(DeclinedError) as caught:
            worker.execute(work)

        assert away.asked == 1
        (note,) = caught.value.__notes__
        assert "could not record this failure: OutcomeUnknownError: fail_step, run 'run', step 'pay'" in note

    @pytest.mark.parametrize("error", [redis.ResponseError("no"), redis.AuthenticationError("no")], ids=repr)
    def test_what_will_not_pass_is_not_tried_again(self, worker: Worker, error: Exception) -> None:
        away = Away(worker.store.client, error)

        with worker.claim() as claim:
            away.takes_over(worker.plain_store)
            with pytest.raises(ServerError, match="no") as caught:
                claim.complete({})
            assert caught.value.__cause__ is error
            assert away.asked == 1
            ask_instead(worker.plain_store, worker.store.client)
            claim.complete({})

    def test_a_completion_that_did_not_get_through_can_be_tried_again(
        self, worker: Worker, others: StepRunStore
    ) -> None:
        client = worker.store.client
        with worker.claim(lease=SHORT) as claim:
            Away(client, redis.ConnectionError("down")).takes_over(worker.plain_store)
            with pytest.raises(OutcomeUnknownError):
                claim.complete({"receipt": 7})
            ask_instead(worker.plain_store, client)
            worker.wait_for_a_beat(claim)
            claim.complete({"receipt": 7})

        assert others.completed_outputs("run") == [{"receipt": 7}]

    def test_a_loss_is_told_also_after_a_completion_that_did_not_get_through(
        self, worker: Worker, others: StepRunStore
    ) -> None:
        client = worker.store.client
        with worker.claim(lease=SHORT) as claim:
            Away(client, redis.ConnectionError("down")).takes_over(worker.plain_store)
            with pytest.raises(OutcomeUnknownError):
                claim.complete({"by": "zombie"})
            ask_instead(worker.plain_store, client)
            take_over(others)

            worker.wait(claim.lost.is_set)


def when_it_fails(worker: Worker, operation: str, act: Callable[[Exception], object]) -> None:
    """Acts whenever a call of the worker's store fails."""
    send = worker.plain_store.send

    @contextlib.contextmanager
    def watched(call: Call[Any]) -> Iterator[None]:
        try:
            yield
        except ServerError as error:
            if call.script.name == operation:
                act(error)
            raise

    async def send_asyncio(call: Call[Any]) -> Any:
        with watched(call):
            return await send(call)

    def send_blocking(call: Call[Any]) -> Any:
        with watched(call):
            return send(call)

    worker.plain_store.send = send_blocking if worker.runner is None else send_asyncio


# What the processes below have in common; each ends when its standard input does.
HEAD = """
import asyncio, os, signal, sys, threading
from squidstep_redis import AsyncStepRunStore, StepBusyError, StepRunStore, current_claim

def say(*words):
    print(*words, flush=True)

class Stopped(Exception): ...

url, prefix = sys.argv[1:]
"""

STOPPABLE = {
    "blocking": """
stopping = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopping.set())

def work(input):
    say("working")
    stopping.wait()
    current_claim().release()
    raise Stopped

with StepRunStore.from_url(url, prefix=prefix) as store:
    try:
        store.run_step("run", "pay", work, {"amount": 1}, max_attempts=1)
    except Stopped:
        say("stopped")
""",
    "asyncio": """
async def main():
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)

    async def work(input):
        say("working")
        await stopping.wait()
        await current_claim().release()
        raise Stopped

    async with AsyncStepRunStore.from_url(url, prefix=prefix) as store:
        try:
            await store.run_step("run", "pay", work, {"amount": 1}, max_attempts=1)
        except Stopped:
            say("stopped")

asyncio.run(main())
""",
}

ZOMBIE = {
    "blocking": """
def work(input):
    say("working")
    say("lost" if current_claim().lost.wait(30) else "held")
    sys.stdin.readline()
    return {"by": "zombie"}

with StepRunStore.from_url(url, prefix=prefix) as store:
    try:
        say(store.run_step("run", "pay", work, {"amount": 1}, lease=0.5))
    except StepBusyError:
        say("busy")
""",
    "asyncio": """
async def work(input):
    say("working")
    async with asyncio.timeout(30):
        await current_claim().lost.wait()
    say("lost")
    sys.stdin.readline()
    return {"by": "zombie"}

async def main():
    async with AsyncStepRunStore.from_url(url, prefix=prefix) as store:
        try:
            say(await store.run_step("run", "pay", work, {"amount": 1}, lease=0.5))
        except StepBusyError:
            say("busy")

asyncio.run(main())
""",
}

FORKED = """
store = StepRunStore.from_url(url, prefix=prefix)
parents = store.claim_step("run", "parents", {}, lease=0.5)
parents.__enter__()
due = parents.next_extension_at
while parents.next_extension_at == due:  # its heartbeat is at work
    pass
if os.fork():
    os._exit(0)
with store.claim_step("run", "childs", {}, lease=0.5) as own:
    say("working")
    sys.stdin.readline()
    own.complete({"lost": parents.lost.is_set()})
say("done")
os._exit(0)
"""


FORKING = """
def work(input):
    child = os.fork()
    if child == 0:
        sys.exit()  # by way of all blocks that its parent is in
    os.waitpid(child, 0)
    say("working")
    sys.stdin.readline()
    return {"by": "parent"}

with StepRunStore.from_url(url, prefix=prefix) as store:
    say(store.run_step("run", "pay", work, {}))
"""


@contextlib.contextmanager
def process(bench: Bench, script: str) -> Iterator[subprocess.Popen[str]]:
    """A process that uses the bench's prefix, and has said that it is at work."""
    path = bench.backend.raw.connection_pool.connection_kwargs["path"]
    command = [sys.executable, "-c", HEAD + script, f"unix://{path}", bench.prefix]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert says(started) == "working"
            yield started
        finally:
            started.kill()


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()


@on_a_real_server
class TestProcesses:
    def flavour(self, bench: Bench) -> str:
        return "blocking" if bench.runner is None else "asyncio"

    def test_told_to_stop_it_gives_its_claim_back(self, bench: Bench, others: StepRunStore) -> None:
        with process(bench, STOPPABLE[self.flavour(bench)]) as worker:
            assert stored(others).status is StepStatus.RUNNING

            worker.send_signal(signal.SIGTERM)

            assert (says(worker), worker.wait(10)) == ("stopped", 0)
        assert stored(others).status is StepStatus.PENDING
        assert outcomes(others) == [Outcome.RELEASED]
        assert begun(others.begin_step("run", "pay", {}, max_attempts=1)).attempt == 2

    @pytest.mark.parametrize("completed", [True, False])
    def test_one_that_was_stopped_past_its_lease_finds_out_that_it_lost_its_claim(
        self, bench: Bench, others: StepRunStore, completed: bool
    ) -> None:
        with process(bench, ZOMBIE[self.flavour(bench)]) as zombie:
            zombie.send_signal(signal.SIGSTOP)
            os.waitpid(zombie.pid, os.WUNTRACED)
            bench.lapse(stored(others))
            winner = begun(others.begin_step("run", "pay", {}, lease=60, owner="winner"))

            zombie.send_signal(signal.SIGCONT)

            assert says(zombie) == "lost"
            if completed:
                winner = others.complete_step(winner, {"by": "winner"})
            tell(zombie)
            assert says(zombie) == ("{'by': 'winner'}" if completed else "busy")
            assert zombie.wait(10) == 0
        assert stored(others) == winner

    @blocking
    def test_a_forked_child_keeps_its_own_claims_and_none_of_its_parents(
        self, bench: Bench, others: StepRunStore
    ) -> None:
        with process(bench, FORKED) as parent:
            assert parent.wait(10) == 0
            first = stored(others, step="childs").lease_ends_at
            assert first is not None

            wait_until(lambda: others.begin_step("run", "parents", {}, lease=60).decision == "execute")
            wait_until(lambda: cast("Any", stored(others, step="childs").lease_ends_at) > first + timedelta(seconds=1))

            tell(parent)
            assert says(parent) == "done"
        assert stored(others, step="childs").output == {"lost": False}
        assert outcomes(others, "childs") == [Outcome.COMPLETED]
        assert outcomes(others, "parents") == [Outcome.LEASE_EXPIRED, Outcome.RUNNING]

    @blocking
    def test_a_forked_child_that_leaves_its_parents_block_leaves_the_claim_to_it(
        self, bench: Bench, others: StepRunStore
    ) -> None:
        with process(bench, FORKING) as parent:
            assert stored(others).status is StepStatus.RUNNING
            tell(parent)
            assert says(parent) == "{'by': 'parent'}"
        assert outcomes(others) == [Outcome.COMPLETED]


class AlarmError(Exception):
    """What a time-out made with SIGALRM raises."""


@pytest.fixture
def alarms() -> Iterator[list[int]]:
    """Each SIGALRM raises, and is listed here."""
    raised: list[int] = []

    def ring(number: int, frame: object) -> None:
        raised.append(number)
        raise AlarmError

    before = signal.signal(signal.SIGALRM, ring)
    yield raised
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def no_garbage_is_collected() -> Iterator[None]:
    """What a signal handler raises in a finaliser, or in a callback of the collector (hypothesis has one), is lost.

    No library can help that; so the collector rests. What is finalised without it still is.
    """
    gc.disable()
    yield
    gc.enable()


@pytest.mark.timeout(method="thread")  # the other method has the alarm itself
class TestAlarmHeldBack:
    def test_the_alarm_comes_after_the_block(self, alarms: list[int]) -> None:
        heard_within: list[int] = []

        def ring_twice() -> None:
            for _ in range(2):
                signal.raise_signal(signal.SIGALRM)
                heard_within.append(len(alarms))

        with pytest.raises(AlarmError), defer_sigalrm():
            ring_twice()

        assert (heard_within, len(alarms)) == ([0, 0], 1)  # two that come together are one, as ever
        with pytest.raises(AlarmError):
            signal.raise_signal(signal.SIGALRM)

    def test_an_exception_of_the_block_comes_first(self, alarms: list[int]) -> None:
        def ring_and_raise() -> None:
            signal.raise_signal(signal.SIGALRM)
            raise DeclinedError

        with pytest.raises(AlarmError) as caught, defer_sigalrm():
            ring_and_raise()

        assert isinstance(caught.value.__context__, DeclinedError)

    def test_without_an_alarm_nothing_happens(self, alarms: list[int]) -> None:
        handler = signal.getsignal(signal.SIGALRM)

        with defer_sigalrm():
            pass

        assert signal.getsignal(signal.SIGALRM) is handler
        assert alarms == []

    def test_one_in_another_holds_it_back_to_the_end_of_the_outer(self, alarms: list[int]) -> None:
        handler = signal.getsignal(signal.SIGALRM)
        heard_within: list[int] = []

        def ring_in_another() -> None:
            with defer_sigalrm():
                signal.raise_signal(signal.SIGALRM)
            heard_within.append(len(alarms))

        with pytest.raises(AlarmError), defer_sigalrm():
            ring_in_another()

        assert (heard_within, len(alarms)) == ([0], 1)
        assert signal.getsignal(signal.SIGALRM) is handler

    def test_it_is_let_in_while_it_sleeps(self, alarms: list[int]) -> None:
        handler = signal.getsignal(signal.SIGALRM)

        with defer_sigalrm() as alarm:
            signal.raise_signal(signal.SIGALRM)
            with pytest.raises(AlarmError):
                alarm.sleep(60)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(AlarmError):
                alarm.sleep(60)
            alarm.sleep(0)

        assert len(alarms) == 2
        assert signal.getsignal(signal.SIGALRM) is handler

    def test_a_handler_that_somebody_sets_meanwhile_stays(self, alarms: list[int]) -> None:
        heard: list[int] = []

        def another(number: int, frame: object) -> None:
            heard.append(number)

        with defer_sigalrm():
            signal.signal(signal.SIGALRM, another)
            signal.raise_signal(signal.SIGALRM)

        assert signal.getsignal(signal.SIGALRM) is another
        assert (len(heard), alarms) == (1, [])

    @pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
    def test_without_a_handler_it_does_nothing(self, alarms: list[int], handler: signal.Handlers) -> None:
        signal.signal(signal.SIGALRM, handler)

        with defer_sigalrm():
            assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getsignal(signal.SIGALRM) is handler

    def test_in_another_thread_it_does_nothing(self, alarms: list[int]) -> None:
        handler = signal.getsignal(signal.SIGALRM)

        def look() -> object:
            with defer_sigalrm():
                return signal.getsignal(signal.SIGALRM)

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(look).result() is handler

    @blocking
    @pytest.mark.parametrize("ending", ["complete", "fail", "release"])
    def test_an_ending_is_never_torn(
        self, worker: Worker, others: StepRunStore, alarms: list[int], ending: str
    ) -> None:
        with worker.claim() as claim:
            when(worker, lambda _: True, lambda: signal.raise_signal(signal.SIGALRM))
            with pytest.raises(AlarmError):
                end(claim, ending)

        expected = {"complete": Outcome.COMPLETED, "fail": Outcome.FAILED, "release": Outcome.RELEASED}
        assert (outcomes(others), len(alarms)) == ([expected[ending]], 1)
        assert current_claim() is None

    @blocking
    def test_an_alarm_that_comes_while_it_claims_gives_the_claim_back(
        self, worker: Worker, others: StepRunStore, alarms: list[int]
    ) -> None:
        when(worker, lambda _: True, lambda: signal.raise_signal(signal.SIGALRM))

        with pytest.raises(AlarmError):
            worker.execute(decline)

        assert (outcomes(others), len(alarms)) == ([Outcome.RELEASED], 1)
        assert current_claim() is None

    @blocking
    def test_an_alarm_ends_the_work_and_is_recorded(
        self, worker: Worker, others: StepRunStore, alarms: list[int]
    ) -> None:
        def work(input: dict[str, Any]) -> dict[str, Any]:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            threading.Event().wait(60)
            return {}

        with pytest.raises(AlarmError):
            worker.execute(work)

        assert outcomes(others) == [Outcome.FAILED]
        assert cast("Any", stored(others).last_error)["type"].endswith("AlarmError")

    @blocking
    @pytest.mark.parametrize("executed", [False, True])
    def test_an_alarm_while_a_payload_is_decoded_is_not_taken_for_the_codecs(
        self, bench: Bench, others: StepRunStore, alarms: list[int], executed: bool
    ) -> None:
        if executed:
            others.run_step("run", "pay", receipt, {"amount": 1})

        with pytest.raises(AlarmError):
            Worker(bench, bench.store(codec=Ringing())).execute(receipt)

        assert len(alarms) == 1

    @blocking
    def test_an_alarm_ends_the_wait_for_another(self, worker: Worker, others: StepRunStore, alarms: list[int]) -> None:
        holder = begun(others.begin_step("run", "pay", {}, lease=60))

        def let_go_and_ring() -> None:
            others.release_step(holder)
            signal.setitimer(signal.ITIMER_REAL, 0.01)

        when(worker, is_busy, let_go_and_ring)

        with pytest.raises(AlarmError):
            worker.execute(receipt, on_busy="wait")

        assert outcomes(others) == [Outcome.RELEASED]  # by the holder, and nobody has claimed it since

    @blocking
    @on_a_real_server
    def test_a_storm_of_alarms_tears_nothing_and_leaks_nothing(
        self, bench: Bench, others: StepRunStore, alarms: list[int], no_garbage_is_collected: None
    ) -> None:
        dice = random.Random(7_000)
        path = bench.backend.raw.connection_pool.connection_kwargs["path"]
        answers: dict[int, dict[str, Any]] = {}
        with connected(bench, f"unix://{path}", client_name=bench.prefix) as worker:
            for number in range(7_000):
                with contextlib.suppress(AlarmError):
                    signal.setitimer(signal.ITIMER_REAL, dice.uniform(0.000_01, 0.000_8))
                    input = {"number": number}
                    answers[number] = worker.store.run_step(f"run-{number % 100}", f"{number}", dict, input, lease=0.5)
                    wait_until(lambda: len(alarms) > number)  # noqa: B023 -- at once
            assert len(alarms) == 7_000

            found = {int(each.step): each for run in range(100) for each in others.get_run(f"run-{run}")}
            assert [each for each in found.values() if each.status is StepStatus.RUNNING] == []
            torn = [number for number in range(7_000) if number not in answers]
            assert len(torn) > 500
            assert all(answers[number] == {"number": number} == found[number].output for number in answers)
            for number in torn[::10]:
                input = {"number": number}
                assert worker.store.run_step(f"run-{number % 100}", f"{number}", dict, input) == input

            pool: Any = worker.store.client.connection_pool
            assert len(pool._in_use_connections) == len(worker.plain_store._connections._idle) <= 1
            clients = bench.backend.raw.client_list()
            assert len([client for client in clients if client["name"] == bench.prefix]) <= 2  # the heartbeat's, too


class Ringing:
    """A codec in whose first decoding the alarm comes."""

    def __init__(self) -> None:
        self.codec = MsgpackCodec()
        self.has_rung = False

    def encode(self, payload: dict[str, Any]) -> bytes:
        return self.codec.encode(payload)

    def decode(self, data: bytes) -> dict[str, Any]:
        if not self.has_rung:
            self.has_rung = True
            signal.raise_signal(signal.SIGALRM)
        return self.codec.decode(data)


class Clock:
    """The monotonic clock, to be set."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


CALLS = Calls("beats", None, 1_000, None)


def held(lease: float) -> BaseClaim[threading.Event]:
    """A claim that has just been granted."""
    claim = BaseClaim(CALLS, "run", "pay", {}, lease, None, "raise", None, threading.Event())
    acquiring = claim._acquire()
    next(acquiring)
    with contextlib.suppress(StopIteration):
        acquiring.send(cast("Any", SimpleNamespace(step_run=None, decision="execute", reason=None)))
    return claim


leases = st.floats(1, 20).map(lambda seconds: round(seconds, 3))
moments = st.floats(0, 40)


class TestBeats:
    @pytest.fixture
    def clock(self) -> Iterator[Clock]:
        clock = Clock()
        with (
            mock.patch("squidstep_redis.claims.rules.time", clock),
            mock.patch("squidstep_redis.claims.heartbeat.time", clock),
        ):
            yield clock

    @given(
        lives=st.lists(st.tuples(moments, leases, moments, st.booleans()), min_size=1, max_size=12),
        latency=st.floats(0, 0.25),
    )
    def test_no_claim_goes_without_an_extension_for_a_whole_lease(
        self, clock: Clock, lives: list[tuple[float, float, float, bool]], latency: float
    ) -> None:
        """Each claim is begun at some time, held for some time, and then discarded or dropped."""
        beats: ExtensionSchedule[BaseClaim[threading.Event]] = ExtensionSchedule()
        clock.now = 1_000.0
        rest = {index: (clock.now + start, lease, time, drop) for index, (start, lease, time, drop) in enumerate(lives)}
        claims: dict[int, BaseClaim[threading.Event]] = {}
        ends: dict[int, float] = {}  # of the leases, as the server would have it
        while rest or claims:
            begins = [(start, "begin", index) for index, (start, *_) in rest.items() if index not in claims]
            leaves = [(rest[index][0] + rest[index][2], "leave", index) for index in claims]
            due = beats.next_at()
            at, event, index = min([*begins, *leaves, *([] if due is None else [(due, "beat", -1)])])
            clock.now = max(clock.now, at)
            if event == "begin":
                claims[index] = held(rest[index][1])
                ends[index] = clock.now + rest[index][1]
                assert beats.add(claims[index]) > clock.now
            elif event == "leave":
                if not rest.pop(index)[3]:
                    beats.discard(claims[index])
                del claims[index]
            else:
                taken, sent_at = beats.due(), clock.now
                assert taken
                clock.now += latency  # the server may be told at any time from sent_at to now
                for index, claim in claims.items():
                    if claim in taken:
                        assert clock.now < ends[index]
                        ends[index] = sent_at + rest[index][1]
                    assert clock.now < ends[index]
                beats.on_extension_results(taken, [None] * len(taken), sent_at)
                del taken, claim
            assert len(beats) == len(claims)
        assert beats.next_at() is None

    @given(starts=st.lists(moments, min_size=1, max_size=12), lease=leases)
    def test_equal_leases_end_up_in_one_batch(self, clock: Clock, starts: list[float], lease: float) -> None:
        beats: ExtensionSchedule[BaseClaim[threading.Event]] = ExtensionSchedule()
        clock.now = begin = 1_000.0
        claims: list[BaseClaim[threading.Event]] = []
        settled = begin + max(starts) + 2 * lease / 3
        for start in sorted(starts):
            self.beat_until(beats, clock, begin + start)
            claims.append(held(lease))
            beats.add(claims[-1])
        self.beat_until(beats, clock, settled + 0.001)

        sizes = self.beat_until(beats, clock, settled + 3 * lease)

        assert len(sizes) >= 8
        assert set(sizes) == {len(claims)}

    def beat_until(self, beats: ExtensionSchedule[BaseClaim[threading.Event]], clock: Clock, end: float) -> list[int]:
        """ExtensionSchedule when it is due; answers how many claims each beat extended."""
        sizes: list[int] = []
        while (due := beats.next_at()) is not None and due < end:
            clock.now = due
            taken = beats.due()
            beats.on_extension_results(taken, [None] * len(taken), due)
            sizes.append(len(taken))
        clock.now = end
        return sizes

    @given(lease=st.floats(0.001, 400 * 24 * 3_600 - 40 * 24 * 3_600))
    def test_a_batch_that_failed_is_tried_again_soon(self, clock: Clock, lease: float) -> None:
        beats: ExtensionSchedule[BaseClaim[threading.Event]] = ExtensionSchedule()
        claim = held(lease)
        end = clock.now + claim._lease_seconds
        beats.add(claim)
        tries = 0
        while (due := beats.next_at()) is not None and due < end and tries < 10:
            clock.now = due
            assert beats.due() == [claim]
            beats.on_extension_results([claim], redis.ConnectionError("down"), due)
            tries += 1

        assert tries >= 3
        assert cast("float", beats.next_at()) <= clock.now + 1
        assert not claim.lost.is_set()

    def test_before_anything_is_due_nothing_is_taken(self, clock: Clock) -> None:
        beats: ExtensionSchedule[BaseClaim[threading.Event]] = ExtensionSchedule()
        claim = held(30)
        assert beats.next_at() is None
        assert beats.add(claim) == beats.next_at() == clock.now + 10

        clock.now += 9.9
        assert beats.due() == []
        clock.now += 0.2
        assert beats.due() == [claim]
