"""Helpers for the fault tests: stores of both flavors on any server, a load, and a server with a movable clock."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, cast

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncioRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from support.backends import Driven
from support.records import begun
from support.servers import collect_abandoned_connections, wait_until

from squidstep_redis import AsyncStepRunStore, ServerError, StepRunNotFoundError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer

from .topologies import SERVICE, Sentinels, connected

FLAVORS: Final = ("blocking", "asyncio")


class Stores:
    """Creates stores of one flavor, and closes them and their clients."""

    def __init__(self, flavor: str, runner: asyncio.Runner | None) -> None:
        self.flavor = flavor
        self.runner: Any = runner  # unused by the blocking flavor
        self._closing = contextlib.ExitStack()

    def from_url(self, url: str, **options: Any) -> StepRunStore:
        if self.flavor == "blocking":
            store = StepRunStore.from_url(url, **options)
        else:
            store = cast("StepRunStore", Driven(AsyncStepRunStore.from_url(url, **options), self.runner))
        self._closing.callback(store.close)
        return store

    def retrying(self, url: str, retries: int, **settings: Any) -> StepRunStore:
        """Returns a store on a client that retries by itself, as clients of redis-py 6 and later do by default."""
        errors = [redis.ConnectionError, redis.TimeoutError]
        options: dict[str, Any] = {"retry_on_error": errors, "protocol": 2}
        if self.flavor == "blocking":
            client: Any = redis.Redis.from_url(url, retry=Retry(NoBackoff(), retries), **options)
        else:
            client = redis.asyncio.Redis.from_url(url, retry=AsyncioRetry(NoBackoff(), retries), **options)
        return self.on_client(client, **settings)

    def on_sentinels(self, sentinels: Sentinels, **settings: Any) -> StepRunStore:
        options: dict[str, Any] = {"socket_timeout": 1, "socket_connect_timeout": 1, "protocol": 2}
        module: Any = redis.sentinel if self.flavor == "blocking" else redis.asyncio.sentinel
        found = module.Sentinel(sentinels.addresses, sentinel_kwargs=options, **options)
        for client in found.sentinels:
            self._closing.callback(self._close, client)
        return self.on_client(found.master_for(SERVICE), **settings)

    def on_cluster(self, url: str, *, address_remap: Any = None, **settings: Any) -> StepRunStore:
        options: dict[str, Any] = {"socket_timeout": 1, "socket_connect_timeout": 1, "address_remap": address_remap}
        if self.flavor == "asyncio":
            return self.on_client(redis.asyncio.RedisCluster.from_url(url, **options), **settings)
        return self.on_client(_blocking_cluster_client(url, options), **settings)

    def on_client(self, client: Any, **settings: Any) -> StepRunStore:
        self._closing.callback(self._close, client)
        if self.flavor == "blocking":
            return StepRunStore(client, **settings)
        return cast("StepRunStore", Driven(AsyncStepRunStore(client, **settings), self.runner))

    def wait(self, result: Any) -> Any:
        """Returns the result of a client's method; on asyncio, awaits it first."""

        async def wait() -> Any:
            return await result

        return result if self.flavor == "blocking" else self.runner.run(wait())

    def _close(self, client: Any) -> None:
        with contextlib.suppress(redis.TimeoutError):  # the machine was too busy to close a connection in time
            self.wait(client.close() if self.flavor == "blocking" else client.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.close()
        collect_abandoned_connections()


def _blocking_cluster_client(url: str, options: dict[str, Any]) -> Any:
    """Returns a client. Unlike that of asyncio, it learns the slots at once; a busy machine may need a while."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return cast("Any", redis.RedisCluster).from_url(url, **options)
        except (redis.TimeoutError, redis.RedisClusterException):
            if time.monotonic() > deadline:
                raise


@contextlib.contextmanager
def stores_of(flavor: str) -> Iterator[Stores]:
    """Creates stores with their own event loop, so that any thread can use them."""
    with asyncio.Runner() as runner, Stores(flavor, runner) as stores:
        yield stores


# A load


@dataclass(frozen=True, slots=True)
class Completion:
    """An acknowledged completion, with monotonic times of this machine."""

    run: str
    step: str
    sent: float
    acknowledged: float


_loads = itertools.count()


class Load:
    """Threads that begin and complete one step after another, each in its own run, and continue after errors.

    Attributes:
        completions: the acknowledged completions.
        errors: the errors of all other calls.
        runs: the runs, one per thread.
        forgotten: steps that were begun and that the server then did not know.
    """

    def __init__(self, connects: Iterable[Callable[[], AbstractContextManager[StepRunStore]]]) -> None:
        self.completions: list[Completion] = []
        self.errors: list[ServerError] = []
        self.forgotten: list[str] = []
        self.unexpected: list[BaseException] = []
        self._end = threading.Event()
        load = next(_loads)
        workers = {f"load-{load}-{index}": connect for index, connect in enumerate(connects)}
        self.runs = list(workers)
        self._threads = [threading.Thread(target=self._work, args=worker, daemon=True) for worker in workers.items()]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for_progress()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self._raise_unexpected()

    def wait_for_progress(self, count: int = 20) -> None:
        """Waits until each thread has completed `count` more steps."""
        before = len(self.completions)

        def is_done() -> bool:
            self._raise_unexpected()
            since = [completion.run for completion in self.completions[before:]]
            return all(since.count(run) >= count for run in self.runs)

        wait_until(is_done, timeout=60)

    def _work(self, run: str, connect: Callable[[], AbstractContextManager[StepRunStore]]) -> None:
        try:
            with connect() as store:
                for number in itertools.count():
                    if self._end.is_set():
                        return
                    self._execute(store, run, f"step-{number:06}")
        except BaseException as error:
            self.unexpected.append(error)

    def _raise_unexpected(self) -> None:
        if self.unexpected:
            raise self.unexpected[0]

    def _execute(self, store: StepRunStore, run: str, step: str) -> None:
        try:
            claim = begun(store.begin_step(run, step, {}))
            sent = time.monotonic()
            completed = store.complete_step(claim, {"of": step})
        except ServerError as error:
            self.errors.append(error)
        except StepRunNotFoundError:
            self.forgotten.append(step)
        else:
            assert completed.output == {"of": step}
            self.completions.append(Completion(run, step, sent, time.monotonic()))

    def lost(self, store: StepRunStore) -> list[Completion]:
        """Returns the acknowledged completions that the store does not have; checks the order of the others."""
        lost: list[Completion] = []
        for run in self.runs:
            known = store.completed_steps(run)
            assert known == sorted(known)  # each thread completes its steps in order
            acknowledged = [completion for completion in self.completions if completion.run == run]
            lost += [completion for completion in acknowledged if completion.step not in known]
        return lost


def assert_loss_is_legal(load: Load, lost: list[Completion], killed: float) -> None:
    """Checks that the new master has all that the old one did up to some moment, and all since the takeover.

    Args:
        load: the load during the failover.
        lost: the completions that the new master does not have.
        killed: the time after which the old master acknowledged nothing.
    """
    assert [completion for completion in lost if completion.sent > killed] == []
    for run in load.runs:  # on a cluster, runs can have different masters
        first = min((completion.acknowledged for completion in lost if completion.run == run), default=killed)
        acknowledged = [completion for completion in load.completions if completion.run == run]
        kept = [each for each in acknowledged if each not in lost and each.acknowledged < killed]
        assert [completion for completion in kept if completion.sent > first] == []


# A server with a movable clock


def write_launcher(path: Path, script: str) -> Path:
    """Writes a program that starts a server. In the script, `"$@"` are the server's options."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return path


LIBRARIES: Final = ("/usr/lib", "/usr/local/lib")


class MovableClock:
    """A server whose clock tests can move. It needs libfaketime, a Debian package."""

    def __init__(self, binary: Path, scratch: Path) -> None:
        libraries = sorted(path for root in LIBRARIES for path in Path(root).glob("**/libfaketime.so.1"))
        if not libraries:
            raise LookupError("libfaketime is not on this machine: apt-get install libfaketime")
        self._offset = scratch / "offset"
        self._set(0)
        settings = {
            "LD_PRELOAD": libraries[0],
            "FAKETIME_TIMESTAMP_FILE": self._offset,
            "FAKETIME_NO_CACHE": 1,
            "FAKETIME_DONT_FAKE_MONOTONIC": 1,
        }
        exports = " ".join(f"{name}={value}" for name, value in settings.items())
        self.server = EmbeddedServer(
            binary=write_launcher(scratch / "movable-clock", f'export {exports}\nexec "{binary}" "$@"'), port=0
        )

    def move(self, seconds: int) -> None:
        """Sets the clock to the true time plus `seconds`, and waits until scripts use it."""
        self._set(seconds)
        with connected(self.server) as client:
            wait_until(lambda: abs(int(client.eval("return redis.call('TIME')[1]", 0)) - time.time() - seconds) < 60)

    def _set(self, seconds: int) -> None:
        new = self._offset.with_suffix(".new")
        new.write_text(f"{seconds:+}")
        new.replace(self._offset)  # atomically, because the server can read it at any time
