"""The master fails and Sentinel promotes another, under load, with and without waiting for replicas."""

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

from .kit import FLAVORS, Load, assert_loss_is_legal, stores_of
from .topologies import Sentinels, connected

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")


TYPED = (NotSentError, RefusedError, OutcomeUnknownError, NotReplicatedError)


def load_on(sentinels: Sentinels, **settings: Any) -> Load:
    """Returns a load of two threads: one has a blocking store, one an asyncio store."""

    @contextlib.contextmanager
    def connect(flavor: str) -> Iterator[StepRunStore]:
        with stores_of(flavor) as stores:
            yield stores.on_sentinels(sentinels, **settings)

    return Load(lambda flavor=flavor: connect(flavor) for flavor in FLAVORS)


def test_killed_master_loses_only_unreplicated_completions(binary: Path, tmp_path: Path) -> None:
    """Every store finds the new master by itself."""
    with Sentinels(binary, tmp_path) as sentinels, stores_of("blocking") as stores:
        with load_on(sentinels, timeout=60) as load:
            old = sentinels.master()
            old.kill()
            killed = time.monotonic()
            sentinels.wait_for_new_master(old)
            load.wait_for_progress()

        assert load.errors == []
        assert_loss_is_legal(load, load.lost(stores.on_sentinels(sentinels)), killed)


def test_paused_master_accepts_no_write_after_a_failover(binary: Path, tmp_path: Path) -> None:
    """No completion that two replicas confirmed is lost."""
    with Sentinels(binary, tmp_path, {"min-replicas-max-lag": "1"}) as sentinels, stores_of("blocking") as stores:
        old = sentinels.master()
        with connected(old) as client:
            client.config_set("min-replicas-to-write", 1)
        with load_on(sentinels, timeout=2, wait_replicas=2, wait_timeout=0.5) as load:
            old.pause()
            new = sentinels.wait_for_new_master(old)
            wait_for_replica_of(new)
            old.resume()
            assert_writes_are_rejected(old, stores.from_url(old.url, timeout=0.2, socket_timeout=5))

        # There can be only one replica until the old master is back, so that no write is confirmed by two.
        assert {type(error) for error in load.errors} <= set(TYPED)
        assert all(error.transient for error in load.errors)
        assert load.lost(stores.on_sentinels(sentinels)) == []


def wait_for_replica_of(master: EmbeddedServer) -> None:
    with connected(master) as client:
        wait_until(lambda: client.info("replication")["connected_slaves"] > 0, timeout=30)


def assert_writes_are_rejected(old: EmbeddedServer, store: StepRunStore) -> None:
    """Checks an old master: it lacks replicas, or is a read-only replica once Sentinel has reconfigured it."""
    with connected(old) as client:
        if client.info("server")["redis_version"].startswith("6."):
            return  # see test_redis_6_lets_scripts_write_without_replicas
    with pytest.raises(RefusedError, match=r"NOREPLICAS|read.only") as caught:
        store.begin_step("run", "pay", {})
    assert caught.value.transient
    assert "nothing was written" in str(caught.value)
