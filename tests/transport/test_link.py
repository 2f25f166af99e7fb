"""The shared connection of an asyncio store: interruptions at any line, waiting for room, and what was sent."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.asyncio_stores import embedded, opened
from support.claims import DeclinedError, until
from support.interruptions import at_line, sigusr1_raises
from support.servers import wait_until

from squidstep_redis import AsyncStepRunStore, NotSentError, OutcomeUnknownError, SquidstepError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.transport import link
from squidstep_redis.transport.link import Link

pytestmark = [
    pytest.mark.servers("valkey"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LINK = (str(Path(link.__file__)),)
SECONDS = 60.0


@pytest.fixture(autouse=True)
def abandoned_coroutines() -> Iterator[None]:
    """Collects coroutines that an interruption has kept from being awaited, while the warning about them is ignored."""
    yield
    gc.collect()


@pytest.fixture
def served(binary: Path) -> Iterator[tuple[EmbeddedServer, StepRunStore]]:
    with embedded("valkey") as served:
        yield served


@pytest.fixture
def server(served: tuple[EmbeddedServer, StepRunStore]) -> EmbeddedServer:
    return served[0]


def shared_link(store: AsyncStepRunStore) -> Link:
    connections: Any = store._transport._direct
    return connections._by_loop[asyncio.get_running_loop()].shared


async def outcomes_of(tasks: list[asyncio.Task[Any]]) -> list[Any]:
    """Returns the result or the error of each task; none may hang."""
    _, pending = await asyncio.wait(tasks, timeout=SECONDS)
    assert not pending
    return [task.exception() or task.result() for task in tasks]


def test_no_line_leaves_a_call_without_an_outcome(server: EmbeddedServer) -> None:
    async def main(line: int) -> bool:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # asyncio logs what a callback raises
        async with opened(server.url, "own client", timeout=2) as store:
            await store.get_run("run")
            with at_line(line, LINK, lambda: signal.raise_signal(signal.SIGUSR1)) as is_over:
                tasks = [asyncio.create_task(store.get_step_run("run", f"step-{number}")) for number in range(3)]
                outcomes = await outcomes_of(tasks)
            for outcome in outcomes:
                assert outcome is None or isinstance(outcome, (SquidstepError, DeclinedError))
            assert await store.get_run("run") == []
            return is_over()

    with sigusr1_raises(DeclinedError("stopped")):
        for line in itertools.count(1):
            if not asyncio.run(main(line)):
                break
    assert line > 60


class TestRoom:
    @pytest.fixture(autouse=True)
    def small_buffers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(link, "_MAX_UNSENT_BYTES", 8_000)
        monkeypatch.setattr(link, "_MAX_PENDING", 40)

    def test_each_call_waits_once(self, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> None:
        waits: list[int] = []
        room = Link.room

        async def counted(link: Link, size: int, deadline: float) -> None:
            waits.append(size)
            await room(link, size, deadline)

        monkeypatch.setattr(Link, "room", counted)

        async def main() -> None:
            async with opened(server.url, "own client", timeout=SECONDS) as store:
                await store.begin_step("run", "first", {})
                payload = {"text": "x" * 1_000}
                calls = (store.begin_step("run", f"step-{number}", payload) for number in range(300))
                outcomes = await outcomes_of([asyncio.create_task(call) for call in calls])
                assert {outcome.decision for outcome in outcomes} == {"execute"}

        asyncio.run(main())

        assert 0 < len(waits) <= 300

    @pytest.mark.parametrize("cancelled", [range(100, 300), range(100, 300, 2), range(299, 100, -3)], ids=str)
    def test_calls_that_are_cancelled_pass_their_turn_on(self, server: EmbeddedServer, cancelled: range) -> None:
        async def main() -> None:
            async with opened(server.url, "own client", timeout=SECONDS) as store:
                await store.get_run("run")
                server.pause()
                payload = {"text": "x" * 1_000}
                tasks = [
                    asyncio.create_task(store.begin_step("run", f"step-{number}", payload)) for number in range(300)
                ]
                await asyncio.sleep(0.01)
                server.resume()
                for number in cancelled:  # some in the turn in which they may be sent
                    tasks[number].cancel()
                    await asyncio.sleep(0)
                _, pending = await asyncio.wait(tasks, timeout=SECONDS)
                assert not pending
                assert {task.result().decision for task in tasks if not task.cancelled()} == {"execute"}
                assert await store.get_step_run("run", "step-0") is not None
                assert (shared_link(store)._granted, shared_link(store)._granted_bytes) == (0, 0)

        asyncio.run(main())

    def test_calls_that_wait_too_long_were_not_sent(self, server: EmbeddedServer) -> None:
        async def main() -> list[Any]:
            async with opened(f"{server.url}?socket_timeout=1", "own client", timeout=0.2) as store:
                await store.get_run("run")
                server.pause()
                calls = (store.begin_step("run", f"step-{number}", {}) for number in range(100))
                try:
                    return await outcomes_of([asyncio.create_task(call) for call in calls])
                finally:
                    server.resume()

        kinds = [type(outcome) for outcome in asyncio.run(main())]
        assert set(kinds) == {NotSentError, OutcomeUnknownError}
        assert kinds.count(NotSentError) >= 60


def test_bytes_that_never_left_the_process_were_not_sent(served: tuple[EmbeddedServer, StepRunStore]) -> None:
    server, observer = served

    async def main() -> tuple[int, dict[str, Any]]:
        async with opened(f"{server.url}?socket_timeout=3", "own client", timeout=0.1) as store:
            await store.begin_step("run", "first", {})
            server.pause()
            payload = {"text": "x" * 60_000}
            tasks = {
                f"step-{number}": asyncio.create_task(store.begin_step("run", f"step-{number}", payload))
                for number in range(400)
            }
            await until(lambda: shared_link(store)._transport.get_write_buffer_size() > 120_000)
            submitted = len(shared_link(store)._sent)
            outcomes = await outcomes_of(list(tasks.values()))
            return submitted, dict(zip(tasks, outcomes, strict=True))

    submitted, outcomes = asyncio.run(main())
    server.resume()

    unknown = [step for step, outcome in outcomes.items() if isinstance(outcome, OutcomeUnknownError)]
    assert 0 < len(unknown) < submitted
    assert all(isinstance(outcomes[step], NotSentError) for step in outcomes.keys() - set(unknown))
    observer.begin_step("run", "last", {})
    wait_until(lambda: {*observer.step_statuses("run")} <= {*unknown, "first", "last"})
