"""The blocking transport: performs the actions of drivers and the effects of workflows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from logging import INFO
from typing import Any, TypeVar

from squidstep_redis.protocol.call import Call, Command
from squidstep_redis.protocol.workflow import BlockOnStream, Broadcast, Send, SendBatch, Sleep, Workflow
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport import driver
from squidstep_redis.transport.base import BaseTransport, as_it_is
from squidstep_redis.transport.broadcast import broadcast
from squidstep_redis.transport.cluster import ClusterConnections, HookedCluster
from squidstep_redis.transport.connection import (
    Connections,
    Halves,
    HookedClient,
    OwnConnections,
    PooledConnections,
    second_half,
)
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
from squidstep_redis.transport.helper import Helper
from squidstep_redis.transport.retry import FAILURES, RoundTripError

T = TypeVar("T")


class BlockingTransport(BaseTransport[Connections]):
    """Sends calls and blocks until the reply arrives."""

    def send(self, call: Call[T]) -> T:
        """Sends one call, with retries; returns its result or raises its error."""
        events = self.events
        if not (events.listeners or events.is_logged(INFO)):
            return self._run(driver.send(call, self.timeout, self.durability))
        began = time.monotonic()
        try:
            result = self._run(driver.send(call, self.timeout, self.durability))
        except Exception as error:
            events.emit(call, error, time.monotonic() - began)
            raise
        events.emit(call, result, time.monotonic() - began)
        return result

    def send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """Sends calls together, with retries; returns for each its result or its error."""
        events = self.events
        if not (events.listeners or events.is_logged(INFO)):
            return self._run(driver.send_batch(calls, self.timeout, self.durability))
        began = time.monotonic()
        try:
            results = self._run(driver.send_batch(calls, self.timeout, self.durability))
        except Exception as error:
            events.emit_all(calls, [error] * len(calls), time.monotonic() - began)
            raise
        events.emit_all(calls, results, time.monotonic() - began)
        return results

    def close(self) -> None:
        """Closes the connections that the transport opened."""
        self._direct.close()
        self._hooked.close()  # a cluster's, for batches

    def server_of(self, call: Call[Any]) -> Connections | None:
        """Returns the connections to the server of a call, the same for all its calls; None if no node serves it."""
        try:
            return self._connections().node_of(call.keys[0])
        except FAILURES:
            return None

    def broadcast(self, commands: Sequence[Command], operation: str) -> dict[str, list[Any]]:
        """Sends commands to every server, with retries; returns their replies or errors by server."""
        return self._run(broadcast(commands, operation, self.timeout))

    def block_on_stream(self, effect: BlockOnStream) -> bool:
        """Blocks until the stream grows, at most for half of the client's timeout. Returns whether it got a reply."""
        deadline = time.monotonic() + effect.seconds
        try:
            node = self._connections().node_of(effect.stream)
            (reply,) = node.send([effect.command(self.longest_read / 2)], as_it_is, deadline)
            has_reply = True
        except FAILURES as error:
            reply, has_reply = error, False
        if isinstance(reply, Exception):  # the server may have refused at once; the next poll shows the state
            time.sleep(max(0.0, min(deadline - time.monotonic(), 0.1)))
        return has_reply

    def _hooked_client(self) -> Connections:
        return HookedCluster(self.client) if self.is_cluster else HookedClient(self.client)

    def _pooled(self) -> Connections:
        return ClusterConnections(self.client) if self.is_cluster else PooledConnections(self.client.connection_pool)

    def _own(self) -> Connections:
        return OwnConnections(self.client)

    def _run(self, steps: Driver[T]) -> T:
        """Performs the actions of a driver; returns what it returns."""
        deadline = time.monotonic() + self.timeout
        try:
            action = next(steps)
            while True:
                try:
                    if isinstance(action, Execute):
                        outcome = self._connections().execute(action.command, action.call, deadline)
                    else:
                        outcome = self._perform(action, deadline)
                except FAILURES as error:
                    action = steps.throw(error)
                else:
                    action = steps.send(outcome)
        except StopIteration as end:
            return end.value

    def _perform(self, action: OtherAction, deadline: float) -> Any:
        """Performs an action other than Execute."""
        if isinstance(action, RoundTrip):
            return action.node.send(action.commands, action.read, deadline)
        if isinstance(action, Route):
            return self._connections().route(action.calls)
        if isinstance(action, Servers):
            return self._connections().servers()
        if isinstance(action, Pause):
            return time.sleep(action.seconds)
        if isinstance(action, Redirect):
            return self._connections().redirect(action.error)
        if isinstance(action, Refresh):
            return self._connections().refresh(action.since, deadline)
        return _side_by_side(action.round_trips, deadline)


def _side_by_side(round_trips: Sequence[RoundTrip], deadline: float) -> list[Any]:
    """Sends to all servers before it reads from the first one, so that they work at the same time."""
    unreachable = _connect_together([each.node for each in round_trips], deadline)
    begun: list[Halves] = [each.node.in_halves(each.commands, each.read, deadline) for each in round_trips]
    try:
        failures = [unreachable.get(index) or _outcome(next, halves) for index, halves in enumerate(begun)]
        return [failure or _outcome(second_half, halves) for halves, failure in zip(begun, failures, strict=True)]
    finally:
        for halves in begun:
            halves.close()


def _connect_together(nodes: Sequence[Connections], deadline: float) -> dict[int, RoundTripError]:
    """Connects to those servers to which no connection is idle: if all hang, it takes no longer than with one.

    Returns:
        Errors, by the index of the server.
    """
    missing = [index for index, node in enumerate(nodes) if not node.has_idle()]
    if len(missing) < 2:  # the round trip connects
        return {}
    helpers = {index: Helper("squidstep-connect", partial(nodes[index].connect, deadline)) for index in missing}
    errors: dict[int, RoundTripError] = {}
    for index, helper in helpers.items():
        helper.wait()
        if isinstance(helper.error, RoundTripError):
            errors[index] = helper.error
        elif helper.error is not None:
            raise helper.error
    return errors


def _outcome(half: Callable[[Halves], T], halves: Halves) -> T | RoundTripError:
    try:
        return half(halves)
    except RoundTripError as error:
        return error


def run_workflow(transport: BlockingTransport, workflow: Workflow[T], sleep: Callable[[float], None] = time.sleep) -> T:
    """Performs the effects of a workflow; returns what it returns."""
    try:
        effect = next(workflow)
        while True:
            outcome: Any = None
            try:
                match effect:
                    case Send(call, seconds):
                        outcome = (transport if seconds is None else transport.limited(seconds)).send(call)
                    case SendBatch(calls):
                        outcome = transport.send_batch(calls)
                    case Sleep():
                        sleep(effect.seconds)
                    case BlockOnStream():
                        outcome = transport.block_on_stream(effect)
                    case Broadcast(commands, operation, seconds):
                        limited = transport if seconds is None else transport.limited(seconds)
                        outcome = limited.broadcast(commands, operation)
            except Exception as error:  # noqa: BLE001 -- the workflow decides which errors it handles
                effect = workflow.throw(error)
            else:
                effect = workflow.send(outcome)
    except StopIteration as end:
        return end.value
