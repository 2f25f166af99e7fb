"""doctor: it finds what would break a promise, on real servers that are set up to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import redis
from backends import Bench
from servers import find_binary, wait_until

from squidstep_redis import Finding, Level, StepRunStore
from squidstep_redis.embedded import EmbeddedServer

SOUND = {"appendonly": "yes", "appendfsync": "always"}


def found(store: StepRunStore) -> dict[str, Finding]:
    return {finding.check: finding for finding in store.doctor().findings}


def examined(binary: Path, options: dict[str, str], **client_options: Any) -> dict[str, Finding]:
    with EmbeddedServer(binary=binary, options=options) as server:
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
def test_every_node_of_a_cluster_is_examined(bench: Bench) -> None:
    findings = bench.store().doctor().findings
    assert len({finding.server for finding in findings if finding.check == "version"}) == 3


@pytest.mark.servers("fakeredis")
def test_what_a_server_does_not_tell_is_unknown_and_not_held_against_it(bench: Bench) -> None:
    diagnosis = bench.store().doctor()
    assert (diagnosis.findings[-1].level, diagnosis.level) == (Level.UNKNOWN, Level.OK)


class TestOnARealServer:
    def test_all_is_well(self, binary: Path) -> None:
        findings = examined(binary, SOUND)
        assert {finding.level for finding in findings.values()} == {Level.OK}
        assert set(findings) >= {"self-test", "version", "eviction", "persistence", "clock", "client time-out"}

    @pytest.mark.parametrize(
        ("options", "check", "level"),
        [
            ({"maxmemory-policy": "allkeys-lru"}, "eviction", Level.FAILURE),
            ({"appendonly": "no"}, "persistence", Level.WARNING),
            ({"appendfsync": "everysec"}, "persistence", Level.WARNING),
            ({"appendfsync": "no"}, "persistence", Level.WARNING),
        ],
    )
    def test_a_setting_that_breaks_a_promise_is_found(
        self, binary: Path, options: dict[str, str], check: str, level: Level
    ) -> None:
        findings = examined(binary, {**SOUND, **options})
        assert {name: finding.level for name, finding in findings.items() if finding.level} == {check: level}

    def test_a_server_that_is_nearly_full_and_has_evicted(self, binary: Path) -> None:
        options = {**SOUND, "maxmemory-policy": "allkeys-lru"}
        with EmbeddedServer(binary=binary, options=options) as server, StepRunStore.from_url(server.url) as store:
            client: Any = store.client
            client.config_set("maxmemory", client.info("memory")["used_memory"] + 2_000_000)
            for number in range(40):
                client.set(f"filler-{number}", b"x" * 100_000)
            findings = found(store)
        assert (findings["evicted keys"].level, findings["memory"].level) == (Level.WARNING, Level.WARNING)

    def test_a_replica(self, binary: Path) -> None:
        with (
            EmbeddedServer(binary=binary, options=SOUND, port=0) as master,
            EmbeddedServer(binary=binary, options=SOUND) as replica,
            StepRunStore.from_url(replica.url) as store,
            StepRunStore.from_url(master.url) as masters,
        ):
            client: Any = masters.client
            cast("Any", store.client).replicaof(master.host, master.port)
            wait_until(lambda: client.info("replication")["connected_slaves"] == 1, 20)
            of_replica, of_master = found(store), found(masters)
            client.config_set("min-replicas-to-write", 1)
            wait_until(lambda: found(masters)["replication"].level is Level.OK, 20)
        assert (of_replica["role"].level, of_replica["self-test"].level) == (Level.FAILURE, Level.FAILURE)
        assert of_master["replication"].level is Level.WARNING

    def test_a_user_without_the_rights(self, binary: Path) -> None:
        with EmbeddedServer(binary=binary, options=SOUND, port=0) as server:
            with redis.Redis.from_url(server.url) as client:
                client.execute_command("ACL SETUSER poor on >secret ~squidstep:* +@all -zadd -config -info")
                client.execute_command("ACL SETUSER other on >secret ~elsewhere:* +@all")
            address = f"{server.host}:{server.port}/0"
            with StepRunStore.from_url(f"redis://poor:secret@{address}") as store:
                poor = found(store)
            with StepRunStore.from_url(f"redis://other:secret@{address}") as store:
                other = found(store)
        assert (poor["self-test"].level, poor["server"].level) == (Level.FAILURE, Level.UNKNOWN)
        assert other["self-test"].level is Level.FAILURE
        assert "~<prefix>:*" in poor["self-test"].message
        assert "~<prefix>:*" in other["self-test"].message

    @pytest.mark.parametrize(
        ("client_options", "check"),
        [
            ({"socket_timeout": None}, "client time-out"),
            ({"socket_timeout": 415}, "client time-out"),
            ({"protocol": 3}, "client protocol"),
            ({"decode_responses": True}, "client decoding"),
        ],
    )
    def test_a_client_that_limits_a_promise(self, binary: Path, client_options: dict[str, Any], check: str) -> None:
        findings = examined(binary, SOUND, **client_options)
        assert {name: finding.level for name, finding in findings.items() if finding.level} == {check: Level.WARNING}

    def test_a_server_that_is_gone_is_a_finding(self) -> None:
        with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
            store = StepRunStore.from_url(server.url, retry=None)
        diagnosis = store.doctor()
        assert diagnosis.level is Level.FAILURE
