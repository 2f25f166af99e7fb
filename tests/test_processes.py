"""Processes, threads and tasks that use one step or one run at the same time."""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from typing import Any, cast

import pytest
from support.backends import Backend, Bench
from support.records import begun
from support.servers import collect_abandoned_connections

from squidstep_redis import AsyncStepRunStore, BeginResult, Outcome, StaleStepRunError, StepRun, StepRunStore

pytestmark = [pytest.mark.all_buckets, pytest.mark.servers("valkey", "redis-7", "redis-6", "cluster")]

DEADLINE = 60.0

Connect = Callable[[], Any]


def run_in_processes(count: int, work: Callable[..., Any], *args: Any, method: str = "fork") -> list[Any]:
    """Runs `work(index, barrier, *args)` in `count` processes, and returns their results."""
    context: Any = multiprocessing.get_context(method)
    barrier = context.Barrier(count)
    started = []
    for index in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_result, args=(sender, work, index, barrier, *args), daemon=True)
        process.start()
        sender.close()
        started.append((process, receiver))
    results = []
    for process, receiver in started:
        assert receiver.poll(DEADLINE), f"{process} sent no result within {DEADLINE} seconds"
        results.append(receiver.recv())
        receiver.close()
        process.join(DEADLINE)
        assert process.exitcode == 0
        process.close()
    assert not [result for result in results if isinstance(result, _Failure)]
    return results


class _Failure(str):
    """The traceback of a process that failed."""

    __slots__ = ()
    __repr__ = str.__str__


def _send_result(sender: Any, work: Callable[..., Any], *args: Any) -> None:
    try:
        sender.send(work(*args))
    except Exception:
        sender.send(_Failure(traceback.format_exc()))


@pytest.fixture(autouse=True)
def collect_garbage() -> Iterator[None]:
    """Collects what a cluster's client abandons when many threads use it for the first time."""
    yield
    collect_abandoned_connections()


def begin_at_once(index: int, barrier: Barrier, connect: Connect, prefix: str) -> BeginResult:
    client = connect()
    store = StepRunStore(client, prefix=prefix)
    store.get_run("run")  # connects
    barrier.wait(DEADLINE)
    result = store.begin_step("run", "pay", {"from": index}, lease=60, owner=f"process-{index}")
    client.close()
    return result


class TestConcurrentBegin:
    @pytest.mark.parametrize(
        ("method", "count"), [("fork", 24), pytest.param("spawn", 3, marks=pytest.mark.not_on("cluster"))]
    )
    def test_one_of_many_processes_executes(self, backend: Backend, method: str, count: int) -> None:
        prefix = f"test-at-once-{method}"

        results = run_in_processes(count, begin_at_once, backend.connect, prefix, method=method)

        executing = [index for index, result in enumerate(results) if result.decision == "execute"]
        assert len(executing) == 1
        assert [result.reason for result in results].count("busy") == count - 1
        assert {result.step_run.owner for result in results} == {f"process-{executing[0]}"}
        assert [result.step_run.input for result in results] == [{"from": executing[0]}] * count
        client = backend.connect()
        store = StepRunStore(client, prefix=prefix)
        assert [attempt.number for attempt in store.attempts("run", "pay")] == [1]
        # Only the result of the process that executes carries a claim.
        for result in results:
            if result.decision == "skip":
                with pytest.raises(StaleStepRunError, match="carries no claim"):
                    store.complete_step(result.step_run, {})
        assert store.complete_step(results[executing[0]].step_run, {"receipt": 7}).output == {"receipt": 7}
        client.close()

    def test_one_of_many_threads_with_one_store_executes(self, backend: Backend) -> None:
        client = backend.connect()
        store = StepRunStore(client, prefix="test-threads")
        barrier = threading.Barrier(32)
        results: list[BeginResult] = []
        unexpected: list[Any] = []

        def work(index: int) -> None:
            barrier.wait(DEADLINE)
            results.append(store.begin_step("run", "pay", {"from": index}))
            for number in range(10):
                own = store.begin_step(f"run-{index}", f"step-{number}", {"from": index, "n": number})
                if own.decision != "execute" or own.step_run.input != {"from": index, "n": number}:
                    unexpected.append(own)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)

        assert [result.reason for result in results].count(None) == 1
        assert [result.reason for result in results].count("busy") == 31
        assert len({result.step_run.input["from"] for result in results}) == 1
        assert unexpected == []
        client.close()

    def test_one_of_many_tasks_with_one_store_executes(self, backend: Backend, runner: asyncio.Runner) -> None:
        async def main() -> None:
            client = backend.connect_asyncio(max_connections=200)  # redis-py's default is 100; an exhausted pool raises
            store = AsyncStepRunStore(client, prefix="test-tasks")
            await store.get_run("run")  # connects

            results = await asyncio.gather(*(store.begin_step("run", "pay", {"from": n}) for n in range(200)))
            own = await asyncio.gather(*(store.begin_step(f"run-{n}", "pay", {"from": n}) for n in range(200)))

            assert [result.reason for result in results].count(None) == 1
            assert [result.reason for result in results].count("busy") == 199
            assert len({result.step_run.input["from"] for result in results}) == 1
            assert [begun(result).input["from"] for result in own] == list(range(200))
            await client.aclose()

        runner.run(main())

    @pytest.mark.servers("cluster")
    def test_tasks_that_share_a_new_cluster_client_are_never_redirected(
        self, backend: Backend, runner: asyncio.Runner
    ) -> None:
        """After a few MOVED replies, redis-py would close the connections of all other tasks."""

        async def main() -> None:
            client = backend.connect_asyncio(max_connections=200)
            store = AsyncStepRunStore(client, prefix="test-first-use")
            calls = (store.begin_step(f"run-{n}", "pay", {"n": n}) for n in range(200))
            results = await asyncio.gather(*calls, return_exceptions=True)
            await client.aclose()
            assert [result for result in results if isinstance(result, Exception)] == []
            assert [begun(cast("BeginResult", result)).input["n"] for result in results] == list(range(200))

        def moved() -> int:
            nodes = backend.raw.info("errorstats", target_nodes="primaries").values()
            return sum(node.get("errorstat_MOVED", {"count": 0})["count"] for node in nodes)

        before = moved()
        runner.run(main())
        assert moved() == before


# Acquires a claim, prints it, and waits until it is killed.
HOLDER = """
import base64, pickle, sys
connect, prefix = pickle.loads(base64.b64decode(sys.argv[1]))
from squidstep_redis import StepRunStore
result = StepRunStore(connect(), prefix=prefix).begin_step("run", "pay", {"amount": 1}, lease=60, owner="victim")
print(base64.b64encode(pickle.dumps(result)).decode(), flush=True)
sys.stdin.read()
"""


def test_killed_holder_is_taken_over_when_its_lease_ends(bench: Bench, store: StepRunStore) -> None:
    argument = base64.b64encode(pickle.dumps((bench.backend.connect, bench.prefix))).decode()
    command = [sys.executable, "-c", HOLDER, argument]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        result = pickle.loads(base64.b64decode(cast("Any", holder.stdout).readline()))
        holder.kill()
    claim = begun(result)
    assert (claim.attempt, claim.owner) == (1, "victim")

    meanwhile = store.begin_step("run", "pay", {"amount": 2}, lease=60)
    assert meanwhile.busy
    assert meanwhile.retry_in is not None
    assert 0 < meanwhile.retry_in <= 60
    bench.lapse(store.extend_claim(claim, 0.01))
    assert [step_run.step for step_run in store.lapsed_claims()] == ["pay"]
    successor = begun(store.begin_step("run", "pay", {"amount": 2}, lease=60))

    assert successor.attempt == 2
    for late in (
        lambda: store.complete_step(claim, {"receipt": 1}),
        lambda: store.fail_step(claim, {"why": "late"}),
        lambda: store.extend_claim(claim, 60),
        lambda: store.release_step(claim),
    ):
        with pytest.raises(StaleStepRunError, match="was taken over: attempt 2"):
            late()
    assert store.complete_step(successor, {"receipt": 2}).output == {"receipt": 2}
    outcomes = [(attempt.owner, attempt.outcome) for attempt in store.attempts("run", "pay")]
    assert outcomes == [("victim", Outcome.LEASE_EXPIRED), (None, Outcome.COMPLETED)]


def complete_steps_with_an_inherited_store(index: int, barrier: Barrier, store: StepRunStore) -> list[Any]:
    barrier.wait(DEADLINE)
    seen = []
    for number in range(25):
        input = {"process": index, "number": number}
        step_run = begun(store.begin_step(f"run-{index}", f"step-{number}", input))
        completed = store.complete_step(step_run, {"of": input})
        seen.append((completed.run_id, completed.step, completed.input, completed.output))
    seen.append(store.begin_step("shared", "pay", {"process": index}).decision)
    return seen


def test_store_connected_before_a_fork_works_in_every_child(backend: Backend) -> None:
    client = backend.connect()
    store = StepRunStore(client, prefix="test-fork")
    for number in range(12):
        store.begin_step(f"before-{number}", "pay", {})  # connects to all nodes

    results = run_in_processes(8, complete_steps_with_an_inherited_store, store)

    for index, result in enumerate(results):
        inputs = [{"process": index, "number": number} for number in range(25)]
        expected = [(f"run-{index}", f"step-{input['number']}", input, {"of": input}) for input in inputs]
        assert result[:-1] == expected
    assert sorted(result[-1] for result in results) == ["execute"] + ["skip"] * 7
    # It still works in the parent.
    assert begun(store.begin_step("after", "pay", {"n": 1})).input == {"n": 1}
    assert len(store.completed_steps("run-7")) == 25
    client.close()


def complete_steps(index: int, barrier: Barrier, connect: Connect, prefix: str) -> tuple[list[str], list[list[str]]]:
    """Completes 30 steps, singly and in a batch; returns them, and each completion order that it read."""
    client = connect()
    store = StepRunStore(client, prefix=prefix)
    steps = [f"step-{index}-{number}" for number in range(30)]
    barrier.wait(DEADLINE)
    claims = [begun(store.begin_step("run", step, {}, lease=60)) for step in steps]
    seen: list[list[str]] = []
    for claim in claims[:20]:
        store.complete_step(claim, {"of": claim.step})
        seen.append(store.completed_steps("run"))
    store.batch([store.calls.complete_step(claim, {"of": claim.step}) for claim in claims[20:]])
    barrier.wait(DEADLINE)
    seen.append(store.completed_steps("run"))
    seen.append([output["of"] for output in store.completed_outputs("run")])
    client.close()
    return steps, seen


def test_steps_completed_by_many_processes_have_one_order(backend: Backend) -> None:
    results = run_in_processes(8, complete_steps, backend.connect, "test-order")

    client = backend.connect()
    order = StepRunStore(client, prefix="test-order").completed_steps("run")
    client.close()
    assert sorted(order) == sorted(step for steps, _ in results for step in steps)
    for steps, seen in results:
        assert [step for step in order if step in steps] == steps
        assert seen[-1] == seen[-2] == order
        # A later read only appends to an earlier one.
        assert all(order[: len(earlier)] == earlier for earlier in seen)


def complete_or_take_over(
    index: int, barrier: Barrier, connect: Connect, prefix: str, claim: StepRun
) -> tuple[str, bool]:
    """Completes the expired claim in processes of an even index, and takes it over in the others."""
    client = connect()
    store = StepRunStore(client, prefix=prefix)
    store.get_run("run")
    barrier.wait(DEADLINE)
    if index % 2:
        result = ("begin", store.begin_step("run", "pay", {"from": index}, lease=60).decision == "execute")
    else:
        try:
            store.complete_step(claim, {"from": index})
            result = ("complete", True)
        except StaleStepRunError:
            result = ("complete", False)
    client.close()
    return result


@pytest.mark.parametrize("attempt", range(2))
def test_late_completion_and_takeover_exclude_each_other(backend: Backend, attempt: int) -> None:
    bench = Bench(backend, None, f"test-late-{attempt}")
    store = bench.store()
    claim = begun(store.begin_step("run", "pay", {}, lease=0.001))
    bench.lapse(claim)

    results = run_in_processes(8, complete_or_take_over, backend.connect, bench.prefix, claim)

    assert [won for _, won in results].count(True) == 1
    (current,) = store.get_run("run")
    assert (current.status, current.attempt) in {("completed", 1), ("running", 2)}
    bench.close()
