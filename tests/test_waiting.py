"""`wait_for_step`: the script that ends a step notifies its waiters, and a lost notification does no harm."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from support.backends import Backend, Bench
from support.proxy import Proxy
from support.records import begun
from support.servers import wait_until

from squidstep_redis import (
    InvalidArgumentError,
    RunDeletedError,
    StepRun,
    StepRunStore,
    StepStatus,
    WaitTimeoutError,
)
from squidstep_redis.operations import waiting as waiting_module

LONG = 30  # seconds


@contextmanager
def waiting(bench: Bench, store: StepRunStore, *steps: str, timeout: float = LONG) -> Iterator[list[Future[StepRun]]]:
    """In the block, one thread per step waits for it."""
    with ThreadPoolExecutor(len(steps)) as threads:
        yield [threads.submit(waiter(bench), step, timeout) for step in steps]


def waiter(bench: Bench) -> Callable[[str, float], StepRun]:
    """Returns a function that waits in another thread, with its own blocking client."""
    other = Bench(bench.backend, None, bench.prefix)

    def wait(step: str, timeout: float) -> StepRun:
        try:
            return other.store().wait_for_step("run", step, timeout)
        finally:
            other.close()

    return wait


def is_awaited(bench: Bench, step: str = "pay") -> bool:
    """Returns whether the step has the mark of a waiter."""
    return bench.field("run", f"w{step}") is not None


@pytest.fixture
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiter that is not notified waits until its test fails."""
    monkeypatch.setattr(waiting_module, "_LAST_POLL", 2 * LONG)


ENDS: dict[str, Callable[[StepRunStore, StepRun], Any]] = {
    "complete_step": lambda store, claim: store.complete_step(claim, {"receipt": 7}),
    "complete_step by id": lambda store, claim: store.complete_step(claim.id, {"receipt": 7}),
    "complete_step with successors": lambda store, claim: store.complete_step(
        claim, {"receipt": 7}, schedule={"b": {}}
    ),
    "advance_step": lambda store, claim: store.advance_step(claim, {"receipt": 7}, "next", {}),
    "fail_step": lambda store, claim: store.fail_step(claim, {"reason": "declined"}),
    "batch": lambda store, claim: store.batch([store.calls.complete_step(claim, {"receipt": 7})]),
}


@pytest.mark.parametrize("how", ENDS)
def test_every_waiter_is_notified_when_the_step_ends(
    bench: Bench, store: StepRunStore, no_polls: None, how: str
) -> None:
    claim = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60))
    with waiting(bench, store, "pay", "pay", "pay") as waiters:
        wait_until(lambda: is_awaited(bench))
        ENDS[how](store, claim)
        for each in waiters:
            assert each.result(LONG) == store.get_step_run("run", "pay")
    assert not is_awaited(bench)


def test_waiter_is_notified_when_the_last_attempt_has_lapsed(bench: Bench, store: StepRunStore, no_polls: None) -> None:
    claim = begun(store.begin_step("run", "pay", {"amount": 1}, lease=60, max_attempts=1))
    with waiting(bench, store, "pay") as (waiter,):
        wait_until(lambda: is_awaited(bench))
        store.expire_claim(claim)
        assert store.begin_step("run", "pay", {}, max_attempts=1).exhausted
        assert waiter.result(LONG) == store.get_step_run("run", "pay")
    assert not is_awaited(bench)


@pytest.mark.parametrize("ttl", [None, 60])
def test_waiters_are_notified_of_their_own_step_only(bench: Bench, no_polls: None, ttl: float | None) -> None:
    store = bench.store(run_ttl=ttl)
    claims = {step: begun(store.begin_step("run", step, {})) for step in ("a", "b")}
    with waiting(bench, store, "a", "b") as (a, b):
        wait_until(lambda: is_awaited(bench, "a") and is_awaited(bench, "b"))
        store.complete_step(claims["a"], {"of": "a"})
        assert a.result(LONG).output == {"of": "a"}
        assert not b.done()
        store.complete_step(claims["b"], {"of": "b"})
        assert b.result(LONG).output == {"of": "b"}


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_step_that_has_ended_is_returned_at_once(store: StepRunStore, status: str) -> None:
    claim = begun(store.begin_step("run", "pay", {}))
    ended = store.complete_step(claim, {"receipt": 7}) if status == "completed" else store.fail_step(claim, {"no": 1})
    assert store.wait_for_step("run", "pay", LONG) == ended


def test_waiter_survives_a_lost_notification(
    bench: Bench, store: StepRunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_module, "_LAST_POLL", 0.1)
    claim = begun(store.begin_step("run", "pay", {}))
    with waiting(bench, store, "pay") as (waiter,):
        wait_until(lambda: is_awaited(bench))
        bench.backend.raw.hdel(bench.keys("run")[0], "wpay")
        store.complete_step(claim, {"receipt": 7})
        assert waiter.result(LONG).output == {"receipt": 7}


def test_waiter_can_start_before_the_step_exists(bench: Bench, store: StepRunStore) -> None:
    with waiting(bench, store, "pay") as (waiter,):
        store.complete_step(begun(store.begin_step("run", "pay", {})), {"receipt": 7})
        assert waiter.result(LONG).output == {"receipt": 7}


def test_waiter_waits_through_a_takeover(bench: Bench, store: StepRunStore, no_polls: None) -> None:
    lost = begun(store.begin_step("run", "pay", {}, lease=60))
    with waiting(bench, store, "pay") as (waiter,):
        wait_until(lambda: is_awaited(bench))
        store.expire_claim(lost)
        store.complete_step(begun(store.begin_step("run", "pay", {})), {"by": 2})
        assert waiter.result(LONG).output == {"by": 2}


@pytest.mark.parametrize("begin", [False, True])
def test_timeout_raises_an_error_with_the_current_state(store: StepRunStore, begin: bool) -> None:
    if begin:
        store.begin_step("run", "pay", {})
    started = time.monotonic()
    with pytest.raises(WaitTimeoutError) as caught:
        store.wait_for_step("run", "pay", 0.15)
    assert time.monotonic() - started >= 0.15
    assert (caught.value.run_id, caught.value.step) == ("run", "pay")
    if begin:
        assert caught.value.current is not None
        assert caught.value.current.status is StepStatus.RUNNING
        assert str(caught.value) == "run 'run', step 'pay': did not end within 0.15 s; it is running"
    else:
        assert caught.value.current is None
        assert str(caught.value) == "run 'run', step 'pay': did not end within 0.15 s; there is no such step run yet"
    assert isinstance(caught.value, TimeoutError)


def test_deleted_run_ends_the_wait(bench: Bench, store: StepRunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_module, "_LAST_POLL", 0.1)
    store.begin_step("run", "pay", {})
    with waiting(bench, store, "pay") as (waiter,):
        wait_until(lambda: is_awaited(bench))
        store.delete_run("run")
        with pytest.raises(RunDeletedError):
            waiter.result(LONG)


def test_notification_key_is_written_only_for_waiters(bench: Bench, store: StepRunStore) -> None:
    store.complete_step(begun(store.begin_step("run", "pay", {})), {})
    store.wait_for_step("run", "pay", 1)
    assert {key.rpartition(b":")[2] for key in bench.backend.keys(bench.prefix)} == {b"steps", b"done", b"runs"}


def test_notification_key_expires_after_a_waiter_has_left(bench: Bench, store: StepRunStore) -> None:
    claim = begun(store.begin_step("run", "pay", {}))
    with pytest.raises(WaitTimeoutError):
        store.wait_for_step("run", "pay", 0.01)
    store.complete_step(claim, {})
    (wake,) = (key for key in bench.backend.keys(bench.prefix) if key.endswith(b":wake"))
    assert 0 < bench.backend.raw.pttl(wake) <= 60_000


@pytest.mark.parametrize("timeout", [0, -1, "1", None])
def test_invalid_timeout_is_rejected(store: StepRunStore, timeout: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="^timeout: "):
        store.wait_for_step("run", "pay", timeout)


@pytest.mark.servers("valkey")
def test_wrong_type_of_notification_key_prevents_no_completion(bench: Bench, store: StepRunStore) -> None:
    claim = begun(store.begin_step("run", "pay", {}))
    wake = bench.keys("run")[0].replace(b":steps", b":wake")
    bench.backend.raw.set(wake, "other")
    with pytest.raises(WaitTimeoutError):
        store.wait_for_step("run", "pay", 0.05)
    assert store.complete_step(claim, {"receipt": 7}).status is StepStatus.COMPLETED
    assert store.wait_for_step("run", "pay", 1).output == {"receipt": 7}


@pytest.mark.servers("valkey", "cluster")
def test_wait_can_outlast_the_socket_timeout(bench: Bench, store: StepRunStore) -> None:
    """A single blocking command that lasts longer than the socket timeout would fail."""
    claim = begun(store.begin_step("run", "pay", {}))
    waiting_store = bench.store(client_options={"socket_timeout": 0.2})
    other = Bench(bench.backend, None, bench.prefix)
    timer = threading.Timer(0.5, lambda: other.store().complete_step(claim, {"n": 1}))
    timer.start()
    assert waiting_store.wait_for_step("run", "pay", LONG).output == {"n": 1}
    timer.join()
    other.close()


def test_many_tasks_can_wait_with_one_client(
    backend: Backend, runner: asyncio.Runner, no_polls: None, tmp_path: Path
) -> None:
    """Each task uses its own connection while it waits, and none blocks the event loop."""
    bench = Bench(backend, runner, tmp_path.name)
    store: Any = cast("Any", bench.store()).store

    async def main() -> list[StepRun]:
        claim = (await store.begin_step("run", "pay", {})).step_run
        waiters = [asyncio.ensure_future(store.wait_for_step("run", "pay", LONG)) for _ in range(20)]
        while not is_awaited(bench):
            await asyncio.sleep(0.01)
        await store.complete_step(claim, {"receipt": 7})
        return await asyncio.gather(*waiters)

    assert [step_run.output for step_run in runner.run(main())] == [{"receipt": 7}] * 20
    bench.close()


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("word", ["NOPERM", "ERR unknown command 'XREAD'", "TRYAGAIN", "LOADING"])
def test_refused_read_does_not_make_the_waiter_spin(bench: Bench, word: str) -> None:
    """A user without the right to XREAD, for example: the server refuses at once, where it should have blocked."""
    with Proxy.to(bench.backend.raw) as proxy:
        store = bench.from_url(f"redis://127.0.0.1:{proxy.port}/0")
        store.begin_step("run", "pay", {})
        proxy.translate = lambda reply: f"-{word} no\r\n".encode() if proxy.commands[-1][0] == b"XREAD" else reply
        with pytest.raises(WaitTimeoutError):
            store.wait_for_step("run", "pay", 0.3)
        assert 1 <= proxy.names().count("XREAD") <= 5
        store.close()
