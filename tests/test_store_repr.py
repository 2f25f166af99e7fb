"""A store's `repr` names its server and prefix. No `repr` and no message shows a password."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.sentinel import Sentinel

from squidstep_redis import AsyncStepRunStore, InvalidArgumentError, StepRunStore, UnsupportedClientError


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


@pytest.mark.parametrize("kind", [StepRunStore, AsyncStepRunStore])
@pytest.mark.parametrize(
    ("client", "found"),
    [("redis://:hidden@h/0", "str; a URL is for from_url"), (Sentinel([("h", 1)], password="hidden"), "Sentinel")],
    ids=["URL", "Sentinel"],
)
def test_rejected_client_is_named_without_its_password(kind: Any, client: Any, found: str) -> None:
    with pytest.raises(UnsupportedClientError) as caught:
        kind(client)
    assert str(caught.value).endswith(found)
    assert "hidden" not in repr(caught.value)


@pytest.mark.parametrize("kind", [StepRunStore, AsyncStepRunStore])
@pytest.mark.parametrize(
    "url", ["redis://:hid#den@h/0", "redis://:hid/den@h/0", "redis://:hid?den@h/0", "h:6379", "http://:hidden@h", None]
)
def test_rejected_url_is_not_quoted(kind: Any, url: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="url: must be redis://") as caught:
        kind.from_url(url)
    assert "hid" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("kind", [StepRunStore, AsyncStepRunStore])
@pytest.mark.parametrize(
    ("url", "options", "problem"),
    [
        ("rediss://h?ssl_cert_reqs=banana", {}, "url: redis-py rejects an option: .*banana"),
        ("rediss://h", {"ssl_cert_reqs": "banana"}, "options: redis-py rejects an option: .*banana"),
        ("rediss://:a?ssl_cert_reqs=secret@h", {}, "url: must be redis://[^ ]* "),
    ],
)
def test_option_that_redis_py_rejects_is_named(kind: Any, url: str, options: Any, problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=problem) as caught:
        kind.from_url(url, **options)
    assert "secret" not in "".join(traceback.format_exception(caught.value))
