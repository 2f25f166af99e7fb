"""doctor: it finds what would break a promise, on real servers that are set up to."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry
from support.backends import Bench
from support.internals import retry_policy
from support.servers import EmbeddedCluster, find_binary, wait_until

from squidstep_redis import AsyncStepRunStore, Diagnosis, Finding, InvalidArgumentError, Level, StepRunStore
from squidstep_redis.doctor.checks import CHECKS_OF_SERVERS, Client, Server
from squidstep_redis.embedded import EmbeddedServer

SOUND = {"appendonly": "yes", "appendfsync": "always", "maxmemory": "100mb"}
RIGHTS = "+@read +@write +@scripting +@transaction -@dangerous +time"
SETTINGS = "+config|get +info +cluster|info +cluster|nodes"  # beyond what a store needs


def found(store: StepRunStore, **asked: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in store.doctor(**asked).findings}


def wrong(findings: dict[str, Finding]) -> dict[str, Level]:
    return {check: finding.level for check, finding in findings.items() if finding.level}


# On a port: redis-py 5.0.2 forgets the socket_timeout of a unix socket, as its doctor rightly says.
def examined(binary: Path, options: dict[str, str], **client_options: Any) -> dict[str, Finding]:
    with EmbeddedServer(binary=binary, options=options, port=0) as server:
        store = StepRunStore.from_url(server.url, **client_options)
        with store:
            return found(store)


def test_on_every_server_a_scratch_run_goes_through_every_transition(bench: Bench) -> None:
    diagnosis = bench.store().doctor()
    assert "self-test" in {finding.check for finding in diagnosis.findings if finding.level is Level.OK}
    assert all(finding.message for finding in diagnosis.findings)


def test_nothing_is_left_of_the_scratch_run(bench: Bench) -> None:
    bench.store().doctor()
    wait_until(lambda: not bench.backend.keys(bench.prefix))


@pytest.mark.servers("cluster")
class TestOnACluster:
    def test_every_node_is_examined_and_tried(self, bench: Bench) -> None:
        findings = bench.store().doctor().findings
        for check in ("connection", "self-test", "cluster"):
            nodes = {finding.server: finding.level for finding in findings if finding.check == check}
            assert list(nodes.values()) == [Level.OK] * 3, check

    def test_a_client_that_knows_one_node_alone(self, bench: Bench) -> None:
        node = bench.backend.raw.get_primaries()[0]
        with StepRunStore.from_url(f"redis://{node.host}:{node.port}") as store:
            finding = found(store)["cluster"]
        assert (finding.level, "RedisCluster" in finding.message) == (Level.FAILURE, True)

    def test_a_node_without_the_rights_that_the_others_have(self, bench: Bench) -> None:
        cluster = bench.backend.raw
        first, *others = cluster.get_primaries()
        try:
            for node in (first, *others):
                rights = "+@all" if node is not first else "+@all -zadd"
                rules = f"reset on >secret ~{bench.prefix}:* {rights}".split()
                cluster.execute_command("ACL SETUSER", "halfway", *rules, target_nodes=node)
            options = {"username": "halfway", "password": "secret"}
            findings = bench.store(client_options=options).doctor().findings
        finally:
            cluster.execute_command("ACL DELUSER", "halfway", target_nodes="primaries")
        tested = {finding.server: finding.level for finding in findings if finding.check == "self-test"}
        assert tested == {first.name: Level.FAILURE, **{node.name: Level.OK for node in others}}


def test_a_cluster_of_which_a_node_is_gone() -> None:
    with EmbeddedCluster(options={"cluster-node-timeout": "500"}) as cluster:
        client: Any = redis.RedisCluster.from_url(cluster.url, protocol=2)
        with client, redis.Redis.from_url(cluster.url, decode_responses=True) as first:
            gone = f"127.0.0.1:{cluster.nodes[2].port}"
            cluster.nodes[2].stop()
            wait_until(lambda: cast("Any", first).cluster("INFO")["cluster_state"] == "fail", 20)
            findings = StepRunStore(client, timeout=1).doctor().findings
    levels = [finding.level for finding in findings if finding.check == "cluster"]
    assert levels == [Level.FAILURE] * 2
    unreached = [finding.server for finding in findings if finding.check == "connection" and finding.level]
    assert unreached == [gone]


@pytest.mark.servers("fakeredis")
def test_what_a_server_does_not_tell_is_unknown(bench: Bench) -> None:
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
def test_the_worst_counts_and_what_is_unknown_is_not_the_worst(levels: list[Level], worst: Level) -> None:
    assert Diagnosis([Finding("check", level, "") for level in levels]).level is worst


class TestOnARealServer:
    def test_all_is_well(self, binary: Path) -> None:
        findings = examined(binary, SOUND)
        assert wrong(findings) == {}
        assert set(findings) == {
            *("client time-out", "client deadline", "connection", "self-test", "version", "role"),
            *("eviction", "memory", "persistence", "disk", "clock"),
        }

    @pytest.mark.parametrize(
        ("options", "check", "level", "said"),
        [
            ({"maxmemory-policy": "allkeys-lru"}, "eviction", Level.FAILURE, "noeviction"),
            ({"maxmemory": "0"}, "memory", Level.WARNING, "maxmemory is not set"),
            ({"appendonly": "no"}, "persistence", Level.WARNING, "forgets everything"),
            ({"appendfsync": "everysec"}, "persistence", Level.WARNING, "a second or two"),
            ({"appendfsync": "no"}, "persistence", Level.WARNING, "half a minute"),
        ],
    )
    def test_a_setting_that_breaks_a_promise(
        self, binary: Path, options: dict[str, str], check: str, level: Level, said: str
    ) -> None:
        findings = examined(binary, {**SOUND, **options})
        assert wrong(findings) == {check: level}
        assert said in findings[check].message

    def test_a_server_that_is_nearly_full_and_has_evicted(self, binary: Path) -> None:
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
    def test_a_snapshot_that_failed(
        self, binary: Path, tmp_path: Path, refuse: str, level: Level, self_test: Level
    ) -> None:
        options = {**SOUND, "appendonly": "no", "stop-writes-on-bgsave-error": refuse}
        directory = tmp_path / "gone"
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

    def test_a_replica(self, binary: Path) -> None:
        with (
            EmbeddedServer(binary=binary, options=SOUND, port=0) as master,
            EmbeddedServer(binary=binary, options=SOUND, port=0) as replica,
            StepRunStore.from_url(replica.url, timeout=1) as store,
            StepRunStore.from_url(master.url, timeout=1) as masters,
        ):
            client: Any = masters.client
            cast("Any", store.client).replicaof(master.host, master.port)
            wait_until(lambda: client.info("replication").get("slave0", {}).get("state") == "online", 20)
            of_replica, of_master = found(store), found(masters)
            with StepRunStore.from_url(master.url, wait_replicas=1) as waiting:
                wait_until(lambda: found(waiting)["replication"].level is Level.OK)
                assert wrong(found(waiting)) == {}
            with StepRunStore.from_url(master.url, timeout=1, wait_replicas=2, wait_timeout=0.01) as waiting:
                too_few = found(waiting)
            client.config_set("min-replicas-to-write", 1)
            wait_until(lambda: client.info("replication")["min_slaves_good_slaves"] == 1, 20)
            held = found(masters)
            client.config_set("min-replicas-to-write", 2)
            refused = found(masters)
        assert wrong(of_replica) == {"role": Level.FAILURE, "self-test": Level.FAILURE}
        assert wrong(of_master) == {"replication": Level.WARNING}
        assert wrong(too_few) == {"replication": Level.FAILURE, "self-test": Level.FAILURE}
        assert "NotReplicatedError" in too_few["self-test"].message
        if held["version"].message.startswith("Redis 6"):
            assert wrong(held) == wrong(refused) == {"replication": Level.WARNING}  # and the self-test is not refused
            assert "holds no script" in held["replication"].message
        else:
            assert wrong(held) == {}
            assert wrong(refused) == {"replication": Level.FAILURE, "self-test": Level.FAILURE}
            assert "NOREPLICAS" in refused["replication"].message

    def test_waiting_for_an_aof_that_is_off(self, binary: Path) -> None:
        findings = examined(binary, {**SOUND, "appendonly": "no"}, wait_aof=True, wait_timeout=0.1, timeout=1)
        assert (findings["persistence"].level, findings["self-test"].level) == (Level.FAILURE, Level.FAILURE)

    def test_waiting_for_the_aof(self, binary: Path) -> None:
        findings = examined(binary, {**SOUND, "appendfsync": "everysec"}, wait_aof=True, wait_timeout=2.5)
        knows_waitaof = findings["version"].message.startswith("Valkey")
        assert findings["persistence"].level is Level.OK
        assert wrong(findings) == ({} if knows_waitaof else {"version": Level.FAILURE, "self-test": Level.FAILURE})

    @pytest.mark.parametrize(
        ("fsync", "wait_timeout", "level"),
        [("everysec", 1.9, Level.WARNING), ("everysec", 2, Level.OK), ("always", 1, Level.OK)],
    )
    def test_waiting_for_the_aof_for_too_short_a_while(
        self, binary: Path, fsync: str, wait_timeout: float, level: Level
    ) -> None:
        findings = examined(binary, {**SOUND, "appendfsync": fsync}, wait_aof=True, wait_timeout=wait_timeout)
        assert findings["persistence"].level is level

    def test_nothing_is_left_where_the_scratch_run_failed(self, binary: Path) -> None:
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
            (f"~squidstep:* +@all -zadd {SETTINGS}", {"self-test": Level.FAILURE}),
            (f"~elsewhere:* +@all {SETTINGS}", {"self-test": Level.FAILURE}),
            (f"~squidstep:* {RIGHTS} {SETTINGS}", {}),
            (f"~squidstep:* {RIGHTS} +info", {"persistence": Level.UNKNOWN}),
            (f"~squidstep:* {RIGHTS}", {"server": Level.UNKNOWN}),
        ],
    )
    def test_a_user_with_these_rights(self, binary: Path, rights: str, expected: dict[str, Level]) -> None:
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server:
            with redis.Redis.from_url(server.url) as client:
                client.execute_command(f"ACL SETUSER limited on >secret {rights}")
            with StepRunStore.from_url(f"redis://limited:secret@{server.host}:{server.port}/0") as store:
                findings = found(store)
        assert wrong(findings) == expected
        if "self-test" in expected:
            advice = f"grant the user ~<prefix>:* {RIGHTS}"
            assert findings["self-test"].message.count(advice) == 1

    def test_a_store_whose_lease_is_too_short(self, binary: Path) -> None:
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server, StepRunStore.from_url(server.url) as store:
            assert wrong(found(store, lease=60, job_timeout=60)) == {}
            for asked, said in (
                ({"lease": 60, "job_timeout": 61}, "a second worker begins"),
                ({"lease": 10}, "timeout of 10 s"),
            ):
                findings = found(store, **asked)
                assert wrong(findings) == {"lease": Level.WARNING}
                assert said in findings["lease"].message
            with pytest.raises(InvalidArgumentError, match="job_timeout"):
                store.doctor(lease=60, job_timeout=0)


class TestClients:
    @pytest.mark.parametrize(
        ("options", "check"),
        [
            ({"socket_timeout": None}, "client time-out"),
            ({"socket_timeout": 415, "timeout": 2_000}, "client time-out"),
            ({"decode_responses": True}, "client decoding"),
            ({"retry": Retry(NoBackoff(), 10)}, "client deadline"),
            ({"socket_timeout": 4, "socket_connect_timeout": 2}, "client deadline"),
        ],
    )
    def test_one_that_limits_a_promise(self, binary: Path, options: dict[str, Any], check: str) -> None:
        assert wrong(examined(binary, SOUND, **options)) == {check: Level.WARNING}

    @pytest.mark.parametrize("pool", [redis.ConnectionPool, redis.BlockingConnectionPool])
    @pytest.mark.parametrize("options", [{}, {"protocol": 2}, {"protocol": 3}])
    def test_what_is_said_of_its_protocol_is_so(
        self, binary: Path, pool: type[redis.ConnectionPool], options: dict[str, Any]
    ) -> None:
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server:
            client: Any = redis.Redis(connection_pool=pool.from_url(server.url, **options))
            with client:
                warned = "client protocol" in found(StepRunStore(client))
                assert mixes_replies(client) is warned

    def test_asyncio_is_not_warned_of_what_a_cancellation_does_not_do(self, binary: Path) -> None:
        async def main(url: str) -> dict[str, Finding]:
            async with redis.asyncio.Redis.from_url(url, protocol=3) as client:
                diagnosis = await AsyncStepRunStore(client).doctor()
            return {finding.check: finding for finding in diagnosis.findings}

        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server:
            assert "client protocol" not in asyncio.run(main(server.url))

    def test_redis_pys_defaults_are_taken_as_they_are(self, binary: Path) -> None:
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server, redis.Redis.from_url(server.url) as client:
            pool: Any = client.connection_pool
            made = pool.connection_class(**pool.connection_kwargs)
            timeout, connect = made.socket_timeout, made.socket_connect_timeout
            store = StepRunStore(client)
            level = found(store)["client time-out"].level
        assert (level is Level.WARNING) == (timeout is None)
        assert retry_policy(store).last_send == min((timeout or 0) + (connect or 0), 5)  # it counts them, too


def mixes_replies(client: Any) -> bool:
    """Whether a reply that an interrupted command left on its connection answers the next command."""
    pool = client.connection_pool
    version = tuple(int(part) for part in redis.__version__.split(".")[:2])
    connection = pool.get_connection() if version >= (5, 3) else pool.get_connection("_")
    pool.release(connection)
    send = connection.send_command

    def send_and_be_interrupted(*args: Any, **options: Any) -> None:
        send(*args, **options)
        wait_until(connection.can_read)
        raise KeyboardInterrupt

    connection.send_command = send_and_be_interrupted
    with pytest.raises(KeyboardInterrupt):
        client.echo("first")
    connection.send_command = send
    return client.echo("second") != b"second"


class TestNoServer:
    def refused(self, server: EmbeddedServer) -> str:
        url = server.url
        server.stop()
        return url

    def wrong_password(self, server: EmbeddedServer) -> str:
        return f"redis://nobody:wrong@{server.host}:{server.port}/0"

    @pytest.mark.parametrize(
        ("make", "advice"),
        [(refused, "Is the server running"), (wrong_password, "Give a user and a password")],
    )
    def test_is_one_finding(self, make: Callable[[TestNoServer, EmbeddedServer], str], advice: str) -> None:
        with (
            EmbeddedServer(binary=find_binary("valkey"), port=0) as server,
            StepRunStore.from_url(make(self, server)) as store,
        ):
            findings = found(store)
        assert wrong(findings) == {"connection": Level.FAILURE}
        assert advice in findings["connection"].message

    def test_one_that_hangs_is_asked_once(self) -> None:
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
    timeout=10,
    wait_replicas=0,
    wait_aof=False,
    wait_timeout=0,
    lease=None,
    job_timeout=None,
)


@pytest.mark.parametrize(
    ("check", "told", "level"),
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
def test_what_no_server_at_hand_tells(check: str, told: dict[str, Any], level: Level) -> None:
    server = Server(**{"settings": {}, "cluster": {}, "skew": 0.0, "client": CLIENT, **told})
    judged = CHECKS_OF_SERVERS[check](server)
    assert judged is not None
    assert judged[0] is level
