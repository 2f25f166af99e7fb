"""The store of a worker process: how it is configured, and when it is created."""

from __future__ import annotations

import signal
import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final, cast, overload
from urllib.parse import parse_qsl, urlsplit

from redis import Redis

from squidstep_redis import InvalidArgumentError, StepRunStore
from squidstep_redis.celery.installed import App, Task, current_app, current_task, on_process_start
from squidstep_redis.signals import also_defer, defer_sigalrm
from squidstep_redis.task_queues import ProcessStores, QueueStore

_CONFIGURE: Final = "call squidstep_redis.celery.configure(url), or set SQUIDSTEP_REDIS_URL"


class TaskStores(ProcessStores):
    """The stores of this process. A forked child creates its own, unless the store itself was configured."""

    def discard(self) -> None:
        """Discards the stores: the next call creates them again."""
        super().discard()
        self._by_broker: dict[str, StepRunStore] = {}

    def get(self, task: Task | None) -> StepRunStore:
        """Returns the configured store; without one, a store on the broker of the application.

        Args:
            task: the current task, whose application is used; None: the current application.
        """
        with defer_sigalrm():
            if (configured := self.configured()) is not None:
                return configured
            app = current_app() if task is None else task.app
            key = f"{app.conf.broker_write_url or app.conf.broker_url}"
            # Threads may make their first stores at the same time: `setdefault` is atomic, and one of them is used.
            return self._by_broker.get(key) or self._by_broker.setdefault(key, self._make_on_broker(app))

    def _make_on_broker(self, app: App) -> StepRunStore:
        url: object = app.conf.broker_write_url or app.conf.broker_url
        address = urlsplit(url) if isinstance(url, str) and ";" not in url else None
        if address is None or address.scheme not in ("redis", "rediss"):
            kind = f"{address.scheme}://" if address is not None else "several servers"
            raise InvalidArgumentError("store", f"the broker is {kind}, not a redis:// or rediss:// URL: {_CONFIGURE}")
        options = {**_tls_of(dict(parse_qsl(address.query))), **_tls_of(app.conf.broker_use_ssl)}
        scheme = "rediss" if options else address.scheme
        return QueueStore.from_url(address._replace(scheme=scheme, query="").geturl(), **{**options, **self.settings})


def _tls_of(options: object) -> dict[str, Any]:
    """Returns the options for TLS as redis-py names their values. The other options are for Celery's own needs."""
    if not isinstance(options, Mapping):
        return {}
    names: dict[object, str] = {ssl.CERT_NONE: "none", ssl.CERT_OPTIONAL: "optional", ssl.CERT_REQUIRED: "required"}
    found: dict[str, Any] = {}
    for name, value in cast("Mapping[str, Any]", options).items():
        if name.startswith("ssl_"):
            text = value.removeprefix("CERT_").lower() if isinstance(value, str) else names.get(value, value)
            found[name] = text if name == "ssl_cert_reqs" else value
    return found


def _defer_soft_time_limit(**_: object) -> None:
    """Keeps soft time limits, which the prefork pool signals to its children, from interrupting calls to the store."""
    also_defer(getattr(signal, "SIGUSR1", None))  # Windows has none, and no soft time limits


on_process_start(_defer_soft_time_limit)

_stores: Final = TaskStores()


@overload
def configure(connect: str | Callable[[], Redis], **settings: Any) -> None: ...
@overload
def configure(*, store: StepRunStore) -> None: ...
def configure(
    connect: str | Callable[[], Redis] | None = None, *, store: StepRunStore | None = None, **settings: Any
) -> None:
    """Sets the server and the settings of the store, or the store. Call it in the module that defines the tasks.

    It opens no connection. Without this call, the store uses the URL in SQUIDSTEP_REDIS_URL; if that is not set, it
    uses the server of the broker, if the URL of the broker is redis:// or rediss://.

    Args:
        connect: a URL, or a function that returns a client. The function is called once in each process, after prefork
            has forked it. None: `store` is given.
        store: the store to use as it is, with its client and its listeners: in tests, or to observe its events. Forked
            processes use it, too. From now on, a soft time limit does not interrupt its calls. None: `connect` is
            given.
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
        InvalidArgumentError: neither `configure` nor SQUIDSTEP_REDIS_URL sets a server, and the broker of the
            application is not a Redis server.
    """
    return _stores.get(current_task())


def store_for(task: Task | None) -> StepRunStore:
    """Returns the store for the steps of a task.

    Args:
        task: the task whose application is used if no server is configured; None: the current application.
    """
    return _stores.get(task)
