"""What the blocking and the asyncio transport share: one store's client, limits and listeners."""

from __future__ import annotations

from typing import Any

from squidstep_redis.transport.batch import Durability
from squidstep_redis.transport.events import EventEmitter
from squidstep_redis.transport.retry import RetryPolicy


class BaseTransport:
    """Sends the calls of one store.

    Attributes:
        client: the redis-py client.
        connections: the client's pooled connections.
        policy: how long a call is retried.
        durability: what transitions wait for; None: nothing.
        events: receives every decision.
        longest_read: seconds after which the client would give up on a blocking read.
    """

    connections: Any  # DirectConnections or AsyncDirectConnections

    def __init__(
        self,
        client: Any,
        connections: Any,
        policy: RetryPolicy,
        durability: Durability | None,
        events: EventEmitter,
        longest_read: float,
    ) -> None:
        self.client: Any = client  # redis-py leaves parts of its types unknown
        self.connections = connections
        self.policy = policy
        self.durability = durability
        self.events = events
        self.longest_read = longest_read
