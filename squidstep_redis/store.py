"""The blocking store: the only place where it waits for the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import NoScriptError
from redis.retry import Retry

from squidstep_redis import wire
from squidstep_redis.base import RETRIES, BaseStore, documented
from squidstep_redis.calls import Calls
from squidstep_redis.wire import OPTIONS, Call, Exchange

P = ParamSpec("P")
T = TypeVar("T")


def _operation(
    make: Callable[Concatenate[Calls, P], Call[T]],
) -> Callable[Concatenate[StepRunStore, P], T]:
    """The method that makes a call and sends it."""

    def operation(self: StepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(make(self.calls, *args, **kwargs))

    return documented(operation, make, "StepRunStore")


def _exchange(
    make: Callable[Concatenate[Calls, P], Exchange[T]],
) -> Callable[Concatenate[StepRunStore, P], T]:
    """The method that carries an exchange through."""

    def carried(self: StepRunStore, *args: P.args, **kwargs: P.kwargs) -> T:
        exchange = make(self.calls, *args, **kwargs)
        try:
            calls = next(exchange)
            while True:
                calls = exchange.send(self._send_all(calls))  # pyright: ignore[reportPrivateUsage]: of this module
        except StopIteration as end:
            return end.value

    return documented(carried, make, "StepRunStore")


class StepRunStore(BaseStore[redis.Redis | redis.RedisCluster]):
    """Decides which delivery of a step executes, and keeps what came of it: the store, blocking."""

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

    def close(self) -> None:
        """Closes the client, if `from_url` made it."""
        if self._owns_client:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @classmethod
    def _connect(cls, url: str, options: dict[str, Any]) -> redis.Redis:
        retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), RETRIES)
        client: Any = redis.Redis
        return client.from_url(url, **{"retry": retry, **options})

    def send(self, call: Call[T]) -> T:
        """Sends one call made by `calls`; what the operation's own method does."""
        try:
            reply = self._untyped_client.execute_command(*call.evalsha(), **OPTIONS)
        except NoScriptError:
            reply = self._untyped_client.execute_command(*call.eval(), **OPTIONS)
        return call.answer(reply)

    def _send_all(self, calls: Sequence[Call[Any]]) -> list[Any]:
        if isinstance(self.client, redis.Redis):
            replies = self._send_to(self.client, calls)
        else:
            replies = self._send_to_nodes(self.client, calls)
        return [
            self._resend(call) if wire.must_resend(reply) else wire.answer_or_error(call, reply)
            for call, reply in zip(calls, replies, strict=True)
        ]

    def _send_to(self, client: Any, calls: Sequence[Call[Any]]) -> list[Any]:
        pipeline = client.pipeline(transaction=False)
        for command in wire.commands(calls):
            pipeline.execute_command(*command, **OPTIONS)
        return pipeline.execute(raise_on_error=False)[-len(calls) :]

    def _send_to_nodes(self, cluster: Any, calls: Sequence[Call[Any]]) -> list[Any]:
        replies: list[Any] = [None] * len(calls)
        nodes: dict[str, tuple[Any, list[int]]] = {}
        for index, call in enumerate(calls):
            node = cluster.nodes_manager.get_node_from_slot(cluster.keyslot(call.keys[0]))
            nodes.setdefault(node.name, (node, []))[1].append(index)
        for node, indexes in nodes.values():
            try:
                answered = self._send_to(cluster.get_redis_connection(node), [calls[index] for index in indexes])
            except wire.UNANSWERED as error:
                answered = [error] * len(indexes)
            for index, reply in zip(indexes, answered, strict=True):
                replies[index] = reply
        return replies

    def _resend(self, call: Call[Any]) -> Any:
        try:
            return self.send(call)
        except Exception as error:  # noqa: BLE001 -- each call of a batch answers for itself
            return error
