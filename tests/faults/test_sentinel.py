"""The master fails, and Sentinel makes another: under load, with and without waiting for replicas."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.servers import wait_until

from squidstep_redis import NotReplicatedError, NotSentError, OutcomeUnknownError, RefusedError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer

from .kit import FLAVOURS, Load, assert_a_legal_loss, stores_of
from .topologies import Sentinels, connected

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")


TYPED = (NotSentError, RefusedError, OutcomeUnknownError, NotReplicatedError)


def load_on(sentinels: Sentinels, **settings: Any) -> Load:
    """One thread with a blocking store, and one with an asyncio one."""

    @contextlib.contextmanager
    def connect(flavour: str) -> Iterator[StepRunStore]:
        with stores_of(flavour) as stores:
            yield stores.behind(sentinels, **settings)

    return Load(lambda flavour=flavour: connect(flavour) for flavour in FLAVOURS)


def test_a_master_that_is_killed_under_load(binary: Path, tmp_path: Path) -> None:
    """Every store finds the new master by itself; what that does not know is the end of what the old one did."""
    with Sentinels(binary, tmp_path) as sentinels, stores_of("blocking") as stores:
        with load_on(sentinels, timeout=60) as load:
            old = sentinels.master()
            old.kill()
            gone = time.monotonic()
            sentinels.wait_for_another_master(old)
            load.wait_for_more()

        assert load.errors == []
        assert_a_legal_loss(load, load.lost(stores.behind(sentinels)), gone)


def test_a_master_that_hangs_and_comes_back(binary: Path, tmp_path: Path) -> None:
    """What two replicas have confirmed is never lost, and the old master takes nothing any more."""
    with Sentinels(binary, tmp_path, {"min-replicas-max-lag": "1"}) as sentinels, stores_of("blocking") as stores:
        old = sentinels.master()
        with connected(old) as client:
            client.config_set("min-replicas-to-write", 1)
        with load_on(sentinels, timeout=2, wait_replicas=2, wait_timeout=0.5) as load:
            old.pause()
            new = sentinels.wait_for_another_master(old)
            wait_for_a_replica_of(new)
            old.resume()
            assert_it_takes_nothing(old, stores.from_url(old.url, timeout=0.2, socket_timeout=5))

        # There were two replicas, and now there may be one: nothing is confirmed by two before the old one is back.
        assert {type(error) for error in load.errors} <= set(TYPED)
        assert all(error.transient for error in load.errors)
        assert load.lost(stores.behind(sentinels)) == []


def wait_for_a_replica_of(master: EmbeddedServer) -> None:
    with connected(master) as client:
        wait_until(lambda: client.info("replication")["connected_slaves"] > 0, timeout=30)


def assert_it_takes_nothing(old: EmbeddedServer, store: StepRunStore) -> None:
    """It refuses for want of replicas, until Sentinel has made a replica of it; then it is read-only."""
    with connected(old) as client:
        if client.info("server")["redis_version"].startswith("6."):
            return  # see test_redis_6_lets_a_script_write_without_replicas
    with pytest.raises(RefusedError, match=r"NOREPLICAS|read.only") as caught:
        store.begin_step("run", "pay", {})
    assert caught.value.transient
    assert "nothing was written" in str(caught.value)
