"""The blocking transport: sends calls and executes the effects of workflows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from logging import INFO
from typing import Any, TypeVar

import redis
from redis import RedisError
from redis.exceptions import AskError, NoScriptError, ResponseError

from squidstep_redis.protocol.call import OPTIONS, Call, Command
from squidstep_redis.protocol.workflow import BlockOnStream, Broadcast, Send, SendBatch, Sleep, Workflow
from squidstep_redis.transport import batch
from squidstep_redis.transport.base import BaseTransport
from squidstep_redis.transport.connection import DirectConnections
from squidstep_redis.transport.retry import FAILURES, NO_REPLY, NeedsResend, RetryState, decode_replies, decode_reply

T = TypeVar("T")


class BlockingTransport(BaseTransport):
    """Sends calls and blocks until the reply arrives."""

    def send(self, call: Call[T]) -> T:
        """Sends one call, with retries; returns its result or raises its error."""
        events = self.events
        if not (events.listeners or events.is_logged(INFO)):
            return self._send(call)
        began = time.monotonic()
        try:
            result = self._send(call)
        except Exception as error:
            events.emit(call, error, time.monotonic() - began)
            raise
        events.emit(call, result, time.monotonic() - began)
        return result

    def _send(self, call: Call[T]) -> T:
        began = time.monotonic()
        try:
            return self._send_once(call)
        except FAILURES as error:
            return self._retry(lambda: self._send_once(call), RetryState(call, began, self.policy), error)

    def _send_once(self, call: Call[T]) -> T:
        if self.durability is not None and call.script.is_transition:
            return self._send_and_wait(call)
        return call.decode(self._execute(call))

    def _execute(self, call: Call[Any]) -> Any:
        if self.connections.can_bypass_client():
            (reply,) = self.connections.send(call.evalsha())
            if isinstance(reply, NoScriptError):
                (reply,) = self.connections.send(call.eval())
            if isinstance(reply, ResponseError):
                raise reply
            return reply
        try:
            return self.client.execute_command(*call.evalsha(), **OPTIONS)
        except NoScriptError:
            return self.client.execute_command(*call.eval(), **OPTIONS)

    def _send_and_wait(self, call: Call[T]) -> T:
        (reply,) = self._send_to(self._node(call), [call], load_scripts=False)
        if isinstance(reply, NoScriptError):
            (reply,) = self._send_to(self._node(call), [call])
        if isinstance(reply, AskError) and isinstance(self.client, redis.RedisCluster):
            # The slot is on another node, or migrating. redis-py follows redirects, but cannot WAIT on that connection.
            result = call.decode(self._execute(call))
            (reply,) = self._send_to(self._node(call), [call])
            if isinstance(reply, AskError):
                raise batch.not_replicated(call, result, "its slot is moving to another node")
        return batch.read(call, reply)

    def _retry(self, attempt: Callable[[], T], state: RetryState, error: Exception) -> T:
        """Retries until an attempt succeeds or `state` raises the final error."""
        while True:
            time.sleep(state.next_pause(error))
            try:
                return attempt()
            except FAILURES as failure:
                error = failure

    def send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """Sends calls together, with retries; returns a result or an error for each."""
        events = self.events
        if not (events.listeners or events.is_logged(INFO)):
            return self._send_batch(calls)
        began = time.monotonic()
        try:
            results = self._send_batch(calls)
        except Exception as error:
            events.emit_all(calls, [error] * len(calls), time.monotonic() - began)
            raise
        events.emit_all(calls, results, time.monotonic() - began)
        return results

    def _send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        state = RetryState(None, time.monotonic(), self.policy)
        try:
            results = self._send_together(calls, state)
        except FAILURES as error:
            results = self._retry(lambda: self._send_together(calls, state), state, error)
        return [
            self._resend(call, result.error, state) if isinstance(result, NeedsResend) else result
            for call, result in zip(calls, results, strict=True)
        ]

    def _send_together(self, calls: Sequence[Call[Any]], state: RetryState) -> list[Any]:
        if self.durability is None and self.connections.can_bypass_client():
            commands = batch.commands(calls)
            read = decode_replies(calls, len(commands) - len(calls), state.may_have_run)
            # Each reply is decoded while the server executes the next call.
            return self.connections.send(*commands, read=read)[-len(calls) :]
        is_one = isinstance(self.client, redis.Redis)
        replies = self._send_to(self.client, calls) if is_one else self._send_to_nodes(calls)
        return [decode_reply(call, reply, state.may_have_run) for call, reply in zip(calls, replies, strict=True)]

    def _send_to(self, client: Any, calls: Sequence[Call[Any]], *, load_scripts: bool = True) -> list[Any]:
        commands = batch.commands(calls, self.durability, load_scripts=load_scripts)
        connections = self.connections if client is self.client else DirectConnections(client)
        if connections.can_bypass_client():
            return batch.replies_to(calls, connections.send(*commands), self.durability)
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command, **OPTIONS)
        return batch.replies_to(calls, pipeline.execute(raise_on_error=False), self.durability)

    def _send_to_nodes(self, calls: Sequence[Call[Any]]) -> list[Any]:
        replies: list[Any] = [None] * len(calls)
        nodes: dict[int, tuple[Any, list[int]]] = {}
        for index, call in enumerate(calls):
            node = self._node(call)
            nodes.setdefault(id(node), (node, []))[1].append(index)
        for node, indexes in nodes.values():
            try:
                replied = self._send_to(node, [calls[index] for index in indexes])
            except NO_REPLY as error:
                replied = [error] * len(indexes)
            for index, reply in zip(indexes, replied, strict=True):
                replies[index] = reply
        return replies

    def _node(self, call: Call[Any]) -> Any:
        """Returns the client of the server of the call's slot."""
        if isinstance(self.client, redis.Redis):
            return self.client
        cluster: Any = self.client
        return cluster.get_redis_connection(cluster.nodes_manager.get_node_from_slot(cluster.keyslot(call.keys[0])))

    def _resend(self, call: Call[Any], error: Exception, of_batch: RetryState) -> Any:
        state = RetryState(call, of_batch.began, self.policy, may_have_run=of_batch.may_have_run)
        try:
            if isinstance(error, (NoScriptError, AskError)):  # it did not run; a single call follows redirects
                try:
                    return self._send_once(call)
                except FAILURES as failure:
                    error = failure
            return self._retry(lambda: self._send_once(call), state, error)
        except Exception as failure:  # noqa: BLE001 -- each call of a batch has its own result
            return failure


def run_workflow(transport: BlockingTransport, workflow: Workflow[T], sleep: Callable[[float], None] = time.sleep) -> T:
    """Executes the effects of a workflow; returns what it returns."""
    try:
        effect = next(workflow)
        while True:
            result: Any = None
            try:
                match effect:
                    case Send(call):
                        result = transport.send(call)
                    case SendBatch(calls):
                        result = transport.send_batch(calls)
                    case Sleep():
                        sleep(effect.seconds)
                    case BlockOnStream():
                        _block_on_stream(transport, effect)
                    case Broadcast(commands):
                        result = _broadcast(transport.client, commands)
            except Exception as error:  # noqa: BLE001 -- the workflow decides which errors it handles
                effect = workflow.throw(error)
            else:
                effect = workflow.send(result)
    except StopIteration as end:
        return end.value


def _block_on_stream(transport: BlockingTransport, effect: BlockOnStream) -> None:
    try:
        transport.client.execute_command(*effect.command(transport.longest_read / 2))
    except RedisError:  # the next poll shows the state
        time.sleep(min(effect.seconds, 0.1))


def _broadcast(client: Any, commands: Sequence[Command]) -> dict[str, list[Any]]:
    """Sends commands to every server; returns their replies or errors by server."""
    if isinstance(client, redis.RedisCluster):
        cluster: Any = client
        servers = {node.name: cluster.get_redis_connection(node) for node in cluster.get_primaries()}
    else:
        servers = {"": client}
    return {name: list(_replies(server, commands)) for name, server in servers.items()}


def _replies(server: Any, commands: Sequence[Command]) -> Iterator[Any]:
    unreachable: Exception | None = None
    for command in commands:
        try:
            yield unreachable or server.execute_command(*command)
        except RedisError as error:
            yield error
            if isinstance(error, NO_REPLY):
                unreachable = error  # the remaining commands would fail too
