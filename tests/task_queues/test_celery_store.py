"""The store of a worker process: where it is, and whose settings it has."""

from __future__ import annotations

import os
import ssl
from typing import Any

import fakeredis
import pytest
from celery import Celery

from squidstep_redis import InvalidArgumentError, StepRunStore
from squidstep_redis.celery import configure, stores
from squidstep_redis.celery.stores import TaskStores

pytest_plugins = ["support.celery_fixtures"]


def app_with(**settings: Any) -> Any:
    app: Any = Celery("shop", set_as_current=False)
    app.conf.update(**settings)
    return app


def work() -> None: ...


def options_of(store: StepRunStore) -> dict[str, Any]:
    client: Any = store.client
    return dict(client.connection_pool.connection_kwargs)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> TaskStores:
    monkeypatch.delenv("SQUIDSTEP_REDIS_URL", raising=False)
    monkeypatch.setattr(stores, "_stores", stores.TaskStores())
    return stores._stores


def store_on_broker(**settings: Any) -> StepRunStore:
    """Returns the store of a task whose application has these settings."""
    task = app_with(**settings).task(work)
    return stores.store_for(task)


def test_store_is_on_the_broker(made: TaskStores) -> None:
    options = options_of(store_on_broker(broker_url="redis://ann:secret@example.net:6380/3?visibility_timeout=9"))
    assert {"host": "example.net", "port": 6380, "db": 3, "username": "ann", "password": "secret"}.items() <= (
        options.items()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"broker_url": "rediss://example.net/0?ssl_cert_reqs=CERT_NONE"},
        {"broker_url": "rediss://example.net/0", "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_NONE}},
        {"broker_url": "redis://example.net/0", "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_NONE}},
    ],
)
def test_store_uses_tls_as_the_broker_does(made: TaskStores, settings: dict[str, Any]) -> None:
    client: Any = store_on_broker(**settings).client
    assert "SSL" in client.connection_pool.connection_class.__name__
    assert client.connection_pool.connection_kwargs["ssl_cert_reqs"] == "none"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("amqp://example.net", "amqp://"),
        ("sentinel://example.net", "sentinel://"),
        ("redis+socket:///tmp/redis.sock", "redis\\+socket://"),
        ("redis://a.example.net;redis://b.example.net", "several servers"),
        (["redis://a.example.net", "redis://b.example.net"], "several servers"),
    ],
)
def test_other_brokers_are_rejected(made: TaskStores, url: Any, kind: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"the broker is {kind}.*configure"):
        store_on_broker(broker_url=url)


def test_tasks_of_one_broker_share_a_store(made: TaskStores) -> None:
    app = app_with(broker_url="redis://example.net/0")
    assert stores.store_for(app.task(work)) is stores.store_for(app.task(app_with))


def test_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUIDSTEP_REDIS_URL", "redis://example.net:6381/0")
    monkeypatch.setattr(stores, "_stores", stores.TaskStores())
    assert options_of(store_on_broker(broker_url="amqp://"))["port"] == 6381


def test_configured_function_is_called_once_in_each_process(made: TaskStores) -> None:
    clients: list[Any] = []

    def connect() -> Any:
        clients.append(fakeredis.FakeStrictRedis())
        return clients[-1]

    configure(connect, prefix="shop")
    assert stores.store() is stores.store_for(None)
    assert (len(clients), stores.store().calls.prefix) == (1, "shop")
    pid = os.fork()
    if pid == 0:
        stores.store()
        os._exit(0 if len(clients) == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_configured_store_is_used_as_it_is(made: TaskStores) -> None:
    store = StepRunStore(fakeredis.FakeStrictRedis())
    configure(store=store)
    assert stores.store() is store
    with pytest.raises(InvalidArgumentError, match="is used as it is"):
        configure(store=store, prefix="shop")
