"""Replies of a proxy, or of something other than Redis: each call ends with an error of this library."""

from __future__ import annotations

from typing import Any

import pytest
from support.backends import Bench
from support.proxy import Proxy
from support.records import begun

from squidstep_redis import NotReplicatedError, NotSentError, OutcomeUnknownError, ServerError, StepRunStore
from transport.conftest import Connect

pytestmark = pytest.mark.servers("valkey")

SHORT = 0.1  # seconds: a call that has to fail is retried for so long
PATIENT = {"socket_timeout": 20, "socket_connect_timeout": 20}

REPLIES = {
    "a redirect without an address": b"-MOVED 1\r\n",
    "a redirect without a port": b"-ASK 1 host\r\n",
    "a map whose key is a list": b"%1\r\n*1\r\n:1\r\n:2\r\n",
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "an error of no UTF-8": b"-\xff\r\n",
}
each_reply = pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)


@each_reply
@pytest.mark.parametrize("kind", ["own", "plain", "hooked"], indirect=True)
@pytest.mark.parametrize("batch", [False, True], ids=["single", "batch"])
def test_call_with_an_unreadable_reply_is_unknown(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, batch: bool, reply: bytes, known: None
) -> None:
    store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT)
    call = store.calls.begin_step("run", "pay", {})
    proxy.translate = lambda _: reply
    assert type(error_of(store, call, batch)) is OutcomeUnknownError
    proxy.translate = bytes
    assert begun(store.send(call)).attempt == 1


def error_of(store: StepRunStore, call: Any, batch: bool) -> ServerError:
    """Returns what a call raises, or what it raises as a batch of one."""
    try:
        (result,) = store.batch([call]) if batch else [store.send(call)]
    except ServerError as error:
        result = error
    assert isinstance(result, ServerError)
    return result


@pytest.mark.parametrize("kind", ["own", "plain", "RESP3", "blocking pool"], indirect=True)
@pytest.mark.parametrize("reply", [b"$-1\r\n", b"-MOVED 1\r\n", b"%1\r\n*1\r\n:1\r\n:2\r\n", b"HTTP/1.1\r\n"])
def test_unreadable_reply_to_a_handshake_is_not_sent(
    connect_to: Connect, proxy: Proxy, kind: str, reply: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RESP3 begins with HELLO, whose reply redis-py takes for a map without a look."""
    monkeypatch.setattr("support.proxy.HANDSHAKE", frozenset())
    store = connect_to(kind, proxy.port, db=1, client=PATIENT, timeout=SHORT)
    proxy.translate = lambda real: reply if proxy.commands[-1][0] in (b"HELLO", b"SELECT") else real
    with pytest.raises(NotSentError):
        store.get_run("run")
    assert "EVALSHA" not in proxy.names()


@pytest.mark.parametrize("host", ["redis..internal", f"{64 * 'x'}.internal"])
@pytest.mark.parametrize("kind", ["own", "plain", "blocking pool"], indirect=True)
def test_invalid_host_name_is_not_sent(connect_to: Connect, kind: str, host: str) -> None:
    store = connect_to(kind, 1, client={"host": host}, timeout=SHORT)
    if kind != "own":
        store.client.connection_pool.connection_kwargs["host"] = host
    with pytest.raises(NotSentError):
        store.get_run("run")


@pytest.mark.parametrize("kind", ["own", "plain", "hooked"], indirect=True)
@pytest.mark.parametrize(
    ("command", "reply"),
    [
        (b"WAIT", b"+OK\r\n"),
        (b"WAIT", b"$-1\r\n"),
        (b"WAITAOF", b":1\r\n"),
        (b"WAITAOF", b"*0\r\n"),
        (b"WAITAOF", b"*1\r\n$-1\r\n"),
    ],
)
def test_unreadable_confirmation_confirms_nothing(
    bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, command: bytes, reply: bytes, known: None
) -> None:
    store = connect_to(kind, proxy.port, client=PATIENT, wait_replicas=1, wait_aof=True, wait_timeout=0.01)
    proxy.translate = lambda real: {b"WAIT": b":1\r\n", command: reply}.get(proxy.commands[-1][0], real)
    with pytest.raises(NotReplicatedError, match=f"{command.decode()} returned an unexpected reply"):
        store.begin_step("run", "pay", {})
    assert bench.store().get_step_run("run", "pay") is not None
