"""The store of a worker process: how it is configured, and when it is created."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Final, Self, TypeVar, cast, overload
from weakref import WeakKeyDictionary

from redis import Redis

from squidstep_redis import Call, InvalidArgumentError, StepRunStore
from squidstep_redis.rq.installed import Job, get_current_job
from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.transport.blocking import BlockingTransport

T = TypeVar("T")

# The options of RQ's connection that select the server and the user. RQ sets the other options for its own needs.
_ADDRESS: Final = ("host", "port", "path", "db", "username", "password", "credential_provider")
_FAKEREDIS: Final = ("server", "version", "server_type", "lua_modules")  # options of fakeredis's connections


class _JobTransport(BlockingTransport):
    """A transport whose calls are not interrupted by the timeout of a job."""

    @classmethod
    def of(cls, transport: BlockingTransport) -> Self:
        """Returns a transport that shares everything with another one."""
        shared = cls.__new__(cls)
        vars(shared).update(vars(transport))
        return shared

    def send(self, call: Call[T]) -> T:
        with defer_sigalrm():
            return super().send(call)

    def send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        with defer_sigalrm():
            return super().send_batch(calls)


class _JobStore(StepRunStore):
    """A store whose calls are not interrupted by the timeout of a job."""

    _transport_type = _JobTransport

    @staticmethod
    def adopt(store: StepRunStore) -> None:
        """Lets the timeout of a job not interrupt the calls of a store, which stays the same otherwise."""
        if not isinstance(store._transport, _JobTransport):
            store._transport = _JobTransport.of(store._transport)


class JobStores:
    """The stores of this process. A forked work-horse creates its own, unless the store itself was configured."""

    def __init__(self) -> None:
        self._connect: str | Callable[[], Any] | StepRunStore | None = os.environ.get("SQUIDSTEP_REDIS_URL")
        self._settings: dict[str, Any] = {}
        self._discard()
        if hasattr(os, "register_at_fork"):  # Windows has no fork
            os.register_at_fork(after_in_child=self._discard)

    def _discard(self) -> None:
        self._configured: StepRunStore | None = None
        self._by_pool: WeakKeyDictionary[Any, StepRunStore] = WeakKeyDictionary()

    def configure(self, connect: str | Callable[[], Any] | StepRunStore, settings: dict[str, Any]) -> None:
        """Sets the store, or its server and settings, as the function `configure` does; discards existing stores."""
        self._connect, self._settings = connect, settings
        self._discard()

    def get(self, job: Job | None) -> StepRunStore:
        """Returns the configured store; without one, a store on the server of the job's connection."""
        if isinstance(self._connect, StepRunStore):
            return self._connect
        with defer_sigalrm():
            if self._connect is not None:
                self._configured = self._configured or self._make(self._connect)
                return self._configured
            if job is None:
                raise InvalidArgumentError(
                    "store", "no server is configured outside a job: call squidstep_redis.rq.configure(url) first"
                )
            pool: Any = cast("Any", job.connection).connection_pool
            if pool not in self._by_pool:
                self._by_pool[pool] = self._make_from_pool(pool)
            return self._by_pool[pool]

    def _make(self, connect: str | Callable[[], Any]) -> StepRunStore:
        if isinstance(connect, str):
            return _JobStore.from_url(connect, **self._settings)
        return _JobStore(connect(), **self._settings)

    def _make_from_pool(self, pool: Any) -> StepRunStore:
        options: dict[str, Any] = pool.connection_kwargs
        if "connection_pool" in options:  # a Sentinel pool: after a failover it connects to another server
            raise InvalidArgumentError(
                "store", "RQ's connection comes from Sentinel: call configure(lambda: sentinel.master_for(…))"
            )
        copied = (*_ADDRESS, *_FAKEREDIS)
        shared = {name: options[name] for name in options if name in copied or name.startswith("ssl_")}
        return _JobStore.from_url("redis://", connection_class=pool.connection_class, **{**shared, **self._settings})


_stores: Final = JobStores()


@overload
def configure(connect: str | Callable[[], Redis], **settings: Any) -> None: ...
@overload
def configure(*, store: StepRunStore) -> None: ...
def configure(
    connect: str | Callable[[], Redis] | None = None, *, store: StepRunStore | None = None, **settings: Any
) -> None:
    """Sets the server and the settings of the store, or the store. Call it in the module that defines the jobs.

    It opens no connection. Without this call, the store uses the URL in SQUIDSTEP_REDIS_URL; if that is not set, it
    uses RQ's own server, with a client of its own.

    Args:
        connect: a URL, or a function that returns a client. The function is called once in each process, after RQ has
            forked it. None: `store` is given.
        store: the store to use as it is, with its client and its listeners: in tests, or to observe its events. Forked
            work-horses use it, too. From now on, a timeout by SIGALRM, such as that of a job, does not interrupt its
            calls. None: `connect` is given.
        settings: keyword arguments of `StepRunStore`, such as `prefix`, `codec`, `run_ttl`, `timeout` or
            `wait_replicas`. A store that is given has its own.

    Raises:
        InvalidArgumentError: both or neither of `connect` and `store` are given, or `store` and settings, or `store` is
            not a StepRunStore.
    """
    if store is not None:
        if not isinstance(cast("object", store), StepRunStore):
            raise InvalidArgumentError(
                "store",
                f"must be a StepRunStore, not of type {type(store).__name__}: coroutines use a blocking one, too",
            )
        if connect is not None or settings:
            raise InvalidArgumentError("store", "is used as it is: give it no URL, function or settings")
        _JobStore.adopt(store)
        _stores.configure(store, {})
    elif connect is None:
        raise InvalidArgumentError("connect", "must be a URL, or a function that returns a client; or give a store")
    else:
        _stores.configure(connect, settings)


def store() -> StepRunStore:
    """Returns the store of this process, for reading the results of steps or scheduling steps.

    Raises:
        InvalidArgumentError: called outside a job, and neither `configure` nor SQUIDSTEP_REDIS_URL sets a server.
    """
    return _stores.get(get_current_job())


def store_for(job: Job | None) -> StepRunStore:
    """Returns the store for the steps of a job.

    Args:
        job: the job whose connection is used if no server is configured; None: a server must be configured.
    """
    return _stores.get(job)
