"""Stores behind a proxy, and a store without faults to compare them with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.backends import Bench
from support.proxy import Proxy

from squidstep_redis import (
    StepRunStore,
)
from squidstep_redis.protocol.scripts import directory, script


@pytest.fixture
def proxy(bench: Bench) -> Iterator[Proxy]:
    with Proxy.to(bench.backend.raw) as proxy:
        yield proxy


@pytest.fixture
def connect(bench: Bench, proxy: Proxy) -> Iterator[Callable[..., StepRunStore]]:
    """Makes stores with from_url, through the proxy."""
    with contextlib.ExitStack() as opened:

        def connect(db: int = 0, **options: Any) -> StepRunStore:
            url = f"redis://127.0.0.1:{proxy.port}/{db}"
            store = bench.from_url(url, **options)
            opened.callback(store.close)
            return store

        yield connect


@pytest.fixture
def proxied(connect: Callable[..., StepRunStore]) -> StepRunStore:
    return connect()


@pytest.fixture
def twin(bench: Bench) -> StepRunStore:
    """A store for comparison, without faults."""
    return bench.store(prefix=f"{bench.prefix}-twin")


@pytest.fixture
def known(bench: Bench) -> None:
    """The server knows all scripts."""
    for path in directory().glob("*.lua"):
        bench.backend.raw.script_load(script(path.stem).source)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py does not wait between two sends."""

    async def no_sleep(_: float) -> None: ...

    monkeypatch.setattr("redis.retry.sleep", lambda _: None)
    monkeypatch.setattr("redis.asyncio.retry.sleep", no_sleep)
