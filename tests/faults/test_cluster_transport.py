"""Calls to the nodes of a cluster: routing, redirects, topology refresh, and whether errors tell what was sent."""

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
from support.internals import can_bypass_client, retry_for
from support.proxy import Fault, Proxy
from support.records import begun
from support.servers import wait_until

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

from .kit import FLAVORS, Stores
from .topologies import Cluster, Fronts, Migration, connected

pytestmark = [
    pytest.mark.servers("valkey", "redis-7", "redis-6"),
    # On asyncio redis-py forgets a node that is gone, and a closed event loop leaves its connections open.
    pytest.mark.filterwarnings("ignore:[Uu]nclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:loop is closed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_numbers = itertools.count()
SHORT = 0.05  # seconds: a call that has to fail is retried for so long
_FAST: dict[str, Any] = {"socket_timeout": 0.5, "socket_connect_timeout": 0.5}


@pytest.fixture(scope="module", autouse=True)
def collect_garbage() -> Iterator[None]:
    """Collects what redis-py leaves open during the last test of this module, where the warnings are filtered."""
    yield
    gc.collect()


@pytest.fixture
def cluster(unreplicated: Cluster) -> Cluster:
    """Three primaries, which all tests share: no test kills one."""
    wait_until(unreplicated.is_ready, timeout=60)
    return unreplicated


@pytest.fixture
def mortal(replicated: Cluster) -> Cluster:
    """Three primaries and a replica of each, all of them up."""
    for node in replicated.nodes:
        node.start()
    wait_until(replicated.is_ready, timeout=60)
    return replicated


@pytest.fixture
def fronts(cluster: Cluster) -> Iterator[Fronts]:
    """The same cluster behind proxies, which a test may close instead of killing nodes."""
    with Fronts(cluster) as fronts:
        yield fronts


def slot_of(run: str) -> int:
    return key_slot(Keys(b"squidstep").of_run(run.encode()).steps)


def runs_on_each(cluster: Cluster) -> list[str]:
    """Returns a run that no test has used for each primary; the URL of the cluster leads to the first one."""
    runs: dict[int, str] = {}
    while len(runs) < cluster.primaries:
        run = new_run()
        runs.setdefault(cluster.nodes_of(slot_of(run))[0].port, run)
    return [runs[node.port] for node in cluster.nodes[: cluster.primaries]]


def new_run() -> str:
    return f"transport-{next(_numbers)}"  # another module uses the same clusters


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


def error_of(operation: Callable[[], object]) -> SquidstepError:
    """Returns the error of an operation that must fail."""
    with pytest.raises(SquidstepError) as caught:
        operation()
    return caught.value


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

            outcomes: list[Any] = store.batch([store.calls.schedule_step(run, f"step-{n}", {}) for n in range(5)])

            assert [outcome.decision for outcome in outcomes] == ["schedule"] * 5
            assert calls_in(proxy) == ["EVALSHA"] * 5

    def test_ask_leads_to_a_node_unknown_to_the_client(self, cluster: Cluster, stores: Stores) -> None:
        store = stores.on_cluster(cluster.url, timeout=20)
        run = new_run()
        claim = claim_in_run_with_all_keys(store, run)
        (spare,) = cluster.spares
        with Migration(cluster, slot_of(run), spare) as migration:
            migration.move(*Keys(b"squidstep").of_run(run.encode()))

            store.begin_step(run, "next", {})
            store.complete_step(claim, {"done": 1})

            assert store.completed_steps(run) == ["completed", "step"]
            with connected(spare) as client:
                assert client.execute_command("CLUSTER COUNTKEYSINSLOT", slot_of(run)) > 0
            migration.cancel()

    def test_a_durable_call_follows_ask(self, mortal: Cluster, stores: Stores) -> None:
        run = new_run()
        store = stores.on_cluster(mortal.url, timeout=10, wait_replicas=1, wait_timeout=0.8)
        claim = claim_in_run_with_all_keys(store, run)
        migration = Migration(mortal, slot_of(run))
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
            store = stores.on_cluster(cluster.url, address_remap=remap, timeout=20)
            store.begin_step(run, "step", {})
            retry_for(store, 0.2)
            proxy.clear()
            moved = f"-MOVED {slot_of(run)} {node.host}:{node.port}\r\n".encode()
            proxy.replace_replies(*[moved] * 5_000)
            began = time.monotonic()

            with pytest.raises(SquidstepError) as caught:
                store.get_step_run(run, "step")

            assert isinstance(caught.value, RefusedError)
            assert caught.value.transient
            assert time.monotonic() - began < 10
            assert len(calls_in(proxy)) < 200

    @pytest.mark.parametrize("batch", [False, True])
    def test_redirect_that_cannot_be_followed_is_a_refusal(self, cluster: Cluster, stores: Stores, batch: bool) -> None:
        run = new_run()
        with through_proxy(Migration(cluster, slot_of(run)).source) as (proxy, remap):
            store = stores.on_cluster(cluster.url, address_remap=remap, timeout=20)
            store.begin_step(run, "step", {})
            retry_for(store, SHORT)
            proxy.replace_replies(*[f"-MOVED {slot_of(run)} 127.0.0.1:0\r\n".encode()] * 100)
            call = store.calls.begin_step(run, "next", {})

            refused = store.batch([call])[0] if batch else error_of(lambda: store.send(call))

            assert isinstance(refused, RefusedError)
            assert refused.transient


class TestWhatWasSent:
    def test_lost_reply_without_a_reachable_node_has_an_unknown_outcome(self, fronts: Fronts, stores: Stores) -> None:
        run = new_run()
        store = stores.on_cluster(fronts.url, address_remap=fronts.remap, timeout=20)
        store.get_step_run(run, "step")
        retry_for(store, SHORT)

        def lose(_: bytes) -> bytes:
            fronts.kill(slot_of(run))
            return b""

        fronts.of(slot_of(run)).add_fault(Fault(reply=lose, script="begin_step"))
        with pytest.raises(OutcomeUnknownError):
            store.begin_step(run, "step", {}, lease=60)

    @pytest.mark.parametrize("batch", [False, True])
    def test_an_unreachable_node_means_that_nothing_was_sent(
        self, cluster: Cluster, fronts: Fronts, stores: Stores, batch: bool
    ) -> None:
        other, run, _ = runs_on_each(cluster)
        store = stores.on_cluster(fronts.url, address_remap=fronts.remap, timeout=20)
        store.get_step_run(other, "step")
        retry_for(store, SHORT)
        fronts.kill(slot_of(run))
        call = store.calls.begin_step(run, "step", {})

        with pytest.raises(NotSentError):
            store.batch([call]) if batch else store.send(call)

    def test_the_other_nodes_serve_while_one_is_down(self, cluster: Cluster, fronts: Fronts, stores: Stores) -> None:
        store = stores.on_cluster(fronts.url, address_remap=fronts.remap, timeout=0.5)
        *runs, dead = runs_on_each(cluster)
        fronts.kill(slot_of(dead))

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


@pytest.fixture(scope="module")
def without_slots(binary: Path) -> Iterator[EmbeddedServer]:
    """A node that knows no others and serves no slot, as after CLUSTER RESET."""
    options = {"cluster-enabled": "yes", "cluster-announce-ip": "127.0.0.1"}
    with EmbeddedServer(binary=binary, options=options, port=0) as server:
        yield server


class TestErrorsHaveTypes:
    @pytest.mark.parametrize("hooked", [False, True])
    def test_operations_raise_typed_errors_when_all_nodes_are_dead(
        self, fronts: Fronts, stores: Stores, hooked: bool
    ) -> None:
        store, run = self.store_and_run(fronts, stores, hooked)
        fronts.kill()

        assert_only_typed_errors(store, run)

    @pytest.mark.parametrize("hooked", [False, True])
    def test_operations_raise_typed_errors_when_no_slot_is_assigned(
        self, fronts: Fronts, without_slots: EmbeddedServer, stores: Stores, hooked: bool
    ) -> None:
        store, run = self.store_and_run(fronts, stores, hooked)
        fronts.lead_to(without_slots)

        assert_only_typed_errors(store, run)

    def store_and_run(self, fronts: Fronts, stores: Stores, hooked: bool = False) -> tuple[StepRunStore, str]:
        """Returns a store that retries only briefly, and a run with a running step."""
        store = stores.on_cluster(fronts.url, address_remap=fronts.remap, timeout=20)
        if hooked:
            hook(store.client)
        run = new_run()
        store.begin_step(run, "step", {}, lease=60)
        retry_for(store, SHORT)
        return store, run

    def test_waiting_ends_with_a_typed_error_when_all_nodes_die(self, fronts: Fronts, stores: Stores) -> None:
        store, run = self.store_and_run(fronts, stores)

        def kill_all() -> None:
            wait_until(lambda: "XREAD" in fronts.of(slot_of(run)).names())
            fronts.kill()

        killer = threading.Thread(target=kill_all)
        killer.start()
        with pytest.raises(SquidstepError):
            store.wait_for_step(run, "step", 60)
        killer.join()


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
            except BaseException as error:
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


class TestFailover:
    def test_a_primary_that_a_replica_replaced_is_found_again(self, mortal: Cluster, runner: asyncio.Runner) -> None:
        """By stores of both flavors, and by a client in another event loop."""
        run = new_run()
        client = redis.asyncio.RedisCluster.from_url(mortal.url, **_FAST)
        in_loops = AsyncStepRunStore(client, timeout=30)
        asyncio.run(begin_all(in_loops, run, "before"))
        with contextlib.ExitStack() as opened:
            flavors = [opened.enter_context(Stores(flavor, runner)) for flavor in FLAVORS]
            stores = [flavor.on_cluster(mortal.url, timeout=30) for flavor in flavors]
            claims = [begun(store.begin_step(f"{run}-{index}", "step", {})) for index, store in enumerate(stores)]
            old = mortal.replace_primary(slot_of(run))

            assert asyncio.run(begin_all(in_loops, run, "after")) == [1] * 20
            for store, claim in zip(stores, claims, strict=True):
                store.begin_step(run, f"of-{claim.run_id}", {})
                assert store.complete_step(claim, {"done": 1}).output == {"done": 1}
                assert store.runs().runs
        old.start()
        close(client)


async def begin_all(store: AsyncStepRunStore, run: str, name: str) -> list[int]:
    """Begins 20 steps at once; returns their attempts."""
    results: list[Any] = await asyncio.gather(*(store.begin_step(run, f"{name}-{each}", {}) for each in range(20)))
    return [begun(result).attempt for result in results]
