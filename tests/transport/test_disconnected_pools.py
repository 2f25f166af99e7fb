"""Another thread disconnects the pool of a client, at any moment of a call. The call is retried."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from support.backends import Bench
from support.interruptions import at_line

from squidstep_redis import StepRunStore

from .conftest import HookedRedis

pytestmark = [pytest.mark.servers("valkey"), pytest.mark.parametrize("bench", ["blocking"], indirect=True)]

FILES = ("/squidstep_redis/transport/",)
OPTIONS: dict[str, Any] = {"socket_timeout": 5, "socket_connect_timeout": 5, "retry": Retry(NoBackoff(), 0)}


@pytest.fixture(params=["plain", "RESP3", "blocking pool", "health checks", "hooked"])
def client(request: pytest.FixtureRequest, bench: Bench) -> Iterator[redis.Redis]:
    options: dict[str, Any] = {**OPTIONS, "protocol": 3 if request.param == "RESP3" else 2}
    if request.param == "health checks":
        options["health_check_interval"] = 60
    kind = redis.BlockingConnectionPool if request.param == "blocking pool" else redis.ConnectionPool
    pool = kind.from_url(bench.backend.url, **options)
    with (HookedRedis if request.param == "hooked" else redis.Redis)(connection_pool=pool) as client:
        yield client


@pytest.mark.parametrize("is_idle", [False, True], ids=["connecting", "idle"])
def test_call_survives_a_disconnect_at_any_line(bench: Bench, client: redis.Redis, is_idle: bool) -> None:
    pool: Any = client.connection_pool
    store = StepRunStore(client, prefix=bench.prefix, timeout=10)

    def disconnect() -> None:
        other = threading.Thread(target=pool.disconnect)
        other.start()
        other.join(0.05)  # perhaps it waits for the lock of the pool

    line, was_disconnected = 0, True
    while was_disconnected:
        line += 1
        store.get_run("run") if is_idle else pool.disconnect()
        with at_line(line, FILES, disconnect) as is_done:
            store.get_run("run")
        was_disconnected = is_done()
    assert line > 50
