"""Clients: the options that work, and the clients that are rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from support.backends import Bench, Driven
from support.operations import (
    CALLS,
    PAYLOAD,
    WORKFLOWS,
    finish,
    perform,
    prepare,
    seen,
    state,
)
from support.records import begun
from support.servers import find_binary

from squidstep_redis import (
    AsyncStepRunStore,
    StepRunStore,
    UnsupportedClientError,
)
from squidstep_redis.embedded import EmbeddedServer

pytestmark = [
    pytest.mark.servers("valkey", "redis-7", "redis-6"),
    # redis-py 6.0 to 6.2 warns about how it makes a cluster's pipeline itself.
    pytest.mark.filterwarnings("ignore:.*cluster_error_retry_attempts:DeprecationWarning"),
]


@pytest.mark.servers("valkey", "redis-7", "redis-6", "cluster")
class TestClientOptions:
    @pytest.mark.parametrize(
        "options",
        [
            # A cluster has its own client, but the same replies: one combination shows that.
            {"protocol": 3, "decode_responses": True},
            pytest.param(
                {"encoding": "ascii", "encoding_errors": "ignore", "decode_responses": True},
                marks=pytest.mark.not_on("cluster"),
            ),
        ],
        ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
    )
    def test_every_operation_works_with_each_client_option(
        self, request: pytest.FixtureRequest, bench: Bench, twin: StepRunStore, options: dict[str, Any]
    ) -> None:
        if bench.backend.name == "cluster":
            store = bench.store(client_options=options)
        else:
            store = request.getfixturevalue("connect")(**options)  # TCP: redis-py 7 has no RESP3 over a unix socket

        for operation in [*WORKFLOWS, *CALLS]:
            expected = perform(twin, operation, prepare(bench, twin, operation))
            assert seen(perform(store, operation, prepare(bench, store, operation))) == seen(expected)
            assert state(store, operation) == state(twin, operation)

    @pytest.mark.servers("valkey", "redis-7", "redis-6")
    def test_each_database_has_its_own_runs(self, bench: Bench, connect: Callable[..., StepRunStore]) -> None:
        store = connect(db=3)

        store.complete_step(begun(store.begin_step("run", "pay", PAYLOAD)), PAYLOAD)

        assert store.completed_outputs("run") == [PAYLOAD]
        assert connect(db=2).get_run("run") == []
        assert bench.dump() == {}

    @pytest.mark.servers("valkey", "redis-7", "redis-6")
    def test_from_url_accepts_the_options_of_redis_py(self, connect: Callable[..., StepRunStore]) -> None:
        store = connect(decode_responses=True, protocol=3, socket_timeout=1, client_name="worker")

        assert begun(store.begin_step("run", "pay", PAYLOAD)).input == PAYLOAD
        assert store.batch([store.calls.get_step_run("run", "pay")])[0] is not None


class TestClients:
    """A store rejects clients with which it cannot keep its guarantees."""

    @pytest.fixture
    def client(self, bench: Bench) -> Any:
        return bench.store().client

    @pytest.fixture
    def make(self, bench: Bench) -> Callable[[Any], object]:
        return StepRunStore if bench.runner is None else AsyncStepRunStore

    def test_a_single_connection_client_is_rejected(self, bench: Bench, make: Callable[[Any], object]) -> None:
        connect = bench.backend.connect if bench.runner is None else bench.backend.connect_asyncio
        client = connect(single_connection_client=True)

        with pytest.raises(UnsupportedClientError, match="has a single connection.*use a pooled client"):
            make(client)
        finish(bench, client.close() if bench.runner is None else client.aclose())

    def test_a_single_connection_client_of_another_is_rejected(
        self, bench: Bench, client: Any, make: Callable[[Any], object]
    ) -> None:
        single = client.client()

        with pytest.raises(UnsupportedClientError, match="has a single connection.*use a pooled client"):
            make(single)
        finish(bench, single.close() if bench.runner is None else single.aclose())

    @pytest.mark.parametrize("transaction", [True, False])
    def test_a_pipeline_is_rejected(self, client: Any, make: Callable[[Any], object], transaction: bool) -> None:
        with pytest.raises(UnsupportedClientError, match="client: must be a redis"):
            make(client.pipeline(transaction=transaction))

    @pytest.mark.parametrize("client", ["redis://localhost", None, 6379, redis.ConnectionPool, redis.Redis])
    def test_value_that_is_not_a_client_is_rejected(self, make: Callable[[Any], object], client: object) -> None:
        with pytest.raises(UnsupportedClientError, match="client: must be a redis"):
            make(client)

    @pytest.mark.servers("valkey", "cluster")
    def test_a_client_of_the_other_flavor_is_rejected(self, bench: Bench, make: Callable[[Any], object]) -> None:
        wrong = bench.backend.connect_asyncio if bench.runner is None else bench.backend.connect
        client = wrong()

        with pytest.raises(UnsupportedClientError, match="client: must be a redis"):
            make(client)
        if bench.runner is not None:
            client.close()

    @pytest.mark.servers("cluster")
    def test_a_pipeline_of_a_cluster_is_rejected(self, client: Any, make: Callable[[Any], object]) -> None:
        with pytest.raises(UnsupportedClientError, match="client: must be a redis"):
            make(client.pipeline())

    def test_a_pool_of_one_connection_is_enough(self, bench: Bench) -> None:
        store = bench.store(client_options={"max_connections": 1})

        assert store.complete_step(begun(store.begin_step("run", "pay", PAYLOAD)), {}).input == PAYLOAD


@pytest.mark.servers("valkey")
def test_a_client_from_sentinel_works(bench: Bench, tmp_path: Path) -> None:
    binary = find_binary(bench.backend.name)
    config, launcher = tmp_path / "sentinel.conf", tmp_path / "sentinel"
    config.touch()
    launcher.write_text(f'#!/bin/sh\nexec "{binary}" "{config}" --sentinel "$@"\n')
    launcher.chmod(0o700)
    with EmbeddedServer(port=0, binary=binary) as primary, EmbeddedServer(port=0, binary=launcher) as sentinel:
        with redis.Redis.from_url(sentinel.url) as client:
            client.execute_command("SENTINEL MONITOR", "main", primary.host, primary.port, 1)
        addresses = [(sentinel.host, sentinel.port)]
        if bench.runner is None:
            found: Any = redis.sentinel.Sentinel(addresses)
            store = StepRunStore(found.master_for("main"))
        else:
            found = redis.asyncio.sentinel.Sentinel(addresses)
            store = cast("StepRunStore", Driven(AsyncStepRunStore(found.master_for("main")), bench.runner))

        step_run = begun(store.begin_step("run", "pay", PAYLOAD, lease=60))
        assert store.complete_step(step_run, PAYLOAD).output == PAYLOAD
        assert store.batch([store.calls.completed_outputs("run")]) == [[PAYLOAD]]
        pipeline = store.client.pipeline()
        began = store.queue(pipeline, store.calls.begin_step("run", "mail", PAYLOAD))
        assert begun(began.result(finish(bench, pipeline.execute()))).input == PAYLOAD

        for client in (store.client, *found.sentinels):
            finish(bench, client.close() if bench.runner is None else client.aclose())
