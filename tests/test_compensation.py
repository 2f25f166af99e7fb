"""The recipe of tests/guide/compensation.md: undone once and in reverse order, wherever its workers are killed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.backends import Bench
from support.records import stored

from squidstep_redis import PermanentError, StepBusyError, StepRunStore

REPOSITORY = Path(__file__).parents[1]
GUIDE = REPOSITORY / "tests" / "guide" / "compensation.md"
RECIPE = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL))

pytestmark = [
    pytest.mark.all_buckets,
    pytest.mark.parametrize("bench", ["blocking"], indirect=True),  # the recipe is for a blocking store
]

WORKER = """
import os, signal, sys
from saga import deliver
from squidstep_redis import PermanentError, StepRunStore, current_claim

url, prefix = sys.argv[1:]
store = StepRunStore.from_url(url, prefix=prefix)

def once_killed(point):
    if store.client.sadd(f"{prefix}-killed", point):
        os.kill(os.getpid(), signal.SIGKILL)

def does(name):
    def work(input):
        once_killed(f"before {name}")
        if store.client.set(f"{prefix}-{current_claim().step_run.id}", 1, nx=True):  # as another system would
            store.client.rpush(f"{prefix}-log", name)
        once_killed(f"after {name}")
        return {"of": name}
    return work

def fails(input):
    once_killed("before the failure")
    raise PermanentError("it cannot be done")

steps = {step: (does(step), does(f"undo {step}")) for step in ("c", "a", "b")}
kills = 0
while True:
    worker = os.fork()
    if not worker:
        deliver(store, "run", {}, {**steps, "d": (fails, None)})
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if not status:
        break
    assert status == -signal.SIGKILL, status
    kills += 1
    (killed,) = (each.step for each in store.get_run("run") if each.status == "running")
    store.expire_claim(store.get_step_run("run", killed))  # instead of waiting for its lease
print(kills)
"""


@pytest.fixture
def saga() -> Any:
    """The module of the guide."""
    names: dict[str, Any] = {}
    exec(compile(RECIPE["saga.py"], str(GUIDE), "exec"), names)
    return SimpleNamespace(**names)


def logging(log: list[str], name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def work(input: dict[str, Any]) -> dict[str, Any]:
        log.append(name)
        return {"of": name, "got": input.get("of")}

    return work


def steps_of(log: list[str], *names: str) -> dict[str, Any]:
    return {name: (logging(log, name), logging(log, f"undo {name}")) for name in names}


@pytest.mark.servers("valkey", "redis-7", "redis-6")
def test_killed_workers_undo_each_step_once_in_reverse_order(bench: Bench, store: StepRunStore, tmp_path: Path) -> None:
    (tmp_path / "saga.py").write_text(RECIPE["saga.py"], "utf-8")
    (tmp_path / "worker.py").write_text(WORKER, "utf-8")
    command = [sys.executable, "worker.py", bench.backend.url or "", bench.prefix]
    environment = {"PYTHONPATH": str(REPOSITORY)}

    killed = subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE).stdout

    assert int(killed) == 13  # before and after each of six effects, and before the failure
    assert bench.backend.raw.lrange(f"{bench.prefix}-log", 0, -1) == [
        *(b"c", b"a", b"b"),
        *(b"undo b", b"undo a", b"undo c"),
    ]
    assert store.completed_steps("run") == ["c", "a", "b", "undo:b", "undo:a", "undo:c", "undo"]
    assert [attempt.outcome for attempt in store.attempts("run", "undo:a")] == [
        *("lease_expired", "lease_expired"),
        "completed",
    ]


def test_compensation_receives_the_output_of_its_step(store: StepRunStore, saga: Any) -> None:
    log: list[str] = []
    steps = steps_of(log, "a", "b")
    saga.deliver(store, "run", {}, steps)

    saga.compensate(store, "run", steps, "cancelled")

    assert log == ["a", "b", "undo b", "undo a"]
    assert stored(store, step="undo:a").output == {"of": "undo a", "got": "a"}


def test_compensation_waits_for_a_step_that_is_running(store: StepRunStore, saga: Any) -> None:
    log: list[str] = []
    steps = steps_of(log, "a", "b")

    def cancelled_meanwhile(input: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(StepBusyError, match="step 'b'"):
            saga.compensate(store, "run", steps, "cancelled")
        assert log == ["a"]
        return logging(log, "b")(input)

    saga.deliver(store, "run", {}, {**steps, "b": (cancelled_meanwhile, None)})
    saga.compensate(store, "run", steps, "cancelled")

    assert log == ["a", "b", "undo b", "undo a"]


def test_step_that_begins_after_the_decision_does_nothing(store: StepRunStore, saga: Any) -> None:
    log: list[str] = []
    steps = steps_of(log, "a", "b", "c")
    store.run_step("run", "a", steps["a"][0], {})
    saga.compensate(store, "run", steps, "cancelled")

    with pytest.raises(PermanentError, match="is being undone"):
        store.run_step("run", "b", saga.unless_undone(store, "run", steps["b"][0]), {})
    store.retry_step("run", "b")
    for _ in range(2):
        saga.deliver(store, "run", {}, steps)

    assert log == ["a", "undo a"]
    assert stored(store, step="undo").output == {"undone": ["a"]}


def test_failed_compensation_leaves_the_earlier_steps_for_the_next_delivery(store: StepRunStore, saga: Any) -> None:
    log: list[str] = []
    steps = steps_of(log, "a", "b", "c")

    def fails_once(input: dict[str, Any]) -> dict[str, Any]:
        log.append("undo b")
        if log.count("undo b") == 1:
            raise ConnectionError
        return {}

    steps["b"] = (steps["b"][0], fails_once)
    saga.deliver(store, "run", {}, steps)
    with pytest.raises(ConnectionError):
        saga.compensate(store, "run", steps, "cancelled")
    assert stored(store, step="undo").status == "pending"
    saga.compensate(store, "run", steps, "cancelled")

    assert log == ["a", "b", "c", "undo c", "undo b", "undo b", "undo a"]
