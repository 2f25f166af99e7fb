"""A cluster of six: its primaries fail, its replicas take over, and slots move, while calls are under way."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot
from support.proxy import Proxy
from support.records import begun
from support.servers import wait_until

from squidstep_redis import NotReplicatedError, RefusedError, StepRun, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.keys import Keys

from .kit import FLAVOURS, Load, Stores, assert_a_legal_loss, stores_of
from .topologies import Cluster, Migration, connected

pytestmark = [
    pytest.mark.servers("valkey", "redis-7", "redis-6"),
    # On asyncio redis-py forgets a node that is gone, and does not close its connections.
    pytest.mark.filterwarnings("ignore:[Uu]nclosed:ResourceWarning"),
]

_runs = (f"run-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def started(binary: Path) -> Iterator[Cluster]:
    with Cluster(binary) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def unreplicated(binary: Path) -> Iterator[Cluster]:
    """A cluster for tests that delete a slot and add it again.

    The other nodes of Redis 7.0 remember the deletion. If a replica takes over such a slot later and the old primary
    comes back, the new primary drops the slot. Then no node serves it, and the cluster stays down.
    """
    with Cluster(binary, replicated=False) as cluster:
        yield cluster


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    """All six are up and follow each other, whichever is primary by now."""
    for node in started.nodes:
        node.start()
    wait_until(started.is_ready, timeout=60)
    yield started
    gc.collect()  # here, where the warnings are filtered


@pytest.fixture
def run() -> str:
    """A run that no test has used."""
    return next(_runs)


def slot_of(run: str) -> int:
    return key_slot(Keys(b"squidstep").of_run(run.encode()).steps)


def load_on(cluster: Cluster, runs: int, **settings: Any) -> Load:
    @contextlib.contextmanager
    def connect(flavour: str) -> Iterator[StepRunStore]:
        with stores_of(flavour) as stores:
            yield stores.on_cluster(cluster.url, **settings)

    return Load(lambda flavour=flavour: connect(flavour) for flavour in FLAVOURS * runs)


class TestFailover:
    def test_of_a_primary_that_is_killed_under_load(self, cluster: Cluster) -> None:
        with stores_of("blocking") as stores:
            with load_on(cluster, runs=2, timeout=60) as load:
                slot = slot_of(load.runs[0])
                old = cluster.holders(slot)[0]
                old.kill()
                gone = time.monotonic()
                cluster.wait_for_another_primary(slot, old)
                load.wait_for_more()
            old.start()
            assert load.errors == []
            assert_a_legal_loss(load, load.lost(stores.on_cluster(cluster.url)), gone)

    def test_loses_nothing_that_a_replica_has_confirmed(self, cluster: Cluster) -> None:
        with stores_of("blocking") as stores:
            with load_on(cluster, runs=1, timeout=60, wait_replicas=1, wait_timeout=0.5) as load:
                slot = slot_of(load.runs[0])
                old = cluster.holders(slot)[0]
                old.kill()
                cluster.wait_for_another_primary(slot, old)
                old.start()  # to be the replica that there was none of meanwhile
                load.wait_for_more()
            assert {type(error) for error in load.errors} <= {NotReplicatedError}
            assert load.lost(stores.on_cluster(cluster.url)) == []

    def test_in_agreement_loses_nothing(self, cluster: Cluster) -> None:
        with stores_of("blocking") as stores:
            with load_on(cluster, runs=1, timeout=60) as load:
                cluster.fail_over(slot_of(load.runs[0]))
                load.wait_for_more()
            assert load.errors == []
            assert load.lost(stores.on_cluster(cluster.url)) == []


def everything_of(run: str, store: StepRunStore) -> StepRun:
    """Creates all four keys of a run; returns a claim that is held."""
    store.complete_step(begun(store.begin_step(run, "completed", {})), {})
    store.fail_step(begun(store.begin_step(run, "failed", {})), {})
    return begun(store.begin_step(run, "running", {}, lease=600))


class TestASlotOnItsWay:
    @pytest.fixture
    def claim(self, cluster: Cluster, stores: Stores, run: str) -> StepRun:
        return everything_of(run, stores.on_cluster(cluster.url))

    @pytest.mark.parametrize("batch", [False, True])
    def test_that_has_arrived_is_followed(
        self, cluster: Cluster, stores: Stores, run: str, claim: StepRun, batch: bool
    ) -> None:
        """MOVED, to a client that knows it to be where it was."""
        store = stores.on_cluster(cluster.url, timeout=60)
        assert store.get_step_run(run, "running") is not None
        with Migration(cluster, slot_of(run)):
            pass
        assert_it_works(store, run, claim, batch)

    @pytest.mark.parametrize("batch", [False, True])
    def test_of_which_all_keys_have_arrived_is_asked_there(
        self, cluster: Cluster, stores: Stores, run: str, claim: StepRun, batch: bool
    ) -> None:
        """ASK."""
        store = stores.on_cluster(cluster.url, timeout=60)
        with Migration(cluster, slot_of(run)) as migration:
            migration.move(*Keys(b"squidstep").of_run(run.encode()))
            assert_it_works(store, run, claim, batch)

    @pytest.mark.parametrize("moved", [["steps"], ["done", "claims"]])
    def test_that_is_halfway_is_refused_at_the_deadline_and_nothing_was_written(
        self, cluster: Cluster, stores: Stores, run: str, claim: StepRun, moved: list[str]
    ) -> None:
        """TRYAGAIN."""
        store = stores.on_cluster(cluster.url, timeout=1)
        with redis.RedisCluster.from_url(cluster.url) as client:
            before = everything_stored(client, run)
            with Migration(cluster, slot_of(run)) as migration:
                migration.move(*(getattr(Keys(b"squidstep").of_run(run.encode()), key) for key in moved))
                calls = [store.calls.begin_step(run, "new", {}, lease=60), store.calls.complete_step(claim, {})]
                for call in calls:
                    with pytest.raises(RefusedError, match="slot is migrating") as caught:
                        store.send(call)
                    assert caught.value.transient
                assert [type(outcome) for outcome in store.batch(calls)] == [RefusedError, RefusedError]
            assert everything_stored(client, run) == before

    @pytest.mark.parametrize("batch", [False, True])
    def test_that_arrives_before_the_deadline_is_followed(
        self, cluster: Cluster, stores: Stores, run: str, claim: StepRun, batch: bool
    ) -> None:
        with Migration(cluster, slot_of(run)) as migration, through_a_proxy(migration.source) as (proxy, remap):
            store = stores.on_cluster(cluster.url, address_remap=remap, timeout=60)
            assert store.get_step_run(run, "running") is not None
            migration.move(Keys(b"squidstep").of_run(run.encode()).done)
            proxy.clear()
            proxy.after(9 if batch else 3, migration.finish)
            assert_it_works(store, run, claim, batch)

    def test_under_load_loses_nothing(self, cluster: Cluster) -> None:
        with stores_of("blocking") as stores:
            with load_on(cluster, runs=1, timeout=60) as load:
                for _ in range(3):
                    with Migration(cluster, slot_of(load.runs[0])):
                        pass
                    load.wait_for_more()
            assert load.errors == []
            assert load.lost(stores.on_cluster(cluster.url)) == []


class TestASlotThatNobodyServes:
    """CLUSTERDOWN."""

    @pytest.fixture
    def cluster(self, unreplicated: Cluster) -> Iterator[Cluster]:
        wait_until(unreplicated.is_ready, timeout=60)
        yield unreplicated
        gc.collect()  # here, where the warnings are filtered

    def test_is_refused_at_the_deadline_and_nothing_was_written(
        self, cluster: Cluster, stores: Stores, run: str
    ) -> None:
        store = stores.on_cluster(cluster.url, timeout=1)
        claim = everything_of(run, store)
        with redis.RedisCluster.from_url(cluster.url) as client:
            before = everything_stored(client, run)
            with unserved(cluster, slot_of(run)):
                # All in one, for redis-py's own retries of this take three seconds.
                calls = [store.calls.begin_step(run, "new", {}), store.calls.complete_step(claim, {})]
                refused: list[Any] = store.batch(calls)
                assert [type(error) for error in refused] == [RefusedError, RefusedError]
                assert all("slots of the cluster are not served" in str(error) and error.transient for error in refused)
            wait_until(cluster.is_ready, timeout=30)
            assert everything_stored(client, run) == before

    @pytest.mark.parametrize("batch", [False, True])
    def test_is_waited_for_to_the_deadline(self, cluster: Cluster, stores: Stores, run: str, batch: bool) -> None:
        primary = cluster.holders(slot_of(run))[0]
        with through_a_proxy(primary) as (proxy, remap):
            store = stores.on_cluster(cluster.url, address_remap=remap, timeout=60)
            claim = everything_of(run, store)
            with contextlib.ExitStack() as outage:
                outage.enter_context(unserved(cluster, slot_of(run)))
                proxy.clear()
                proxy.after(9 if batch else 3, outage.close)
                assert_it_works(store, run, claim, batch)


def assert_it_works(store: StepRunStore, run: str, claim: StepRun, batch: bool) -> None:
    """A claim can be taken and another completed, once each."""
    calls = [store.calls.begin_step(run, "new", {}, lease=60), store.calls.complete_step(claim, {"receipt": 7})]
    outcomes: list[Any] = store.batch(calls) if batch else [store.send(call) for call in calls]
    assert begun(outcomes[0]).attempt == 1
    assert outcomes[1].output == {"receipt": 7}
    assert [attempt.number for attempt in store.attempts(run, "new")] == [1]
    assert store.completed_steps(run) == ["completed", claim.step]


def everything_stored(client: Any, run: str) -> list[Any]:
    steps, done, claims, failed = Keys(b"squidstep").of_run(run.encode())
    ordered = [client.zrange(key, 0, -1, withscores=True) for key in (done, claims, failed)]
    return [client.hgetall(steps), *ordered]


@contextlib.contextmanager
def unserved(cluster: Cluster, slot: int) -> Iterator[None]:
    """Its primary has given a slot up; and no part of the cluster serves while one is missing."""
    with connected(cluster.holders(slot)[0]) as client:
        client.execute_command("CLUSTER DELSLOTS", slot)
        wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "fail")
        try:
            yield
        finally:
            client.execute_command("CLUSTER ADDSLOTS", slot)
            wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", timeout=30)


@contextlib.contextmanager
def through_a_proxy(node: EmbeddedServer) -> Iterator[tuple[Proxy, Any]]:
    """A proxy before one node, and the address_remap that leads a client through it."""
    with Proxy((node.host, node.port)) as proxy:
        yield proxy, lambda address: (address[0], proxy.port if address[1] == node.port else address[1])
