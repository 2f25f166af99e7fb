"""How calls reach the nodes of a cluster: routing, redirects, topology refresh, and what an error says was sent."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.crc import key_slot
from support.internals import can_bypass_client
from support.proxy import Fault, Proxy
from support.records import begun
from support.servers import EmbeddedCluster, wait_until

from squidstep_redis import (
    AsyncStepRunStore,
    NotSentError,
    OutcomeUnknownError,
    RefusedError,
    SquidstepError,
    StepRun,
    StepRunStore,
)
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.keys import Keys

from .kit import Stores
from .topologies import Cluster, Migration, connected

pytestmark = [
    pytest.mark.servers("valkey", "redis-7", "redis-6"),
    # On asyncio redis-py forgets a node that is gone, and a closed event loop leaves its connections open.
    pytest.mark.filterwarnings("ignore:[Uu]nclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_numbers = itertools.count()
_FAST: dict[str, Any] = {"socket_timeout": 0.5, "socket_connect_timeout": 0.5}


@pytest.fixture(scope="module")
def replicated(binary: Path) -> Iterator[Cluster]:
    with Cluster(binary) as cluster:
        yield cluster


@pytest.fixture
def cluster(replicated: Cluster) -> Iterator[Cluster]:
    """Three primaries and a replica of each, all of them up."""
    for node in replicated.nodes:
        node.start()
    wait_until(replicated.is_ready, timeout=60)
    yield replicated
    gc.collect()  # here, where the warnings are filtered


@pytest.fixture
def doomed(binary: Path) -> Iterator[EmbeddedCluster]:
    """Three primaries for one test, which may kill them."""
    with EmbeddedCluster(binary=binary) as cluster:
        yield cluster
        gc.collect()


def slot_of(run: str) -> int:
    return key_slot(Keys(b"squidstep").of_run(run.encode()).steps)


def run_on(cluster: EmbeddedCluster, node: int) -> str:
    """Returns a run that no test has used, on one of the primaries of a new cluster."""
    count = cluster.primaries
    first, last = 16_384 * node // count, 16_384 * (node + 1) // count
    return next(run for run in (f"run-{number}" for number in _numbers) if first <= slot_of(run) < last)


def new_run() -> str:
    return f"run-{next(_numbers)}"


def claim_in_run_with_all_keys(store: StepRunStore, run: str) -> StepRun:
    """Creates a run with all its keys, so that none of them is missing on the node to which its slot moves."""
    store.complete_step(begun(store.begin_step(run, "completed", {})), {})
    store.fail_step(begun(store.begin_step(run, "failed", {})), {})
    return begun(store.begin_step(run, "step", {}, lease=600))


@contextlib.contextmanager
def through_proxy(node: EmbeddedServer) -> Iterator[tuple[Proxy, Any]]:
    """Provides a proxy of one node, and the address_remap that leads a client through it."""
    with Proxy((node.host, node.port)) as proxy:
        yield proxy, lambda address: (address[0], proxy.port if address[1] == node.port else address[1])


def calls_in(proxy: Proxy) -> list[str]:
    return [name for name in proxy.names() if name in ("EVAL", "EVALSHA", "ASKING")]


def hook(client: Any) -> list[str]:
    """Hooks a client's `execute_command`; returns the names of the commands that pass."""
    seen: list[str] = []
    execute = client.execute_command

    def execute_command(*words: Any, **options: Any) -> Any:
        seen.append(words[0])
        return execute(*words, **options)

    client.execute_command = execute_command
    return seen


class TestRouting:
    def test_a_plain_client_is_bypassed(self, cluster: Cluster, stores: Stores) -> None:
        store = stores.on_cluster(cluster.url)
        store.get_step_run(new_run(), "step")

        assert can_bypass_client(getattr(store, "store", store))

    def test_a_hooked_client_sees_every_single_call(self, cluster: Cluster, stores: Stores) -> None:
        store = stores.on_cluster(cluster.url)
        seen = hook(store.client)
        store.complete_step(begun(store.begin_step(new_run(), "step", {})), {})

        assert "EVALSHA" in seen
        assert not can_bypass_client(getattr(store, "store", store))

    def test_a_subclass_that_overrides_execute_command_sees_every_call(self, cluster: Cluster) -> None:
        seen: list[str] = []

        class Client(redis.RedisCluster):
            def execute_command(self, *words: Any, **options: Any) -> Any:
                seen.append(words[0])
                return super().execute_command(*words, **options)

        with Client.from_url(cluster.url) as client:
            StepRunStore(client).begin_step(new_run(), "step", {})

        assert "EVALSHA" in seen

    def test_a_second_call_costs_one_round_trip(self, cluster: Cluster, stores: Stores) -> None:
        with through_proxy(cluster.nodes[0]) as (proxy, remap):
            store = stores.on_cluster(cluster.url, address_remap=remap)
            runs = [new_run() for _ in range(30)]
            for run in runs:
                store.get_step_run(run, "step")
            proxy.clear()
            for run in runs:
                store.get_step_run(run, "step")

            assert 0 < proxy.round_trips < len(runs)
            assert set(proxy.names()) == {"EVALSHA"}


class TestRedirects:
    def test_the_client_learns_the_node_of_a_moved_slot(self, cluster: Cluster, stores: Stores) -> None:
        run = new_run()
        migration = Migration(cluster, slot_of(run))
        with through_proxy(migration.source) as (proxy, remap):
            store = stores.on_cluster(cluster.url, address_remap=remap, timeout=10)
            store.begin_step(run, "step", {})
            with migration:
                pass
            proxy.clear()

            store.begin_step(run, "next", {})
            store.begin_step(run, "last", {})

            assert calls_in(proxy) == ["EVALSHA"]  # the second call goes to the new node at once

    def test_all_calls_of_a_batch_learn_the_moved_slot_once(self, cluster: Cluster, stores: Stores) -> None:
        run = new_run()
        migration = Migration(cluster, slot_of(run))
        with through_proxy(migration.source) as (proxy, remap):
            store = stores.on_cluster(cluster.url, address_remap=remap, timeout=10)
            store.begin_step(run, "step", {})
            with migration:
                pass
            proxy.clear()

            outcomes: list[Any] = store.batch([store.calls.begin_step(run, f"step-{n}", {}) for n in range(5)])

            assert [begun(outcome).attempt for outcome in outcomes] == [1] * 5
            assert calls_in(proxy) == ["EVALSHA"] * 5

    def test_ask_leads_to_a_node_that_the_client_does_not_know(
        self, doomed: EmbeddedCluster, binary: Path, stores: Stores
    ) -> None:
        store = stores.on_cluster(doomed.url, timeout=5)
        run = run_on(doomed, 0)
        claim = claim_in_run_with_all_keys(store, run)
        options = {"cluster-enabled": "yes", "cluster-announce-ip": "127.0.0.1"}
        with EmbeddedServer(binary=binary, options=options, port=0) as added:
            begin_migration(doomed.nodes[0], added, slot_of(run), run)

            store.begin_step(run, "next", {})
            store.complete_step(claim, {"done": 1})

            assert store.completed_steps(run) == ["completed", "step"]
            with connected(added) as client:
                assert client.execute_command("CLUSTER COUNTKEYSINSLOT", slot_of(run)) > 0

    def test_a_durable_call_follows_ask(self, cluster: Cluster, stores: Stores) -> None:
        run = new_run()
        store = stores.on_cluster(cluster.url, timeout=10, wait_replicas=1, wait_timeout=0.8)
        claim = claim_in_run_with_all_keys(store, run)
        migration = Migration(cluster, slot_of(run))
        with migration:
            migration.move(*Keys(b"squidstep").of_run(run.encode()))

            store.begin_step(run, "next", {})
            assert store.complete_step(claim, {"done": 1}).output == {"done": 1}
            with connected(migration.source) as client:  # what the calls before the migration waited with
                client.execute_command("FLUSHALL")
        assert begun(store.begin_step(run, "last", {})).attempt == 1

    def test_endless_redirects_end_at_the_deadline(self, cluster: Cluster, stores: Stores) -> None:
        run = new_run()
        node = Migration(cluster, slot_of(run)).source
        with through_proxy(node) as (proxy, remap):
            store = stores.on_cluster(cluster.url, address_remap=remap, timeout=0.5)
            store.begin_step(run, "step", {})
            proxy.clear()
            moved = f"-MOVED {slot_of(run)} {node.host}:{node.port}\r\n".encode()
            proxy.replace_replies(*[moved] * 5_000)
            began = time.monotonic()

            with pytest.raises(SquidstepError) as caught:
                store.get_step_run(run, "step")

            assert isinstance(caught.value, RefusedError)
            assert caught.value.transient
            assert time.monotonic() - began < 3
            assert len(calls_in(proxy)) < 200


def begin_migration(source: EmbeddedServer, target: EmbeddedServer, slot: int, run: str) -> None:
    """Adds a node to a cluster, and moves all keys of one slot there; the slot remains with its old node."""
    with connected(source) as old, connected(target) as new:
        new.execute_command("CLUSTER MEET", source.host, source.port)
        wait_until(lambda: new.execute_command("CLUSTER INFO")["cluster_state"] == "ok", timeout=30)
        ids = {client: client.execute_command("CLUSTER MYID") for client in (old, new)}
        wait_until(lambda: ids[new] in str(old.execute_command("CLUSTER NODES")), timeout=30)
        new.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[old])
        old.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[new])
        keys = Keys(b"squidstep").of_run(run.encode())
        old.execute_command("MIGRATE", target.host, target.port, "", 0, 5_000, "KEYS", *keys)


class TestWhatWasSent:
    def test_a_lost_reply_without_a_reachable_node_is_an_unknown_outcome(
        self, doomed: EmbeddedCluster, stores: Stores
    ) -> None:
        node, run = doomed.nodes[1], run_on(doomed, 1)
        with through_proxy(node) as (proxy, remap):
            store = stores.on_cluster(doomed.url, address_remap=remap, timeout=3)
            store.get_step_run(run, "step")

            def lose(_: bytes) -> bytes:
                node.kill()
                return b""

            proxy.add_fault(Fault(reply=lose, script="begin_step"))
            with pytest.raises(OutcomeUnknownError):
                store.begin_step(run, "step", {}, lease=60)

    @pytest.mark.parametrize("batch", [False, True])
    def test_an_unreachable_node_means_that_nothing_was_sent(
        self, doomed: EmbeddedCluster, stores: Stores, batch: bool
    ) -> None:
        store = stores.on_cluster(doomed.url, timeout=1)
        store.get_step_run(run_on(doomed, 0), "step")
        doomed.nodes[2].kill()
        call = store.calls.begin_step(run_on(doomed, 2), "step", {})

        with pytest.raises(NotSentError):
            store.batch([call]) if batch else store.send(call)

    def test_the_other_nodes_serve_while_one_is_down(self, doomed: EmbeddedCluster, stores: Stores) -> None:
        store = stores.on_cluster(doomed.url, timeout=1)
        runs = [run_on(doomed, node) for node in (0, 1)]
        dead = run_on(doomed, 2)
        with connected(doomed.nodes[0]) as first, connected(doomed.nodes[1]) as second:
            for client in (first, second):
                client.execute_command("CONFIG SET", "cluster-require-full-coverage", "no")
        doomed.nodes[2].kill()

        outcomes: list[Any] = store.batch([store.calls.begin_step(run, "step", {}) for run in (*runs, dead)])

        assert [begun(outcome).attempt for outcome in outcomes[:2]] == [1, 1]
        assert isinstance(outcomes[2], SquidstepError)


OPERATIONS: dict[str, Callable[[StepRunStore, str], object]] = {
    "begin_step": lambda store, run: store.begin_step(run, "new", {}),
    "batch": lambda store, run: store.batch([store.calls.begin_step(run, "new", {})]),
    "get_run": lambda store, run: store.get_run(run),
    "runs": lambda store, _: store.runs(),
    "purge": lambda store, _: store.purge(older_than=3600),
    "failed_steps": lambda store, _: store.failed_steps(),
    "live_claims": lambda store, _: store.live_claims(),
    "wait_for_step": lambda store, run: store.wait_for_step(run, "step", 1),
    "doctor": lambda store, _: store.doctor(),
}


def assert_only_typed_errors(store: StepRunStore, run: str) -> None:
    """Performs operations of each kind; each of them may fail, but only with an error of the library."""
    failed: list[str] = []
    for name, operation in OPERATIONS.items():
        try:
            operation(store, run)
        except SquidstepError:
            failed.append(name)
    assert {"begin_step", "get_run", "runs", "purge"} <= set(failed)


class TestErrorsHaveTypes:
    @pytest.mark.parametrize("hooked", [False, True])
    def test_no_operation_raises_an_untyped_error_when_all_nodes_are_dead(
        self, doomed: EmbeddedCluster, stores: Stores, hooked: bool
    ) -> None:
        store = stores.on_cluster(doomed.url, timeout=0.3)
        if hooked:
            hook(store.client)
        run = run_on(doomed, 0)
        store.begin_step(run, "step", {}, lease=60)
        for node in doomed.nodes:
            node.kill()

        assert_only_typed_errors(store, run)

    @pytest.mark.parametrize("hooked", [False, True])
    def test_no_operation_raises_an_untyped_error_when_no_slot_is_assigned(
        self, doomed: EmbeddedCluster, stores: Stores, hooked: bool
    ) -> None:
        store = stores.on_cluster(doomed.url, timeout=0.3)
        if hooked:
            hook(store.client)
        run = run_on(doomed, 0)
        store.begin_step(run, "step", {}, lease=60)
        for node in doomed.nodes:
            with connected(node) as client:
                client.flushall()
                client.execute_command("CLUSTER RESET")

        assert_only_typed_errors(store, run)

    def test_a_wait_ends_with_a_typed_error_when_all_nodes_die(self, doomed: EmbeddedCluster, stores: Stores) -> None:
        store = stores.on_cluster(doomed.url, timeout=0.5)
        run = run_on(doomed, 0)
        store.begin_step(run, "step", {}, lease=60)
        killer = threading.Timer(0.5, lambda: [node.kill() for node in doomed.nodes])
        killer.start()

        with pytest.raises(SquidstepError):
            store.wait_for_step(run, "step", 10)
        killer.join()


class TestFailover:
    def test_a_primary_that_a_replica_replaced_is_found_again(self, cluster: Cluster, stores: Stores) -> None:
        run = new_run()
        store = stores.on_cluster(cluster.url, timeout=30)
        claim = begun(store.begin_step(run, "step", {}, lease=600))
        old = Migration(cluster, slot_of(run)).source
        with connected(old) as client:
            assert client.execute_command("WAIT", 1, 5_000) == 1
        old.kill()

        assert store.complete_step(claim, {"done": 1}).output == {"done": 1}
        assert store.runs().runs
        old.start()


def close(client: Any) -> None:
    with contextlib.suppress(RuntimeError):  # of redis-py, for a connection of an earlier event loop
        asyncio.run(client.aclose())
    gc.collect()


class TestEventLoops:
    def test_one_client_works_in_several_event_loops_in_turn(self, cluster: Cluster) -> None:
        client = redis.asyncio.RedisCluster.from_url(cluster.url, **_FAST)
        store = AsyncStepRunStore(client, timeout=5)
        run = new_run()

        async def work(number: int) -> list[Any]:
            begins = (store.begin_step(run, f"step-{number}-{each}", {}) for each in range(20))
            results: list[Any] = await asyncio.gather(*begins)
            calls = [store.calls.begin_step(f"{run}-{number}", f"step-{each}", {}) for each in range(5)]
            return [*results, *await store.batch(calls)]

        for number in range(3):
            assert [result.attempt for result in map(begun, asyncio.run(work(number)))] == [1] * 25
        close(client)

    def test_a_new_event_loop_finds_a_replaced_primary(self, cluster: Cluster) -> None:
        client = redis.asyncio.RedisCluster.from_url(cluster.url, **_FAST)
        store = AsyncStepRunStore(client, timeout=30)
        run = new_run()

        async def work(number: int) -> list[Any]:
            return list(await asyncio.gather(*(store.begin_step(run, f"{number}-{each}", {}) for each in range(20))))

        asyncio.run(work(0))
        old = Migration(cluster, slot_of(run)).source
        old.kill()

        assert [begun(result).attempt for result in asyncio.run(work(1))] == [1] * 20
        old.start()
        close(client)

    def test_one_client_works_in_event_loops_of_several_threads(self, cluster: Cluster) -> None:
        client = redis.asyncio.RedisCluster.from_url(cluster.url, **_FAST)
        store = AsyncStepRunStore(client, timeout=10)
        runs = [new_run() for _ in range(3)]
        errors: list[BaseException] = []

        async def work(run: str) -> None:
            for number in range(20):
                await asyncio.gather(*(store.begin_step(run, f"{number}-{each}", {}) for each in range(5)))

        def in_thread(run: str) -> None:
            try:
                asyncio.run(work(run))
            except SquidstepError:
                pass
            except BaseException as error:  # noqa: BLE001 -- whatever it is, the test fails
                errors.append(error)

        threads = [threading.Thread(target=in_thread, args=(run,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert errors == []
        close(client)

    def test_a_cancelled_first_call_does_not_fail_the_others(self, cluster: Cluster) -> None:
        run = new_run()

        async def work() -> list[Any]:
            client = redis.asyncio.RedisCluster.from_url(cluster.url, **_FAST)
            store = AsyncStepRunStore(client, timeout=5)
            first = asyncio.create_task(store.begin_step(run, "first", {}))
            others = [asyncio.create_task(store.begin_step(run, f"step-{each}", {})) for each in range(10)]
            await asyncio.sleep(0)
            first.cancel()
            results: list[Any] = await asyncio.gather(*others)
            await client.aclose()
            return results

        assert [begun(result).attempt for result in asyncio.run(work())] == [1] * 10
