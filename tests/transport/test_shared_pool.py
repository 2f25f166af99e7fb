"""A store on the user's client shares its pool: the user's own commands work as before."""

from __future__ import annotations

import time

import pytest
import redis
from support.backends import Bench

from squidstep_redis import StepRunStore

pytestmark = pytest.mark.servers("valkey", "redis-7", "redis-6")


@pytest.fixture(params=[redis.ConnectionPool, redis.BlockingConnectionPool])
def client(request: pytest.FixtureRequest, bench: Bench) -> redis.Redis:
    """Has a single connection, which waits 0.3 seconds for a reply."""
    pool = request.param.from_url(bench.backend.url, max_connections=1, socket_timeout=0.3)
    return redis.Redis(connection_pool=pool)


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
def test_command_on_a_connection_that_a_store_opened_has_the_whole_timeout(bench: Bench, client: redis.Redis) -> None:
    with client:
        StepRunStore(client, prefix=bench.prefix).begin_step("run", "pay", {})
        time.sleep(0.3)

        assert client.blpop([f"{bench.prefix}-empty"], timeout=0.1) is None


@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
def test_store_reconnects_a_connection_that_the_server_closed(bench: Bench, client: redis.Redis) -> None:
    with client:
        store = StepRunStore(client, prefix=bench.prefix)
        store.begin_step("run", "pay", {})
        bench.backend.raw.client_kill_filter(_id=str(client.client_id()))

        assert store.step_statuses("run") == {"pay": "running"}
