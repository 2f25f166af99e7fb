"""Helpers for tests of `run_step` and `claim_step`, on both flavors.

Their access to private attributes of claims and heartbeats is in the second half of this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import redis

from squidstep_redis import (
    AsyncClaim,
    AsyncStepRunStore,
    BeginResult,
    Call,
    Calls,
    Claim,
    Outcome,
    ServerError,
    StepRun,
    StepRunStore,
    current_claim,
)
from squidstep_redis.claims import heartbeat as heartbeats
from squidstep_redis.claims.request import claim_request
from squidstep_redis.claims.rules import BaseClaim
from squidstep_redis.protocol.workflow import Workflow
from support.backends import Bench, Driven
from support.internals import give_up_early, replace_client
from support.records import stored
from support.servers import wait_until

Work = Callable[[dict[str, Any]], Mapping[str, Any]]

blocking_only = pytest.mark.parametrize("bench", ["blocking"], indirect=True)
asyncio_only = pytest.mark.parametrize("bench", ["asyncio"], indirect=True)
real_server = pytest.mark.servers("valkey", "redis-7", "redis-6")
fakeredis_only = pytest.mark.servers("fakeredis")  # behavior of the client, the same with every server

# For a claim that must be extended, or found lost, within the test. If the machine stalls, it may expire without harm:
# an expired claim that was not taken over can still be extended.
SHORT_LEASE = 0.3


class Block:
    """A claim of either flavor as a `with` block, called like a blocking one."""

    def __init__(self, claim: Any, runner: asyncio.Runner | None) -> None:
        self.claim = claim
        self.runner = runner

    def __enter__(self) -> Any:
        if self.runner is None:
            self.claim.__enter__()
        else:
            self.runner.run(self._enter())
        return self

    async def _enter(self) -> None:
        # Returns nothing: a task keeps its result, which must not keep the claim alive.
        await self.claim.__aenter__()

    def __exit__(self, *raised: Any) -> Any:
        return self.claim.__exit__(*raised) if self.runner is None else self.runner.run(self.claim.__aexit__(*raised))

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.claim, name)
        return value if self.runner is None or not inspect.iscoroutinefunction(value) else self._driven(value)

    def _driven(self, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: cast("asyncio.Runner", self.runner).run(method(*args, **kwargs))


class Worker:
    """Executes steps with a store of either flavor, by blocking calls."""

    def __init__(self, bench: Bench, store: StepRunStore | None = None) -> None:
        self.runner = bench.runner
        self.store = store or bench.store()

    @property
    def plain_store(self) -> Any:
        """The store itself, whose methods a test can replace."""
        return self.store.store if isinstance(self.store, Driven) else self.store

    def execute(self, work: Work, step: str = "pay", **options: Any) -> dict[str, Any]:
        """Calls `run_step`. The work may block: with asyncio it runs in a thread."""

        async def in_a_thread(input: dict[str, Any]) -> Mapping[str, Any]:
            with ThreadPoolExecutor(1) as pool:
                context = contextvars.copy_context()
                return await asyncio.get_running_loop().run_in_executor(pool, context.run, work, input)

        fn = work if self.runner is None else cast("Any", in_a_thread)
        return self.store.run_step("run", step, fn, {"amount": 1}, **options)

    def claim(self, step: str = "pay", **options: Any) -> Any:
        """Calls `claim_step`."""
        return Block(self.store.claim_step("run", step, {"amount": 1}, **options), self.runner)

    def finish(self, result: Any) -> Any:
        """Returns the result of a redis-py client, awaited if the client is an asyncio one."""

        async def wait() -> Any:
            return await result

        return result if self.runner is None else self.runner.run(wait())

    def wait(self, condition: Callable[[], object]) -> None:
        """Waits for a condition; with asyncio in the event loop, so that its timers run."""
        if self.runner is None:
            wait_until(condition)
        else:
            self.runner.run(until(condition))

    def wait_for_extension(self, *claims: Any) -> None:
        """Waits until each of the claims has been extended once more, or is lost."""
        due = [(claim, claim.next_extension_at) for claim in claims]
        self.wait(lambda: all(claim.lost.is_set() or claim.next_extension_at > before for claim, before in due))

    def settle(self) -> None:
        """Waits for an extension in flight, which would reopen closed connections."""
        if self.runner is not None:
            self.runner.run(self._settle())

    async def _settle(self) -> None:
        heartbeat = heartbeat_of_loop(self.plain_store)
        await until(lambda: not heartbeat.is_sending)


def until_extended(*claims: Claim) -> None:
    """Waits until each of these blocking claims has been extended once more."""
    due = [(claim, claim.next_extension_at) for claim in claims]
    wait_until(lambda: all(claim.next_extension_at > before for claim, before in due))


@contextlib.contextmanager
def connected(bench: Bench, url: str, **options: Any) -> Iterator[Worker]:
    """Provides a worker whose store is made by `from_url`."""
    own = (StepRunStore if bench.runner is None else AsyncStepRunStore).from_url(url, prefix=bench.prefix, **options)
    store = cast("StepRunStore", own if bench.runner is None else Driven(cast("Any", own), bench.runner))
    worker = Worker(bench, store)
    try:
        yield worker
    finally:
        worker.settle()
        store.close()


async def until(condition: Callable[[], object]) -> None:
    """Waits in the event loop until the condition holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


class DeclinedError(Exception):
    """An error of the work."""


def charge(input: dict[str, Any]) -> dict[str, Any]:
    """Work that succeeds."""
    return {"charged": input["amount"]}


def decline(input: dict[str, Any]) -> dict[str, Any]:
    """Work that fails."""
    raise DeclinedError("no funds")


def end(claim: Any, ending: str) -> StepRun:
    """Ends a claim: by "complete", "fail" or "release"."""
    return claim.release() if ending == "release" else getattr(claim, ending)({})


def outcomes(store: StepRunStore, step: str = "pay") -> list[Outcome]:
    """Returns the outcomes of all attempts of a step."""
    return [attempt.outcome for attempt in store.attempts("run", step)]


def take_over(others: StepRunStore, step: str = "pay", **options: Any) -> StepRun:
    """Expires the lease and claims the step, as another worker would if the holder were dead."""
    found: list[BeginResult] = []

    def taken() -> bool:  # the holder may extend its claim in between
        expire = others.calls.expire_claim(stored(others, step=step).id)
        begin = others.calls.begin_step("run", step, {"amount": 2}, **options)
        found.append(cast("Any", others.batch([cast("Call[Any]", expire), begin])[1]))
        return found[-1].decision == "execute"

    wait_until(taken)
    return found[-1].step_run


def claim_of_the_work() -> Claim | AsyncClaim:
    """Returns the claim under which the calling code executes."""
    claim = current_claim()
    assert claim is not None
    return cast("Claim | AsyncClaim", claim)


def is_busy(result: Any) -> bool:
    """Returns whether this is a `begin_step` result that says that another worker holds the step."""
    return isinstance(result, BeginResult) and result.busy


def after_reply(worker: Worker, matches: Callable[[Any], object], act: Callable[[], object]) -> None:
    """Calls `act` once, directly after the first result of the worker's store that matches."""
    send, done = worker.plain_store._transport.send, []

    def check(result: Any) -> Any:
        if not done and matches(result):
            done.append(True)
            act()
        return result

    async def send_asyncio(call: Call[Any]) -> Any:
        return check(await send(call))

    worker.plain_store._transport.send = (lambda call: check(send(call))) if worker.runner is None else send_asyncio


def on_failure(worker: Worker, operation: str, act: Callable[[Exception], object]) -> None:
    """Calls `act` with the error each time this operation of the worker's store fails."""
    send = worker.plain_store._transport.send

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

    worker.plain_store._transport.send = send_blocking if worker.runner is None else send_asyncio


def around_batches(
    worker: Worker, before: Callable[[], object] = lambda: None, after: Callable[[int], object] = lambda size: None
) -> None:
    """Calls `before`, which may raise, before each batch, and `after` with the size of each that succeeded."""
    holder, name = worker.plain_store._transport, "send_batch"
    if worker.runner is None:
        holder = heartbeat_of(worker)._transport.get()
    batch = getattr(holder, name)

    def batch_blocking(calls: list[Call[Any]]) -> Any:
        before()
        results = batch(calls)
        after(len(calls))
        return results

    async def batch_asyncio(calls: list[Call[Any]]) -> Any:
        before()
        results = await batch(calls)
        after(len(calls))
        return results

    setattr(holder, name, batch_blocking if worker.runner is None else batch_asyncio)


class UnreachableClient:
    """A client whose every command raises an error, and is counted in `asked`; unless `sends`, before it is sent."""

    def __init__(self, client: Any, error: Exception, *, sends: bool = True) -> None:
        self.client = client
        self.error = error
        self.sends = sends
        self.asked = 0

    def replace_client_of(self, store: Any) -> None:
        """Makes the store use this client from now on, with a short timeout."""
        replace_client(store, self)
        limit_retries(store)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self.asked += 1
        if self.sends:
            args[0].encode()  # as redis-py does, right before it sends a command
        if isinstance(self.client, redis.Redis | redis.RedisCluster):
            raise self.error
        return self._refuse()

    async def _refuse(self) -> Any:
        raise self.error


class Clock:
    """A monotonic clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


# Access to private attributes


def heartbeat_of_loop(store: Any) -> Any:
    """Returns the heartbeat of an asyncio store in the running event loop."""
    return store._per_loop.get().heartbeat


def heartbeat_of(worker: Worker) -> heartbeats.Heartbeat:
    """Returns the heartbeat of the worker's blocking store."""
    return heartbeats.heartbeat_of(worker.plain_store)


def has_heartbeat(worker: Worker) -> bool:
    """Returns whether a thread, or with asyncio a timer, extends claims of the worker's store."""
    if worker.runner is None:
        return heartbeat_of(worker).is_running
    return worker.runner.run(_has_timer(worker.plain_store))


async def _has_timer(store: Any) -> bool:
    return heartbeat_of_loop(store)._timer is not None


def heartbeat_threads() -> list[threading.Thread]:
    """Returns the heartbeat threads of this process, of any store. One may still start for a claim that has ended."""
    return [thread for thread in threading.enumerate() if thread.name == "squidstep-heartbeat"]


@contextlib.contextmanager
def interrupted_seconds(seconds: float) -> Iterator[None]:
    """Sets for how long an interrupted block waits until its claim is given back, or its failure recorded."""
    with contextlib.ExitStack() as stack:
        for module in ("aio", "claims.aio_background", "claims.aio_claim", "claims.claim"):
            stack.enter_context(mock.patch(f"squidstep_redis.{module}.INTERRUPTED_SECONDS", seconds))
        yield


def limit_retries(store: Any) -> None:
    """Limits the retries of the store, so that those of the claim can be observed."""
    give_up_early(store)


def granted_claim(lease: float) -> BaseClaim[threading.Event]:
    """Makes a claim that has just been acquired, without a server."""
    request = claim_request("run", "pay", {}, lease=lease)
    claim = BaseClaim(Calls("test", None, 1_000, None), request, threading.Event(), threading.Event())
    acquiring = claim._acquire()
    next(acquiring)
    with contextlib.suppress(StopIteration):
        acquiring.send(cast("Any", SimpleNamespace(step_run=None, decision="execute", reason=None)))
    return claim


def lease_seconds(claim: BaseClaim[Any]) -> float:
    """Returns the lease of a claim, rounded as it is sent to the server."""
    return claim._lease_seconds


@contextlib.contextmanager
def fake_clock() -> Iterator[Clock]:
    """In the block, claims and heartbeats use the clock that is provided."""
    clock = Clock()
    with (
        mock.patch("squidstep_redis.claims.rules.time", clock),
        mock.patch("squidstep_redis.claims.extensions.time", clock),
        mock.patch("squidstep_redis.claims.heartbeat.time", clock),
        mock.patch("squidstep_redis.claims.aio_heartbeat.time", clock),
    ):
        yield clock


def acquisition(claim: Any) -> Workflow[None]:
    """Returns the workflow that enters the block of the claim."""
    return claim._acquire()


@contextlib.contextmanager
def no_heartbeat_threads() -> Iterator[None]:
    """In the block, no heartbeat thread starts, so that only the test extends claims."""
    with mock.patch.object(heartbeats.Heartbeat, "start", return_value=None):
        yield


def extend_now(worker: Worker, claim: Any, clock: Clock) -> None:
    """Sets the clock to the next extension of the claim, and runs the heartbeat in the calling thread."""
    clock.now = claim.next_extension_at
    if worker.runner is None:
        heartbeat = heartbeat_of(worker)
        heartbeat._extend([claim])
        wait_until(lambda: all(batch.replies for batch in heartbeat._batches))
        heartbeat._apply_results()
    else:
        worker.runner.run(_extend_in_loop(worker.plain_store))


async def _extend_in_loop(store: Any) -> None:
    heartbeat = heartbeat_of_loop(store)
    heartbeat._start(heartbeat._schedule.due())
    await asyncio.wait([heartbeat._task])
