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

# One step, and the points at which the worker may be killed. The effect is a line in a file.
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
    """A server, a proxy before it, and the file that shows what was paid."""

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
        """What the next delivery comes to, once the first is finished or its lease is over."""
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
        # Else what is killed is the question whether the server knows the script.
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


def test_before_begin_nothing_is_known_of_it(scene: Scene) -> None:
    scene.kill_at("before begin")

    assert scene.store.get_run("run") == []
    assert scene.deliver_again() == {"by": "successor"}
    assert [(attempt.number, attempt.owner) for attempt in scene.attempts] == [(1, "successor")]


@pytest.mark.parametrize("point", ["after the claim", "after the effect"])
def test_with_the_claim_in_hand_it_is_taken_over_when_the_lease_ends(scene: Scene, point: str) -> None:
    scene.kill_at(point)

    assert scene.deliver_again() == {"by": "successor"}
    assert_taken_over(scene)
    paid = ["the victim paid", "the successor paid"]
    assert scene.effects == (paid if point == "after the effect" else paid[1:])  # an effect may repeat


def killed_completing(scene: Scene, arrives: Callable[[bytes], bytes]) -> None:
    """Kills the worker while the proxy has its complete_step in hand, of which the server then gets so much."""
    worker = scene.start()

    def kill_and_pass_on(request: bytes) -> bytes:
        worker.kill()
        worker.wait()
        return arrives(request)

    scene.proxy.add_fault(Fault(request=kill_and_pass_on, script="complete_step"))
    assert worker.wait(60) == -9


@pytest.mark.parametrize("arrives", ["nothing", "half of it", "all but the last byte"])
def test_during_a_completion_that_does_not_arrive_none_of_it_takes_effect(scene: Scene, arrives: str) -> None:
    bytes_short = {
        "nothing": len,
        "half of it": lambda request: len(request) // 2,
        "all but the last byte": lambda _: 1,
    }
    killed_completing(scene, lambda it: it[: len(it) - bytes_short[arrives](it)])

    assert scene.deliver_again() == {"by": "successor"}
    assert_taken_over(scene)


def test_during_a_completion_that_arrives_all_of_it_takes_effect(scene: Scene) -> None:
    killed_completing(scene, bytes)

    assert scene.deliver_again() == {"by": "victim"}
    assert scene.effects == ["the victim paid"]
    assert [step_run.step for step_run in scene.store.get_run("run")] == ["pay", "mail"]
    assert scene.store.completed_steps("run") == ["pay"]


def test_after_complete_it_is_skipped(scene: Scene) -> None:
    scene.kill_at("after complete")

    assert scene.deliver_again() == {"by": "victim"}
    assert scene.effects == ["the victim paid"]
    assert [(attempt.owner, attempt.outcome) for attempt in scene.attempts] == [("victim", Outcome.COMPLETED)]
