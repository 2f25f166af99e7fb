"""What the blocking and the asyncio transport share: one store's client, limits, listeners and connections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from typing import Any, Generic, Self, TypeVar

from squidstep_redis.transport.batch import Durability
from squidstep_redis.transport.client import ClientFacts, ClientHooks, has_plain_stream
from squidstep_redis.transport.events import EventEmitter
from squidstep_redis.transport.retry import RoundTripError

Connections = TypeVar("Connections")


class BaseTransport(ABC, Generic[Connections]):
    """Sends the calls of one store.

    Attributes:
        client: the redis-py client.
        is_cluster: whether it is a cluster client.
        timeout: seconds until the last attempt of a call.
        durability: what transitions wait for; None: nothing.
        events: receives every decision.
        longest_read: seconds after which the client would give up on a blocking read.
        hooks: whether something hooks the client's `execute_command`.
    """

    def __init__(
        self,
        client: Any,
        facts: ClientFacts,
        timeout: float,
        durability: Durability | None,
        events: EventEmitter,
        *,
        own_connections: bool,
    ) -> None:
        self.client: Any = client  # redis-py leaves parts of its types unknown
        self.is_cluster = facts.is_cluster
        self.timeout = timeout
        self.durability = durability
        self.events = events
        self.longest_read = facts.socket_timeout or 60
        self.hooks = ClientHooks(client)
        self._hooked = self._hooked_client()
        if own_connections and has_plain_stream(client.connection_pool.connection_class):
            self._direct = self._own()
        else:
            self._direct = self._pooled()

    def limited(self, seconds: float) -> Self:
        """Returns a transport that shares everything with this one, and whose last attempts begin sooner.

        Args:
            seconds: until the last attempt of a call, at most.
        """
        limited = copy(self)
        limited.timeout = min(self.timeout, seconds)
        return limited

    @abstractmethod
    def _hooked_client(self) -> Connections:
        """Returns connections that send through the client's `execute_command`."""

    @abstractmethod
    def _pooled(self) -> Connections:
        """Returns connections that borrow from the client's pool; for a cluster client, from its nodes' pools."""

    @abstractmethod
    def _own(self) -> Connections:
        """Returns connections that the store opens itself."""

    def _connections(self) -> Connections:
        return self._hooked if self.hooks.are_present() else self._direct


def as_it_is(_: int, reply: Any) -> Any:
    """Returns a reply undecoded."""
    return reply


def cause_of(error: Exception) -> Exception:
    """Returns the error that redis-py raised, or would raise."""
    return error.cause if isinstance(error, RoundTripError) else error
