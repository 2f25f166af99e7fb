"""Operations queued in the caller's own redis-py pipeline or transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from redis import RedisError

from squidstep_redis.errors import UnsupportedClientError, described
from squidstep_redis.protocol.call import OPTIONS, Call, check_call

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Queued(Generic[T]):
    """An operation that is queued in a pipeline.

    Attributes:
        call: the operation.
        index: its index among the pipeline's commands.
    """

    call: Call[T]
    index: int

    def result(self, replies: Sequence[Any]) -> T:
        """Reads the operation's reply.

        Args:
            replies: what the pipeline's `execute()` returned.

        Returns:
            What the operation's own method returns.

        Raises:
            SquidstepError: what the operation's own method raises. The operation wrote nothing, but other commands of
                the pipeline ran.
            redis.RedisError: the server's own error, if the pipeline was executed with `raise_on_error=False`.
        """
        reply = replies[self.index]
        if isinstance(reply, RedisError):
            raise reply
        return self.call.decode(reply)


def queue(pipeline: Any, call: Call[T]) -> Queued[T]:
    """Appends a call to a redis-py pipeline, blocking or asyncio.

    The command contains the script's source: in a transaction, if the script is unknown, only the EVALSHA would fail,
    while the other commands take effect.
    """
    check_call("call", call)
    if not (hasattr(pipeline, "execute") and hasattr(pipeline, "__len__")):
        raise UnsupportedClientError("pipeline", f"must be a redis-py pipeline, not {described(pipeline)}")
    # A cluster's pipeline delegates transactions to a strategy. asyncio's calls the attribute is_transaction, because
    # transaction is a method of its base class.
    state = getattr(pipeline, "_execution_strategy", pipeline)
    explicit = getattr(state, "explicit_transaction", getattr(state, "_explicit_transaction", False))
    if getattr(state, "watching", getattr(state, "_watching", False)) and not explicit:
        raise UnsupportedClientError(
            "pipeline", "is watching and would run the command immediately: call multi() first"
        )
    requested = getattr(pipeline, "is_transaction", getattr(pipeline, "transaction", False))
    transaction = explicit or hasattr(state, "_watching") or (not callable(requested) and requested)
    owner = getattr(pipeline, "cluster_client", pipeline)
    connections = getattr(owner, "connection_pool", None) or getattr(owner, "nodes_manager", None)
    if transaction and getattr(connections, "connection_kwargs", {}).get("decode_responses"):
        raise UnsupportedClientError(
            "pipeline", "decodes all replies of a transaction, payloads too: use a client without decode_responses"
        )
    index = len(pipeline)
    name, *words = call.eval()
    pipeline.execute_command(name.decode(), *words, **OPTIONS)
    return Queued(call, index)
