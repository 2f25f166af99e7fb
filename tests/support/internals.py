"""Access to private attributes of stores and transports: a change of the internals affects only this file."""

from __future__ import annotations

import contextlib
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from squidstep_redis.protocol import codec
from squidstep_redis.transport import connection
from squidstep_redis.transport import retry as retry_module
from squidstep_redis.transport.retry import RetryPolicy


def retry_policy(store: Any) -> RetryPolicy:
    """Returns how long the store retries a call."""
    return store._transport.policy


def give_up_early(store: Any, timeout: float = 0.05) -> None:
    """Makes a store retry a call for `timeout` seconds, without a reserve for the last send."""
    store._transport.policy = store._transport.policy._replace(timeout=timeout, last_send=0)


def can_bypass_client(store: Any) -> bool:
    """Returns whether the store sends on its client's connections without calling `execute_command`."""
    return store._transport.connections.can_bypass_client()


def event_listeners(store: Any) -> list[Any]:
    """Returns the functions that receive the store's events."""
    return list(store._transport.events.listeners)


def idle_connections(store: Any) -> int:
    """Returns how many connections the store keeps for its next calls."""
    return len(store._transport.connections._idle)


def replace_client(store: Any, client: Any) -> None:
    """Makes a store use another client."""
    transport = store._transport
    transport.client = client
    transport.connections = type(transport.connections)(client)


def lose_replies(store: Any, times: int) -> None:
    """Makes a store send each single call `times` more times, as after lost replies."""
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
    """Makes stores check an idle connection before each use, however short it was idle."""
    monkeypatch.setattr(connection, "_FRESH_SECONDS", 0.0)


def shorten_pauses(monkeypatch: Any, longest: float) -> None:
    """Limits the pause between two sends of a call to `longest` seconds."""
    monkeypatch.setattr(retry_module, "_LAST_PAUSE", longest)


def end_retries(state: Any, timeout: float) -> None:
    """Replaces the deadline of a call in progress."""
    state._retry_policy = RetryPolicy(timeout, 1, 0)


def idle_packers() -> deque[Any]:
    """Returns the idle packers of the default codec."""
    return codec._packers


class ScriptedConnections:
    """Connections without a server: a function decides what each send returns or raises.

    Attributes:
        sends: the number of sends so far.
    """

    def __init__(self, is_asyncio: bool, reply: Callable[[int], Any]) -> None:
        """`reply` gets the number of the send, from 0. It returns the reply to each call of that send, or raises."""
        self.sends = 0
        self.send = self._send_asyncio if is_asyncio else self._send
        self._reply = reply

    def replace_connections_of(self, store: Any) -> None:
        """Makes a store send on these connections."""
        store._transport.connections = self

    def can_bypass_client(self) -> bool:
        return True

    def _send(self, *commands: Any, read: Callable[[int, Any], Any] | None = None) -> list[Any]:
        self.sends += 1
        reply = self._reply(self.sends - 1)
        return [reply if read is None else read(index, reply) for index in range(len(commands))]

    async def _send_asyncio(self, *commands: Any, read: Callable[[int, Any], Any] | None = None) -> list[Any]:
        return self._send(*commands, read=read)


@contextlib.contextmanager
def transport_clock(clock: Any) -> Iterator[None]:
    """In the block, transports use this clock: an object with `monotonic()` and `sleep(seconds)`."""
    names = ("blocking", "aio", "retry")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(f"squidstep_redis.transport.{name}.time", clock))
        yield


def plain_store(store: Any) -> Any:
    """Returns the store itself, without the wrapper that runs an asyncio store."""
    return vars(store).get("store", store)
