"""A worker is killed at every point of a step's life, and the step is delivered again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from support.proxy import Fault, Proxy

from squidstep_redis import Attempt, Outcome, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.scripts import script

# A worker with one step, and the points at which it can be killed. The effect of the step is a line in a file.
WORKER = """
import os, signal, sys
from squidstep_redis import StepRunStore
url, point, effects = sys.argv[1:]
def at(name):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)
store = StepRunStore.from_url(url)
at("before begin")
claim, decision = store.begin_step("run", "pay", {"amount": 42}, lease=1, owner="victim")
assert decision == "execute"
at("after the claim")
with open(effects, "a") as file:
    file.write("the victim paid\\n")
at("after the effect")
store.complete_step(claim, {"by": "victim"}, schedule={"mail": {}})
at("after complete")
"""


class Scene:
    """A server behind a proxy, and the file with the effects."""

    def __init__(self, server: EmbeddedServer, proxy: Proxy, store: StepRunStore, effects: Path) -> None:
        self.store = store
        self.proxy = proxy
        self._url = f"redis://127.0.0.1:{proxy.port}/0"
        self._path = effects
        self._path.touch()

    def start(self, point: str = "") -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WORKER, self._url, point, str(self._path)])

    def kill_at(self, point: str) -> None:
        assert self.start(point).wait(60) == -9

    def deliver_again(self) -> dict[str, Any]:
        """Returns the output of the next delivery, which waits until the first has ended or its lease is over."""
        return self.store.run_step("run", "pay", self._pay, {"amount": 42}, on_busy="wait", owner="successor")

    def _pay(self, input: dict[str, Any]) -> dict[str, Any]:
        with self._path.open("a") as file:
            file.write("the successor paid\n")
        return {"by": "successor"}

    @property
    def effects(self) -> list[str]:
        return self._path.read_text().splitlines()

    @property
    def attempts(self) -> list[Attempt]:
        return self.store.attempts("run", "pay")


@pytest.fixture
def scene(binary: Path, tmp_path: Path) -> Iterator[Scene]:
    with (
        EmbeddedServer(binary=binary, port=0) as server,
        Proxy((server.host, server.port)) as proxy,
        StepRunStore.from_url(server.url) as store,
    ):
        # Without the scripts, the first request would only be an EVALSHA that fails with NOSCRIPT.
        for name in ("begin_step", "complete_step"):
            cast("Any", store.client).script_load(script(name).source)
        yield Scene(server, proxy, store, tmp_path / "effects")


def assert_taken_over(scene: Scene) -> None:
    first, second = scene.attempts
    assert (first.owner, first.outcome) == ("victim", Outcome.LEASE_EXPIRED)
    assert (second.owner, second.outcome) == ("successor", Outcome.COMPLETED)
    assert first.started_at is not None
    assert second.started_at is not None
    assert (second.started_at - first.started_at).total_seconds() >= 1  # the lease
    assert [step_run.step for step_run in scene.store.get_run("run")] == ["pay"]


def test_step_of_worker_killed_before_begin_is_unknown(scene: Scene) -> None:
    scene.kill_at("before begin")

    assert scene.store.get_run("run") == []
    assert scene.deliver_again() == {"by": "successor"}
    assert [(attempt.number, attempt.owner) for attempt in scene.attempts] == [(1, "successor")]


@pytest.mark.parametrize("point", ["after the claim", "after the effect"])
def test_step_of_worker_killed_with_claim_is_taken_over(scene: Scene, point: str) -> None:
    scene.kill_at(point)

    assert scene.deliver_again() == {"by": "successor"}
    assert_taken_over(scene)
    paid = ["the victim paid", "the successor paid"]
    assert scene.effects == (paid if point == "after the effect" else paid[1:])  # an effect may repeat


def kill_during_completion(scene: Scene, arrives: Callable[[bytes], bytes]) -> None:
    """Kills the worker while the proxy holds its complete_step.

    Args:
        scene: the server, the proxy and the effects.
        arrives: returns the part of the request that the server receives.
    """
    worker = scene.start()

    def kill_and_pass_on(request: bytes) -> bytes:
        worker.kill()
        worker.wait()
        return arrives(request)

    scene.proxy.add_fault(Fault(request=kill_and_pass_on, script="complete_step"))
    assert worker.wait(60) == -9


@pytest.mark.parametrize("arrives", ["nothing", "half of it", "all but the last byte"])
def test_completion_that_does_not_fully_arrive_has_no_effect(scene: Scene, arrives: str) -> None:
    bytes_short = {
        "nothing": len,
        "half of it": lambda request: len(request) // 2,
        "all but the last byte": lambda _: 1,
    }
    kill_during_completion(scene, lambda request: request[: len(request) - bytes_short[arrives](request)])

    assert scene.deliver_again() == {"by": "successor"}
    assert_taken_over(scene)


def test_completion_that_arrives_takes_full_effect(scene: Scene) -> None:
    kill_during_completion(scene, bytes)

    assert scene.deliver_again() == {"by": "victim"}
    assert scene.effects == ["the victim paid"]
    assert [step_run.step for step_run in scene.store.get_run("run")] == ["pay", "mail"]
    assert scene.store.completed_steps("run") == ["pay"]


def test_step_of_worker_killed_after_complete_is_skipped(scene: Scene) -> None:
    scene.kill_at("after complete")

    assert scene.deliver_again() == {"by": "victim"}
    assert scene.effects == ["the victim paid"]
    assert [(attempt.owner, attempt.outcome) for attempt in scene.attempts] == [("victim", Outcome.COMPLETED)]
