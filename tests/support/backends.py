"""The servers and the stores of the tests: each server, and on each the blocking and the asyncio store."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any, Self, cast
from unittest import mock

import fakeredis
import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from squidstep_redis import AsyncStepRunStore, StepRun, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.protocol.keys import Keys
from support.internals import lose_replies
from support.servers import EmbeddedCluster, collect_abandoned_connections, find_binary, wait_until

# `pip install` installs the default servers. The others are selected by --servers; a missing one is then an error.
DEFAULT_SERVERS = ("fakeredis", "valkey", "cluster")
ALL_SERVERS = (*DEFAULT_SERVERS, "redis-7", "redis-6")


class Backend:
    """A server, and functions that make clients of it."""

    def __init__(self, name: str, connect: Callable[..., Any], connect_asyncio: Callable[..., Any]) -> None:
        self.name = name
        self.url: str | None = getattr(connect, "args", (None,))[0] if name != "fakeredis" else None
        self.connect = connect
        self.connect_asyncio = connect_asyncio
        self.raw: Any = connect()

    @classmethod
    def of_url(cls, name: str, url: str) -> Self:
        """Returns the backend of a single server that is already running."""
        return cls(
            name,
            functools.partial(redis.Redis.from_url, url, protocol=2),
            functools.partial(redis.asyncio.Redis.from_url, url, protocol=2),
        )

    def now(self) -> float:
        """Returns the server's time, in seconds since 1970."""
        seconds, microseconds = self.raw.time(target_nodes="random") if self.name == "cluster" else self.raw.time()
        return seconds + microseconds / 1_000_000

    def keys(self, prefix: str) -> set[bytes]:
        return keys_of(self.raw, prefix)

    def flush(self) -> None:
        """Deletes all keys, but not the scripts."""
        if self.name == "cluster":
            self.raw.flushall(target_nodes="primaries")
        else:
            self.raw.flushall()

    def flush_scripts(self) -> None:
        if self.name == "cluster":
            self.raw.script_flush(target_nodes="primaries")
        else:
            self.raw.script_flush()


def buckets_of(test: pytest.Item) -> contextlib.AbstractContextManager[object]:
    """Returns a block in which the indexes of this process's stores have the buckets of a test.

    They are 16 instead of 1,024, unless it is marked: reading all takes longer than most tests; on fakeredis, half a
    second.
    """
    if test.get_closest_marker("all_buckets"):
        return contextlib.nullcontext()
    return mock.patch("squidstep_redis.protocol.keys.BUCKETS", 16)


@contextlib.contextmanager
def running(name: str) -> Iterator[Backend]:
    """Runs the server of this name during the block."""
    if name == "fakeredis":
        fake = fakeredis.FakeServer()
        yield Backend(
            name,
            functools.partial(fakeredis.FakeStrictRedis, server=fake),
            functools.partial(fakeredis.FakeAsyncRedis, server=fake),
        )
    elif name == "cluster":
        with EmbeddedCluster() as cluster:
            url = cluster.url
            yield Backend(
                name,
                functools.partial(redis.RedisCluster.from_url, url),
                functools.partial(redis.asyncio.RedisCluster.from_url, url),
            )
    else:
        with EmbeddedServer(binary=find_binary(name)) as server:
            yield Backend.of_url(name, server.url)


@contextlib.contextmanager
def offline_store(**settings: Any) -> Iterator[StepRunStore]:
    """Provides a store on a closed port: every send raises NotSentError."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with redis.Redis(port=bound.getsockname()[1], retry=Retry(NoBackoff(), 0)) as client:
            yield StepRunStore(client, timeout=0.001, **settings)


def keys_of(raw: Any, prefix: str) -> set[bytes]:
    return set(raw.scan_iter(match=f"{prefix}:*", count=1000))


def contents(raw: Any, prefix: str) -> dict[bytes, Any]:
    """Returns all keys of a prefix, with their contents. Two pipelines take less CPU than calls for each key."""
    keys = keys_of(raw, prefix)
    read = {
        b"hash": lambda pipeline, key: pipeline.hgetall(key),
        b"zset": lambda pipeline, key: pipeline.zrange(key, 0, -1, withscores=True),
        b"string": lambda pipeline, key: pipeline.get(key),
        b"stream": lambda pipeline, key: pipeline.xrange(key),
    }
    with raw.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.type(key)
        types = dict(zip(keys, pipeline.execute(), strict=True))
        for key, kind in types.items():
            read[kind](pipeline, key)
        values = zip(types.items(), pipeline.execute(), strict=True)
    return {key: [entry for _, entry in value] if kind == b"stream" else value for (key, kind), value in values}


def timeless(value: Any) -> Any:
    """Replaces the times in a stored value or a reply, which differ between two calls, and sorts by member.

    Entries of an index are ordered by time: two of the same millisecond in one database may differ in the other.
    """
    if isinstance(value, list | tuple):
        items = [timeless(item) for item in value]
        return sorted(items) if value and isinstance(value[0], tuple) else items
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items()}
    if isinstance(value, bytes):
        value = re.sub(rb"\b1\d{12}\b", b"time", value)
        # In a state line, the lease, the start and the end of the attempt precede the time of creation.
        return re.sub(rb" (\d*) (\d*) (\d*) time", without_spans, value)
    return "time" if isinstance(value, float) and value > 1e12 else value


def without_spans(found: re.Match[bytes]) -> bytes:
    lease, *spans = found.groups()
    known = lease and (b"live" if int(lease) >= 60_000 else b"expired")  # of 60 s, perhaps since a later extension
    return b" ".join([b"", known, *(b"span" if span else b"" for span in spans), b"time"])


class Driven:
    """An asyncio store with the methods of a blocking one, so that both run the same tests."""

    def __init__(self, store: AsyncStepRunStore, runner: asyncio.Runner) -> None:
        self.store = store
        self.runner = runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.store, name)
        if not inspect.iscoroutinefunction(value):
            return value

        @functools.wraps(value)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self.runner.run(value(*args, **kwargs))

        return run


class Bench:
    """Makes stores of one flavor on one server, all with the prefix of the test."""

    def __init__(
        self, backend: Backend, runner: asyncio.Runner | None, prefix: str, *, shares_client: bool = False
    ) -> None:
        """Makes no store yet.

        Args:
            backend: the server.
            runner: the event loop of the asyncio stores; None: the stores are blocking.
            prefix: of the keys.
            shares_client: whether the stores of a cluster use the client of other tests.
        """
        self.backend = backend
        self.runner = runner
        self.prefix = prefix
        self._shares_client = shares_client
        self._clients: list[Any] = []

    def store(
        self, *, lost_replies: int = 0, client_options: dict[str, Any] | None = None, **settings: Any
    ) -> StepRunStore:
        """Makes a store. Of each call, `lost_replies` replies are lost before one arrives."""
        settings = {"prefix": self.prefix, **settings}
        if self.runner is None:
            store: Any = StepRunStore(self._connect(client_options or {}), **settings)
        else:
            client = self.runner.run(self._connect_asyncio(client_options or {}))
            self._clients.append(client)
            store = AsyncStepRunStore(client, **settings)
        if lost_replies:
            lose_replies(store, lost_replies)
        # One type for both, so that tests are type-checked against the blocking store.
        return cast("StepRunStore", Driven(store, self.runner) if self.runner else store)

    def from_url(self, url: str, **settings: Any) -> StepRunStore:
        """Makes a store with its own client. The caller closes it."""
        settings = {"prefix": self.prefix, **settings}
        if self.runner is None:
            return StepRunStore.from_url(url, **settings)
        return cast("StepRunStore", Driven(AsyncStepRunStore.from_url(url, **settings), self.runner))

    def _connect(self, options: dict[str, Any]) -> Any:
        if self._shares_client and self.backend.name == "cluster" and not options:
            return self.backend.raw
        client = self.backend.connect(**options)
        self._clients.append(client)
        return client

    async def _connect_asyncio(self, options: dict[str, Any]) -> Any:
        return self.backend.connect_asyncio(**options)

    def lapse(self, step_run: StepRun) -> None:
        """Waits until the lease has expired by the server's clock."""
        assert step_run.lease_ends_at is not None
        end = step_run.lease_ends_at.timestamp()
        wait_until(lambda: self.backend.now() >= end)

    def field(self, run_id: str, field: str) -> bytes | None:
        """Returns a field of the run's hash, as it is stored."""
        return self.backend.raw.hget(self.keys(run_id)[0], field)

    def keys(self, run_id: str) -> list[bytes]:
        """Returns the run's keys: steps, done, claims, failed."""
        return list(Keys(self.prefix.encode()).run(run_id).keys)

    def indexed(self) -> set[bytes]:
        """Returns the members of the index of runs, of all buckets."""
        keys = [key for key in self.backend.keys(self.prefix) if key.endswith(b"}:runs")]
        return {member for key in keys for member in self.backend.raw.zrange(key, 0, -1)}

    def dump(self) -> dict[bytes, Any]:
        """Returns everything stored under the prefix; compared before and after, it shows that nothing was written."""
        return contents(self.backend.raw, self.prefix)

    def close(self) -> None:
        for client in self._clients:
            if self.runner is None:
                client.close()
            else:
                self.runner.run(client.aclose())
        if self.backend.name == "cluster":
            # A busy machine may make a call time out, or a test interrupts the initialization of the client.
            collect_abandoned_connections(generation=1)
