"""An exception of a signal handler in a callback of the event loop: at any instruction, and before the first line."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import signal
import sys
from asyncio import selector_events
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.asyncio_stores import embedded, opened
from support.claims import until
from support.interruptions import sigusr1_raises
from support.proxy import Proxy

from squidstep_redis import AsyncStepRunStore, BeginResult, NotSentError, ServerError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.transport import aio_connection
from squidstep_redis.transport.link import Link

pytestmark = [
    pytest.mark.servers("valkey"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECONDS = 60.0  # a call without an outcome by then has none
SILENCE = "?socket_timeout=0.3"


@pytest.fixture(autouse=True)
def abandoned_coroutines() -> Iterator[None]:
    """Collects coroutines that an interruption has kept from being awaited, while the warning about them is ignored."""
    yield
    gc.collect()


class TimeIsUpError(Exception):
    """What the signal handler raises."""


class Interruption:
    """Raises a signal at one instruction of a function, or at a line of it, once.

    Attributes:
        has_happened: whether that was reached.
    """

    def __init__(self, function: Callable[..., Any], position: int, event: str) -> None:
        self.has_happened = False
        self._code = function.__code__
        self._left = position
        self._event = event

    def enter(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code is not self._code or self.has_happened:
            return None
        frame.f_trace_opcodes = self._event == "opcode"
        return self.step

    def step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == self._event and not self.has_happened:
            self._left -= 1
            if self._left < 0:
                self.has_happened = True
                signal.raise_signal(signal.SIGUSR1)
        return self.step


@contextlib.contextmanager
def interrupted(function: Callable[..., Any], position: int, event: str = "line") -> Iterator[Interruption]:
    interruption = Interruption(function, position, event)
    before = sys.gettrace()
    sys.settrace(interruption.enter)
    try:
        with sigusr1_raises(TimeIsUpError()):
            yield interruption
    finally:
        sys.settrace(before)


@pytest.fixture
def served(binary: Path) -> Iterator[tuple[EmbeddedServer, StepRunStore]]:
    with embedded("valkey") as served:
        yield served


@pytest.fixture
def server(served: tuple[EmbeddedServer, StepRunStore]) -> EmbeddedServer:
    return served[0]


def run(url: str, main: Callable[[AsyncStepRunStore], Coroutine[Any, Any, None]], timeout: float = 20) -> None:
    async def with_store() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # asyncio logs what a callback raises
        async with opened(url, "own client", timeout=timeout) as store:
            await main(store)

    asyncio.run(with_store())


async def outcomes_of(calls: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Returns the result or the error of each call; none may hang."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    _, hanging = await asyncio.wait(tasks, timeout=SECONDS)
    assert not hanging
    return [task.exception() or task.result() for task in tasks]


def shared_link(store: AsyncStepRunStore) -> Any:
    connections: Any = store._transport._direct
    return connections._by_loop[asyncio.get_running_loop()].shared


@pytest.mark.parametrize(
    "function", [Link.submit, Link._flush, Link.data_received], ids=lambda function: function.__name__
)
def test_only_the_interrupted_call_fails(server: EmbeddedServer, function: Callable[..., Any]) -> None:
    async def main(store: AsyncStepRunStore) -> None:
        for position in itertools.count():
            await store.schedule_step("run", "before", {})
            with interrupted(function, position, "opcode") as interruption:
                results = await outcomes_of([store.begin_step(f"run-{position}", f"{n}", {}) for n in range(4)])
            raised = [result for result in results if not isinstance(result, BeginResult)]
            assert [type(error) for error in raised] in ([], [TimeIsUpError]), position
            if not interruption.has_happened:
                assert position > 40
                return

    run(server.url, main)


def test_interrupted_check_still_fails_a_call_without_a_reply(server: EmbeddedServer) -> None:
    async def main(store: AsyncStepRunStore) -> None:
        for position in itertools.count():
            with contextlib.suppress(ServerError):  # on a busy machine
                await store.get_run("run")
            server.pause()
            try:
                with interrupted(Link._check_progress, position) as interruption:
                    (error,) = await outcomes_of([store.begin_step("run", f"{position}", {})])
            finally:
                server.resume()
            assert isinstance(error, ServerError), position
            if not interruption.has_happened:
                return

    run(server.url + SILENCE, main, timeout=0.1)


def test_interrupted_resumption_does_not_end_sending(server: EmbeddedServer) -> None:
    payload = {"text": "x" * 60_000}

    async def main(store: AsyncStepRunStore) -> None:
        await store.get_run("run")
        server.pause()
        with interrupted(Link.resume_writing, 0) as interruption:
            calls = [store.schedule_step("run", f"{number}", payload) for number in range(200)]
            results = asyncio.ensure_future(outcomes_of(calls))
            await until(lambda: shared_link(store)._is_paused)
            server.resume()
            assert {result.decision for result in await results} == {"schedule"}
        assert interruption.has_happened

    run(server.url, main)


def test_interrupted_opening_does_not_end_later_ones(server: EmbeddedServer) -> None:
    async def main(store: AsyncStepRunStore) -> None:
        for position in itertools.count():
            with interrupted(aio_connection._Links.on_connected, position) as interruption:
                results = await outcomes_of([store.begin_step("run", f"{position}-{n}", {}) for n in range(2)])
            raised = [result for result in results if not isinstance(result, BeginResult)]
            # A call may have done what the callback had not.
            assert [type(error) for error in raised] in ([], [TimeIsUpError]), position
            proxy.disconnect()
            (later,) = await outcomes_of([store.begin_step("run", f"{position}-later", {})])
            assert isinstance(later, BeginResult), position
            proxy.disconnect()
            if not interruption.has_happened:
                return

    with StepRunStore.from_url(server.url) as store, Proxy.to(store.client) as proxy:
        run(f"redis://127.0.0.1:{proxy.port}", main)


def test_interrupted_write_is_not_reported_as_unsent(served: tuple[EmbeddedServer, StepRunStore]) -> None:
    """asyncio's transport handles the exception as a failed write, although it may have sent the bytes."""
    server, observer = served
    transport: Any = selector_events
    write = transport._SelectorSocketTransport.write

    async def main(store: AsyncStepRunStore) -> None:
        await store.begin_step("run", "first", {})  # the server knows the script
        for position in itertools.count():
            await store.get_run("run")
            call = store.calls.begin_step("run", f"{position}", {})._replace(retryable=False)
            with interrupted(write, position, "opcode") as interruption:
                (outcome,) = await outcomes_of([store.send(call)])
            if isinstance(outcome, NotSentError):
                await asyncio.sleep(0.005)  # the server reads
                assert observer.get_step_run("run", f"{position}") is None, position
            if not interruption.has_happened:
                assert position > 20
                return

    run(server.url, main)
