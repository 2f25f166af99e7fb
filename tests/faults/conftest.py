"""Fixtures of the fault tests: clusters, and stores of both flavors on the servers that a test starts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.backends import buckets_of

from .kit import FLAVORS, Stores
from .topologies import Cluster


@pytest.fixture(params=FLAVORS)
def stores(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Stores]:
    with buckets_of(request.node), Stores(request.param, runner) as stores:
        yield stores


@pytest.fixture(scope="module")
def replicated(binary: Path) -> Iterator[Cluster]:
    """Three primaries and their replicas. Tests may kill nodes; the next test starts them again."""
    with Cluster(binary) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def unreplicated(binary: Path) -> Iterator[Cluster]:
    """Three primaries and a spare node. Tests kill no node of it, but may delete a slot and add it again.

    The other nodes of Redis 7.0 remember the deletion. If a replica takes over such a slot later and the old primary
    comes back, the new primary drops the slot. Then no node serves it, and the cluster stays down.
    """
    with Cluster(binary, replicated=False, spares=1) as cluster:
        yield cluster
