"""The asyncio transport: performs the actions of drivers and the effects of workflows."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from copy import copy
from logging import INFO
from typing import Any, TypeVar

from redis.exceptions import ConnectionError

from squidstep_redis.protocol.call import Call, Command
from squidstep_redis.protocol.workflow import BlockOnStream, Broadcast, Send, SendBatch, Sleep, Workflow
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport import driver
from squidstep_redis.transport.aio_cluster import ClusterConnections, HookedCluster
from squidstep_redis.transport.aio_connection import AsyncConnections, OwnConnections
from squidstep_redis.transport.aio_hooked import HookedClient
from squidstep_redis.transport.aio_pool import PooledConnections
from squidstep_redis.transport.base import BaseTransport, as_it_is
from squidstep_redis.transport.broadcast import broadcast
from squidstep_redis.transport.client import has_plain_stream
from squidstep_redis.transport.driver import (
    Driver,
    Execute,
    OtherAction,
    Pause,
    Redirect,
    Refresh,
    RoundTrip,
    Route,
    Servers,
)
from squidstep_redis.transport.retry import FAILURES, RoundTripError

T = TypeVar("T")


class AsyncTransport(BaseTransport[AsyncConnections]):
    """Sends calls with asyncio."""

    def send(self, call: Call[T]) -> Coroutine[Any, Any, T]:
        """Sends one call, with retries; returns its result or raises its error."""
        events = self.events
        if events.listeners or events.is_logged(INFO):
            return self._send_and_emit(call)
        return self._run(driver.send(call, self.timeout, self.durability))

    async def _send_and_emit(self, call: Call[T]) -> T:
        events = self.events
        began = time.monotonic()
        try:
            result = await self._run(driver.send(call, self.timeout, self.durability))
        except Exception as error:
            events.emit(call, error, time.monotonic() - began)
            raise
        events.emit(call, result, time.monotonic() - began)
        return result

    async def send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """Sends calls together, with retries; returns for each its result or its error."""
        events = self.events
        if not (events.listeners or events.is_logged(INFO)):
            return await self._run(driver.send_batch(calls, self.timeout, self.durability))
        began = time.monotonic()
        try:
            results = await self._run(driver.send_batch(calls, self.timeout, self.durability))
        except Exception as error:
            events.emit_all(calls, [error] * len(calls), time.monotonic() - began)
            raise
        events.emit_all(calls, results, time.monotonic() - began)
        return results

    def close(self) -> None:
        """Closes the connections that the transport opened."""
        self._direct.close()

    @property
    def is_pool_exhausted(self) -> bool:
        """Whether a call would have to wait for a connection of the client's pool."""
        return self._connections().is_exhausted

    def beside_pool(self) -> AsyncTransport:
        """Returns a transport with its own connections, which an exhausted pool does not delay; its user closes it.

        It returns this transport itself if the client's calls are hooked, if its connections are not redis-py's, or for
        a cluster, whose connections belong to no pool.
        """
        if (
            self.is_cluster
            or self.hooks.are_present()
            or not has_plain_stream(self.client.connection_pool.connection_class)
        ):
            return self
        other = copy(self)
        other._direct = other._own()
        return other

    async def broadcast(self, commands: Sequence[Command], operation: str) -> dict[str, list[Any]]:
        """Sends commands to every server, with retries; returns their replies or errors by server."""
        return await self._run(broadcast(commands, operation, self.timeout))

    async def block_on_stream(self, effect: BlockOnStream) -> bool:
        """Blocks until the stream grows, at most for half of the client's timeout. Returns whether it got a reply."""
        deadline = time.monotonic() + effect.seconds
        try:
            node = await self._connections().node_of(effect.stream, deadline)
            (reply,) = await node.send([effect.command(self.longest_read / 2)], as_it_is, deadline, blocks=True)
            has_reply = True
        except FAILURES as error:
            reply, has_reply = error, False
        if isinstance(reply, Exception):  # the server may have refused at once; the next poll shows the state
            await asyncio.sleep(max(0.0, min(deadline - time.monotonic(), 0.1)))
        return has_reply

    def _hooked_client(self) -> AsyncConnections:
        return HookedCluster(self.client) if self.is_cluster else HookedClient(self.client)

    def _pooled(self) -> AsyncConnections:
        return ClusterConnections(self.client) if self.is_cluster else PooledConnections(self.client)

    def _own(self) -> AsyncConnections:
        return OwnConnections(self.client)

    async def _run(self, steps: Driver[T]) -> T:
        """Performs the actions of a driver; returns what it returns."""
        deadline = time.monotonic() + self.timeout
        try:
            action = next(steps)
            while True:
                try:
                    if isinstance(action, Execute):
                        outcome = await self._connections().execute(action.command, action.call, deadline)
                    else:
                        outcome = await self._perform(action, deadline)
                except FAILURES as error:
                    action = steps.throw(error)
                else:
                    action = steps.send(outcome)
        except StopIteration as end:
            return end.value

    async def _perform(self, action: OtherAction, deadline: float) -> Any:
        """Performs an action other than Execute."""
        if isinstance(action, RoundTrip):
            return await action.node.send(action.commands, action.read, deadline, blocks=action.blocks)
        if isinstance(action, Route):
            return await self._connections().route(action.calls, deadline)
        if isinstance(action, Servers):
            return await self._connections().servers(deadline)
        if isinstance(action, Pause):
            return await asyncio.sleep(action.seconds)
        if isinstance(action, Redirect):
            return await self._connections().redirect(action.error)
        if isinstance(action, Refresh):
            return await self._connections().refresh(action.since, deadline)
        sent = (
            each.node.send(each.commands, each.read, deadline, blocks=each.blocks) for each in action.round_trips
        )  # RoundTrips
        return [_outcome(result) for result in await asyncio.gather(*sent, return_exceptions=True)]


def _outcome(result: Any) -> Any:
    """Returns the result of one of several round trips, or its error."""
    if isinstance(result, asyncio.CancelledError):  # something has cancelled its task, but not the caller's
        return RoundTripError(ConnectionError("The round trip was interrupted."), sent=True)
    if isinstance(result, BaseException) and not isinstance(result, RoundTripError):
        raise result
    return result


async def run_workflow(transport: AsyncTransport, workflow: Workflow[T]) -> T:
    """Performs the effects of a workflow; returns what it returns."""
    try:
        effect = next(workflow)
        while True:
            outcome: Any = None
            try:
                match effect:
                    case Send(call, seconds):
                        outcome = await (transport if seconds is None else transport.limited(seconds)).send(call)
                    case SendBatch(calls):
                        outcome = await transport.send_batch(calls)
                    case Sleep():
                        await asyncio.sleep(effect.seconds)
                    case BlockOnStream():
                        outcome = await transport.block_on_stream(effect)
                    case Broadcast(commands, operation, seconds):
                        limited = transport if seconds is None else transport.limited(seconds)
                        outcome = await limited.broadcast(commands, operation)
            except Exception as error:  # noqa: BLE001 -- the workflow decides which errors it handles
                effect = workflow.throw(error)
            else:
                effect = workflow.send(outcome)
    except StopIteration as end:
        return end.value
