"""Claims of worker processes that are stopped, suspended or forked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
from support.backends import Bench
from support.claims import blocking_only, outcomes, real_server
from support.records import begun, stored
from support.servers import wait_until

from squidstep_redis import (
    Outcome,
    StepRunStore,
    StepStatus,
)

# The common start of the scripts below.
HEAD = """
import asyncio, os, signal, sys, time
from squidstep_redis import AsyncStepRunStore, StepBusyError, StepRunStore, current_claim

def say(*words):
    print(*words, flush=True)

class Stopped(Exception): ...

url, prefix = sys.argv[1:]
"""

STOPPABLE = {
    "blocking": """
stopping = []  # no threading.Event: its `set` waits for a lock that the interrupted `wait` may hold
signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))

def work(input):
    say("working")
    while not stopping:
        time.sleep(0.01)
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
parent = store.claim_step("run", "parent", {}, lease=0.5)
parent.__enter__()
due = parent.next_extension_at
while parent.next_extension_at == due:  # until its heartbeat has extended it
    pass
if os.fork():
    os._exit(0)
with store.claim_step("run", "child", {}, lease=0.5) as own:
    say("working")
    sys.stdin.readline()
    own.complete({"lost": parent.lost.is_set()})
say("done")
os._exit(0)
"""

FORKING = """
def work(input):
    child = os.fork()
    if child == 0:
        sys.exit()  # leaves all blocks that its parent is in
    os.waitpid(child, 0)
    say("working")
    sys.stdin.readline()
    return {"by": "parent"}

with StepRunStore.from_url(url, prefix=prefix) as store:
    say(store.run_step("run", "pay", work, {}))
"""


@contextlib.contextmanager
def process(bench: Bench, script: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that uses the prefix of the bench, and waits until it is working."""
    path = bench.backend.raw.connection_pool.connection_kwargs["path"]
    command = [sys.executable, "-c", HEAD + script, f"unix://{path}", bench.prefix]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert read_line(started) == "working"
            yield started
        finally:
            started.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def resume(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()


@pytest.mark.all_buckets
@real_server
class TestWorkerProcesses:
    def flavor(self, bench: Bench) -> str:
        """The key of the script of the flavor under test."""
        return "blocking" if bench.runner is None else "asyncio"

    def test_process_told_to_stop_releases_its_claim(self, bench: Bench, others: StepRunStore) -> None:
        with process(bench, STOPPABLE[self.flavor(bench)]) as worker:
            assert stored(others).status is StepStatus.RUNNING

            worker.send_signal(signal.SIGTERM)

            assert (read_line(worker), worker.wait(30)) == ("stopped", 0)
        assert stored(others).status is StepStatus.PENDING
        assert outcomes(others) == [Outcome.RELEASED]
        assert begun(others.begin_step("run", "pay", {}, max_attempts=1)).attempt == 2

    @pytest.mark.parametrize("completed", [True, False])
    def test_process_suspended_past_its_lease_notices_the_loss(
        self, bench: Bench, others: StepRunStore, completed: bool
    ) -> None:
        with process(bench, ZOMBIE[self.flavor(bench)]) as zombie:
            zombie.send_signal(signal.SIGSTOP)
            os.waitpid(zombie.pid, os.WUNTRACED)
            bench.lapse(stored(others))
            winner = begun(others.begin_step("run", "pay", {}, lease=60, owner="winner"))

            zombie.send_signal(signal.SIGCONT)

            assert read_line(zombie) == "lost"
            if completed:
                winner = others.complete_step(winner, {"by": "winner"})
            resume(zombie)
            assert read_line(zombie) == ("{'by': 'winner'}" if completed else "busy")
            assert zombie.wait(30) == 0
        assert stored(others) == winner

    @blocking_only
    def test_forked_child_extends_only_its_own_claims(self, bench: Bench, others: StepRunStore) -> None:
        with process(bench, FORKED) as parent:
            assert parent.wait(30) == 0
            first = stored(others, step="child").lease_ends_at
            assert first is not None

            wait_until(lambda: others.begin_step("run", "parent", {}, lease=60).decision == "execute")
            wait_until(lambda: cast("Any", stored(others, step="child").lease_ends_at) > first + timedelta(seconds=1))

            resume(parent)
            assert read_line(parent) == "done"
        assert stored(others, step="child").output == {"lost": False}
        assert outcomes(others, "child") == [Outcome.COMPLETED]
        assert outcomes(others, "parent") == [Outcome.LEASE_EXPIRED, Outcome.RUNNING]

    @blocking_only
    def test_forked_child_cannot_end_its_parents_claim(self, bench: Bench, others: StepRunStore) -> None:
        with process(bench, FORKING) as parent:
            assert stored(others).status is StepStatus.RUNNING
            resume(parent)
            assert read_line(parent) == "{'by': 'parent'}"
        assert outcomes(others) == [Outcome.COMPLETED]
