"""Operations that ask all servers, when connections are lost, servers hang, or none of them replies."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import redis
from redis.crc import key_slot
from support.internals import retry_for
from support.records import begun
from support.servers import wait_until

from squidstep_redis import Level, NotSentError, RefusedError
from squidstep_redis.operations.calls import Calls
from squidstep_redis.operations.scans import Shard, find_shards
from squidstep_redis.protocol.keys import Keys

from .kit import Stores
from .test_hanging_nodes import REPLY, Addresses, addresses, fastest, runs_on_each
from .topologies import Cluster, Fronts

pytestmark = [
    pytest.mark.servers("valkey", "redis-7"),
    pytest.mark.filterwarnings("ignore:[Uu]nclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

__all__ = ["addresses"]  # a fixture


@pytest.mark.parametrize("hooked", [False, True])
def test_lost_connections_hide_no_node_from_purge(unreplicated: Cluster, stores: Stores, hooked: bool) -> None:
    wait_until(unreplicated.is_ready, timeout=60)
    with Fronts(unreplicated) as fronts:
        store = stores.on_cluster(fronts.url, address_remap=fronts.remap, timeout=20)
        runs = runs_on_each(unreplicated, f"purge-{stores.flavor}-{hooked}")
        for run in runs:
            store.complete_step(begun(store.begin_step(run, "pay", {})), {})
        if hooked:
            client: Any = store.client
            client.execute_command = functools.partial(client.execute_command)
        for run in runs:
            fronts.of(key_slot(Keys(b"squidstep").of_run(run.encode()).steps)).disconnect()
        time.sleep(0.01)

        purged = store.purge(older_than=0.001, run_id_prefix=f"hanging-purge-{stores.flavor}-{hooked}")

        assert {summary.run_id for summary in purged} == set(runs)


def test_lost_connections_are_no_finding_of_the_doctor(unreplicated: Cluster, stores: Stores) -> None:
    wait_until(unreplicated.is_ready, timeout=60)
    with Fronts(unreplicated) as fronts:
        store = stores.on_cluster(fronts.url, address_remap=fronts.remap, timeout=20)
        assert store.doctor().findings
        for run in runs_on_each(unreplicated, "doctor"):
            fronts.of(key_slot(Keys(b"squidstep").of_run(run.encode()).steps)).disconnect()

        levels = [finding.level for finding in store.doctor().findings if finding.check == "connection"]

        assert levels[:3] == [Level.OK] * 3


def test_hanging_nodes_are_waited_for_side_by_side(addresses: Addresses, stores: Stores) -> None:
    store = stores.on_cluster(addresses.url, address_remap=addresses.remap, timeout=20)

    def measure() -> float:
        addresses.resume()
        retry_for(store, 30)
        assert store.get_run("run") == []
        retry_for(store, 0.05)
        addresses.disconnect()
        addresses.hang()
        began = time.monotonic()
        findings = store.doctor().findings
        took = time.monotonic() - began
        assert [each.level for each in findings if each.check == "connection"] == [Level.FAILURE] * 3
        return took

    fastest(0.05 + REPLY, measure)


class TestShards:
    """Which servers are scanned, by the replies to CLUSTER SLOTS."""

    def find(self, replies: dict[str, Any]) -> list[Shard]:
        workflow = find_shards(Calls("squidstep", None, 1_000_000, None), "purge")
        next(workflow)
        try:
            workflow.send({name: [reply] for name, reply in replies.items()})
        except StopIteration as end:
            return end.value
        raise AssertionError("it yields once")

    def test_unreached_nodes_raise_their_error(self) -> None:
        away = NotSentError("purge", None, None, "away", True)
        with pytest.raises(NotSentError):
            self.find({"node-1:6379": away, "node-2:6379": away})
        with pytest.raises(NotSentError):
            self.find({"": away})

    def test_nodes_that_refuse_raise_an_error(self) -> None:
        with pytest.raises(RefusedError, match="no permissions"):
            self.find({"node-1:6379": redis.exceptions.NoPermissionError("no permissions")})

    def test_single_server_that_refuses_is_scanned(self) -> None:
        disabled = redis.ResponseError("This instance has cluster support disabled")
        assert [shard.name for shard in self.find({"": disabled})] == [""]
