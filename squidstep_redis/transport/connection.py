"""The connections of the blocking transport: how bytes get to one server and replies come back.

There are three ways, with one interface. `OwnConnections` opens connections through redis-py (address, TLS,
credentials, Sentinel), and writes and reads them itself. `PooledConnections` borrows from the pool of a user's client.
`HookedClient` calls a client's `execute_command`, because something hooks it. `cluster.py` adds clusters.

A connection is discarded, and not used again, after a failure, an interruption, a reply to another call, or a fork. It
is also discarded if the server is no longer a primary, together with the idle connections to that server.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from math import inf
from threading import get_ident
from typing import Any, Final

from redis.exceptions import AskError, RedisError, ResponseError

from squidstep_redis.protocol.call import OPTIONS, Call, Command
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.client import has_plain_stream, idle_of, own_connection, pools_of, probed
from squidstep_redis.transport.handshake import end_of_attempt, limited_replies, open_connection
from squidstep_redis.transport.pool import KNOWN, Loan, borrow, is_known, needs_release, open_one, wake
from squidstep_redis.transport.retry import (
    UNREADABLE,
    RoundTripError,
    as_redis_error,
    check_resent,
    is_demotion,
    undecided,
    unsent,
)
from squidstep_redis.transport.spin import Spin, callers
from squidstep_redis.transport.stream import OwnStream, Packed, Read, is_quiet, stream_of

Halves = Generator[None, None, list[Any]]
"""A round trip: it sends until its first yield, and then reads."""

_MAX_IDLE: Final = 16
_FRESH_SECONDS: Final = 1.0


class Connections(ABC):
    """Sends commands to one server.

    Attributes:
        loaded: the digests of the scripts that batches have loaded, unless the server has lost them since.
    """

    loaded: frozenset[bytes] = frozenset()

    @abstractmethod
    def send(self, commands: Sequence[Command], read: Read, deadline: float = inf) -> list[Any]:
        """Sends commands in one write and reads their replies; an error of the server is a reply.

        Args:
            commands: tuples of words.
            read: decodes a reply, given its index and the reply, while the server works on the next ones.
            deadline: when the call's timeout ends, by the monotonic clock. Until then, it waits for a pool.

        Returns:
            What `read` returned.

        Raises:
            RoundTripError: connecting, sending or reading failed.
            ReplyMismatchError: raised by `read`.
        """

    def in_halves(self, commands: Sequence[Command], read: Read, deadline: float) -> Halves:
        """Does what `send` does in two halves, for several servers side by side. Closing it drops the connection."""
        yield
        return self.send(commands, read, deadline)

    def execute(self, command: Command, call: Call[Any], deadline: float) -> Any:
        """Sends the command of one call, as `send` does; returns what `call.outcome` returns."""
        return self.send((command,), lambda _, reply: call.outcome(reply), deadline)[0]

    def node_of(self, key: bytes) -> Connections:
        """Returns the connections to the server of a key."""
        return self

    def route(self, calls: Sequence[Call[Any]]) -> list[tuple[Connections, Sequence[int]]]:
        """Groups calls by the server of their keys: pairs of the connections to it, and the indexes of its calls."""
        return [(self, range(len(calls)))]

    def servers(self) -> dict[str, Connections]:
        """Returns the connections to each server, by its name."""
        return {"": self}

    def redirect(self, error: AskError) -> Connections | None:
        """Learns the node of a slot that has moved; or returns the node to which the keys of a slot are moving.

        Raises:
            AskError: the client is not a cluster client.
            RoundTripError: the node could not be learned.
        """
        raise error

    def refresh(self, since: float, deadline: float) -> None:
        """Learns which node serves each slot, unless that happened after `since`; no error is raised.

        Args:
            since: when the last attempt began, by the monotonic clock.
            deadline: when the call's timeout ends.
        """

    def has_idle(self) -> bool:
        """Whether a round trip can begin without connecting."""
        return True

    def connect(self, deadline: float) -> None:
        """Opens a connection that the next round trip can use. It raises what `send` raises."""

    def close(self) -> None:
        """Closes the connections that were opened here."""


class OwnConnections(Connections):
    """Connections that redis-py opens and that are written and read here.

    A connection is used again without a check for a second after its last use: the check costs a third of a call. If
    the server closed it within that second, the call fails, and is retried like any other.
    """

    def __init__(self, client: Any, default_timeout: float | None = None) -> None:
        """Opens nothing yet.

        Args:
            client: has the server's address.
            default_timeout: seconds to wait for a connection and for a reply, if the client has no limit.
        """
        self._client = client
        self._default_timeout = default_timeout
        self._idle: deque[tuple[OwnStream, float]] = deque()
        self._spin = Spin()
        self._pid = os.getpid()

    def send(self, commands: Sequence[Command], read: Read, deadline: float = inf) -> list[Any]:
        thread = get_ident()
        connection, idle = self._take_idle(_FRESH_SECONDS) or self._open(deadline), self._idle
        is_reusable = False
        try:
            callers.add(thread)
            connection.write(commands, deadline)
            if len(commands) == 1:
                self._spin.wait(connection.socket)
            results = connection.read(len(commands), read)
            is_reusable = True
        except RoundTripError:
            self._discard_idle()  # they lead to the same server
            raise
        finally:
            if not is_reusable:
                connection.close()
            callers.discard(thread)
        self._leave_idle(connection, idle)
        return results

    def in_halves(self, commands: Sequence[Command], read: Read, deadline: float) -> Halves:
        connection, idle = self._take_idle(_FRESH_SECONDS) or self._open(deadline), self._idle
        is_reusable = False
        try:
            connection.write(commands, deadline)
            yield
            results = connection.read(len(commands), read)
            is_reusable = True
        except RoundTripError:
            self._discard_idle()
            raise
        finally:
            if not is_reusable:
                connection.close()
        self._leave_idle(connection, idle)
        return results

    def has_idle(self) -> bool:
        connection = self._take_idle(0)
        if connection is not None:
            self._idle.append((connection, time.monotonic()))
        return connection is not None

    def connect(self, deadline: float) -> None:
        self._leave_idle(self._open(deadline), self._idle)

    def close(self) -> None:
        """Closes the idle connections, and those in use as soon as they are not."""
        self._discard_idle()
        self._idle = deque()

    def _open(self, deadline: float) -> OwnStream:
        try:
            connection = own_connection(self._client, self._default_timeout)
        except OSError as error:
            failure = unsent(error)
            if failure is None:
                raise
            raise failure from error
        limit = end_of_attempt(connection, deadline)
        stream = OwnStream(open_connection(connection, limit))
        stream.attempt_ends = limit
        return stream

    def _take_idle(self, fresh_seconds: float) -> OwnStream | None:
        """Returns an idle connection, if there is one. It is checked unless it was used so many seconds ago."""
        if self._pid != os.getpid():
            self._idle = deque()  # the old ones belong to the parent; closing them here leaves them open there
            self._pid = os.getpid()
        while True:
            try:
                connection, since = self._idle.pop()
            except IndexError:
                return None
            if time.monotonic() - since < fresh_seconds or connection.is_quiet():
                return connection
            connection.close()

    def _leave_idle(self, connection: OwnStream, idle: deque[tuple[OwnStream, float]]) -> None:
        """Keeps a connection for the next round trip.

        Args:
            connection: the connection.
            idle: where those were that were idle when it was taken. `close` has replaced them since, perhaps.
        """
        connection.attempt_ends = inf
        if connection.is_demoted:
            self._discard_idle()
        elif idle is self._idle and len(idle) < _MAX_IDLE and not connection.has_left():
            idle.append((connection, time.monotonic()))
            return
        connection.close()

    def _discard_idle(self) -> None:
        while self._idle:
            try:
                connection, _ = self._idle.pop()
            except IndexError:  # another thread took it
                return
            connection.close()


class PooledConnections(Connections):
    """The pool of a user's client: a connection is borrowed for one round trip."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._spin = Spin()

    def send(self, commands: Sequence[Command], read: Read, deadline: float = inf) -> list[Any]:
        thread = get_ident()
        callers.add(thread)
        try:
            halves = self.in_halves(commands, read, deadline)
            try:
                next(halves)
                return second_half(halves)
            except BaseException:
                halves.close()  # the garbage collector would do it late, and at any instruction
                raise
        finally:
            callers.discard(thread)

    def in_halves(self, commands: Sequence[Command], read: Read, deadline: float) -> Halves:
        loan = borrow(self._pool, deadline)
        connection = loan.connection
        is_reusable = False
        is_demoted = False
        try:
            stream = stream_of(connection)
            if stream is None:
                yield
                results, is_demoted = _round_trip(loan, commands, read, deadline)
            else:
                stream.attempt_ends = loan.attempt_ends
                stream.write(commands, deadline)
                yield
                if len(commands) == 1:
                    self._spin.wait(stream.socket)
                results, is_demoted = stream.read(len(commands), read), stream.is_demoted
            is_reusable = not (is_demoted or getattr(connection, "_should_reconnect", False))
            if needs_release(self._pool, connection):
                loan.leave_to_pool()
        finally:
            try:
                if not is_reusable:
                    connection.disconnect()
            finally:
                if not is_reusable:
                    connection._sock = None  # also if that was interrupted
                try:
                    loan.give_back()
                except BaseException:
                    loan.give_back_again()
                    raise
                wake(self._pool)
        if is_demoted:
            self._disconnect_idle()
        return results

    def has_idle(self) -> bool:
        return False  # `borrow` shows it

    def connect(self, deadline: float) -> None:
        open_one(self._pool, deadline)

    def _disconnect_idle(self) -> None:
        for connection in idle_of(self._pool):
            connection.disconnect()


def second_half(halves: Halves) -> list[Any]:
    """Reads the replies of a round trip whose commands were sent; returns what `read` returned for each."""
    try:
        next(halves)
    except StopIteration as end:
        return end.value
    raise AssertionError("it yields once")


class HookedClient(Connections):
    """A client whose `execute_command` has to see every command."""

    def __init__(self, client: Any) -> None:
        self._client = client
        pool = getattr(client, "connection_pool", None)  # a cluster client has none
        is_plain = pool is not None and getattr(pool, "cache", None) is None and has_plain_stream(pool.connection_class)
        self._pool = pool if is_plain else None

    def send(self, commands: Sequence[Command], read: Read, deadline: float = inf) -> list[Any]:
        self._connect(deadline)
        name, plain = probed(commands)
        is_reusable = False
        try:
            try:
                if len(plain) == 1:
                    replies = [_reply_or_error(self._client, plain[0])]
                else:
                    pipeline: Any = self._client.pipeline(transaction=False)
                    for command in plain:
                        pipeline.execute_command(*command, **OPTIONS)
                    replies = pipeline.execute(raise_on_error=False)
            except Exception as error:
                cause = undecided(as_redis_error(error), name.times_packed * len(plain))
                raise RoundTripError(cause, sent=name.times_packed > 0) from error
            if name.times_packed > 1:
                check_resent(replies, name.times_packed)
            results = [read(index, reply) for index, reply in enumerate(replies)]
            is_reusable = not any(isinstance(reply, Exception) and is_demotion(reply) for reply in replies)
        finally:
            # The client has released the connection, and would use it for its next command, even if its handshake was
            # interrupted and it has another database or no credentials.
            if not is_reusable:
                for pool in pools_of(self._client):
                    for connection in idle_of(pool):
                        connection.disconnect()
        return results

    def _connect(self, deadline: float) -> None:
        """Sets up a connection for the client's next command, unless the pool has one that is open and quiet.

        If the client's own set-up is interrupted, it leaves a half-made connection to another thread; and hiredis
        crashes the process if a signal handler raises while it formats the database's number.
        """
        pool = self._pool
        if pool is None or not is_known(pool, KNOWN):
            return
        if not any(is_quiet(connection._sock) for connection in idle_of(pool)[-1:]):
            open_one(pool, deadline)


def _reply_or_error(client: Any, command: Sequence[Any]) -> Any:
    try:
        return client.execute_command(*command, **OPTIONS)
    except ResponseError as error:
        return error


def _round_trip(loan: Loan, commands: Sequence[Command], read: Read, deadline: float) -> tuple[list[Any], bool]:
    """Sends commands with redis-py's methods; returns the results, and whether the server is no longer a primary."""
    connection = loan.connection
    packed = Packed(commands)
    results: list[Any] = []
    is_demoted = False
    limit = min(max(deadline, time.monotonic()) + (connection.socket_timeout or inf), loan.attempt_ends)
    try:
        with limited_replies(connection, limit) as begin_reply:
            connection.send_packed_command(packed)
            for index in range(len(commands)):
                begin_reply()
                try:
                    reply = connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    reply = error
                    is_demoted = is_demoted or is_demotion(error)
                results.append(read(index, reply))
    except (RedisError, *UNREADABLE) as error:
        raise RoundTripError(undecided(as_redis_error(error), len(commands)), sent=packed.was_taken) from error
    return results, is_demoted
