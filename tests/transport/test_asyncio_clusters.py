"""The connections of an asyncio client of a cluster: what is known if one cannot be set up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import redis
import redis.asyncio
from redis.credentials import CredentialProvider
from support.backends import Bench

from squidstep_redis import AsyncStepRunStore, NotSentError

pytestmark = [
    pytest.mark.servers("cluster"),
    pytest.mark.parametrize("bench", ["asyncio"], indirect=True),
]

RUNS = [f"run-{number}" for number in range(12)]  # on all nodes


class HookedCluster(redis.asyncio.RedisCluster):
    async def execute_command(self, *args: Any, **options: Any) -> Any:
        return await super().execute_command(*args, **options)


class Credentials(CredentialProvider):
    """Fails at one request, or from then on; otherwise returns the credentials of a user."""

    fails_from_then_on = False

    def __init__(self, user: str, failing: int) -> None:
        self.user = user
        self.failing = failing
        self.requests = 0

    def get_credentials(self) -> tuple[str, str]:
        self.requests += 1
        if self.requests == self.failing or (self.fails_from_then_on and self.requests > self.failing):
            raise RuntimeError("the token server is away")
        return self.user, "secret"

    async def get_credentials_async(self) -> tuple[str, str]:
        return self.get_credentials()


@pytest.fixture
def user(bench: Bench) -> Iterator[str]:
    cluster: Any = bench.backend.raw
    cluster.execute_command("ACL SETUSER", bench.prefix, "on", ">secret", "+@all", "~*", "&*", target_nodes="primaries")
    yield bench.prefix
    cluster.execute_command("ACL DELUSER", bench.prefix, target_nodes="primaries")


@pytest.mark.parametrize("kind", [redis.asyncio.RedisCluster, HookedCluster])
def test_failing_provider_leaves_no_connection_without_credentials(bench: Bench, user: str, kind: Any) -> None:
    async def has_failed(failing: int) -> bool:
        credentials = Credentials(user, failing)
        client: Any = kind.from_url(bench.backend.url, credential_provider=credentials, protocol=2)
        store = AsyncStepRunStore(client, prefix=bench.prefix, timeout=20)
        assert [await store.get_run(run) for run in RUNS] == [[]] * len(RUNS)
        requests, credentials.failing = credentials.requests, 0
        whoami = [await node.execute_command("ACL WHOAMI") for node in client.get_primaries()]
        assert {name.decode() if isinstance(name, bytes) else name for name in whoami} == {user}, failing
        await client.aclose()
        return requests >= failing

    async def main() -> None:
        failing = 1
        while await has_failed(failing):
            failing += 1
        assert failing > 3

    assert bench.runner is not None
    bench.runner.run(main())


@pytest.mark.parametrize("kind", [redis.asyncio.RedisCluster, HookedCluster])
def test_text_of_a_failing_provider_is_not_shown(bench: Bench, user: str, kind: Any) -> None:
    async def main() -> None:
        credentials = Credentials(user, 0)
        client: Any = kind.from_url(bench.backend.url, credential_provider=credentials, protocol=2)
        await client.initialize()
        for node in client.get_primaries():
            await node.disconnect()
        credentials.fails_from_then_on = True
        store = AsyncStepRunStore(client, prefix=bench.prefix, timeout=0.05)
        for run in RUNS:
            with pytest.raises(NotSentError, match="RuntimeError") as caught:
                await store.get_run(run)
            assert "token server" not in str(caught.value)
        await client.aclose()

    assert bench.runner is not None
    bench.runner.run(main())


def test_hooked_call_to_a_node_that_is_down_is_not_sent(bench: Bench) -> None:
    """redis-py packs a command before it connects to the node."""

    async def main() -> None:
        async with HookedCluster.from_url(str(bench.backend.url), protocol=2) as client:
            await client.initialize()
            store = AsyncStepRunStore(client, prefix=bench.prefix, timeout=0.05)
            nodes: Any = client.nodes_manager
            bound.bind(("127.0.0.1", 0))
            for node in nodes.nodes_cache.values():
                node.connection_kwargs["port"] = bound.getsockname()[1]
                await node.disconnect()
            away = redis.ConnectionError("away")
            with mock.patch.object(type(nodes), "initialize", side_effect=away), pytest.raises(NotSentError):
                await asyncio.wait_for(store.get_run("run"), 30)

    assert bench.runner is not None
    with socket.socket() as bound:
        bench.runner.run(main())
