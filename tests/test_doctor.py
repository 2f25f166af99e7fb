"""doctor: reports what breaks the guarantees, on real servers that are configured that way."""

from __future__ import annotations

import asyncio
import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import redis.asyncio
from redis.backoff import ConstantBackoff, ExponentialBackoff, NoBackoff
from redis.retry import Retry
from support.backends import Bench
from support.servers import EmbeddedCluster, find_binary, wait_until

from squidstep_redis import (
    AsyncStepRunStore,
    Diagnosis,
    Finding,
    InvalidArgumentError,
    Level,
    NotSentError,
    StepRunStore,
)
from squidstep_redis.doctor.checks import CHECKS_OF_SERVERS, Client, Server
from squidstep_redis.embedded import EmbeddedServer

SOUND = {"appendonly": "yes", "appendfsync": "always", "maxmemory": "100mb"}
RIGHTS = "+@read +@write +@scripting +@transaction -@dangerous +time"
HOOK = {"execute_command": functools.partialmethod(redis.Redis.execute_command)}
SETTINGS = "+config|get +info +cluster|info +cluster|nodes"  # the doctor needs these, a store does not


def found(store: StepRunStore, **options: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in store.doctor(**options).findings}


def wrong(findings: dict[str, Finding]) -> dict[str, Level]:
    return {check: finding.level for check, finding in findings.items() if finding.level}


# On a port, because redis-py 5.0.2 ignores the socket_timeout of a unix socket, which the doctor would report.
def examined(binary: Path, options: dict[str, str], **client_options: Any) -> dict[str, Finding]:
    with EmbeddedServer(binary=binary, options=options, port=0) as server:
        store = StepRunStore.from_url(server.url, **client_options)
        with store:
            return found(store)


def test_scratch_run_passes_every_transition_on_every_server(bench: Bench) -> None:
    diagnosis = bench.store().doctor()
    assert "self-test" in {finding.check for finding in diagnosis.findings if finding.level is Level.OK}
    assert all(finding.message for finding in diagnosis.findings)


def test_scratch_run_leaves_no_keys(bench: Bench) -> None:
    bench.store().doctor()
    wait_until(lambda: not bench.backend.keys(bench.prefix))


@pytest.mark.servers("cluster")
class TestOnACluster:
    def test_every_node_is_examined_and_self_tested(self, bench: Bench) -> None:
        findings = bench.store().doctor().findings
        for check in ("connection", "self-test", "cluster"):
            nodes = {finding.server: finding.level for finding in findings if finding.check == check}
            assert list(nodes.values()) == [Level.OK] * 3, check

    def test_plain_client_of_a_cluster_node_is_a_failure(self, bench: Bench) -> None:
        node = bench.backend.raw.get_primaries()[0]
        with StepRunStore.from_url(f"redis://{node.host}:{node.port}") as store:
            finding = found(store)["cluster"]
        assert (finding.level, "RedisCluster" in finding.message) == (Level.FAILURE, True)

    def test_missing_permission_on_one_node_is_reported_for_that_node(self, bench: Bench) -> None:
        cluster = bench.backend.raw
        first, *others = cluster.get_primaries()
        try:
            for node in (first, *others):
                rights = "+@all" if node is not first else "+@all -zadd"
                rules = f"reset on >secret ~{bench.prefix}:{{* {rights}".split()
                cluster.execute_command("ACL SETUSER", "halfway", *rules, target_nodes=node)
            options = {"username": "halfway", "password": "secret"}
            findings = bench.store(client_options=options).doctor().findings
        finally:
            cluster.execute_command("ACL DELUSER", "halfway", target_nodes="primaries")
        tested = {finding.server: finding.level for finding in findings if finding.check == "self-test"}
        assert tested == {first.name: Level.FAILURE, **{node.name: Level.OK for node in others}}


def test_unreachable_cluster_node_is_reported() -> None:
    with EmbeddedCluster(options={"cluster-node-timeout": "500"}) as cluster:
        client: Any = redis.RedisCluster.from_url(cluster.url, protocol=2)
        with client, redis.Redis.from_url(cluster.url, decode_responses=True) as first:
            stopped = f"127.0.0.1:{cluster.nodes[2].port}"
            cluster.nodes[2].stop()
            wait_until(lambda: cast("Any", first).cluster("INFO")["cluster_state"] == "fail", 20)
            findings = StepRunStore(client, timeout=1).doctor().findings
    levels = [finding.level for finding in findings if finding.check == "cluster"]
    assert levels == [Level.FAILURE] * 2
    unreachable = [finding.server for finding in findings if finding.check == "connection" and finding.level]
    assert unreachable == [stopped]


@pytest.mark.servers("fakeredis")
def test_missing_server_information_is_unknown(bench: Bench) -> None:
    diagnosis = bench.store(client_options={"protocol": 2, "socket_timeout": 3}, timeout=60).doctor()
    assert (diagnosis.findings[-1].level, diagnosis.level) == (Level.UNKNOWN, Level.UNKNOWN)


@pytest.mark.parametrize(
    ("levels", "worst"),
    [
        ([Level.OK], Level.OK),
        ([Level.UNKNOWN, Level.OK], Level.UNKNOWN),
        ([Level.UNKNOWN, Level.WARNING, Level.OK], Level.WARNING),
        ([Level.WARNING, Level.FAILURE, Level.UNKNOWN], Level.FAILURE),
    ],
)
def test_level_of_a_diagnosis_is_the_highest_severity(levels: list[Level], worst: Level) -> None:
    assert Diagnosis([Finding("check", level, "") for level in levels]).level is worst


class TestOnARealServer:
    def test_a_sound_server_passes_every_check(self, binary: Path) -> None:
        findings = examined(binary, SOUND)
        assert wrong(findings) == {}
        assert set(findings) == {
            *("client timeout", "client deadline", "connection", "self-test", "version", "role"),
            *("eviction", "memory", "persistence", "disk", "clock"),
        }

    @pytest.mark.parametrize(
        ("options", "check", "level", "message"),
        [
            ({"maxmemory-policy": "allkeys-lru"}, "eviction", Level.FAILURE, "noeviction"),
            ({"maxmemory": "0"}, "memory", Level.WARNING, "maxmemory is not set"),
            ({"appendonly": "no"}, "persistence", Level.WARNING, "loses everything"),
            ({"appendfsync": "everysec"}, "persistence", Level.WARNING, "a second or two"),
            ({"appendfsync": "no"}, "persistence", Level.WARNING, "half a minute"),
        ],
    )
    def test_unsafe_setting_is_reported(
        self, binary: Path, options: dict[str, str], check: str, level: Level, message: str
    ) -> None:
        findings = examined(binary, {**SOUND, **options})
        assert wrong(findings) == {check: level}
        assert message in findings[check].message

    def test_nearly_full_server_and_evicted_keys_are_warnings(self, binary: Path) -> None:
        options = {**SOUND, "maxmemory-policy": "allkeys-lru"}
        with (
            EmbeddedServer(binary=binary, options=options, port=0) as server,
            StepRunStore.from_url(server.url) as store,
        ):
            client: Any = store.client
            client.config_set("maxmemory", client.info("memory")["used_memory"] + 2_000_000)
            for number in range(40):
                client.set(f"filler-{number}", b"x" * 100_000)
            findings = found(store)
        assert (findings["evicted keys"].level, findings["memory"].level) == (Level.WARNING, Level.WARNING)

    @pytest.mark.parametrize(
        ("refuse", "level", "self_test"),
        [("yes", Level.FAILURE, Level.FAILURE), ("no", Level.WARNING, Level.OK)],
    )
    def test_failed_snapshot_is_reported(
        self, binary: Path, tmp_path: Path, refuse: str, level: Level, self_test: Level
    ) -> None:
        options = {**SOUND, "appendonly": "no", "stop-writes-on-bgsave-error": refuse}
        directory = tmp_path / "removed"
        directory.mkdir()
        with EmbeddedServer(binary=binary, options=options, directory=directory, port=0) as server:
            shutil.rmtree(directory)
            with StepRunStore.from_url(server.url, timeout=1) as store:
                client: Any = store.client
                client.config_set("save", "3600 1000")
                client.bgsave()
                wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
                findings = found(store)
        assert (findings["disk"].level, findings["self-test"].level) == (level, self_test)
        assert "since the last snapshot" in findings["persistence"].message

    def test_replicas_and_their_settings_are_checked(self, binary: Path) -> None:
        with (
            EmbeddedServer(binary=binary, options=SOUND, port=0) as primary,
            EmbeddedServer(binary=binary, options=SOUND, port=0) as replica,
            StepRunStore.from_url(replica.url, timeout=1) as store,
            StepRunStore.from_url(primary.url) as primary_store,
            StepRunStore.from_url(primary.url, timeout=1) as rejected,
        ):
            client: Any = primary_store.client
            cast("Any", store.client).replicaof(primary.host, primary.port)
            wait_until(lambda: client.info("replication").get("slave0", {}).get("state") == "online", 60)
            of_replica, of_primary = found(store), found(primary_store)
            with StepRunStore.from_url(primary.url, wait_replicas=1, wait_timeout=2.5) as waiting:
                wait_until(lambda: found(waiting)["replication"].level is Level.OK)
                assert wrong(found(waiting)) == {}
            with StepRunStore.from_url(primary.url, timeout=1, wait_replicas=2, wait_timeout=0.01) as waiting:
                too_few = found(waiting)
            client.config_set("min-replicas-to-write", 1)
            wait_until(lambda: client.info("replication")["min_slaves_good_slaves"] == 1, 60)
            satisfied = found(primary_store)
            client.config_set("min-replicas-to-write", 2)
            refused = found(rejected)  # each call is retried until its timeout
        assert wrong(of_replica) == {"role": Level.FAILURE, "self-test": Level.FAILURE}
        assert wrong(of_primary) == {"replication": Level.WARNING}
        assert wrong(too_few) == {"replication": Level.FAILURE, "self-test": Level.FAILURE}
        assert "NotReplicatedError" in too_few["self-test"].message
        if satisfied["version"].message.startswith("Redis 6"):
            assert wrong(satisfied) == wrong(refused) == {"replication": Level.WARNING}  # and the self-test passes
            assert "does not apply it to scripts" in satisfied["replication"].message
        else:
            assert wrong(satisfied) == {}
            assert wrong(refused) == {"replication": Level.FAILURE, "self-test": Level.FAILURE}
            assert "NOREPLICAS" in refused["replication"].message

    def test_wait_aof_without_an_aof_is_a_failure(self, binary: Path) -> None:
        findings = examined(binary, {**SOUND, "appendonly": "no"}, wait_aof=True, wait_timeout=0.1, timeout=1)
        assert (findings["persistence"].level, findings["self-test"].level) == (Level.FAILURE, Level.FAILURE)

    def test_wait_aof_with_everysec_needs_waitaof(self, binary: Path) -> None:
        findings = examined(binary, {**SOUND, "appendfsync": "everysec"}, wait_aof=True, wait_timeout=2.5)
        knows_waitaof = findings["version"].message.startswith("Valkey")
        assert findings["persistence"].level is Level.OK
        assert wrong(findings) == ({} if knows_waitaof else {"version": Level.FAILURE, "self-test": Level.FAILURE})

    @pytest.mark.parametrize(
        ("fsync", "wait_timeout", "level"),
        [("everysec", 1.9, Level.WARNING), ("everysec", 2, Level.OK), ("always", 1, Level.OK)],
    )
    def test_wait_timeout_below_two_seconds_with_everysec_is_a_warning(
        self, binary: Path, fsync: str, wait_timeout: float, level: Level
    ) -> None:
        findings = examined(binary, {**SOUND, "appendfsync": fsync}, wait_aof=True, wait_timeout=wait_timeout)
        assert findings["persistence"].level is level

    def test_failed_scratch_run_leaves_no_keys(self, binary: Path) -> None:
        waiting = {"timeout": 1, "wait_replicas": 1, "wait_timeout": 0.01}
        with (
            EmbeddedServer(binary=binary, options=SOUND, port=0) as server,
            StepRunStore.from_url(server.url, **waiting) as store,
        ):
            assert found(store)["self-test"].level is Level.FAILURE
            wait_until(lambda: not cast("Any", store.client).keys("squidstep:*"))

    @pytest.mark.parametrize(
        ("rights", "expected"),
        [
            (f"~squidstep:{{* +@all -zadd {SETTINGS}", {"self-test": Level.FAILURE}),
            (f"~elsewhere:* +@all {SETTINGS}", {"self-test": Level.FAILURE}),
            (f"~squidstep:{{* {RIGHTS} {SETTINGS}", {}),
            (f"~squidstep:{{* {RIGHTS} +info", {"persistence": Level.UNKNOWN}),
            (f"~squidstep:{{* {RIGHTS}", {"server": Level.UNKNOWN}),
        ],
    )
    def test_missing_permissions_are_reported_with_advice(
        self, binary: Path, rights: str, expected: dict[str, Level]
    ) -> None:
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server:
            with redis.Redis.from_url(server.url) as client:
                client.execute_command(f"ACL SETUSER limited on >secret {rights}")
            with StepRunStore.from_url(f"redis://limited:secret@{server.host}:{server.port}/0") as store:
                findings = found(store)
        assert wrong(findings) == expected
        if "self-test" in expected:
            advice = f"grant the user ~<prefix>:{{* {RIGHTS}"
            assert findings["self-test"].message.count(advice) == 1

    def test_too_short_lease_is_a_warning(self, binary: Path) -> None:
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server, StepRunStore.from_url(server.url) as store:
            assert wrong(found(store, lease=60, job_timeout=60)) == {}
            for options, message in (
                ({"lease": 60, "job_timeout": 61}, "a second worker begins"),
                ({"lease": 10}, "timeout of 10 s"),
                ({"lease": 14.5}, "can take, 14.5 s"),
            ):
                findings = found(store, **options)
                assert wrong(findings) == {"lease": Level.WARNING}
                assert message in findings["lease"].message
            with pytest.raises(InvalidArgumentError, match="job_timeout"):
                store.doctor(lease=60, job_timeout=0)


class TestClients:
    @pytest.mark.parametrize(
        ("options", "check"),
        [
            ({"socket_timeout": None}, "client timeout"),
            ({"socket_timeout": 415, "timeout": 2_000}, "client timeout"),
            ({"decode_responses": True}, "client decoding"),
            ({"socket_timeout": 4, "socket_connect_timeout": 2}, "client deadline"),
        ],
    )
    def test_client_option_that_limits_a_guarantee_is_a_warning(
        self, binary: Path, options: dict[str, Any], check: str
    ) -> None:
        assert wrong(examined(binary, SOUND, **options)) == {check: Level.WARNING}

    @pytest.mark.parametrize("pool", [redis.ConnectionPool, redis.BlockingConnectionPool])
    @pytest.mark.parametrize("options", [{}, {"protocol": 2}, {"protocol": 3}])
    def test_protocol_warning_matches_the_behavior_of_redis_py(
        self, binary: Path, pool: type[redis.ConnectionPool], options: dict[str, Any]
    ) -> None:
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server:
            client: Any = redis.Redis(connection_pool=pool.from_url(server.url, **options))
            with client:
                warned = "client protocol" in found(StepRunStore(client))
                assert reuses_dirty_connections(client) is warned

    def test_asyncio_client_gets_no_protocol_warning(self, binary: Path) -> None:
        async def main(url: str) -> dict[str, Finding]:
            async with redis.asyncio.Redis.from_url(url, protocol=3) as client:
                diagnosis = await AsyncStepRunStore(client).doctor()
            return {finding.check: finding for finding in diagnosis.findings}

        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server:
            assert "client protocol" not in asyncio.run(main(server.url))

    @pytest.mark.parametrize(
        ("options", "longest"),
        [
            ({}, 14.5),  # the client of from_url: 1.5 s for a connection, and 3 s for a reply
            ({"timeout": 2}, 2.9),
            ({"timeout": 20, "socket_timeout": 4, "socket_connect_timeout": 2}, 26),
            ({"timeout": 60, "socket_timeout": 4, "socket_connect_timeout": 2, "retry": Retry(NoBackoff(), 2)}, 66),
            ({"timeout": 60, "socket_connect_timeout": 2, "retry": Retry(ConstantBackoff(3), 2)}, 80),
        ],
    )
    def test_longest_call_is_the_timeout_and_an_attempt(
        self, binary: Path, options: dict[str, Any], longest: float
    ) -> None:
        finding = examined(binary, SOUND, **options)["client deadline"]
        assert (finding.level, f"a call ends within {longest:g} s" in finding.message) == (Level.OK, True)

    def test_only_a_hooked_client_retries_within_an_attempt(self, binary: Path) -> None:
        options: Any = {"socket_timeout": 1, "socket_connect_timeout": 0.5}
        hooked: Any = type("Hooked", (redis.Redis,), HOOK)
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server:
            for retry, longest in ((Retry(ConstantBackoff(3), 2), 70.5), (Retry(ExponentialBackoff(4, 1), 30), 224.5)):
                for kind, seconds in ((redis.Redis, 61.5), (hooked, longest)):
                    with kind.from_url(server.url, retry=retry, **options) as client:
                        level, message = found(StepRunStore(client, timeout=60))["client deadline"][1:3]
                    assert (f" {seconds:g} s" in message, "small pieces" in message) == (True, seconds == 70.5)
                    assert {level is Level.WARNING, "sends up to 31 times" in message} == {seconds > 200}

    @pytest.mark.parametrize("wait", [0.2, 30, None])
    def test_timeout_of_a_pool_does_not_extend_a_call(self, binary: Path, wait: float | None) -> None:
        """The store waits for a connection until its own timeout; then there is no attempt to wait for."""
        options: dict[str, Any] = {"socket_timeout": 0.5, "socket_connect_timeout": 0.2, "timeout": wait}
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server:
            pool = redis.BlockingConnectionPool.from_url(server.url, max_connections=1, protocol=2, **options)
            with redis.Redis(connection_pool=pool) as client:
                store = StepRunStore(client, timeout=1.5)
                assert "a call ends within 2.2 s" in found(store)["client deadline"].message
                connection = get_connection(pool)
                began = time.monotonic()
                with pytest.raises(NotSentError, match="No connection available"):
                    store.begin_step("run", "pay", {})
                took = time.monotonic() - began
                pool.release(connection)
        assert 1.5 <= took < 10

    @pytest.mark.parametrize("by_url", [False, True])
    def test_pool_of_one_connection_passes_every_check(self, binary: Path, by_url: bool) -> None:
        """A limit in the URL is respected like one in the options."""
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server:
            url = f"{server.url}?max_connections=1" if by_url else server.url
            with StepRunStore.from_url(url, **({} if by_url else {"max_connections": 1})) as store:
                store.begin_step("run", "pay", {}, lease=60)
                assert wrong(found(store)) == {}
                pool: Any = store.client.connection_pool
                assert (len(pool._available_connections), len(pool._in_use_connections)) == (1, 0)

    def test_default_timeouts_of_redis_py_are_recognized(self, binary: Path) -> None:
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server, redis.Redis.from_url(server.url) as client:
            pool: Any = client.connection_pool
            made = pool.connection_class(**pool.connection_kwargs)
            timeout, connect = made.socket_timeout, made.socket_connect_timeout
            store = StepRunStore(client)
            level = found(store)["client timeout"].level
        assert (level is Level.WARNING) == (timeout is None)
        if timeout is not None:
            findings = found(store)
            longest = 10 + connect + timeout
            assert f"a call can take {longest:g} s" in findings["client deadline"].message


def get_connection(pool: Any) -> Any:
    version = tuple(int(part) for part in redis.__version__.split(".")[:2])
    return pool.get_connection() if version >= (5, 3) else pool.get_connection("_")


def reuses_dirty_connections(client: Any) -> bool:
    """Returns whether the next command gets the reply that an interrupted command left on its connection."""
    pool = client.connection_pool
    connection = get_connection(pool)
    pool.release(connection)
    send = connection.send_command

    def send_then_interrupt(*args: Any, **options: Any) -> None:
        send(*args, **options)
        wait_until(connection.can_read)
        raise KeyboardInterrupt

    connection.send_command = send_then_interrupt
    with pytest.raises(KeyboardInterrupt):
        client.echo("first")
    connection.send_command = send
    return client.echo("second") != b"second"


class TestUnreachableServer:
    def refused(self, server: EmbeddedServer) -> str:
        url = server.url
        server.stop()
        return url

    def wrong_password(self, server: EmbeddedServer) -> str:
        return f"redis://unknown:wrong@{server.host}:{server.port}/0"

    @pytest.mark.parametrize(
        ("make", "advice"),
        [(refused, "Check that the server is running"), (wrong_password, "Check the user name and the password")],
    )
    def test_unreachable_server_yields_one_finding(
        self, make: Callable[[TestUnreachableServer, EmbeddedServer], str], advice: str
    ) -> None:
        with (
            EmbeddedServer(binary=find_binary("valkey"), port=0) as server,
            StepRunStore.from_url(make(self, server), timeout=120) as store,
        ):
            began = time.monotonic()
            findings = found(store)
        assert time.monotonic() - began < 60  # it does not wait for the server, as operations do
        assert wrong(findings) == {"connection": Level.FAILURE}
        assert advice in findings["connection"].message

    def test_hanging_server_yields_one_finding(self) -> None:
        with (
            EmbeddedServer(binary=find_binary("valkey"), port=0) as server,
            StepRunStore.from_url(server.url, socket_timeout=0.2) as store,
        ):
            server.pause()
            findings = found(store)
            server.resume()
        assert wrong(findings) == {"connection": Level.FAILURE}
        assert "The server hangs" in findings["connection"].message


CLIENT = Client(
    is_cluster=True,
    socket_timeout=3,
    connect_timeout=1,
    sends=1,
    decodes=False,
    reuses_dirty_connections=False,
    retry_pauses=0,
    is_hooked=True,
    timeout=10,
    wait_replicas=0,
    wait_aof=False,
    wait_timeout=0,
    lease=None,
    job_timeout=None,
)


@pytest.mark.parametrize(
    ("check", "facts", "level"),
    [
        ("version", {"info": {"redis_version": "6.0.16"}}, Level.FAILURE),
        ("version", {"info": {"redis_version": "6.2.0"}}, Level.OK),
        ("version", {"info": {"executable": "?"}}, Level.UNKNOWN),
        ("role", {"info": {"redis_mode": "sentinel"}}, Level.FAILURE),
        ("eviction", {"info": {}}, Level.UNKNOWN),
        ("memory", {"info": {}}, Level.UNKNOWN),
        ("persistence", {"info": {}}, Level.UNKNOWN),
        ("disk", {"info": {"aof_last_write_status": "err"}}, Level.FAILURE),
        ("disk", {"info": {"aof_last_bgrewrite_status": "err"}}, Level.WARNING),
        ("replication", {"info": {"connected_slaves": "1"}}, Level.UNKNOWN),
        ("cluster", {"info": {"cluster_enabled": "1"}}, Level.UNKNOWN),
        (
            "cluster",
            {"info": {"cluster_enabled": "1"}, "cluster": {"cluster_state": "ok", "cluster_slots_ok": "16383"}},
            Level.FAILURE,
        ),
        ("clock", {"info": {}, "skew": 1.5}, Level.WARNING),
    ],
)
def test_check_judges_recorded_server_information(check: str, facts: dict[str, Any], level: Level) -> None:
    server = Server(**{"settings": {}, "cluster": {}, "skew": 0.0, "client": CLIENT, **facts})
    result = CHECKS_OF_SERVERS[check](server)
    assert result is not None
    assert result[0] is level
