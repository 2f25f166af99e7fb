"""A client on asyncio whose own methods have to see every command, because something hooks them."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Sequence
from math import inf
from typing import Any, Final

from redis.exceptions import ConnectionError, ResponseError

from squidstep_redis.protocol.call import OPTIONS, Command
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.aio_connection import AsyncConnections, drop
from squidstep_redis.transport.aio_tasks import cancellations, raise_swallowed_cancellation
from squidstep_redis.transport.client import ProbedName, idle_of, probed
from squidstep_redis.transport.retry import RoundTripError, as_redis_error, check_resent, is_demotion, undecided
from squidstep_redis.transport.stream import Read

_SHORTEST_ATTEMPT: Final = 1.0  # seconds to connect, if the client has no timeouts


class HookedClient(AsyncConnections):
    """A client whose `execute_command` has to see every command."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def send(
        self, commands: Sequence[Command], read: Read, deadline: float = inf, *, blocks: bool = False
    ) -> list[Any]:
        name, plain = probed(commands)
        before = cancellations()
        is_reusable = False
        try:
            scope = asyncio.timeout(None)
            timer = self._begin_to_limit(scope, name, deadline)
            try:
                async with scope:
                    if len(plain) == 1:
                        replies = [await _reply_or_error(self._client, plain[0])]
                    else:
                        pipeline: Any = self._client.pipeline(transaction=False)
                        for command in plain:
                            pipeline.execute_command(*command, **OPTIONS)
                        replies = await pipeline.execute(raise_on_error=False)
            except Exception as error:
                if isinstance(error, builtins.TimeoutError) and scope.expired():
                    failure = ConnectionError("No connection available in time.")
                    raise RoundTripError(failure, sent=name.times_packed > 0) from error
                cause = undecided(as_redis_error(error), name.times_packed * len(plain))
                raise RoundTripError(cause, sent=name.times_packed > 0) from error
            finally:
                if timer is not None:
                    timer.cancel()
            if name.times_packed > 1:
                check_resent(replies, name.times_packed)
            results = [read(index, reply) for index, reply in enumerate(replies)]
            is_reusable = not any(isinstance(reply, Exception) and is_demotion(reply) for reply in replies)
        finally:
            # The client has released the connection, and would use it for its next command: also one whose handshake
            # was interrupted, which has another database or no credentials.
            if not is_reusable and hasattr(self._client, "connection_pool"):
                for connection in idle_of(self._client.connection_pool):
                    drop(connection)
        await raise_swallowed_cancellation(before)
        return results

    def _begin_to_limit(self, scope: asyncio.Timeout, name: ProbedName, deadline: float) -> asyncio.TimerHandle | None:
        """Ends a scope if the client has no connection in time.

        Its pool, or its provider of credentials, may wait for longer than the call may take.
        """
        pool: Any = getattr(self._client, "connection_pool", None)  # a cluster client has none
        if pool is None or deadline == inf:
            return None
        loop, options = asyncio.get_running_loop(), pool.connection_kwargs
        attempt = sum(options.get(each) or 0.0 for each in ("socket_connect_timeout", "socket_timeout"))
        seconds = max(0.0, deadline - time.monotonic()) + (attempt or _SHORTEST_ATTEMPT)

        def give_up() -> None:
            if not name.times_packed:
                scope.reschedule(loop.time())

        return loop.call_later(seconds, give_up)


async def _reply_or_error(client: Any, command: Sequence[Any]) -> Any:
    try:
        return await client.execute_command(*command, **OPTIONS)
    except ResponseError as error:
        return error
