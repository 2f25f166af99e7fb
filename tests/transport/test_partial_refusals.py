"""A refusal says nothing about the commands before and after it: their writes stay written, or unknown."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ConnectionError, MovedError
from support.backends import Bench
from support.proxy import Fault, Proxy
from support.records import begun

from squidstep_redis import (
    AsyncStepRunStore,
    NotReplicatedError,
    OutcomeUnknownError,
    RefusedError,
)
from squidstep_redis.transport import driver
from squidstep_redis.transport.retry import RoundTripError
from transport.conftest import Connect

pytestmark = pytest.mark.servers("valkey")

SHORT = 0.1  # seconds: a call that has to fail is retried for so long
PATIENT = {"socket_timeout": 20, "socket_connect_timeout": 20}

# After these two, the connection is of no use any more. redis-py raises them as errors of the connection.
words = pytest.mark.parametrize("word", ["LOADING", "NOAUTH"])
bypassed = pytest.mark.parametrize("kind", ["own", "plain", "RESP3", "blocking pool"], indirect=True)
hooked = pytest.mark.parametrize("kind", ["hooked"], indirect=True)


def refusal(word: str, script: str | None = None) -> Fault:
    """The server never receives a command, and the client receives a refusal."""
    return Fault(reply=lambda _: f"-{word} no\r\n".encode(), script=script)


def refuse_second_step(proxy: Proxy, word: str) -> None:
    """Refuses each call about the second step, from now on."""
    forward = proxy.translate

    def translate(reply: bytes) -> bytes:
        return f"-{word} no\r\n".encode() if b"second" in b"".join(proxy.commands[-1]) else forward(reply)

    proxy.translate = translate


@words
@bypassed
def test_refusal_within_a_batch_affects_only_its_call(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, word: str, known: None
) -> None:
    store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT)
    refuse_second_step(proxy, word)
    first, second = store.batch([store.calls.begin_step(f"run-{step}", step, {}) for step in ("first", "second")])
    assert begun(first).attempt == 1
    assert type(second) is RefusedError


@words
@hooked
def test_refusal_within_a_pipeline_leaves_the_batch_unknown(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, word: str, known: None
) -> None:
    """redis-py raises the refusal in place of all replies."""
    store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT)
    refuse_second_step(proxy, word)
    with pytest.raises(OutcomeUnknownError):
        store.batch([store.calls.begin_step(f"run-{step}", step, {}) for step in ("first", "second")])
    assert bench.store().get_step_run("run-first", "first") is not None


@words
@bypassed
@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
def test_refused_wait_does_not_deny_the_transition(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, word: str, batch: bool, known: None
) -> None:
    store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT, wait_replicas=1, wait_timeout=0.01)
    call = store.calls.begin_step("run", "pay", {})

    def translate(reply: bytes) -> bytes:
        return f"-{word} no\r\n".encode() if proxy.commands[-1][0] == b"SET" else reply

    proxy.translate = translate
    if batch:
        (error,) = store.batch([call])
        assert type(error) is NotReplicatedError
    else:
        with pytest.raises(NotReplicatedError):
            store.send(call)
    assert bench.store().get_step_run("run", "pay") is not None


@words
@pytest.mark.parametrize("bench", ["asyncio"], indirect=True)
def test_refusal_leaves_later_calls_on_the_connection_unknown(
    bench: Bench, proxy: Proxy, word: str, known: None
) -> None:
    """Two tasks share a connection. The first call is refused, and the second one is executed and gets no reply."""
    runner: Any = bench.runner

    async def begin_both() -> list[Any]:
        url = f"redis://127.0.0.1:{proxy.port}"
        async with AsyncStepRunStore.from_url(url, prefix=bench.prefix, timeout=1, socket_timeout=20) as store:
            await store.get_run("run")
            proxy.add_fault(refusal(word))
            proxy.refuse_after_reply()
            calls = (store.begin_step(f"run-{number}", "pay", {}) for number in range(2))
            return await asyncio.gather(*calls, return_exceptions=True)

    refused, lost = runner.run(begin_both())
    assert type(refused) is RefusedError
    assert type(lost) is OutcomeUnknownError
    assert bench.store().get_step_run("run-1", "pay") is not None


@pytest.mark.parametrize("word", ["LOADING", "NOPERM", "READONLY", "OOM"])
@pytest.mark.parametrize("kind", ["hooked, with retries"], indirect=True)
def test_refusal_of_what_the_client_resent_leaves_the_outcome_unknown(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, word: str, known: None
) -> None:
    """The client sends by itself what got no reply: the first send was executed, and the second one is refused."""
    store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT)
    proxy.drop()
    for _ in range(100):
        proxy.add_fault(refusal(word))
    with pytest.raises(OutcomeUnknownError):
        store.begin_step("run", "pay", {})
    assert bench.store().get_step_run("run", "pay") is not None


@bypassed
def test_call_that_was_refused_and_then_not_sent_is_refused(
    connect_to: Connect, proxy: Proxy, kind: str, known: None
) -> None:
    """Bytes of it were sent, so it is no NotSentError. It wrote nothing, so its outcome is known."""
    store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT)

    def refuse(_: bytes) -> bytes:
        proxy.refuse()
        return b"-LOADING no\r\n"

    proxy.add_fault(Fault(reply=refuse))
    with pytest.raises(RefusedError, match="refused earlier, and could not be reached now: .* Nothing was written"):
        store.get_run("run")


def test_call_that_was_redirected_to_an_unknown_node_is_refused(bench: Bench) -> None:
    """A node received it, and refused it."""
    steps = driver.send(bench.store().calls.get_run("run"), 0.0, None)
    assert isinstance(next(steps), driver.Execute)
    assert isinstance(steps.send(MovedError("7 127.0.0.1:0")), driver.Redirect)
    with pytest.raises(RefusedError, match="Nothing was written"):
        steps.throw(RoundTripError(ConnectionError("no such node"), sent=False))
