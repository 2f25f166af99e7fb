"""A transport separate from a store's own, with connections that the store's calls cannot use up."""

from __future__ import annotations

from typing import Any, Final

from squidstep_redis.transport.blocking import BlockingTransport
from squidstep_redis.transport.client import has_plain_stream
from squidstep_redis.transport.cluster import ClusterConnections
from squidstep_redis.transport.connection import OwnConnections

_REPLY_SHARE: Final = 0.3  # of the store's timeout, if the client waits for a reply without limit


class SeparateTransport:
    """Provides a transport with a store's events, durability and timeout, and with its own connections.

    A client that is hooked, of another kind (fakeredis), or whose connections are overridden, has to see every command.
    For such a client, this is the store's own transport.
    """

    def __init__(self, transport: BlockingTransport) -> None:
        self._source = transport
        self._separate: _Separate | None = None

    def get(self) -> BlockingTransport:
        """Returns the transport to use now: instrumentation may hook the client at any time."""
        source = self._source
        if source.hooks.are_present() or not (source.is_cluster or _is_plain(source.client)):
            return source
        if self._separate is None or self._separate.client is not source.client:
            self._separate = _Separate(source)
        return self._separate

    def close(self) -> None:
        """Closes its connections."""
        separate, self._separate = self._separate, None
        if separate is not None:
            separate.close()


class _Separate(BlockingTransport):
    """A transport that shares everything except the connections with another one."""

    def __init__(self, source: BlockingTransport) -> None:
        vars(self).update(vars(source))
        wait = self.durability.timeout_ms / 1_000 if self.durability else 0.0
        timeout = max(_REPLY_SHARE * self.timeout, 2 * wait)
        if self.is_cluster:
            self._direct = ClusterConnections(self.client, timeout, is_limited=False)
        else:
            self._direct = OwnConnections(self.client, timeout)


def _is_plain(client: Any) -> bool:
    return has_plain_stream(client.connection_pool.connection_class)
