"""A reply that is left on a connection reaches no call, and goes together with its connection."""

from __future__ import annotations

import asyncio
import select
from typing import Any

import pytest
from support.backends import Bench
from support.claims import until
from support.internals import plain_store
from support.operations import finish
from support.proxy import Fault, Proxy
from support.records import begun

from squidstep_redis import StepRunStore
from transport.conftest import Connect, pool_connection

pytestmark = pytest.mark.servers("valkey")

# Replies that an interrupted command may leave behind.
LEFT = {
    "of a script": b"*3\r\n$9\r\ncompleted\r\n$1\r\n0\r\n$1\r\nx\r\n",
    "of PING": b"+PONG\r\n",
    "an error": b"-ERR no such key\r\n",
    "of the batch's kind": b"+OK\r\n",
    "half of one": b"*3\r\n$9\r\ncompl",
}
# All of them where the store reads by itself; where redis-py checks, those that it could take for a reply. It waits for
# the rest of half a reply, until its timeout.
WITH_ANOTHER = [
    *(("own", left) for left in LEFT),
    *((kind, left) for kind in ("plain", "RESP3") for left in ("of a script", "an error")),
    *((kind, "of a script") for kind in ("blocking pool", "hooked")),
]
BEFORE_THE_OWN = [
    *(("own", left) for left in ("of a script", "of PING", "an error")),
    *((kind, left) for kind in ("plain", "RESP3", "hooked") for left in ("of a script", "an error")),
]


@pytest.fixture(params=[False, True], ids=["single", "batch"])
def batch(request: pytest.FixtureRequest) -> bool:
    return request.param


def begin(store: StepRunStore, name: str, count: int, *, retryable: bool = True) -> None:
    """Begins steps, alone or as a batch, and checks that each call gets its own reply."""
    calls = [
        store.calls.begin_step(f"run-{name}-{number}", "pay", {"n": number})._replace(retryable=retryable)
        for number in range(count)
    ]
    results: list[Any] = store.batch(calls) if count > 1 else [store.send(calls[0])]
    assert [(begun(result).attempt, begun(result).input) for result in results] == [(1, {"n": n}) for n in range(count)]


def check_recovery(store: StepRunStore, proxy: Proxy, count: int) -> None:
    """Checks that calls get their own replies, and soon need one send each again."""
    begin(store, "first", count)
    sends = proxy.round_trips
    for number in range(10):
        begin(store, f"later-{number}", 1, retryable=False)
    begin(store, "later", 3)
    if count == 1:
        assert proxy.round_trips - sends >= 10


@pytest.mark.parametrize("kind", ["plain", "RESP3", "blocking pool", "hooked"], indirect=True)
def test_reply_left_by_the_user_is_discarded_with_its_connection(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, batch: bool, known: None
) -> None:
    store = connect_to(kind, proxy.port, client={"client_name": bench.prefix}, timeout=20)
    begin(store, "before", 1)
    client: Any = store.client

    async def leave_asyncio() -> None:
        connection = await pool_connection(client)
        await connection.send_command("PING")
        await client.connection_pool.release(connection)
        await until(lambda: connection._reader._buffer)

    if bench.runner is not None:
        finish(bench, leave_asyncio())
    else:
        connection = pool_connection(client)
        connection.send_command("PING")
        client.connection_pool.release(connection)
        assert select.select([connection._sock], [], [], 20)[0]
    check_recovery(store, proxy, 3 if batch else 1)


@pytest.mark.parametrize(("kind", "left"), WITH_ANOTHER, indirect=["kind"])
def test_reply_that_arrives_with_another_is_discarded_with_its_connection(
    connect_to: Connect, proxy: Proxy, kind: str, batch: bool, left: str, known: None
) -> None:
    store = connect_to(kind, proxy.port, timeout=20)
    begin(store, "before", 1)
    proxy.add_fault(Fault(reply=lambda reply: reply + LEFT[left], script="schedule_step"))
    store.schedule_step("left", "pay", {})
    check_recovery(store, proxy, 3 if batch else 1)


@pytest.mark.parametrize(("kind", "left"), BEFORE_THE_OWN, indirect=["kind"])
def test_reply_before_the_calls_own_is_discarded_with_its_connection(
    connect_to: Connect, proxy: Proxy, kind: str, batch: bool, left: str, known: None
) -> None:
    store = connect_to(kind, proxy.port, timeout=20)
    begin(store, "before", 1)
    if left == "an error":
        proxy.add_fault(Fault(reply=lambda reply: LEFT["of a script"] + LEFT[left] + reply, script="begin_step"))
    else:
        proxy.add_fault(Fault(reply=lambda reply: LEFT[left] + reply, script="begin_step"))
    check_recovery(store, proxy, 3 if batch else 1)


@pytest.mark.parametrize("bench", ["asyncio"], indirect=True)  # blocking calls share no connection
def test_other_tasks_on_a_mismatched_connection_get_their_own_replies(
    bench: Bench, connect_to: Connect, proxy: Proxy, known: None
) -> None:
    assert bench.runner is not None
    store = plain_store(connect_to("own", proxy.port, timeout=20))

    async def main() -> None:
        await store.schedule_step("run", "before", {})
        proxy.add_fault(Fault(reply=lambda reply: LEFT["of a script"] + reply, script="begin_step"))
        results = await asyncio.gather(*[store.begin_step(f"run-{n}", "pay", {"n": n}) for n in range(50)])
        assert [(begun(result).attempt, begun(result).input["n"]) for result in results] == [(1, n) for n in range(50)]

    bench.runner.run(main())
