"""Exceptions of signal handlers while an asyncio block begins or ends: no claim stays behind that nothing would end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.asyncio_stores import either_kind, opened
from support.claims import DeclinedError
from support.interruptions import at_line, sigusr1_raises
from support.servers import wait_until

import squidstep_redis
from squidstep_redis import AsyncStepRunStore, StepRunStore, StepStatus
from squidstep_redis.embedded import EmbeddedServer

PACKAGE = (str(Path(squidstep_redis.__file__).parent),)

pytestmark = [
    pytest.mark.servers("valkey"),
    either_kind,
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def abandoned_coroutines() -> Iterator[None]:
    """Collects coroutines that an interruption has kept from being awaited, while the warning about them is ignored."""
    yield
    gc.collect()


class Interruption:
    """A signal at the n-th line of the package after `begin`."""

    def __init__(self, line: int) -> None:
        self._block = contextlib.ExitStack()
        self._line = line
        self.is_over = False

    def begin(self) -> None:
        at = at_line(self._line, PACKAGE, lambda: signal.raise_signal(signal.SIGUSR1))
        is_reached = self._block.enter_context(at)
        self._block.callback(lambda: setattr(self, "is_over", is_reached()))

    def end(self) -> None:
        self._block.close()


def is_running(observer: StepRunStore, step: str) -> bool:
    step_run = observer.get_step_run("run", step)
    return step_run is not None and step_run.status is StepStatus.RUNNING


async def begin_and_end(store: AsyncStepRunStore, step: str, interruption: Interruption, moment: str) -> None:
    """Executes a step without a lease, and begins the interruption at one of three moments."""

    async def work(_: dict[str, Any]) -> dict[str, Any]:
        if moment == "fails":
            interruption.begin()
            raise ValueError("no funds")
        if moment == "completes":
            interruption.begin()
        else:
            interruption.end()
        return {}

    if moment == "begins":
        interruption.begin()
    await store.run_step("run", step, work, {}, lease=None)


STATUSES = {
    "begins": {StepStatus.PENDING, StepStatus.FAILED, StepStatus.COMPLETED},  # failed: between entering and the work
    "completes": {StepStatus.COMPLETED, StepStatus.FAILED},
    "fails": {StepStatus.FAILED},
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", STATUSES)
def test_no_line_of_a_block_leaves_a_running_claim(
    server: EmbeddedServer, observer: StepRunStore, kind: str, moment: str
) -> None:
    for line in itertools.count(3, 29):
        step, interruption = f"step-{line}", Interruption(line)

        async def main(step: str = step, interruption: Interruption = interruption) -> None:
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)
            async with opened(server.url, kind) as store:
                await store.begin_step("warm", "pay", {})
                await asyncio.wait([asyncio.create_task(begin_and_end(store, step, interruption, moment))])

        try:
            with sigusr1_raises(DeclinedError("stopped")), contextlib.suppress(DeclinedError, ValueError):
                asyncio.run(main())
        finally:
            interruption.end()
        wait_until(lambda step=step: not is_running(observer, step))
        if not interruption.is_over:
            break

    assert line > 100
    assert set(observer.step_statuses("run").values()) <= STATUSES[moment]
