"""Access to private attributes of stores and transports: a change of the internals affects only this file."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

from redis.exceptions import RedisError

from squidstep_redis.protocol import codec
from squidstep_redis.transport import connection
from squidstep_redis.transport import retry as retry_module
from squidstep_redis.transport.aio_connection import AsyncConnections
from squidstep_redis.transport.base import as_it_is
from squidstep_redis.transport.client import ClientHooks
from squidstep_redis.transport.connection import Connections
from squidstep_redis.transport.driver import Execute, RoundTrip, RoundTrips
from squidstep_redis.transport.retry import RoundTripError

S = TypeVar("S")


def call_timeout(store: Any) -> float:
    """Returns for how many seconds the store retries a call."""
    return store._transport.timeout


def retry_for(store: Any, seconds: float) -> None:
    """Makes a store retry its next calls for so many seconds."""
    store._transport.timeout = seconds


def give_up_early(store: Any, timeout: float = 0.05) -> None:
    """Makes a store retry a call for `timeout` seconds, without a reserve for the last send."""
    retry_for(store, timeout)


def can_bypass_client(store: Any) -> bool:
    """Returns whether the store sends on its client's connections without calling `execute_command`."""
    return not store._transport.hooks.are_present()


def event_listeners(store: Any) -> list[Any]:
    """Returns the functions that receive the store's events."""
    return list(store._transport.events.listeners)


def idle_connections(store: Any) -> int:
    """Returns how many connections the store keeps open for its next calls."""
    own = store._transport._direct
    if hasattr(own, "_nodes"):  # a blocking store on a cluster
        return sum(len(node._idle) for node in own._nodes.values() if hasattr(node, "_idle"))
    if hasattr(own, "_idle"):
        return len(own._idle)
    links = [link for loop in own._by_loop.values() for link in (loop.shared, *loop.idle)]
    return sum(link is not None and link.is_open for link in links)


def shared_socket(store: Any) -> Any:
    """Returns the socket of the connection that the running event loop's tasks share on an asyncio store."""
    return store._transport._direct._by_loop[asyncio.get_running_loop()].shared._transport.get_extra_info("socket")


def close_idle_connections(store: Any) -> None:
    """Closes the connections that the store keeps; for an asyncio store, within its event loop."""
    store._transport.close()


def node_connections(store: Any, key: bytes | None) -> Any:
    """Returns the connections of a blocking store on a cluster to the node of a key; None: to all nodes."""
    connections = store._transport._connections()
    return connections if key is None else connections.node_of(key)


def learn_slots(store: Any) -> bool:
    """Lets a store on a cluster ask the nodes for the slots; returns whether it has learned them."""
    connections, began = store._transport._connections(), time.monotonic()
    connections.refresh(began, began + 20)
    return connections._topology.refreshed_at > began


def replace_client(store: Any, client: Any) -> None:
    """Lets a store use another client, and call its `execute_command`."""
    transport = store._transport
    transport.client = client
    transport.hooks = ClientHooks(client)
    transport._hooked = transport._hooked_client()
    if not transport.hooks.are_present():
        transport._direct = transport._pooled()


def lose_replies(store: Any, times: int) -> None:
    """Lets a store send each single call `times` times more, as after lost replies."""
    connections = store._transport._connections()
    send = connections.send

    def sends(commands: tuple[Any, ...]) -> int:
        return 1 if len(commands) > 1 else times + 1

    def send_all(commands: Any, read: Any, *args: Any, **options: Any) -> Any:
        for _ in range(sends(commands) - 1):
            send(commands, as_it_is, *args, **options)
        return send(commands, read, *args, **options)

    async def send_all_asyncio(commands: Any, read: Any, *args: Any, **options: Any) -> Any:
        for _ in range(sends(commands) - 1):
            await send(commands, as_it_is, *args, **options)
        return await send(commands, read, *args, **options)

    is_asyncio = inspect.iscoroutinefunction(send)
    connections.send = send_all_asyncio if is_asyncio else send_all
    kind: Any = AsyncConnections if is_asyncio else Connections
    connections.execute = functools.partial(kind.execute, connections)  # through `send`


def check_every_connection(monkeypatch: Any) -> None:
    """Makes stores check an idle connection before each use, however short it was idle."""
    monkeypatch.setattr(connection, "_FRESH_SECONDS", 0.0)


def shorten_pauses(monkeypatch: Any, longest: float) -> None:
    """Limits the pause between two sends of a call to `longest` seconds."""
    monkeypatch.setattr(retry_module, "_LAST_PAUSE", longest)


def end_retries(state: Any, timeout: float) -> None:
    """Replaces the deadline of a call in progress."""
    state._timeout = timeout


def counting(kind: type[S], count: Callable[[], None]) -> type[S]:
    """Returns a kind of store that calls `count` whenever it sends a call or a batch, also if it sends it again."""
    base: Any = kind

    class Transport(base._transport_type):
        def _run(self, steps: Any) -> Any:
            return super()._run(_counted(steps, count))

    return type(kind.__name__, (kind,), {"_transport_type": Transport})


def _counted(steps: Any, count: Callable[[], None]) -> Any:
    """Passes on the actions of a driver, and counts those that send something."""
    try:
        action = next(steps)
        while True:
            if isinstance(action, (Execute, RoundTrip, RoundTrips)):
                count()
            try:
                outcome = yield action
            except Exception as error:
                action = steps.throw(error)
            else:
                action = steps.send(outcome)
    except StopIteration as end:
        return end.value


def log_calls(store: Any, logged: Callable[[Any], Any]) -> None:
    """Lets everything that an asyncio store sends, also in the background, pass through a context manager.

    Args:
        store: the store.
        logged: returns a context manager, given the calls; the results are added to the list that it yields.
    """
    kind = type(store._transport)

    class Transport(kind):
        async def send(self, call: Any) -> Any:
            with logged([call]) as results:
                results.append(await super().send(call))
                return results[0]

        async def send_batch(self, calls: Any) -> Any:
            with logged(calls) as results:
                results.extend(await super().send_batch(calls))
                return results

    store._transport.__class__ = Transport


def idle_packers() -> deque[Any]:
    """Returns the idle packers of the default codec."""
    return codec._packers


class ScriptedConnections:
    """Connections without a server: a function decides what each send returns or raises.

    Attributes:
        sends: the number of sends so far.
    """

    is_exhausted = False
    loaded: frozenset[bytes] = frozenset()

    def __init__(self, is_asyncio: bool, reply: Callable[[int], Any]) -> None:
        """`reply` gets the number of the send, from 0. It returns the reply to each call of that send, or raises."""
        self.sends = 0
        self.send = self._send_asyncio if is_asyncio else self._send
        self._reply = reply
        # One server, as with any client that is no cluster's.
        kind: Any = AsyncConnections if is_asyncio else Connections
        for name in ("execute", "route", "redirect", "refresh"):
            setattr(self, name, functools.partial(getattr(kind, name), self))

    def replace_connections_of(self, store: Any) -> None:
        """Lets a store send on these connections."""
        store._transport._direct = store._transport._hooked = self

    def _send(self, commands: Any, read: Callable[[int, Any], Any], *args: Any, **options: Any) -> list[Any]:
        self.sends += 1
        try:
            reply = self._reply(self.sends - 1)
        except RedisError as error:
            raise RoundTripError(error, sent=True) from error
        return [read(index, reply) for index in range(len(commands))]

    async def _send_asyncio(
        self, commands: Any, read: Callable[[int, Any], Any], *args: Any, **options: Any
    ) -> list[Any]:
        return self._send(commands, read)


@contextlib.contextmanager
def transport_clock(clock: Any) -> Iterator[None]:
    """In the block, transports use this clock: an object with `monotonic()` and `sleep(seconds)`."""
    names = ("blocking", "driver", "retry")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch(f"squidstep_redis.transport.{name}.time", clock))
        yield


def plain_store(store: Any) -> Any:
    """Returns the store itself, without the wrapper that runs an asyncio store."""
    return vars(store).get("store", store)


def run_workflow(store: Any, workflow: Any) -> Any:
    """Runs a workflow of the operations, whose only effects are batches."""
    try:
        effect = next(workflow)
        while True:
            effect = workflow.send(store.batch(effect.calls))
    except StopIteration as end:
        return end.value
