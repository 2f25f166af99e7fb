"""Kits on each server. `store` is the blocking store of a kit, or its asyncio store behind a blocking interface."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import cast

import pytest
from support.backends import Backend, Driven, buckets_of

from squidstep_redis import StepRunStore
from squidstep_redis.testing import StepKit


@pytest.fixture
def kit(request: pytest.FixtureRequest, backend: Backend) -> Iterator[StepKit]:
    with buckets_of(request.node), StepKit(backend.url or "fakeredis") as kit:
        yield kit


@pytest.fixture(params=["blocking", "asyncio"])
def store(request: pytest.FixtureRequest, kit: StepKit, runner: asyncio.Runner) -> StepRunStore:
    return cast("StepRunStore", kit.store if request.param == "blocking" else Driven(kit.async_store, runner))
