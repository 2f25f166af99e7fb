"""The blocking way to the server: the only place where a call is waited for, and a plan carried out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import redis
from redis import RedisError
from redis.backoff import NoBackoff
from redis.exceptions import AskError, NoScriptError, ResponseError
from redis.retry import Retry

from squidstep_redis.protocol import call as wire
from squidstep_redis.protocol.call import OPTIONS, BlockOnStream, Call, Command, Plan
from squidstep_redis.settings import BaseStore
from squidstep_redis.transport.connection import DirectConnections
from squidstep_redis.transport.retry import FAILURES, UNANSWERED, NeedsResend, RetryState, decode_replies, decode_reply

T = TypeVar("T")


class Sender(BaseStore[redis.Redis | redis.RedisCluster]):
    """A store's side that sends: every method of its own comes down to one of these."""

    _client_types = (redis.Redis, redis.RedisCluster)
    _connections_type = DirectConnections

    @classmethod
    def _connect(cls, url: str, options: dict[str, Any]) -> redis.Redis:
        client: Any = redis.Redis
        return client.from_url(url, **{"retry": Retry(NoBackoff(), 0), **options})

    def send(self, call: Call[T]) -> T:
        """Sends one call made by `calls`; what the operation's own method does.

        The same call can be sent again, by any store of the same prefix: it takes effect once.
        """
        if not self._events:
            return self._send(call)
        began = time.monotonic()
        try:
            result = self._send(call)
        except Exception as error:
            self._events.emit(call, error, time.monotonic() - began)
            raise
        self._events.emit(call, result, time.monotonic() - began)
        return result

    def _send(self, call: Call[T]) -> T:
        began = time.monotonic()
        try:
            return self._send_once(call)
        except FAILURES as error:
            return self._retry(lambda: self._send_once(call), RetryState(call, began, self._retry_policy), error)

    def _send_once(self, call: Call[T]) -> T:
        if self._durability is not None and call.script.is_transition:
            return self._send_and_wait(call)
        return call.answer(self._execute(call))

    def _execute(self, call: Call[Any]) -> Any:
        if self._connections.can_bypass_client():
            (reply,) = self._connections.send(call.evalsha())
            if isinstance(reply, NoScriptError):
                (reply,) = self._connections.send(call.eval())
            if isinstance(reply, ResponseError):
                raise reply
            return reply
        try:
            return self._untyped_client.execute_command(*call.evalsha(), **OPTIONS)
        except NoScriptError:
            return self._untyped_client.execute_command(*call.eval(), **OPTIONS)

    def _send_and_wait(self, call: Call[T]) -> T:
        (reply,) = self._send_to(self._node(call), [call], load_scripts=False)
        if isinstance(reply, NoScriptError):
            (reply,) = self._send_to(self._node(call), [call])
        if isinstance(reply, AskError) and isinstance(self.client, redis.RedisCluster):
            # The slot is elsewhere, or on its way. redis-py knows to follow it, but not to wait on that connection.
            result = call.answer(self._execute(call))
            (reply,) = self._send_to(self._node(call), [call])
            if isinstance(reply, AskError):
                raise wire.not_replicated(call, result, "its slot is moving to another node")
        return wire.read(call, reply)

    def _retry(self, attempt: Callable[[], T], sending: RetryState, error: Exception) -> T:
        """Tries again until it succeeds, or `sending` raises what has become of it."""
        while True:
            time.sleep(sending.next_pause(error))
            try:
                return attempt()
            except FAILURES as failure:
                error = failure

    def _send_all(self, calls: Sequence[Call[Any]]) -> list[Any]:
        if not self._events:
            return self._send_batch(calls)
        began = time.monotonic()
        try:
            results = self._send_batch(calls)
        except Exception as error:
            self._events.emit_all(calls, [error] * len(calls), time.monotonic() - began)
            raise
        self._events.emit_all(calls, results, time.monotonic() - began)
        return results

    def _send_batch(self, calls: Sequence[Call[Any]]) -> list[Any]:
        sending = RetryState(None, time.monotonic(), self._retry_policy)
        try:
            results = self._send_together(calls, sending)
        except FAILURES as error:
            results = self._retry(lambda: self._send_together(calls, sending), sending, error)
        return [
            self._resend(call, result.error, sending) if isinstance(result, NeedsResend) else result
            for call, result in zip(calls, results, strict=True)
        ]

    def _send_together(self, calls: Sequence[Call[Any]], sending: RetryState) -> list[Any]:
        if self._durability is None and self._connections.can_bypass_client():
            commands = wire.commands(calls)
            read = decode_replies(calls, len(commands) - len(calls), sending.may_have_run)
            return self._connections.send(*commands, read=read)[-len(calls) :]  # each is read while the next is made
        is_one = isinstance(self.client, redis.Redis)
        replies = self._send_to(self.client, calls) if is_one else self._send_to_nodes(calls)
        return [decode_reply(call, reply, sending.may_have_run) for call, reply in zip(calls, replies, strict=True)]

    def _send_to(self, client: Any, calls: Sequence[Call[Any]], *, load_scripts: bool = True) -> list[Any]:
        commands = wire.commands(calls, self._durability, load_scripts=load_scripts)
        lender = self._connections if client is self.client else DirectConnections(client)
        if lender.can_bypass_client():
            return wire.replies_to(calls, lender.send(*commands), self._durability)
        pipeline = client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command, **OPTIONS)
        return wire.replies_to(calls, pipeline.execute(raise_on_error=False), self._durability)

    def _send_to_nodes(self, calls: Sequence[Call[Any]]) -> list[Any]:
        replies: list[Any] = [None] * len(calls)
        nodes: dict[int, tuple[Any, list[int]]] = {}
        for index, call in enumerate(calls):
            node = self._node(call)
            nodes.setdefault(id(node), (node, []))[1].append(index)
        for node, indexes in nodes.values():
            try:
                answered = self._send_to(node, [calls[index] for index in indexes])
            except UNANSWERED as error:
                answered = [error] * len(indexes)
            for index, reply in zip(indexes, answered, strict=True):
                replies[index] = reply
        return replies

    def _node(self, call: Call[Any]) -> Any:
        """The client of the server that has the call's slot."""
        if isinstance(self.client, redis.Redis):
            return self.client
        cluster: Any = self.client
        return cluster.get_redis_connection(cluster.nodes_manager.get_node_from_slot(cluster.keyslot(call.keys[0])))

    def _resend(self, call: Call[Any], error: Exception, batch: RetryState) -> Any:
        sending = RetryState(call, batch.began, self._retry_policy, may_have_run=batch.may_have_run)
        try:
            if isinstance(error, (NoScriptError, AskError)):  # it has not run, and a single call finds the way
                try:
                    return self._send_once(call)
                except FAILURES as failure:
                    error = failure
            return self._retry(lambda: self._send_once(call), sending, error)
        except Exception as failure:  # noqa: BLE001 -- each call of a batch answers for itself
            return failure


def run_workflow(store: Sender, plan: Plan[T], sleep: Callable[[float], None] = time.sleep) -> T:
    """Does what a plan says."""
    try:
        wanted = next(plan)
        while True:
            answer: Any = None
            try:
                if isinstance(wanted, Call):
                    answer = store.send(wanted)
                elif isinstance(wanted, list):
                    answer = _broadcast(store.client, wanted)
                elif isinstance(wanted, BlockOnStream):
                    _block_on_stream(store, wanted)
                elif isinstance(wanted, tuple):
                    answer = store._send_all(wanted)  # pyright: ignore[reportPrivateUsage]: of this module
                else:
                    sleep(wanted)
            except Exception as error:  # noqa: BLE001 -- the plan knows which errors to bear
                wanted = plan.throw(error)
            else:
                wanted = plan.send(answer)
    except StopIteration as end:
        return end.value


def _block_on_stream(store: Sender, doze: BlockOnStream) -> None:
    longest = store._longest_read / 2  # pyright: ignore[reportPrivateUsage]: of this module
    client: Any = store.client
    try:
        client.execute_command(*doze.command(longest))
    except RedisError:  # the next look will tell
        time.sleep(min(doze.seconds, 0.1))


def _broadcast(client: Any, commands: list[Command]) -> dict[str, list[Any]]:
    """Sends commands to every server: by server, their replies or errors."""
    if isinstance(client, redis.RedisCluster):
        cluster: Any = client
        servers = {node.name: cluster.get_redis_connection(node) for node in cluster.get_primaries()}
    else:
        servers = {"": client}
    return {name: list(_answers(server, commands)) for name, server in servers.items()}


def _answers(server: Any, commands: list[Command]) -> Iterator[Any]:
    unanswered: Exception | None = None
    for command in commands:
        try:
            yield unanswered or server.execute_command(*command)
        except RedisError as error:
            yield error
            if isinstance(error, UNANSWERED):
                unanswered = error  # nor will it answer the rest
