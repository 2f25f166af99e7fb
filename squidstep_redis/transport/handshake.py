"""Lets redis-py set up a connection: completely or not at all, and in bounded time."""

from __future__ import annotations

import codecs
import socket
from typing import Any, cast

from redis.connection import PythonRespSerializer
from redis.exceptions import ConnectionError, RedisClusterException, RedisError

from squidstep_redis.signals import defer_sigalrm
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.client import has_plain_stream
from squidstep_redis.transport.retry import RoundTripError

# `getaddrinfo` imports this codec with the first host name. An exception that another thread sets during that import
# leaves the lock of the module held, and every later connection would wait for it.
codecs.lookup("idna")


def open_connection(connection: Any) -> Any:
    """Connects a connection of redis-py's.

    An interruption between two steps of its handshake leaves a connection that looks ready but has another database or
    no credentials: it is closed. A server that trickles bytes does not prolong the timeout of a reply.

    SIGALRM is deferred. With RESP3, redis-py asks for a logger, and an exception there could leave logging's lock held.

    Raises:
        RoundTripError: it could not be connected; nothing was sent.
    """
    try:
        with defer_sigalrm():
            if has_plain_stream(cast("type[object]", type(connection))):
                _connect(connection)
            else:
                connection.connect()
    except BaseException as error:
        connection.disconnect()
        if isinstance(error, (RedisError, RedisClusterException)):
            raise RoundTripError(error, sent=False) from error
        raise
    return connection


def _connect(connection: Any) -> None:
    given, packer = connection.redis_connect_func, connection._command_packer

    def set_up(_: object) -> None:
        holder: Any
        sock, parser = connection._sock, connection._parser
        if connection.socket_timeout is not None:
            connection._sock = _HandshakeSocket(sock, connection.socket_timeout)
        try:
            connection.on_connect() if given is None else given(connection)
        finally:
            if connection._sock is not None:  # nothing has disconnected it
                for holder in (connection, parser, getattr(parser, "_buffer", None)):
                    if hasattr(holder, "_sock"):
                        holder._sock = sock
                try:
                    sock.settimeout(connection.socket_timeout)
                except OSError as error:
                    if sock.fileno() >= 0:  # then a signal handler raised it
                        raise
                    raise ConnectionError("Connection closed by another thread.") from error

    connection.redis_connect_func = set_up
    # hiredis crashes the process if a signal handler raises while it formats an int, such as the database.
    connection._command_packer = PythonRespSerializer(connection._buffer_cutoff, connection.encoder.encode)
    try:
        connection.connect()
    finally:
        connection.redis_connect_func, connection._command_packer = given, packer


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
