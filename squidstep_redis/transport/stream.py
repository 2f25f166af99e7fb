"""One connection of the blocking transport: a socket that redis-py opened, written and read without it."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Any, Final, cast

import hiredis
from redis._parsers import hiredis as redis_parser
from redis.exceptions import (
    ConnectionError,
    InvalidResponse,
    RedisError,
    TimeoutError,
)

from squidstep_redis.protocol.call import Command
from squidstep_redis.signals import is_raised_by_handler
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.client import has_plain_stream
from squidstep_redis.transport.retry import UNREADABLE, RoundTripError, is_demotion

Read = Callable[[int, Any], Any]

_hiredis: Any = hiredis  # parts of its types are unknown
pack_command: Callable[[Command], bytes] = _hiredis.pack_command

_CHUNK_BYTES: Final = 4_096  # size of a write: the server starts on it while the next commands are packed
_READ_SIZE: Final = 65_536
_redis_parser: Any = redis_parser
_INCOMPLETE: Final = getattr(_redis_parser, "NOT_ENOUGH_DATA", False)  # older versions of redis-py use False
MORE: Final = object()
PUSH: Final = getattr(_hiredis, "PushNotification", ())  # of RESP3; before hiredis 3.2 there is none


class Stream:
    """The socket and the reader of a redis-py connection, written and read without it.

    A server that trickles bytes, or reads them slowly, extends neither a reply's timeout nor the call's.

    Attributes:
        attempt_ends: when the attempt ends that has opened the connection, by the monotonic clock.
        is_demoted: whether the server replied that it is no longer a primary.
        has_left: returns whether more replies arrived than were expected.
        socket: the socket.
    """

    __slots__ = (
        "_buffer", "_connection", "_limit", "_more", "_reader", "_timeout", "attempt_ends", "has_left", "is_demoted",
        "socket",
    )  # fmt: skip

    def __init__(self, connection: Any, sock: socket.socket, reader: Any, more: object, buffer: bytearray) -> None:
        """Begins with a connected connection.

        Args:
            connection: redis-py's connection.
            sock: its socket.
            reader: hiredis' reader.
            more: what the reader returns if it has no complete reply.
            buffer: receives bytes from the socket.
        """
        self._connection = connection
        self.socket = sock
        self._timeout: float | None = connection.socket_timeout
        self._reader = reader
        self._more = more
        self._buffer = buffer
        self._limit = self.attempt_ends = inf
        self.is_demoted = False
        self.has_left: Callable[[], bool] = reader.has_data

    def write(self, commands: Sequence[Command], deadline: float) -> None:
        """Sends commands. They must be written, and their replies read, within a reply's timeout after the deadline."""
        limit = max(deadline, time.monotonic()) + (inf if self._timeout is None else self._timeout)
        self._limit = min(limit, self.attempt_ends)
        sent = False
        try:
            if len(commands) == 1:
                self._write(pack_command(commands[0]))
                return
            for chunk in chunks(commands):
                self._write(chunk, is_first=not sent)
                sent = True
        except OSError as error:
            if not _is_raised_here(error):
                raise
            raise RoundTripError(_named(error, "writing"), sent=sent) from error

    def read(self, count: int, read: Read) -> list[Any]:
        """Reads the replies to the commands that were sent; returns what `read` returns for each."""
        try:
            return [read(index, self._next()) for index in range(count)]
        except OSError as error:
            if not _is_raised_here(error):
                raise
            raise RoundTripError(_named(error, "reading"), sent=True) from error

    def is_quiet(self) -> bool:
        """Whether it is open and nothing is left to read."""
        if type(self.socket) is not socket.socket:  # TLS may hold bytes back
            return self._is_encryption_quiet()
        return is_quiet(self.socket) and not self.has_left()

    def _is_encryption_quiet(self) -> bool:
        try:
            return not self._connection.can_read()
        except (RedisError, OSError) as error:  # the server has closed it
            for each in (error, error.__context__):  # redis-py wraps what a handler raises, too
                if each is not None and is_raised_by_handler(each):
                    raise each from None
            return False

    def _write(self, data: bytes, *, is_first: bool = True) -> None:
        written = self._send(data) if is_first else 0
        if written < len(data):
            try:
                self._write_rest(memoryview(data)[written:])
            except OSError as error:
                if not _is_raised_here(error):
                    raise
                raise RoundTripError(_named(error, "writing"), sent=True) from error

    def _write_rest(self, data: memoryview) -> None:
        while data:
            left = self._limit - time.monotonic()
            if left <= 0:  # a server that reads slowly always reads some in time
                raise RoundTripError(TimeoutError("Timeout writing"), sent=True)
            is_short = self._timeout is not None and left < self._timeout
            if is_short:
                self.socket.settimeout(max(0.001, left))
            try:
                data = data[self._send(data) :]
            finally:
                if is_short:
                    self.socket.settimeout(self._timeout)

    def _send(self, data: bytes | memoryview) -> int:
        """Sends at least one byte; returns how many were sent."""
        return self.socket.send(data)

    def _next(self) -> Any:
        """Returns one reply; an error of the server is a reply, unless it is about the connection."""
        until: float | None = None
        while True:
            try:
                reply = self._reader.gets(False)
            except (InvalidResponse, *UNREADABLE) as error:  # of a redirect without an address, for example
                if not _is_raised_here(error):
                    raise
                raise RoundTripError(ConnectionError(f"Protocol error: {error}"), sent=True) from error
            if reply is self._more:
                if self._timeout is None:
                    self._receive()
                elif until is None:
                    until = min(time.monotonic() + self._timeout, self._limit)
                    self._receive() if until < self._limit else self._receive_until(until)
                else:
                    self._receive_until(until)
            elif isinstance(reply, Exception):
                if is_demotion(reply):
                    self.is_demoted = True
                elif isinstance(reply, ConnectionError):
                    raise RoundTripError(reply, sent=True)
                return reply
            elif type(reply) is PUSH:  # a managed service's notifications
                self._connection._parser.handle_push_response(reply)
            else:
                return reply

    def _receive(self) -> None:
        self._feed(self.socket.recv_into(self._buffer))

    def _feed(self, count: int) -> None:
        """Passes what was received to the reader."""
        if not count:
            raise RoundTripError(ConnectionError("Connection closed by server."), sent=True)
        self._reader.feed(self._buffer, 0, count)

    def _receive_until(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0:  # a server that trickles bytes always sends some in time
            raise RoundTripError(TimeoutError("Timeout reading"), sent=True)
        self.socket.settimeout(max(0.001, left))
        try:
            self._receive()
        finally:
            self.socket.settimeout(self._timeout)


class OwnStream(Stream):
    """A connection that nothing but the store uses."""

    __slots__ = ("_descriptor",)

    def __init__(self, connection: Any) -> None:
        super().__init__(connection, connection._sock, new_reader(connection), MORE, bytearray(_READ_SIZE))
        # Before each send and recv, Python polls a socket that has a timeout. Here, only if the socket is not ready.
        is_plain = type(self.socket) is socket.socket and hasattr(os, "readv")
        self._descriptor = self.socket.fileno() if is_plain else None  # None: of a TLS socket, or on Windows

    def close(self) -> None:
        self._connection.disconnect()

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self.socket.send(data) if self._descriptor is None else os.write(self._descriptor, data)
        except BlockingIOError:
            return self.socket.send(data)

    def _receive(self) -> None:
        if self._descriptor is None:
            super()._receive()
            return
        try:
            count = os.readv(self._descriptor, (self._buffer,))
        except BlockingIOError:
            count = self.socket.recv_into(self._buffer)
        self._feed(count)


def stream_of(connection: Any) -> Stream | None:
    """Returns the stream of a borrowed connection; None if its own methods have to write and read it.

    Raises:
        RoundTripError: another thread has closed the connection, as `disconnect` of its pool does.
    """
    kind = cast("type[object]", type(connection))
    parser: Any = connection._parser
    is_hiredis = type(parser) is _redis_parser._HiredisParser
    if not is_hiredis or connection.health_check_interval or not has_plain_stream(kind):
        return None
    sock, reader = connection._sock, parser._reader
    if reader is None or sock is None:
        raise RoundTripError(ConnectionError("Connection closed by another thread."), sent=False)
    return Stream(connection, sock, reader, _INCOMPLETE, parser._buffer)


def is_quiet(sock: socket.socket | None) -> bool:
    """Whether a socket is open and has nothing to read. Another thread may close it at any moment."""
    descriptor = -1 if sock is None else sock.fileno()
    if descriptor < 0:
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return not poll.poll(0)


class Packed(Iterable[bytes]):
    """Commands for redis-py's `send_packed_command`, which iterates over them right before it writes them.

    Attributes:
        was_taken: whether anything may have been written.
    """

    def __init__(self, commands: Sequence[Command]) -> None:
        self._commands = commands
        self.was_taken = False

    def __iter__(self) -> Iterator[bytes]:
        for chunk in chunks(self._commands):
            self.was_taken = True
            yield chunk


def chunks(commands: Iterable[Command]) -> Iterator[bytes]:
    """Packs commands in chunks."""
    packed: list[bytes] = []
    size = 0
    for command in commands:
        data = pack_command(command)
        packed.append(data)
        size += len(data)
        if size >= _CHUNK_BYTES:
            yield b"".join(packed)
            packed, size = [], 0
    if packed:
        yield b"".join(packed)


def new_reader(connection: Any) -> Any:
    """Returns a reader for the replies on a redis-py connection, with redis-py's errors."""
    return _hiredis.Reader(protocolError=InvalidResponse, replyError=connection._parser.parse_error, notEnoughData=MORE)


def _is_raised_here(error: Exception) -> bool:
    """Whether the socket or the reader raised it, and not a signal handler that was called meanwhile."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""
    return module in (__name__, "ssl") or module.startswith(("gevent.", "redis."))


def _named(error: OSError, doing: str) -> RedisError:
    if isinstance(error, socket.timeout):
        return TimeoutError(f"Timeout {doing}")
    return ConnectionError(f"Error while {doing}: {error}")
