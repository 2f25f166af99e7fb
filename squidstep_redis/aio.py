"""The asyncio store: the only place where it waits for the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import NoScriptError

from squidstep_redis import wire
from squidstep_redis.base import RETRIES, BaseStore, documented
from squidstep_redis.calls import Calls
from squidstep_redis.wire import OPTIONS, Call, Command, Exchange

P = ParamSpec("P")
T = TypeVar("T")


def _operation(
    make: Callable[Concatenate[Calls, P], Call[T]],
) -> Callable[Concatenate[AsyncStepRunStore, P], Coroutine[Any, Any, T]]:
    """The method that makes a call and sends it."""

    async def operation(self: AsyncStepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(make(self.calls, *args, **kwargs))

    return documented(operation, make, "AsyncStepRunStore")


def _exchange(
    make: Callable[Concatenate[Calls, P], Exchange[T]],
) -> Callable[Concatenate[AsyncStepRunStore, P], Coroutine[Any, Any, T]]:
    """The method that carries an exchange through."""

    async def carried(self: AsyncStepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        exchange = make(self.calls, *args, **kwargs)
        try:
            calls = next(exchange)
            while True:
                calls = exchange.send(await self._send_all(calls))  # pyright: ignore[reportPrivateUsage]: of this module
        except StopIteration as end:
            return end.value

    return documented(carried, make, "AsyncStepRunStore")


class _NodeCommand:
    """One command of a pipeline to a cluster node, as `ClusterNode.execute_pipeline` takes and answers it."""

    __slots__ = ("args", "kwargs", "result")

    def __init__(self, command: Command) -> None:
        self.args = command
        self.kwargs = dict(OPTIONS)
        self.result: Any = None


class AsyncStepRunStore(BaseStore[redis.Redis | redis.RedisCluster]):
    """Decides which delivery of a step executes, and keeps what came of it: the store, for asyncio."""

    _client_types = (redis.Redis, redis.RedisCluster)

    schedule_step = _operation(Calls.schedule_step)
    schedule_steps = _operation(Calls.schedule_steps)
    begin_step = _operation(Calls.begin_step)
    complete_step = _operation(Calls.complete_step)
    fail_step = _operation(Calls.fail_step)
    extend_claim = _operation(Calls.extend_claim)
    release_step = _operation(Calls.release_step)
    delete_pending_steps = _operation(Calls.delete_pending_steps)

    get_step_run = _operation(Calls.get_step_run)
    get_run = _operation(Calls.get_run)
    attempts = _operation(Calls.attempts)
    completed_steps = _operation(Calls.completed_steps)
    completed_outputs = _operation(Calls.completed_outputs)
    step_statuses = _operation(Calls.step_statuses)

    expire_run = _operation(Calls.expire_run)
    delete_run = _operation(Calls.delete_run)

    batch = _exchange(Calls.batch)
    lapsed_claims = _exchange(Calls.lapsed_claims)
    failed_steps = _exchange(Calls.failed_steps)

    async def close(self) -> None:
        """Closes the client, if `from_url` made it."""
        if self._owns_client:
            await self.client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @classmethod
    def _connect(cls, url: str, options: dict[str, Any]) -> redis.Redis:
        retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), RETRIES)
        client: Any = redis.Redis
        return client.from_url(url, **{"retry": retry, **options})

    async def send(self, call: Call[T]) -> T:
        """Sends one call made by `calls`; what the operation's own method does."""
        if isinstance(self.client, redis.RedisCluster):
            # Left to itself, redis-py lets many first calls each find out by a MOVED where their slot is.
            await self.client.initialize()
        try:
            reply = await self._untyped_client.execute_command(*call.evalsha(), **OPTIONS)
        except NoScriptError:
            reply = await self._untyped_client.execute_command(*call.eval(), **OPTIONS)
        return call.answer(reply)

    async def _send_all(self, calls: Sequence[Call[Any]]) -> list[Any]:
        if isinstance(self.client, redis.Redis):
            pipeline = self._untyped_client.pipeline(transaction=False)
            for command in wire.commands(calls):
                pipeline.execute_command(*command, **OPTIONS)
            replies = (await pipeline.execute(raise_on_error=False))[-len(calls) :]
        else:
            replies = await self._send_to_nodes(self.client, calls)
        return [
            await self._resend(call) if wire.must_resend(reply) else wire.answer_or_error(call, reply)
            for call, reply in zip(calls, replies, strict=True)
        ]

    async def _send_to_nodes(self, cluster: Any, calls: Sequence[Call[Any]]) -> list[Any]:
        await cluster.initialize()
        replies: list[Any] = [None] * len(calls)
        nodes: dict[str, tuple[Any, list[int]]] = {}
        for index, call in enumerate(calls):
            node = cluster.nodes_manager.get_node_from_slot(cluster.keyslot(call.keys[0]))
            nodes.setdefault(node.name, (node, []))[1].append(index)

        async def send(node: Any, indexes: list[int]) -> None:
            commands = [_NodeCommand(command) for command in wire.commands([calls[index] for index in indexes])]
            try:
                await node.execute_pipeline(commands)
            except wire.UNANSWERED as error:
                for command in commands:
                    command.result = error
            for index, command in zip(indexes, commands[-len(indexes) :], strict=True):
                replies[index] = command.result

        await asyncio.gather(*(send(node, indexes) for node, indexes in nodes.values()))
        return replies

    async def _resend(self, call: Call[Any]) -> Any:
        try:
            return await self.send(call)
        except Exception as error:  # noqa: BLE001 -- each call of a batch answers for itself
            return error
