"""How long calls to a cluster take whose nodes accept connections and never reply."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
import redis.asyncio
from redis.crc import key_slot
from support.address import Address
from support.claims import Block, until
from support.internals import learn_slots, retry_for
from support.interruptions import AlarmError, sigalrm_raises
from support.records import begun, stored
from support.servers import wait_until

from squidstep_redis import SquidstepError, StepRunStore
from squidstep_redis.protocol.keys import Keys

from .kit import Stores
from .topologies import Cluster

pytestmark = [
    pytest.mark.servers("valkey", "redis-7"),
    pytest.mark.filterwarnings("ignore:[Uu]nclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

REPLY: Final = 1.0  # seconds that the clients wait for a reply
STALL: Final = 0.7  # seconds that a shared machine may add
TRIES: Final = 4  # of which one has to end in time: the machine may also stall for longer


class Addresses:
    """The nodes of a cluster, each behind an address that a test may let hang."""

    def __init__(self, cluster: Cluster, opened: contextlib.ExitStack) -> None:
        self.cluster = cluster
        self._by_port = {node.port: opened.enter_context(Address(node.port)) for node in cluster.nodes}

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._by_port[self.cluster.nodes[0].port].port}"

    def remap(self, address: tuple[str, int]) -> tuple[str, int]:
        host, port = address
        return host, self._by_port[port].port if port in self._by_port else port

    def hang(self, but: int | None = None) -> None:
        """Lets all nodes hang, except that of a slot."""
        healthy = None if but is None else self.cluster.nodes_of(but)[0].port
        for port, address in self._by_port.items():
            if port != healthy:
                address.stall()

    def resume(self) -> None:
        for address in self._by_port.values():
            address.resume()

    def disconnect(self) -> None:
        for address in self._by_port.values():
            address.disconnect()


@pytest.fixture
def addresses(unreplicated: Cluster) -> Iterator[Addresses]:
    wait_until(unreplicated.is_ready, timeout=60)
    with contextlib.ExitStack() as opened:
        yield Addresses(unreplicated, opened)


def slot_of(run: str) -> int:
    return key_slot(Keys(b"squidstep").of_run(run.encode()).steps)


def runs_on_each(cluster: Cluster, name: str) -> list[str]:
    runs: dict[int, str] = {}
    number = 0
    while len(runs) < cluster.primaries:
        run = f"hanging-{name}-{number}"
        runs.setdefault(cluster.nodes_of(slot_of(run))[0].port, run)
        number += 1
    return list(runs.values())


def fastest(limit: float, measure: Callable[[], float]) -> None:
    """Measures again if the machine stalled; fails if it never took less than the limit."""
    took = [measure()]
    while took[-1] >= limit + STALL and len(took) < TRIES:
        took.append(measure())
    assert min(took) < limit + STALL


def helpers() -> list[str]:
    names = ("squidstep-topology", "squidstep-connect")
    return [thread.name for thread in threading.enumerate() if thread.name in names]


def seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    with pytest.raises(SquidstepError):
        call()
    return time.monotonic() - began


def test_hanging_nodes_cost_a_call_one_attempt(addresses: Addresses, stores: Stores) -> None:
    """The client asks one node after another for the slots, and waits for each."""
    store = stores.on_cluster(addresses.url, address_remap=addresses.remap, timeout=20)
    call = store.calls.get_run("run")

    def measure() -> float:
        addresses.resume()
        retry_for(store, 30)
        store.send(call)
        retry_for(store, REPLY + 0.3)  # the first attempt leaves time for another
        addresses.hang()
        return seconds(lambda: store.send(call))

    # The timeout; asking for the slots, which is not waited for; and an attempt: a handshake.
    fastest(REPLY + 0.3 + 0.2 + REPLY, measure)
    addresses.resume()
    retry_for(store, 30)
    assert store.send(call) == []
    wait_until(lambda: not helpers())


def test_hanging_nodes_cost_a_batch_one_attempt(addresses: Addresses, stores: Stores) -> None:
    """It is connected to no node yet."""
    runs = runs_on_each(addresses.cluster, "batch")

    def measure() -> float:
        addresses.resume()
        store = stores.on_cluster(addresses.url, address_remap=addresses.remap, timeout=20)
        store.send(store.calls.get_run(runs[0]))  # on asyncio, it learns the slots
        addresses.disconnect()
        retry_for(store, 0.05)
        addresses.hang()
        began = time.monotonic()
        outcomes: list[Any] = store.batch([store.calls.get_run(run) for run in runs])
        took = time.monotonic() - began
        assert [isinstance(outcome, SquidstepError) for outcome in outcomes] == [True] * len(runs)
        return took

    fastest(0.05 + REPLY, measure)  # the timeout and a handshake
    assert not helpers()


def test_node_that_replies_serves_its_calls_of_a_batch(addresses: Addresses, stores: Stores) -> None:
    """Whatever the order of the nodes, and although the others take longer to fail than the timeout."""
    runs = runs_on_each(addresses.cluster, "reply")
    for healthy in runs:
        addresses.resume()
        store = stores.on_cluster(addresses.url, address_remap=addresses.remap, timeout=20)
        if stores.flavor == "asyncio":
            store.send(store.calls.get_run(healthy))  # learns the slots
        retry_for(store, 0.05)
        addresses.hang(but=slot_of(healthy))

        outcomes: list[Any] = store.batch([store.calls.get_run(run) for run in runs])

        served = [run for run, outcome in zip(runs, outcomes, strict=True) if not isinstance(outcome, SquidstepError)]
        assert served == [healthy]


def test_hanging_nodes_do_not_delay_extensions_on_other_nodes(addresses: Addresses, stores: Stores) -> None:
    """The leases are shorter than the store's timeout, so that a batch for all nodes would end too late."""
    runs = runs_on_each(addresses.cluster, f"lease-{stores.flavor}")
    store = stores.on_cluster(addresses.url, address_remap=addresses.remap, timeout=60)
    runner = None if stores.flavor == "blocking" else stores.runner
    with redis.RedisCluster.from_url(addresses.cluster.url) as client, contextlib.ExitStack() as blocks:
        others = StepRunStore(client)
        claims = [blocks.enter_context(Block(store.claim_step(run, "pay", {}, lease=3), runner)) for run in runs]
        addresses.hang(but=slot_of(runs[0]))
        ends: set[object] = set()

        def is_extended_repeatedly() -> bool:
            ends.add(stored(others, runs[0]).lease_ends_at)
            return len(ends) > 3

        if runner is None:
            wait_until(is_extended_repeatedly, timeout=30)
        else:
            runner.run(until(is_extended_repeatedly))

        addresses.resume()
        for claim in claims:
            claim.release()


@pytest.mark.parametrize("stores", ["asyncio"], indirect=True)
def test_first_call_waits_for_the_slots_until_its_deadline(addresses: Addresses, stores: Stores) -> None:
    """The client would wait for a minute. A blocking client learns the slots before it has a store."""
    options = {"socket_timeout": 60, "address_remap": addresses.remap}
    addresses.hang()
    store = stores.on_client(redis.asyncio.RedisCluster.from_url(addresses.url, **options), timeout=0.3)

    fastest(0.3, lambda: seconds(lambda: store.get_run("run")))
    fastest(0.3, lambda: seconds(store.count_runs))
    fastest(0.3 + REPLY, lambda: seconds(lambda: store.wait_for_step("run", "pay", 0.3)))
    addresses.resume()

    retry_for(store, 30)
    assert store.get_run("run") == []


@pytest.mark.parametrize("stores", ["blocking"], indirect=True)
class TestOtherThread:
    """On a blocking store, another thread asks for the slots."""

    def test_interrupted_call_leaves_the_client_usable(self, addresses: Addresses, stores: Stores) -> None:
        store = stores.on_cluster(addresses.url, address_remap=addresses.remap, timeout=20)
        store.get_run("run")
        addresses.hang()
        with sigalrm_raises():
            signal.setitimer(signal.ITIMER_REAL, REPLY + 0.6)  # while the nodes are asked
            with pytest.raises(AlarmError):
                store.get_run("run")
        addresses.resume()

        assert begun(store.begin_step(f"hanging-alarm-{time.monotonic_ns()}", "pay", {})).attempt == 1
        client: Any = store.client
        assert client.get("key") is None
        wait_until(lambda: not helpers())

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_fork_while_nodes_are_asked_leaves_no_lock_held(self, addresses: Addresses, stores: Stores) -> None:
        store = stores.on_cluster(addresses.url, address_remap=addresses.remap, timeout=20)
        store.get_run("run")
        addresses.hang()
        retry_for(store, REPLY + 0.3)
        with pytest.raises(SquidstepError):
            store.get_run("run")
        assert helpers() == ["squidstep-topology"]
        addresses.resume()
        child = os.fork()
        if not child:
            os._exit(_refreshes(store))
        _, status = os.waitpid(child, 0)

        assert status == 0

    def test_changed_slots_are_told_to_subscriptions_of_the_client(self, addresses: Addresses, stores: Stores) -> None:
        event: Any = pytest.importorskip("redis.event")
        if not hasattr(event, "AfterSlotsCacheRefreshEvent"):
            pytest.skip("only redis-py 8 tells them")
        store = stores.on_cluster(addresses.url, address_remap=addresses.remap, timeout=20)
        store.get_run("run")
        client: Any = store.client
        manager = client.nodes_manager
        before, seen = manager.slots_cache, list[object]()

        class Listener(event.EventListenerInterface):
            def listen(self, _: object) -> None:
                seen.append(manager.slots_cache)

        manager._event_dispatcher.register_listeners({event.AfterSlotsCacheRefreshEvent: [Listener()]})

        assert learn_slots(store)
        assert manager.slots_cache is not before
        assert seen[-1] is manager.slots_cache


def _refreshes(store: StepRunStore) -> int:
    """Returns 0 if the store and the client can learn the slots."""
    signal.alarm(30)
    try:
        is_learned = learn_slots(store)
        client: Any = store.client
        client.nodes_manager.initialize()
    except BaseException:
        return 2
    return 0 if is_learned else 1
