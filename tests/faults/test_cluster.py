"""A cluster of six nodes: primaries fail, replicas take over, and slots move while calls are in progress."""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.crc import key_slot
from support.internals import retry_for
from support.proxy import Proxy
from support.records import begun
from support.servers import wait_until

from squidstep_redis import NotReplicatedError, RefusedError, StepRun, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.keys import Keys

from .kit import FLAVORS, Load, Stores, assert_loss_is_legal, stores_of
from .topologies import Cluster, Migration, connected

pytestmark = [
    pytest.mark.servers("valkey", "redis-7", "redis-6"),
    # On asyncio, redis-py drops a node that is down without closing its connections.
    pytest.mark.filterwarnings("ignore:[Uu]nclosed:ResourceWarning"),
]

_runs = (f"run-{number}" for number in itertools.count())


@pytest.fixture
def cluster(replicated: Cluster) -> Iterator[Cluster]:
    """The shared cluster, with all nodes up and in sync; earlier tests may have changed the primaries."""
    for node in replicated.nodes:
        node.start()
    wait_until(replicated.is_ready, timeout=60)
    yield replicated
    gc.collect()  # here, where the warnings are filtered


@pytest.fixture
def run() -> str:
    """The id of an unused run."""
    return next(_runs)


def slot_of(run: str) -> int:
    return key_slot(Keys(b"squidstep").of_run(run.encode()).steps)


def load_on(cluster: Cluster, runs: int, **settings: Any) -> Load:
    @contextlib.contextmanager
    def connect(flavor: str) -> Iterator[StepRunStore]:
        with stores_of(flavor) as stores:
            yield stores.on_cluster(cluster.url, **settings)

    return Load(lambda flavor=flavor: connect(flavor) for flavor in FLAVORS * runs)


class TestFailover:
    def test_killed_primary_loses_only_unreplicated_completions(self, cluster: Cluster) -> None:
        with stores_of("blocking") as stores:
            with load_on(cluster, runs=2, timeout=60) as load:
                slot = slot_of(load.runs[0])
                old = cluster.nodes_of(slot)[0]
                old.kill()
                killed = time.monotonic()
                cluster.wait_for_new_primary(slot, old)
                load.wait_for_progress()
            old.start()
            assert load.errors == []
            assert_loss_is_legal(load, load.lost(stores.on_cluster(cluster.url)), killed)

    def test_completion_confirmed_by_replica_survives_failover(self, cluster: Cluster) -> None:
        with stores_of("blocking") as stores:
            with load_on(cluster, runs=1, timeout=60, wait_replicas=1, wait_timeout=0.5) as load:
                slot = slot_of(load.runs[0])
                old = cluster.nodes_of(slot)[0]
                old.kill()
                cluster.wait_for_new_primary(slot, old)
                old.start()  # as the replica, without which nothing is confirmed
                load.wait_for_progress()
            assert {type(error) for error in load.errors} <= {NotReplicatedError}
            assert load.lost(stores.on_cluster(cluster.url)) == []

    def test_manual_failover_loses_no_completion(self, cluster: Cluster) -> None:
        with stores_of("blocking") as stores:
            with load_on(cluster, runs=1, timeout=60) as load:
                cluster.fail_over(slot_of(load.runs[0]))
                load.wait_for_progress()
            assert load.errors == []
            assert load.lost(stores.on_cluster(cluster.url)) == []


def create_run_with_all_keys(run: str, store: StepRunStore) -> StepRun:
    """Creates a run that has all four keys; returns its live claim."""
    store.complete_step(begun(store.begin_step(run, "completed", {})), {})
    store.fail_step(begun(store.begin_step(run, "failed", {})), {})
    return begun(store.begin_step(run, "running", {}, lease=600))


class TestMigratingSlot:
    @pytest.fixture
    def claim(self, cluster: Cluster, stores: Stores, run: str) -> StepRun:
        return create_run_with_all_keys(run, stores.on_cluster(cluster.url))

    @pytest.mark.parametrize("batch", [False, True])
    def test_client_follows_a_moved_slot(
        self, cluster: Cluster, stores: Stores, run: str, claim: StepRun, batch: bool
    ) -> None:
        """The client knows the slot's old node and receives MOVED."""
        store = stores.on_cluster(cluster.url, timeout=60)
        assert store.get_step_run(run, "running") is not None
        with Migration(cluster, slot_of(run)):
            pass
        assert_calls_work(store, run, claim, batch)

    @pytest.mark.parametrize("batch", [False, True])
    def test_calls_follow_ask_once_all_keys_have_moved(
        self, cluster: Cluster, stores: Stores, run: str, claim: StepRun, batch: bool
    ) -> None:
        """The server replies ASK."""
        store = stores.on_cluster(cluster.url, timeout=60)
        with Migration(cluster, slot_of(run)) as migration:
            migration.move(*Keys(b"squidstep").of_run(run.encode()))
            assert_calls_work(store, run, claim, batch)

    @pytest.mark.parametrize("moved", [["steps"], ["done", "claims"]])
    def test_half_moved_slot_rejects_calls_and_nothing_is_written(
        self, cluster: Cluster, stores: Stores, run: str, claim: StepRun, moved: list[str]
    ) -> None:
        """The server replies TRYAGAIN until the deadline."""
        store = stores.on_cluster(cluster.url, timeout=0.3)
        with redis.RedisCluster.from_url(cluster.url) as client:
            before = stored_keys(client, run)
            with Migration(cluster, slot_of(run)) as migration:
                migration.move(*(getattr(Keys(b"squidstep").of_run(run.encode()), key) for key in moved))
                calls = [store.calls.begin_step(run, "new", {}, lease=60), store.calls.complete_step(claim, {})]
                for call in calls:
                    with pytest.raises(RefusedError, match="slot is migrating") as caught:
                        store.send(call)
                    assert caught.value.transient
                assert [type(outcome) for outcome in store.batch(calls)] == [RefusedError, RefusedError]
            assert stored_keys(client, run) == before

    @pytest.mark.parametrize("batch", [False, True])
    def test_calls_succeed_if_migration_ends_before_the_deadline(
        self, cluster: Cluster, stores: Stores, run: str, claim: StepRun, batch: bool
    ) -> None:
        with Migration(cluster, slot_of(run)) as migration, through_a_proxy(migration.source) as (proxy, remap):
            store = stores.on_cluster(cluster.url, address_remap=remap, timeout=60)
            assert store.get_step_run(run, "running") is not None
            migration.move(Keys(b"squidstep").of_run(run.encode()).done)
            proxy.clear()
            proxy.after(9 if batch else 3, migration.finish)
            assert_calls_work(store, run, claim, batch)

    def test_migrations_under_load_lose_no_completion(self, cluster: Cluster) -> None:
        with stores_of("blocking") as stores:
            with load_on(cluster, runs=1, timeout=60) as load:
                for _ in range(3):
                    with Migration(cluster, slot_of(load.runs[0])):
                        pass
                    load.wait_for_progress()
            assert load.errors == []
            assert load.lost(stores.on_cluster(cluster.url)) == []


class TestIndexOfRuns:
    """No script has the index of runs, or the runs that it lists, among its keys."""

    @pytest.fixture
    def runs(self, run: str) -> list[str]:
        """Returns the ids of three unused runs in one bucket, and so in one slot."""
        keys = Keys(b"squidstep")
        index = keys.of_run(run.encode()).claims
        others = (f"{run}-{number}" for number in itertools.count())
        same = (other for other in others if keys.of_run(other.encode()).claims == index)
        return [run, *itertools.islice(same, 2)]

    @pytest.mark.parametrize("moved", [[], ["index"], ["first"], ["index", "first"]])
    def test_migration_neither_loses_nor_doubles_an_entry(
        self, cluster: Cluster, stores: Stores, runs: list[str], moved: list[str]
    ) -> None:
        keys = Keys(b"squidstep")
        store = stores.on_cluster(cluster.url, timeout=0.2, run_ttl=600)
        for run in runs[:2]:  # with both keys: while a slot migrates, the server refuses a call if one does not exist
            store.complete_step(begun(store.begin_step(run, "step", {})), {})
        first = keys.of_run(runs[0].encode())
        parts = {"index": [first.claims.removesuffix(b"claims") + b"runs"], "first": first[:2]}

        with Migration(cluster, slot_of(runs[0])) as migration:
            for part in moved:
                migration.move(*parts[part])
            calls = [
                lambda: store.schedule_step(runs[2], "step", {}),
                lambda: store.begin_step(runs[2], "step", {}, lease=60),
                *[store.runs] * 3,
                *[lambda run=run: store.expire_run(run, 600) for run in runs[:2] * 20],
            ]
            for call in calls:
                with contextlib.suppress(RefusedError):
                    call()

        created = {runs[2]} if store.get_run(runs[2]) else set[str]()
        assert {run.run_id for run in store.runs(run_id_prefix=runs[0]).runs} == {*runs[:2], *created}


class TestUnservedSlot:
    """The server replies CLUSTERDOWN."""

    @pytest.fixture
    def cluster(self, unreplicated: Cluster) -> Iterator[Cluster]:
        wait_until(unreplicated.is_ready, timeout=60)
        yield unreplicated
        gc.collect()  # here, where the warnings are filtered

    def test_calls_are_rejected_and_nothing_is_written(self, cluster: Cluster, stores: Stores, run: str) -> None:
        store = stores.on_cluster(cluster.url, timeout=60)
        claim = create_run_with_all_keys(run, store)
        retry_for(store, 0.3)
        with redis.RedisCluster.from_url(cluster.url) as client:
            before = stored_keys(client, run)
            with unserved(cluster, slot_of(run)):
                # One batch for all calls, because redis-py's own retries take three seconds.
                calls = [store.calls.begin_step(run, "new", {}), store.calls.complete_step(claim, {})]
                rejected: list[Any] = store.batch(calls)
                assert [type(error) for error in rejected] == [RefusedError, RefusedError]
                assert all(
                    "slots of the cluster are not served" in str(error) and error.transient for error in rejected
                )
            wait_until(cluster.is_ready, timeout=30)
            assert stored_keys(client, run) == before

    @pytest.mark.parametrize("batch", [False, True])
    def test_calls_wait_until_the_slot_is_served_again(
        self, cluster: Cluster, stores: Stores, run: str, batch: bool
    ) -> None:
        primary = cluster.nodes_of(slot_of(run))[0]
        with through_a_proxy(primary) as (proxy, remap):
            store = stores.on_cluster(cluster.url, address_remap=remap, timeout=60)
            claim = create_run_with_all_keys(run, store)
            with contextlib.ExitStack() as outage:
                outage.enter_context(unserved(cluster, slot_of(run)))
                proxy.clear()
                proxy.after(9 if batch else 3, outage.close)
                assert_calls_work(store, run, claim, batch)


def assert_calls_work(store: StepRunStore, run: str, claim: StepRun, batch: bool) -> None:
    """Checks that a begin and a complete succeed, each exactly once."""
    calls = [store.calls.begin_step(run, "new", {}, lease=60), store.calls.complete_step(claim, {"receipt": 7})]
    outcomes: list[Any] = store.batch(calls) if batch else [store.send(call) for call in calls]
    assert begun(outcomes[0]).attempt == 1
    assert outcomes[1].output == {"receipt": 7}
    assert [attempt.number for attempt in store.attempts(run, "new")] == [1]
    assert store.completed_steps(run) == ["completed", claim.step]


def stored_keys(client: Any, run: str) -> list[Any]:
    steps, done, claims, failed = Keys(b"squidstep").of_run(run.encode())
    ordered = [client.zrange(key, 0, -1, withscores=True) for key in (done, claims, failed)]
    return [client.hgetall(steps), *ordered]


@contextlib.contextmanager
def unserved(cluster: Cluster, slot: int) -> Iterator[None]:
    """Deletes a slot from its primary, which then rejects all calls, and adds it again at the end."""
    with connected(cluster.nodes_of(slot)[0]) as client:
        client.execute_command("CLUSTER DELSLOTS", slot)
        wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "fail")
        try:
            yield
        finally:
            client.execute_command("CLUSTER ADDSLOTS", slot)
            wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", timeout=30)


@contextlib.contextmanager
def through_a_proxy(node: EmbeddedServer) -> Iterator[tuple[Proxy, Any]]:
    """Starts a proxy for one node; also returns the `address_remap` that directs a client to the proxy."""
    with Proxy((node.host, node.port)) as proxy:
        yield proxy, lambda address: (address[0], proxy.port if address[1] == node.port else address[1])
