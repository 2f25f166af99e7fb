"""The store of a worker process: how it is configured, and when it is created."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast, overload
from weakref import WeakKeyDictionary

from redis import Redis

from squidstep_redis import InvalidArgumentError, StepRunStore
from squidstep_redis.rq.installed import Job, get_current_job
from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.task_queues import ProcessStores, QueueStore

# The options of RQ's connection that select the server and the user. RQ sets the other options for its own needs.
_ADDRESS: Final = ("host", "port", "path", "db", "username", "password", "credential_provider")
_FAKEREDIS: Final = ("server", "version", "server_type", "lua_modules")  # options of fakeredis's connections


class JobStores(ProcessStores):
    """The stores of this process. A forked work-horse creates its own, unless the store itself was configured."""

    def discard(self) -> None:
        """Discards the stores: the next call creates them again."""
        super().discard()
        self._by_pool: WeakKeyDictionary[Any, StepRunStore] = WeakKeyDictionary()

    def get(self, job: Job | None) -> StepRunStore:
        """Returns the configured store; without one, a store on the server of the job's connection."""
        with defer_sigalrm():
            if (configured := self.configured()) is not None:
                return configured
            if job is None:
                raise InvalidArgumentError(
                    "store", "no server is configured outside a job: call squidstep_redis.rq.configure(url) first"
                )
            pool: Any = cast("Any", job.connection).connection_pool
            if pool not in self._by_pool:
                self._by_pool[pool] = self._make_from_pool(pool)
            return self._by_pool[pool]

    def _make_from_pool(self, pool: Any) -> StepRunStore:
        options: dict[str, Any] = pool.connection_kwargs
        if "connection_pool" in options:  # a Sentinel pool: after a failover it connects to another server
            raise InvalidArgumentError(
                "store", "RQ's connection comes from Sentinel: call configure(lambda: sentinel.master_for(…))"
            )
        copied = (*_ADDRESS, *_FAKEREDIS)
        shared = {name: options[name] for name in options if name in copied or name.startswith("ssl_")}
        return QueueStore.from_url("redis://", connection_class=pool.connection_class, **{**shared, **self.settings})


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
    uses RQ's own server, with its own client.

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
            not a StepRunStore, or `connect` or a setting is rejected.
        TypeError: there is no such setting.
    """
    _stores.configure(connect, store, settings)


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
