"""What the tests of faults are made with: stores of both flavours on any server, a load, servers with a trick."""

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
from support.servers import wait_until

from squidstep_redis import AsyncStepRunStore, ServerError, StepRunNotFoundError, StepRunStore
from squidstep_redis.embedded import EmbeddedServer

from .topologies import SERVICE, Sentinels, connected

FLAVOURS: Final = ("blocking", "asyncio")


class Stores:
    """Makes stores of one flavour, and closes them and their clients."""

    def __init__(self, flavour: str, runner: asyncio.Runner | None) -> None:
        self.flavour = flavour
        self.runner: Any = runner  # asyncio's alone
        self._opened = contextlib.ExitStack()

    def from_url(self, url: str, **options: Any) -> StepRunStore:
        if self.flavour == "blocking":
            store = StepRunStore.from_url(url, **options)
        else:
            store = cast("StepRunStore", Driven(AsyncStepRunStore.from_url(url, **options), self.runner))
        self._opened.callback(store.close)
        return store

    def retrying(self, url: str, retries: int, **settings: Any) -> StepRunStore:
        """On a client that sends again by itself, as redis-py 6 and later do unless told otherwise."""
        errors = [redis.ConnectionError, redis.TimeoutError]
        options: dict[str, Any] = {"retry_on_error": errors, "protocol": 2}
        if self.flavour == "blocking":
            return self.on(redis.Redis.from_url(url, retry=Retry(NoBackoff(), retries), **options), **settings)
        return self.on(
            redis.asyncio.Redis.from_url(url, retry=AsyncioRetry(NoBackoff(), retries), **options), **settings
        )

    def behind(self, sentinels: Sentinels, **settings: Any) -> StepRunStore:
        options: dict[str, Any] = {"socket_timeout": 1, "socket_connect_timeout": 1, "protocol": 2}
        module: Any = redis.sentinel if self.flavour == "blocking" else redis.asyncio.sentinel
        found = module.Sentinel(sentinels.addresses, sentinel_kwargs=options, **options)
        for client in found.sentinels:
            self._opened.callback(self._close, client)
        return self.on(found.master_for(SERVICE), **settings)

    def on_cluster(self, url: str, *, address_remap: Any = None, **settings: Any) -> StepRunStore:
        options: dict[str, Any] = {"socket_timeout": 1, "socket_connect_timeout": 1, "address_remap": address_remap}
        module: Any = redis if self.flavour == "blocking" else redis.asyncio
        return self.on(module.RedisCluster.from_url(url, **options), **settings)

    def on(self, client: Any, **settings: Any) -> StepRunStore:
        self._opened.callback(self._close, client)
        if self.flavour == "blocking":
            return StepRunStore(client, **settings)
        return cast("StepRunStore", Driven(AsyncStepRunStore(client, **settings), self.runner))

    def wait(self, answer: Any) -> Any:
        """Returns what a client of this flavor returns."""

        async def wait() -> Any:
            return await answer

        return answer if self.flavour == "blocking" else self.runner.run(wait())

    def _close(self, client: Any) -> None:
        self.wait(client.close() if self.flavour == "blocking" else client.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._opened.close()


@contextlib.contextmanager
def stores_of(flavour: str) -> Iterator[Stores]:
    """In a thread of its own, where the event loop of another is of no use."""
    with asyncio.Runner() as runner, Stores(flavour, runner) as stores:
        yield stores


# A load


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion that was acknowledged, by the clock of this machine."""

    run: str
    step: str
    sent: float
    answered: float


_loads = itertools.count()


class Load:
    """Threads that each begin and complete one step after the other, in a run of their own, through thick and thin.

    Attributes:
        completions: those that were acknowledged.
        errors: what the others were answered.
        runs: of each thread.
        forgotten: steps that were begun, and of which the server then knew nothing.
    """

    def __init__(self, connects: Iterable[Callable[[], AbstractContextManager[StepRunStore]]]) -> None:
        self.completions: list[Completion] = []
        self.errors: list[ServerError] = []
        self.forgotten: list[str] = []
        self.unforeseen: list[BaseException] = []
        self._end = threading.Event()
        load = next(_loads)
        workers = {f"load-{load}-{index}": connect for index, connect in enumerate(connects)}
        self.runs = list(workers)
        self._threads = [threading.Thread(target=self._work, args=worker, daemon=True) for worker in workers.items()]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        assert not self.unforeseen, self.unforeseen

    def wait_for_more(self, count: int = 20) -> None:
        """Waits until each thread has had so many more steps acknowledged."""
        before = len(self.completions)

        def is_done() -> bool:
            assert not self.unforeseen, self.unforeseen
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
        except BaseException as error:  # noqa: BLE001 -- the test fails with it
            self.unforeseen.append(error)

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
        """The acknowledged completions that the store does not know, or not in the order they came in."""
        lost: list[Completion] = []
        for run in self.runs:
            known = store.completed_steps(run)
            assert known == sorted(known)  # each thread makes its steps one after the other
            acknowledged = [completion for completion in self.completions if completion.run == run]
            lost += [completion for completion in acknowledged if completion.step not in known]
        return lost


def assert_a_legal_loss(load: Load, lost: list[Completion], gone: float) -> None:
    """A new master knows all that the old one did up to some moment, and all that came after it took over.

    `gone` is when the old master was no longer there to acknowledge anything.
    """
    assert [completion for completion in lost if completion.sent > gone] == []
    for run in load.runs:  # on a cluster each may have a master of its own
        first = min((completion.answered for completion in lost if completion.run == run), default=gone)
        acknowledged = [completion for completion in load.completions if completion.run == run]
        kept = [completion for completion in acknowledged if completion not in lost and completion.answered < gone]
        assert [completion for completion in kept if completion.sent > first] == []


# Servers with a trick


def launcher(path: Path, script: str) -> Path:
    """A program that starts a server in its own way; `"$@"` are the server's options."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return path


LIBRARIES: Final = ("/usr/lib", "/usr/local/lib")


class MovedClock:
    """A server whose clock can be moved, by libfaketime (Debian's package of that name)."""

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
            binary=launcher(scratch / "moved-clock", f'export {exports}\nexec "{binary}" "$@"'), port=0
        )

    def move(self, seconds: int) -> None:
        """Sets the clock to so many seconds after the true time, and waits until scripts go by it."""
        self._set(seconds)
        with connected(self.server) as client:
            wait_until(lambda: abs(int(client.eval("return redis.call('TIME')[1]", 0)) - time.time() - seconds) < 60)

    def _set(self, seconds: int) -> None:
        new = self._offset.with_suffix(".new")
        new.write_text(f"{seconds:+}")
        new.replace(self._offset)  # as a whole: the server reads it at any time
