"""Replies that belong to another call: the store detects them, and re-sends the call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import cast

import pytest
from support.backends import Backend, Bench
from support.operations import (
    CALLS,
    perform,
    prepare,
    seen,
    state,
)
from support.proxy import Proxy
from support.records import begun

from squidstep_redis import (
    AsyncStepRunStore,
    BeginResult,
    ReplyMismatchError,
    StepRunStore,
)

pytestmark = [
    pytest.mark.servers("valkey", "redis-7", "redis-6"),
    # redis-py 6.0 to 6.2 warns about its own use of a deprecated argument.
    pytest.mark.filterwarnings("ignore:.*cluster_error_retry_attempts:DeprecationWarning"),
]

WRONG_REPLIES = {
    "of another call": b"*3\r\n$9\r\ncompleted\r\n$1\r\n0\r\n$1\r\nx\r\n",
    "an empty array": b"*0\r\n",
    "nothing": b"$-1\r\n",
    "no array": b"*-1\r\n",
    "OK": b"+OK\r\n",
    "a number": b":1\r\n",
    "a string": b"$2\r\nhi\r\n",
}


class TestRepliesToAnotherCall:
    @pytest.mark.parametrize("reply", WRONG_REPLIES.values(), ids=WRONG_REPLIES)
    def test_a_call_with_a_wrong_reply_is_sent_again(
        self, proxy: Proxy, proxied: StepRunStore, known: None, reply: bytes
    ) -> None:
        proxy.replace_replies(reply)

        assert begun(proxied.begin_step("run", "pay", {})).attempt == 1
        assert proxy.names() == ["EVALSHA", "EVALSHA"]

    @pytest.mark.parametrize("operation", CALLS)
    def test_every_operation_detects_a_wrong_reply(
        self, bench: Bench, proxy: Proxy, proxied: StepRunStore, twin: StepRunStore, known: None, operation: str
    ) -> None:
        expected = perform(twin, operation, prepare(bench, twin))
        claim = prepare(bench, proxied)
        proxy.replace_replies(WRONG_REPLIES["of another call"])

        assert seen(perform(proxied, operation, claim)) == seen(expected)
        assert state(proxied) == state(twin)

    def test_after_the_deadline_the_same_call_can_be_sent_again(
        self, proxy: Proxy, connect: Callable[..., StepRunStore], known: None
    ) -> None:
        store = connect(timeout=0.5)
        proxy.replace_replies(*[WRONG_REPLIES["of another call"]] * 1_000)

        with pytest.raises(
            ReplyMismatchError,
            match="begin_step, run 'run', step 'pay': an earlier call on this connection was interrupted",
        ) as caught:
            store.begin_step("run", "pay", {})

        proxy.heal()
        assert caught.value.call is not None
        assert begun(store.send(caught.value.call)).attempt == 1

    def test_a_reply_left_on_the_connection_reaches_no_call(
        self, proxy: Proxy, proxied: StepRunStore, known: None
    ) -> None:
        left = WRONG_REPLIES["of another call"]
        proxy.replace_replies(left + left)  # one of them stays on the connection

        for number in range(5):
            step_run = begun(proxied.begin_step(f"run-{number}", "pay", {"n": number}))
            assert (step_run.attempt, step_run.input) == (1, {"n": number})

    def test_a_batch_with_a_wrong_reply_is_sent_again(self, proxy: Proxy, proxied: StepRunStore) -> None:
        calls = [proxied.calls.begin_step(f"run-{number}", "pay", {"n": number}) for number in range(5)]
        left = WRONG_REPLIES["of another call"]
        proxy.replace_replies(left + left)

        outcomes = [begun(cast("BeginResult", outcome)) for outcome in proxied.batch(calls)]

        assert [(step_run.attempt, step_run.input["n"]) for step_run in outcomes] == [(1, n) for n in range(5)]


@pytest.mark.servers("valkey", "redis-7", "redis-6", "cluster")
def test_a_cancelled_task_leaves_no_reply_behind(backend: Backend, runner: asyncio.Runner) -> None:
    """A task is cancelled at every point of a call. The calls that follow get their own replies."""

    async def main() -> None:
        client = backend.connect_asyncio()
        store = AsyncStepRunStore(client, prefix="test-cancelled")
        for operation in (store.send, lambda call: store.batch([call] * 3)):
            for steps in range(25):
                task = asyncio.ensure_future(operation(store.calls.begin_step("cancelled", f"step-{steps}", {})))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                for number in range(3):
                    result = await store.begin_step(f"run-{operation}", f"{steps}-{number}", {"n": number})
                    assert begun(result).input == {"n": number}
        await client.aclose()

    runner.run(main())
