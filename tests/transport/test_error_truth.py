"""What the error of a failed call says about the server: nothing was sent, refused, or unknown."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from math import inf
from typing import Any, ClassVar
from unittest import mock

import pytest
import redis
import redis.asyncio
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry
from support.backends import Bench
from support.internals import retry_for
from support.proxy import Fault, Proxy
from support.records import begun

from squidstep_redis import (
    AsyncStepRunStore,
    NotReplicatedError,
    NotSentError,
    OutcomeUnknownError,
    RefusedError,
    ReplyMismatchError,
    ServerError,
    StepRunStore,
)
from squidstep_redis.transport.retry import map_error
from transport.conftest import Connect

pytestmark = pytest.mark.servers("valkey")

# The three ways to send, and the protocols and retries of redis-py that have a share in what is known about a call.
each_way = pytest.mark.parametrize("kind", ["own", "plain", "hooked"], indirect=True)
each_protocol = pytest.mark.parametrize("kind", ["own", "plain", "RESP3", "hooked"], indirect=True)
each_retry = pytest.mark.parametrize("kind", ["own", "plain", "RESP3", "hooked", "hooked, with retries"], indirect=True)

SHORT = 0.05  # seconds: a call that has to fail is retried for so long
PATIENT = {
    "socket_timeout": 20,
    "socket_connect_timeout": 20,
}  # on a machine that stalls, a reply that matters still arrives in time

STRAY_REPLY = b"*3\r\n$9\r\ncompleted\r\n$1\r\n0\r\n$1\r\nx\r\n"


def error_of(store: StepRunStore, call: Any, batch: bool) -> ServerError:
    """Returns what a call raises, or what it raises as a batch of one."""
    try:
        (result,) = store.batch([call]) if batch else [store.send(call)]
    except ServerError as error:
        result = error
    assert isinstance(result, ServerError)
    return result


def refuse(proxy: Proxy, word: str, script: str) -> None:
    """Lets the server refuse a script from now on."""
    for _ in range(1_000):
        proxy.add_fault(Fault(reply=lambda _: f"-{word} no\r\n".encode(), script=script))


@pytest.fixture(params=[False, True], ids=["single", "batch"])
def batch(request: pytest.FixtureRequest) -> bool:
    return request.param


class TestNotSent:
    @each_way
    def test_closed_port_is_not_sent(self, connect_to: Connect, kind: str, batch: bool) -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            store = connect_to(kind, bound.getsockname()[1], timeout=SHORT)
            error = error_of(store, store.calls.begin_step("run", "pay", {}), batch)
        assert type(error) is NotSentError
        assert "nothing was sent" in str(error)

    @each_protocol
    def test_server_gone_between_two_calls_is_not_sent(
        self, bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, batch: bool, known: None
    ) -> None:
        """The idle connection was closed: where that shows before the call is sent, nothing is."""
        store = connect_to(kind, proxy.port, client=PATIENT)
        store.schedule_step("run", "before", {})
        retry_for(store, SHORT)
        arrived = len(proxy.commands)
        proxy.refuse()
        proxy.disconnect()
        if bench.runner is not None:
            bench.runner.run(asyncio.sleep(0.01))  # lets the event loop notice
        error = error_of(store, store.calls.begin_step("run", "pay", {}), batch)
        assert len(proxy.commands) == arrived
        if (kind, bench.runner is None) in (("own", True), ("RESP3", False)):  # not checked before use: bytes are sent
            assert type(error) in (NotSentError, OutcomeUnknownError)
        else:
            assert type(error) is NotSentError

    @each_way
    def test_wrong_password_is_refused(self, connect_to: Connect, proxy: Proxy, kind: str, batch: bool) -> None:
        store = connect_to(kind, proxy.port, client={"username": "nobody", "password": "wrong", **PATIENT})
        error = error_of(store, store.calls.begin_step("run", "pay", {}), batch)
        assert type(error) is RefusedError
        assert not error.transient
        assert proxy.commands == []


class TestOutcomeUnknown:
    @each_retry
    def test_lost_reply_of_a_lost_server_is_unknown(
        self, bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, batch: bool, known: None
    ) -> None:
        """The server executed the call. The attempts after that cannot connect, which changes nothing about it."""
        store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT)
        proxy.refuse_after_reply("begin_step")
        error = error_of(store, store.calls.begin_step("run", "pay", {}), batch)
        assert type(error) is OutcomeUnknownError
        assert bench.store().step_statuses("run") == {"pay": "running"}

    @each_way
    def test_half_received_command_is_unknown(
        self, bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, known: None
    ) -> None:
        store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT)
        proxy.tear(100, "begin_step")
        error = error_of(store, store.calls.begin_step("run", "pay", {}), batch=False)
        assert type(error) is OutcomeUnknownError
        assert bench.store().step_statuses("run") == {}

    @each_way
    def test_resend_of_an_unknown_call_stays_unknown(
        self, bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, batch: bool, known: None
    ) -> None:
        """The second send alone would be certain: nothing is sent, or the server refuses."""
        store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT)
        proxy.refuse_after_reply("begin_step")
        first = error_of(store, store.calls.begin_step("run", "pay", {}), batch=False)
        assert isinstance(first, OutcomeUnknownError)
        assert first.call is not None
        again = error_of(store, first.call, batch)
        assert type(again) is OutcomeUnknownError
        with Proxy.to(bench.backend.raw) as other:
            refusing = connect_to(kind, other.port, client=PATIENT, timeout=SHORT)
            refuse(other, "OOM", "begin_step")
            refused = error_of(refusing, first.call, batch)
        assert type(refused) is OutcomeUnknownError
        assert "no reply to an earlier attempt" in str(refused)
        assert begun(bench.store().send(first.call)).attempt == 1

    @each_way
    def test_resend_of_a_mismatched_call_stays_unknown(
        self, bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, known: None
    ) -> None:
        store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT)
        proxy.replace_replies(*[STRAY_REPLY] * 1_000)
        error = error_of(store, store.calls.begin_step("run", "pay", {}), batch=False)
        assert isinstance(error, ReplyMismatchError)
        proxy.heal()
        refuse(proxy, "OOM", "begin_step")
        assert error.call is not None
        assert type(error_of(store, error.call, batch=False)) is OutcomeUnknownError
        proxy.heal()
        assert begun(store.send(error.call)).attempt == 1

    @pytest.mark.parametrize("kind", ["own", "plain"], indirect=True)
    def test_resend_of_an_unconfirmed_call_stays_unknown(
        self, connect_to: Connect, proxy: Proxy, kind: str, batch: bool, known: None
    ) -> None:
        """The primary has executed it; only its replicas are missing."""
        store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT, wait_replicas=1, wait_timeout=0.01)
        error = error_of(store, store.calls.begin_step("run", "pay", {}), batch)
        assert type(error) is NotReplicatedError
        assert error.call is not None
        proxy.refuse()
        store.close() if kind == "own" else None
        plain = connect_to(kind, proxy.port, timeout=SHORT)
        assert type(error_of(plain, error.call, batch)) is OutcomeUnknownError


@pytest.mark.servers("cluster")
def test_call_for_an_unserved_slot_is_not_sent(bench: Bench) -> None:
    store = bench.store(timeout=SHORT)
    assert store.get_run("run") == []  # learns the nodes
    nodes: Any = store.client.nodes_manager
    call = store.calls.begin_step("run", "pay", {})
    away = redis.ConnectionError("away")
    with mock.patch.object(nodes, "slots_cache", {}), mock.patch.object(type(nodes), "initialize", side_effect=away):
        assert type(error_of(store, call, batch=False)) is NotSentError
        with pytest.raises(NotSentError, match="no node of the cluster serves slot"):
            store.batch([call])
    assert begun(store.send(call)).attempt == 1


@pytest.mark.servers("cluster")
def test_unserved_slot_fails_only_its_own_calls_of_a_batch(bench: Bench) -> None:
    store = bench.store(timeout=SHORT)
    assert store.get_run("run") == []  # learns the nodes
    nodes: Any = store.client.nodes_manager
    calls = [store.calls.begin_step(f"run-{number}", "pay", {}) for number in range(30)]
    half = {slot: nodes.slots_cache[slot] for slot in range(8_192)}
    away = redis.ConnectionError("away")
    with mock.patch.object(nodes, "slots_cache", half), mock.patch.object(type(nodes), "initialize", side_effect=away):
        results = store.batch(calls)
    served = [key_slot(call.keys[0]) in half for call in calls]
    assert {True, False} == set(served)
    assert [type(result) is not NotSentError for result in results] == served
    assert all(begun(result).attempt == 1 for result in store.batch(calls))


# What a word means does not depend on how it arrived, with two exceptions: an error of its own class in redis-py, and
# that of a server that is no primary any more, after which connections are closed.
REFUSALS = [
    *(("own", word) for word in ("OOM", "READONLY", "MASTERDOWN", "NOPERM", "LOADING", "BUSY", "MISCONF")),
    *((kind, word) for kind in ("plain", "RESP3", "hooked") for word in ("NOPERM", "READONLY")),
]


class TestRefused:
    @pytest.mark.parametrize(("kind", "word"), REFUSALS, indirect=["kind"])
    def test_refusals_alone_leave_the_outcome_known(
        self, bench: Bench, connect_to: Connect, proxy: Proxy, kind: str, batch: bool, word: str, known: None
    ) -> None:
        store = connect_to(kind, proxy.port, client=PATIENT, timeout=SHORT)
        refuse(proxy, word, "get_step_run")
        error = error_of(store, store.calls.get_step_run("run", "pay"), batch)
        assert type(error) is RefusedError
        assert "nothing was written" in str(error)

    @each_way
    def test_command_that_fails_within_a_script_is_unknown(
        self, bench: Bench, connect_to: Connect, proxy: Proxy, kind: str
    ) -> None:
        """An ACL may forbid a command of the script, after which other commands of it have written."""
        raw = bench.backend.raw
        raw.execute_command(f"ACL SETUSER halfway reset on >secret ~{bench.prefix}:* +@all -zadd")
        store = connect_to(kind, proxy.port, client={"username": "halfway", "password": "secret", **PATIENT})
        claim = begun(bench.store().begin_step("run", "pay", {}))
        error = error_of(store, store.calls.complete_step(claim, {}), batch=False)
        raw.execute_command("ACL DELUSER halfway")
        assert type(error) is OutcomeUnknownError


class ScarceConnection(redis.Connection):
    """redis-py 8 reads a file when it makes a connection."""

    failures = 0.0

    def __init__(self, **options: Any) -> None:
        ScarceConnection.failures -= 1
        if ScarceConnection.failures >= 0:
            raise OSError(errno.EMFILE, "Too many open files", "METADATA")
        super().__init__(**options)


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@pytest.mark.parametrize("kind", ["own", "plain", "blocking pool", "hooked"], indirect=True)
def test_lack_of_file_descriptors_raises_not_sent(connect_to: Connect, proxy: Proxy, kind: str) -> None:
    store = connect_to(kind, proxy.port, timeout=0.1)
    client: Any = store.client
    client.connection_pool.connection_class = ScarceConnection
    ScarceConnection.failures = inf
    with pytest.raises(NotSentError, match="Too many open files"):
        store.get_run("run")
    ScarceConnection.failures = 1
    assert store.get_run("run") == []


class TestSentinelsWithPassword:
    """No sentinel replies. redis-py quotes their clients in its error, with their passwords."""

    options: ClassVar[dict[str, Any]] = {"socket_connect_timeout": 0.2, "socket_timeout": 0.2}

    def check(self, errors: Sequence[str]) -> None:
        for text in errors:
            assert "no sentinel knows a master for the service 'orders'" in text
            assert "secret" not in text

    def test_blocking_errors_name_the_service_alone(self) -> None:
        sentinels = [("127.0.0.1", closed_port())]
        kwargs = {"password": "secret", "retry": Retry(NoBackoff(), 0), **self.options}
        finder: Any = redis.Sentinel(sentinels, sentinel_kwargs=kwargs, **self.options)
        store = StepRunStore(finder.master_for("orders", password="secret"), timeout=0.1)
        with pytest.raises(NotSentError) as caught:
            store.get_run("run")
        self.check([str(caught.value), repr(store.doctor())])

    def test_asyncio_errors_name_the_service_alone(self) -> None:
        async def main() -> list[str]:
            sentinels = [("127.0.0.1", closed_port())]
            module: Any = redis.asyncio
            kwargs = {"password": "secret", "retry": AsyncRetry(NoBackoff(), 0), **self.options}
            finder = module.Sentinel(sentinels, sentinel_kwargs=kwargs, **self.options)
            store = AsyncStepRunStore(finder.master_for("orders", password="secret"), timeout=0.5)
            with pytest.raises(NotSentError) as caught:
                await store.get_run("run")
            return [str(caught.value), repr(await store.doctor())]

        self.check(asyncio.run(main()))

    def test_wrapped_error_names_the_service_alone(self) -> None:
        text = "No master found for 'orders' : <Redis(password=secret)> - ConnectionError"
        error = redis.sentinel.MasterNotFoundError(text)
        self.check([str(map_error(each, None, False, 0.0)) for each in (error, redis.ConnectionError(error))])


def closed_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port
