"""The only place where tests reach into a store: a change of its insides changes this file alone."""

from __future__ import annotations

import inspect
from collections import deque
from typing import Any

from squidstep_redis.protocol import codec
from squidstep_redis.transport import connection
from squidstep_redis.transport import retry as retry_module
from squidstep_redis.transport.retry import RetryPolicy


def retry_policy(store: Any) -> RetryPolicy:
    """Returns how long the store retries a call."""
    return store._transport.policy


def give_up_early(store: Any, timeout: float = 0.05) -> None:
    """Lets a store retry a call for `timeout` seconds only."""
    store._transport.policy = store._transport.policy._replace(timeout=timeout, last_send=0)


def can_bypass_client(store: Any) -> bool:
    """Returns whether the store sends on its client's connections, past `execute_command`."""
    return store._transport.connections.can_bypass_client()


def idle_connections(store: Any) -> int:
    """Returns how many connections the store keeps for its next calls."""
    return len(store._transport.connections._idle)


def replace_client(store: Any, client: Any) -> None:
    """Lets a store use another client, and call its `execute_command`."""
    transport = store._transport
    transport.client = client
    transport.connections = type(transport.connections)(client)


def lose_replies(store: Any, times: int) -> None:
    """Lets a store send each single call `times` times more, as after lost replies."""
    transport = store._transport
    bypasses = can_bypass_client(store)
    target, name = (transport.connections, "send") if bypasses else (transport.client, "execute_command")
    send = getattr(target, name)

    def sends(args: tuple[Any, ...]) -> int:
        is_batch = name == "send" and len(args) > 1
        return 1 if is_batch else times + 1

    def send_all(*args: Any, **options: Any) -> Any:
        return [send(*args, **options) for _ in range(sends(args))][-1]

    async def send_all_asyncio(*args: Any, **options: Any) -> Any:
        return [await send(*args, **options) for _ in range(sends(args))][-1]

    setattr(target, name, send_all_asyncio if inspect.iscoroutinefunction(send) else send_all)


def check_every_connection(monkeypatch: Any) -> None:
    """Lets stores check a kept connection before each use, however short it was idle."""
    monkeypatch.setattr(connection, "_FRESH_SECONDS", 0.0)


def shorten_pauses(monkeypatch: Any, longest: float) -> None:
    """Limits the pause between two tries of a call to `longest` seconds."""
    monkeypatch.setattr(retry_module, "_LAST_PAUSE", longest)


def end_retries(state: Any, timeout: float) -> None:
    """Gives a call under way another deadline."""
    state._retry_policy = RetryPolicy(timeout, 1, 0)


def idle_packers() -> deque[Any]:
    """Returns the packers of the default codec that wait for their next payload."""
    return codec._packers
