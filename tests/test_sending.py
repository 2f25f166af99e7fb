"""Retries of a call, their deadline, and the errors that a failed call raises."""

from __future__ import annotations

import builtins
import contextlib
import pickle
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from redis import exceptions
from support.backends import Bench
from support.internals import end_retries, replace_client
from support.operations import finish
from support.proxy import Proxy
from support.records import begun
from support.servers import wait_until

from squidstep_redis import (
    InvalidArgumentError,
    NotReplicatedError,
    NotSentError,
    OutcomeUnknownError,
    RefusedError,
    ServerError,
    SquidstepError,
    StepRunStore,
)
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.operations.calls import Calls
from squidstep_redis.transport.retry import RetryState, RoundTripError

real_server = pytest.mark.servers("valkey", "redis-7", "redis-6")

CALL = Calls("squidstep", None, 1_000, None).begin_step("run", "pay", {})

# The exceptions that redis-py raises for refusals, and whether each is transient. Redis 6.2 wraps those of scripts.
REFUSALS: dict[str, tuple[Exception, bool]] = {
    "loading": (exceptions.BusyLoadingError("Redis is loading the dataset in memory"), True),
    "read-only": (exceptions.ReadOnlyError("You can't write against a read only replica."), True),
    "read-only, in a script": (
        exceptions.ResponseError("Error running script (call to f_0): @user_script:3: -READONLY You can't write"),
        True,
    ),
    "busy": (exceptions.ResponseError("BUSY Redis is busy running a script. You can only call SCRIPT KILL"), True),
    "try again": (exceptions.TryAgainError("Multiple keys request during rehashing of slot"), True),
    "too many redirects": (exceptions.ClusterError("TTL exhausted."), True),
    "cluster down": (exceptions.ClusterDownError("Hash slot not served"), True),
    "master down": (exceptions.MasterDownError("Link with MASTER is down"), True),
    "too few replicas": (exceptions.ResponseError("NOREPLICAS Not enough good replicas to write."), True),
    "out of memory": (exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), True),
    "out of memory, in a script": (
        exceptions.ResponseError("Error running script (call to f_0): @user_script:3: -OOM command not allowed"),
        True,
    ),
    "disk full": (exceptions.ResponseError("MISCONF Errors writing to the AOF file"), True),
    "wrong password": (exceptions.AuthenticationError("invalid username-password pair"), False),
    "no permission": (exceptions.NoPermissionError("User x has no permissions to run the 'evalsha' command"), False),
    "moved": (exceptions.MovedError("1 127.0.0.1:7000"), False),
    "renamed command": (exceptions.ResponseError("unknown command 'EVALSHA', with args beginning with: '0'"), False),
    "renamed command, of Redis 6": (
        exceptions.ResponseError("unknown command `EVAL`, with args beginning with: `0`"),
        False,
    ),
}
NO_REPLY: dict[str, Exception] = {
    "connection closed": exceptions.ConnectionError("Connection closed by server."),
    "timeout": exceptions.TimeoutError("Timeout reading from socket"),
    "cluster unreachable": exceptions.RedisClusterException("Redis Cluster cannot be connected."),
}
NOT_CONNECTED = RoundTripError(exceptions.ConnectionError("Error 111 connecting to localhost:6379."), sent=False)
OTHER_ERRORS: dict[str, Exception] = {
    "refused midway": exceptions.ResponseError(
        "ACL failure in script: User has no permissions to run the 'zadd' command"
    ),
    "unknown command, in a script": exceptions.ResponseError("Unknown Redis command called from script script: f_0"),
    "unknown command, in a script of Redis 6": exceptions.ResponseError(
        "Error running script (call to f_0): @user_script:1: Unknown Redis command called from Lua script"
    ),
}


def raised(error: Exception, *before: Exception, timeout: float = 0.0) -> ServerError:
    """Returns what a call raises whose last send fails with `error`, after earlier sends failed with `before`."""
    state = RetryState(CALL, time.monotonic(), 60)
    for earlier in before:
        state.next_pause(earlier)
    end_retries(state, timeout)
    with pytest.raises(ServerError) as caught:
        state.next_pause(error)
    return caught.value


class TestServerErrors:
    @pytest.mark.parametrize("name", REFUSALS)
    def test_refused_call_has_written_nothing(self, name: str) -> None:
        cause, transient = REFUSALS[name]
        error = raised(cause)
        assert type(error) is RefusedError
        assert (error.transient, error.__cause__) == (transient, cause)
        assert (error.operation, error.run_id, error.step) == ("begin_step", "run", "pay")
        assert "nothing was written" in str(error)
        assert "What to do: " in str(error)

    @pytest.mark.parametrize("name", [*NO_REPLY, *OTHER_ERRORS])
    def test_call_without_a_reply_has_an_unknown_outcome(self, name: str) -> None:
        error = raised({**NO_REPLY, **OTHER_ERRORS}[name])
        assert type(error) is OutcomeUnknownError
        assert error.transient is (name in NO_REPLY)
        assert error.call == CALL._replace(may_have_run=True)
        assert "unknown" in str(error)

    @pytest.mark.parametrize("name", REFUSALS)
    def test_refusal_of_a_resend_leaves_the_outcome_unknown(self, name: str) -> None:
        error = raised(REFUSALS[name][0], NO_REPLY["connection closed"])
        assert type(error) is OutcomeUnknownError
        assert "no reply to an earlier attempt, and was refused now" in str(error)

    def test_call_of_which_no_byte_was_sent_is_not_sent(self) -> None:
        error = raised(NOT_CONNECTED)
        assert type(error) is NotSentError
        assert (error.transient, error.__cause__) == (True, NOT_CONNECTED.cause)
        assert "nothing was sent" in str(error)

    def test_failed_connect_after_a_lost_reply_leaves_the_outcome_unknown(self) -> None:
        assert type(raised(NOT_CONNECTED, NO_REPLY["connection closed"])) is OutcomeUnknownError
        assert type(raised(NOT_CONNECTED, RoundTripError(NO_REPLY["timeout"], sent=True))) is OutcomeUnknownError

    def test_refusal_after_a_failed_connect_leaves_the_outcome_known(self) -> None:
        assert type(raised(REFUSALS["busy"][0], NOT_CONNECTED)) is RefusedError

    def test_failed_connect_after_a_refusal_is_a_refusal(self) -> None:
        """Bytes of the call were sent before."""
        error = raised(NOT_CONNECTED, NOT_CONNECTED, REFUSALS["loading"][0])
        assert (type(error), error.transient) == (RefusedError, True)
        assert "Nothing was written" in str(error)
        redirected = RoundTripError(NOT_CONNECTED.cause, sent=False, follows_refusal=True)
        assert type(raised(redirected)) is RefusedError

    @pytest.mark.parametrize("of", ["", " + cluster connections"])
    def test_full_server_is_retried_and_not_sent(self, of: str) -> None:
        """Whatever class redis-py gives it: a node of a cluster has another text."""
        text = f"max number of clients{of} reached"
        error = RoundTripError(exceptions.ResponseError(text), sent=False)
        assert RetryState(CALL, time.monotonic(), 60).next_pause(error) > 0
        assert (type(raised(error)), raised(error).transient) == (NotSentError, True)
        assert raised(exceptions.ResponseError(text)).transient

    def test_rejected_settings_of_the_client_are_not_transient(self) -> None:
        error = raised(RoundTripError(exceptions.ResponseError("DB index is out of range"), sent=False))
        assert (type(error), error.transient) == (NotSentError, False)
        assert "Check the client's settings" in str(error)

    @pytest.mark.parametrize(
        "error", [raised(NO_REPLY["connection closed"]), raised(REFUSALS["busy"][0])], ids=["unknown", "busy"]
    )
    def test_errors_survive_pickling(self, error: ServerError) -> None:
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.transient) == (type(error), str(error), error.transient)

    def test_pickled_replication_error_loses_call_and_result(self) -> None:
        error = NotReplicatedError("begin_step", "run", "pay", "0 of 1 replicas", True, CALL, object(), 0)
        copy = pickle.loads(pickle.dumps(error))
        assert (str(copy), copy.call, copy.result, copy.replicas) == (str(error), None, None, 0)

    def test_server_errors_are_squidstep_errors(self) -> None:
        assert issubclass(ServerError, SquidstepError)


class TestRetries:
    @pytest.mark.parametrize("name", [*NO_REPLY, *(name for name in REFUSALS if REFUSALS[name][1])])
    def test_transient_errors_are_retried_unless_memory_or_disk_is_full(self, name: str) -> None:
        error = NO_REPLY.get(name) or REFUSALS[name][0]
        state = RetryState(CALL, time.monotonic(), 60)
        if name in ("out of memory", "out of memory, in a script", "disk full"):
            with pytest.raises(RefusedError):
                state.next_pause(error)
        else:
            pauses = [state.next_pause(error) for _ in range(12)]
            assert all(0 < pause <= 0.5 for pause in pauses)
            assert pauses[-1] > pauses[0]

    def test_call_that_is_not_retryable_is_sent_once(self) -> None:
        state = RetryState(CALL._replace(retryable=False), time.monotonic(), 60)
        with pytest.raises(OutcomeUnknownError):
            state.next_pause(NO_REPLY["connection closed"])

    def test_last_attempt_begins_at_the_deadline(self) -> None:
        """The whole timeout is used: a server that returns shortly before its end is still reached."""
        state = RetryState(CALL, time.monotonic() - 9.9, 10)
        assert 0 < state.next_pause(NO_REPLY["timeout"]) <= 0.1

    def test_no_attempt_begins_after_the_deadline(self) -> None:
        state = RetryState(CALL, time.monotonic() - 10, 10)
        with pytest.raises(OutcomeUnknownError):
            state.next_pause(NO_REPLY["timeout"])

    @pytest.mark.parametrize("name", ["timeout", "wait_timeout"])
    @pytest.mark.parametrize("value", [0, -1, float("nan"), 3_601, "1", True])
    def test_invalid_timeout_is_rejected(self, name: str, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match=f"^{name}: must be seconds"):
            StepRunStore(redis.Redis(), **{name: value})

    @pytest.mark.parametrize(
        ("settings", "argument"),
        [
            ({"wait_replicas": -1}, "wait_replicas"),
            ({"wait_replicas": True}, "wait_replicas"),
            ({"wait_replicas": 101}, "wait_replicas"),
            ({"wait_aof": 1}, "wait_aof"),
            ({"wait_replicas": 1, "wait_timeout": 5}, "wait_timeout"),  # as long as the client's own
        ],
    )
    def test_invalid_durability_setting_is_rejected(self, settings: dict[str, Any], argument: str) -> None:
        with pytest.raises(InvalidArgumentError, match=f"^{argument}: "):
            StepRunStore(redis.Redis(socket_timeout=5), **settings)


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """Returns the port of a server that accepts connections and never replies."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        yield listener.getsockname()[1]


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("word", ["OOM", "NOPERM"])
def test_refusal_after_a_lost_reply_leaves_a_batch_unknown(bench: Bench, word: str) -> None:
    """The reply to the first send is lost, and the server refuses the second: the first may have taken effect."""
    with Proxy.to(bench.backend.raw) as proxy:
        store = bench.from_url(f"redis://127.0.0.1:{proxy.port}")
        with contextlib.closing(store), proxy.batches(1, 1):
            proxy.drop()
            proxy.replace_replies(f"-{word} no\r\n".encode())
            (result,) = store.batch([store.calls.begin_step("run", "pay", {})])
    assert type(result) is OutcomeUnknownError
    assert bench.store().step_statuses("run") == {"pay": "running"}


@pytest.mark.servers("fakeredis")
@pytest.mark.parametrize("error", [builtins.TimeoutError("alarm"), builtins.ConnectionError("alarm")], ids=repr)
def test_exception_of_a_signal_handler_is_not_a_server_error(bench: Bench, error: Exception) -> None:
    """Many handlers raise Python's own TimeoutError."""
    commands: list[Any] = []

    def interrupted(*args: Any, **options: Any) -> Any:
        commands.append(args)
        raise error

    store: Any = bench.store()
    replace_client(store if bench.runner is None else store.store, SimpleNamespace(execute_command=interrupted))
    with pytest.raises(type(error), match="^alarm$"):
        store.begin_step("run", "pay", {})
    assert len(commands) == 1


@pytest.mark.servers("valkey")
class TestUnreachableServer:
    """A call has one deadline, for any kind of failure."""

    def test_closed_port_raises_not_sent(self, bench: Bench) -> None:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            with contextlib.closing(
                bench.from_url(f"redis://127.0.0.1:{bound.getsockname()[1]}", timeout=0.2)
            ) as store:
                with pytest.raises(NotSentError, match="nothing was sent"):
                    store.begin_step("run", "pay", {})
                with pytest.raises(NotSentError, match="^batch: "):
                    store.batch([store.calls.begin_step("run", "pay", {})])

    @pytest.mark.parametrize("batch", [False, True])
    def test_silent_server_raises_not_sent_at_the_deadline(self, bench: Bench, batch: bool) -> None:
        """The call itself is never sent: redis-py waits for the reply to its handshake."""
        with (
            silent_server() as port,
            contextlib.closing(bench.from_url(f"redis://127.0.0.1:{port}", timeout=1)) as store,
        ):
            call = store.calls.begin_step("run", "pay", {})

            def seconds() -> float:
                began = time.monotonic()
                with pytest.raises(NotSentError):
                    _ = store.batch([call, call]) if batch else store.send(call)
                return time.monotonic() - began

            # Without one deadline, each send would take three seconds. The repetition tolerates a stall.
            assert any(seconds() < 4 for _ in range(3))

    def test_exhausted_pool_raises_not_sent(self, bench: Bench) -> None:
        with (
            Proxy.to(bench.backend.raw) as proxy,
            contextlib.closing(
                bench.from_url(f"redis://127.0.0.1:{proxy.port}", timeout=0.3, max_connections=1)
            ) as store,
        ):
            client: Any = store.client
            pipeline = client.pipeline()
            finish(bench, pipeline.watch("key"))  # holds a connection
            with pytest.raises(NotSentError, match="nothing was sent"):
                store.begin_step("run", "pay", {})
            finish(bench, pipeline.reset())
            assert begun(store.begin_step("run", "pay", {})).attempt == 1


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[EmbeddedServer, EmbeddedServer]]:
    options = {"appendonly": "yes", "appendfsync": "everysec", "repl-diskless-sync-delay": "0"}
    with (
        EmbeddedServer(options=options, port=0) as master,
        EmbeddedServer(port=0) as replica,
        redis.Redis.from_url(replica.url) as client,
    ):
        client.replicaof(master.host, master.port)
        wait_until(lambda: client.info("replication")["master_link_status"] == "up", 30)
        yield master, replica


class TestDurability:
    """WAIT and WAITAOF, on the connection of the transition."""

    @pytest.mark.servers("valkey")
    def test_acknowledged_write_is_on_the_replica(
        self, bench: Bench, pair: tuple[EmbeddedServer, EmbeddedServer]
    ) -> None:
        master, replica = pair
        with (
            contextlib.closing(bench.from_url(master.url, wait_replicas=1, wait_aof=True)) as store,
            StepRunStore.from_url(replica.url, prefix=bench.prefix) as reader,
        ):
            claim = begun(store.begin_step("run", "pay", {}, lease=60))
            assert reader.step_statuses("run") == {"pay": "running"}
            store.complete_step(claim, {"charged": 1})
            assert reader.step_statuses("run") == {"pay": "completed"}
            results = store.batch([store.calls.schedule_step("run", f"step-{number}", {}) for number in range(5)])
            assert not [result for result in results if isinstance(result, Exception)]
            assert len(reader.get_run("run")) == 6

    @pytest.mark.servers("valkey")
    def test_wait_for_a_hanging_replica_can_be_repeated(
        self, bench: Bench, pair: tuple[EmbeddedServer, EmbeddedServer]
    ) -> None:
        master, replica = pair
        with contextlib.closing(bench.from_url(master.url, wait_replicas=1, wait_timeout=0.05)) as store:
            replica.pause()
            try:
                with pytest.raises(NotReplicatedError, match="0 of 1 replicas confirmed it within 50 ms") as caught:
                    store.begin_step("run", "hang", {}, lease=60)
                error = caught.value
                assert (error.replicas, error.result.decision, error.step) == (0, "execute", "hang")
                assert error.call is not None
                # The same call writes nothing now. A new connection would have no write of its own to wait for.
                another = bench.from_url(master.url, wait_replicas=1, wait_timeout=0.05)
                with contextlib.closing(another), pytest.raises(NotReplicatedError):
                    another.send(error.call)
                calls = [store.calls.schedule_step("run", "later", {}), store.calls.get_step_run("run", "hang")]
                scheduled, read = store.batch(cast("Any", calls))
                assert isinstance(scheduled, NotReplicatedError)
                assert cast("Any", read).status == "running"
            finally:
                replica.resume()
            resumed = bench.from_url(master.url, wait_replicas=1, wait_timeout=2)
            with contextlib.closing(resumed):
                assert resumed.send(error.call).step_run.attempt == 1

    @pytest.mark.servers("valkey")
    def test_reads_do_not_wait_for_replicas(self, bench: Bench) -> None:
        with Proxy.to(bench.backend.raw) as proxy:
            store = bench.from_url(f"redis://127.0.0.1:{proxy.port}", wait_replicas=1, wait_timeout=0.01)
            with contextlib.closing(store):
                assert store.get_run("run") == []
                assert store.batch([store.calls.get_run("run")]) == [[]]
            assert "WAIT" not in proxy.names()

    @real_server
    def test_write_takes_effect_on_the_master_without_replicas(self, bench: Bench) -> None:
        store = bench.store(wait_replicas=1, wait_timeout=0.01)
        with pytest.raises(NotReplicatedError) as caught:
            store.schedule_step("run", "pay", {})
        assert caught.value.result.decision == "schedule"
        assert bench.store().schedule_step("run", "pay", {}).decision == "skip"

    @pytest.mark.servers("cluster")
    def test_missing_replicas_of_a_cluster_raise_not_replicated(self, bench: Bench) -> None:
        store = bench.store(wait_replicas=1, wait_timeout=0.01)
        for number in range(6):
            with pytest.raises(NotReplicatedError):
                store.begin_step(f"run-{number}", "pay", {})
        results = store.batch([store.calls.begin_step(f"other-{number}", "pay", {}) for number in range(6)])
        assert [type(result) for result in results] == [NotReplicatedError] * 6

    @pytest.mark.servers("valkey")
    def test_server_without_an_aof_raises_not_replicated(self, bench: Bench) -> None:
        store = bench.store(wait_aof=True)  # this server has no AOF
        with pytest.raises(NotReplicatedError, match="WAITAOF failed: "):
            store.schedule_step("run", "pay", {})

    @pytest.mark.servers("valkey")
    def test_wait_mark_expires_in_the_slot_of_the_run(self, bench: Bench) -> None:
        with contextlib.suppress(NotReplicatedError):
            bench.store(wait_replicas=1, wait_timeout=0.01).schedule_step("run", "pay", {})
        mark = bench.keys("run")[2].removesuffix(b"claims") + b"wait"
        assert 0 < bench.backend.raw.pttl(mark) <= 1_000
