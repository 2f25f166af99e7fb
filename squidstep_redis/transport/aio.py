"""The asyncio transport: sends calls and executes the effects of workflows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from logging import INFO
from typing import Any, TypeVar

from redis import RedisError
from redis import asyncio as redis
from redis.exceptions import AskError, NoScriptError, ResponseError

from squidstep_redis.protocol.call import OPTIONS, Call, Command
from squidstep_redis.protocol.workflow import BlockOnStream, Broadcast, Send, SendBatch, Sleep, Workflow
from squidstep_redis.transport import batch
from squidstep_redis.transport.base import BaseTransport
from squidstep_redis.transport.retry import FAILURES, NO_REPLY, NeedsResend, RetryState, decode_replies, decode_reply

T = TypeVar("T")


class _NodeCommand:
    """One command of a pipeline to a cluster node, as `ClusterNode.execute_pipeline` expects it."""

    __slots__ = ("args", "kwargs", "result")

    def __init__(self, command: Command) -> None:
        self.args = command
        self.kwargs = dict(OPTIONS)
        self.result: Any = None


class AsyncTransport(BaseTransport):
    """Sends calls with asyncio."""

    async def send(self, call: Call[T]) -> T:
        """Sends one call, with retries; returns its result or raises its error."""
        events = self.events
        if not (events.listeners or events.is_logged(INFO)):
            return await self._send(call)
        began = time.monotonic()
        try:
            result = await self._send(call)
        except Exception as error:
            events.emit(call, error, time.monotonic() - began)
            raise
        events.emit(call, result, time.monotonic() - began)
        return result

    async def _send(self, call: Call[T]) -> T:
        began = time.monotonic()
        try:
            return await self._send_once(call)
        except FAILURES as error:
            return await self._retry(lambda: self._send_once(call), RetryState(call, began, self.policy), error)

    async def _send_once(self, call: Call[T]) -> T:
        if self.durability is not None and call.script.is_transition:
            return await self._send_and_wait(call)
        return call.decode(await self._execute(call))

    async def _execute(self, call: Call[Any]) -> Any:
        if isinstance(self.client, redis.RedisCluster):
            # Otherwise, the first calls, if concurrent, would each be redirected by a MOVED.
            await self.client.initialize()
        if self.connections.can_bypass_client():
            (reply,) = await self.connections.send(call.evalsha())
            if isinstance(reply, NoScriptError):
                (reply,) = await self.connections.send(call.eval())
            if isinstance(reply, ResponseError):
                raise reply
            return reply
        try:
            return await self.client.execute_command(*call.evalsha(), **OPTIONS)
        except NoScriptError:
            return await self.client.execute_command(*call.eval(), **OPTIONS)

    async def _send_and_wait(self, call: Call[T]) -> T:
        (reply,) = await self._send_to(await self._node(call), [call], load_scripts=False)
        if isinstance(reply, NoScriptError):
            (reply,) = await self._send_to(await self._node(call), [call])
        if isinstance(reply, AskError) and isinstance(self.client, redis.RedisCluster):
            # The slot is on another node, or migrating. redis-py follows redirects, but cannot WAIT on that connection.
            result = call.decode(await self._execute(call))
            (reply,) = await self._send_to(await self._node(call), [call])
            if isinstance(reply, AskError):
                raise batch.not_replicated(call, result, "its slot is moving to another node")
        return batch.read(call, reply)

    async def _retry(self, attempt: Callable[[], Awaitable[T]], state: RetryState, error: Exception) -> T:
        """Retries until an attempt succeeds or `state` raises the final error."""
        while True:
            await asyncio.sleep(state.next_pause(error))
            try:
                return await attempt()
            except FAILURES as failure:
                error = failure

    async def send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        """Sends calls together, with retries; returns a result or an error for each."""
        events = self.events
        if not (events.listeners or events.is_logged(INFO)):
            return await self._send_batch(calls)
        began = time.monotonic()
        try:
            results = await self._send_batch(calls)
        except Exception as error:
            events.emit_all(calls, [error] * len(calls), time.monotonic() - began)
            raise
        events.emit_all(calls, results, time.monotonic() - began)
        return results

    async def _send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        state = RetryState(None, time.monotonic(), self.policy)
        try:
            results = await self._send_together(calls, state)
        except FAILURES as error:
            results = await self._retry(lambda: self._send_together(calls, state), state, error)
        return [
            await self._resend(call, result.error, state) if isinstance(result, NeedsResend) else result
            for call, result in zip(calls, results, strict=True)
        ]

    async def _send_together(self, calls: Sequence[Call[Any]], state: RetryState) -> list[Any]:
        if self.durability is None and self.connections.can_bypass_client():
            commands = batch.commands(calls)
            read = decode_replies(calls, len(commands) - len(calls), state.may_have_run)
            # Each reply is decoded while the server executes the next call.
            replies = await self.connections.send(*commands, read=read)
            return replies[-len(calls) :]
        is_one = isinstance(self.client, redis.Redis)
        replies = await self._send_to(self.client, calls) if is_one else await self._send_to_nodes(calls)
        return [decode_reply(call, reply, state.may_have_run) for call, reply in zip(calls, replies, strict=True)]

    async def _send_to(self, client: Any, calls: Sequence[Call[Any]], *, load_scripts: bool = True) -> list[Any]:
        commands = batch.commands(calls, self.durability, load_scripts=load_scripts)
        if client is self.client and self.connections.can_bypass_client():
            replies = await self.connections.send(*commands)
        elif isinstance(client, redis.Redis):
            pipeline: Any = client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command, **OPTIONS)
            replies = await pipeline.execute(raise_on_error=False)
        else:
            sent = [_NodeCommand(command) for command in commands]
            await client.execute_pipeline(sent)
            replies = [command.result for command in sent]
        return batch.replies_to(calls, replies, self.durability)

    async def _send_to_nodes(self, calls: Sequence[Call[Any]]) -> list[Any]:
        replies: list[Any] = [None] * len(calls)
        nodes: dict[int, tuple[Any, list[int]]] = {}
        for index, call in enumerate(calls):
            node = await self._node(call)
            nodes.setdefault(id(node), (node, []))[1].append(index)

        async def send(node: Any, indexes: list[int]) -> None:
            try:
                replied = await self._send_to(node, [calls[index] for index in indexes])
            except NO_REPLY as error:
                replied = [error] * len(indexes)
            for index, reply in zip(indexes, replied, strict=True):
                replies[index] = reply

        await asyncio.gather(*(send(node, indexes) for node, indexes in nodes.values()))
        return replies

    async def _node(self, call: Call[Any]) -> Any:
        """Returns what sends to the server of the call's slot: the client, or a node of the cluster."""
        if isinstance(self.client, redis.Redis):
            return self.client
        cluster: Any = await self.client.initialize()
        return cluster.nodes_manager.get_node_from_slot(cluster.keyslot(call.keys[0]))

    async def _resend(self, call: Call[Any], error: Exception, of_batch: RetryState) -> Any:
        state = RetryState(call, of_batch.began, self.policy, may_have_run=of_batch.may_have_run)
        try:
            if isinstance(error, (NoScriptError, AskError)):  # it did not run; a single call follows redirects
                try:
                    return await self._send_once(call)
                except FAILURES as failure:
                    error = failure
            return await self._retry(lambda: self._send_once(call), state, error)
        except Exception as failure:  # noqa: BLE001 -- each call of a batch has its own result
            return failure


async def run_workflow(transport: AsyncTransport, workflow: Workflow[T]) -> T:
    """Executes the effects of a workflow; returns what it returns."""
    try:
        effect = next(workflow)
        while True:
            result: Any = None
            try:
                match effect:
                    case Send(call):
                        result = await transport.send(call)
                    case SendBatch(calls):
                        result = await transport.send_batch(calls)
                    case Sleep():
                        await asyncio.sleep(effect.seconds)
                    case BlockOnStream():
                        await _block_on_stream(transport, effect)
                    case Broadcast(commands):
                        result = await _broadcast(transport.client, commands)
            except Exception as error:  # noqa: BLE001 -- the workflow decides which errors it handles
                effect = workflow.throw(error)
            else:
                effect = workflow.send(result)
    except StopIteration as end:
        return end.value


async def _block_on_stream(transport: AsyncTransport, effect: BlockOnStream) -> None:
    try:
        await transport.client.execute_command(*effect.command(transport.longest_read / 2))
    except RedisError:  # the next poll shows the state
        await asyncio.sleep(min(effect.seconds, 0.1))


async def _broadcast(client: Any, commands: Sequence[Command]) -> dict[str, list[Any]]:
    """Sends commands to every server; returns their replies or errors by server."""
    if isinstance(client, redis.RedisCluster):
        cluster: Any = await client.initialize()
        servers = {node.name: node for node in cluster.get_primaries()}
    else:
        servers = {"": client}
    return {name: [reply async for reply in _replies(server, commands)] for name, server in servers.items()}


async def _replies(server: Any, commands: Sequence[Command]) -> AsyncIterator[Any]:
    unreachable: Exception | None = None
    for command in commands:
        try:
            yield unreachable or await server.execute_command(*command)
        except RedisError as error:
            yield error
            if isinstance(error, NO_REPLY):
                unreachable = error  # the remaining commands would fail too
