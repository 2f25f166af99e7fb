"""A store's `repr` names its server and prefix, and never shows a password."""

from __future__ import annotations

from typing import Any

import pytest
import redis
import redis.asyncio
from redis.sentinel import Sentinel

from squidstep_redis import AsyncStepRunStore, StepRunStore


@pytest.mark.parametrize(
    ("client", "server"),
    [
        (redis.Redis(host="h", port=1, password="hidden"), "h:1, database 0"),
        (redis.Redis.from_url("redis://hidden:hidden@h/3"), "h:6379, database 3"),
        (redis.Redis.from_url("unix:///run/redis.sock?password=hidden"), "/run/redis.sock, database 0"),
        (Sentinel([("h", 1)]).master_for("primary", password="hidden"), "service primary, database 0"),
        (redis.asyncio.Redis.from_url("redis://hidden:hidden@h/3"), "h:6379, database 3"),
    ],
    ids=["options", "URL", "unix socket", "Sentinel", "asyncio"],
)
def test_repr_shows_the_server_and_no_password(client: Any, server: str) -> None:
    kind: Any = AsyncStepRunStore if isinstance(client, redis.asyncio.Redis) else StepRunStore
    assert repr(kind(client, prefix="p")) == f"{kind.__name__}({server}, prefix='p')"
