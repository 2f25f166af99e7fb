"""Lets redis-py set up a connection: completely or not at all, and in bounded time."""

from __future__ import annotations

import socket
import time
from typing import Any

from redis.exceptions import RedisClusterException, RedisError

from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.transport.retry import ExchangeError


def open_connection(connection: Any) -> Any:
    """Connects a connection of redis-py's.

    An interruption between two steps of its handshake leaves a connection that looks ready but has another database or
    no credentials: it is closed. A server that trickles bytes does not prolong the timeout of a reply.

    SIGALRM is deferred. With RESP3, redis-py asks for a logger, and an exception there could leave logging's lock held.

    Raises:
        ExchangeError: it could not be connected; nothing was sent.
    """
    connect, timeout, packer = connection._connect, connection.socket_timeout, connection._command_packer
    deferred = defer_sigalrm()
    try:
        with deferred:
            if timeout is not None:
                connection._connect = lambda: _HandshakeSocket(connect(), timeout)
            connection._command_packer = _Packer(packer)
            connection.connect()
            if isinstance(connection._sock, _HandshakeSocket):
                connection._sock = connection._sock.finish()
                connection._parser.on_connect(connection)  # it had the other socket
    except BaseException as error:
        connection.disconnect()
        if isinstance(error, (RedisError, RedisClusterException)):
            raise ExchangeError(error, sent=False) from error
        raise
    finally:
        attributes: dict[str, Any] = connection.__dict__
        attributes.pop("_connect", None)  # a cycle of references would outlive the connection
        attributes["_command_packer"] = packer
    return connection


class _Packer:
    """Packs no numbers: hiredis crashes the process if a signal handler raises while it formats one."""

    def __init__(self, packer: Any) -> None:
        self._packer = packer

    def pack(self, *words: Any) -> Any:
        """Returns what redis-py's packer returns."""
        return self._packer.pack(*[str(word) if isinstance(word, int) else word for word in words])


class _HandshakeSocket:
    """The socket of a connection while redis-py sets it up: redis-py's timeout is for each piece of a reply."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._sock = sock
        self._timeout = timeout
        self._until = time.monotonic() + timeout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, data: Any) -> None:
        """Sends a command; its reply has the whole timeout."""
        self._sock.settimeout(self._timeout)
        self._sock.sendall(data)
        self._until = time.monotonic() + self._timeout

    def recv_into(self, *args: Any) -> int:
        """Reads a piece of a reply."""
        self._sock.settimeout(max(0.001, self._until - time.monotonic()))
        return self._sock.recv_into(*args)

    def recv(self, *args: Any) -> bytes:
        """Reads a piece of a reply."""
        self._sock.settimeout(max(0.001, self._until - time.monotonic()))
        return self._sock.recv(*args)

    def finish(self) -> socket.socket:
        """Returns the socket itself."""
        self._sock.settimeout(self._timeout)
        return self._sock
