"""Lets redis-py set up a connection: completely or not at all, and in bounded time."""

from __future__ import annotations

import _thread
import builtins
import codecs
import socket
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from math import inf
from threading import get_ident
from typing import Any, TypeVar, cast

from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.exceptions import ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

from squidstep_redis.signals import defer_sigalrm, is_raised_by_handler
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.client import has_plain_stream
from squidstep_redis.transport.helper import Helper
from squidstep_redis.transport.retry import RoundTripError, unsent

T = TypeVar("T")

# `getaddrinfo` imports this codec with the first host name. An exception that another thread sets during that import
# leaves the lock of the module held, and every later connection would wait for it.
codecs.lookup("idna")


def end_of_attempt(connection: Any, deadline: float) -> float:
    """Returns when an attempt must have ended that begins now, by the monotonic clock; inf: there is no limit.

    Args:
        connection: the redis-py connection that is opened for it.
        deadline: when the call's timeout ends.
    """
    timeouts = [getattr(connection, name, 0.0) for name in ("socket_connect_timeout", "socket_timeout")]
    return max(deadline, time.monotonic()) + sum(inf if seconds is None else seconds for seconds in timeouts)


def open_connection(connection: Any, limit: float) -> Any:
    """Connects a redis-py connection.

    An interruption between two steps of its handshake leaves a connection that looks ready but has another database or
    no credentials: it is closed. A server that trickles bytes does not extend the timeout of a reply. The connection's
    own retries are off, because their pauses ignore the limit; the store retries by itself.

    SIGALRM is deferred. With RESP3, redis-py asks for a logger, and an exception there could leave logging's lock held.

    Args:
        connection: the connection.
        limit: when its handshake must have ended, by the monotonic clock.

    Raises:
        RoundTripError: it could not be connected; nothing was sent.
    """
    try:
        with defer_sigalrm():
            retry = _given(getattr(connection, "retry", None))
            if retry is not None:
                connection.retry = _NoRetries(retry)
            try:
                if has_plain_stream(cast("type[object]", type(connection))):
                    _connect(connection, limit)
                else:
                    connection.connect()
            finally:
                if retry is not None:
                    connection.retry = retry
    except BaseException as error:
        connection.disconnect()
        failure = unsent(error)
        if failure is not None:
            raise failure from error
        raise
    return connection


def _connect(connection: Any, limit: float) -> None:
    packer, given = connection._command_packer, _given(connection.redis_connect_func)
    provider, sentinels = _given(connection.credential_provider), _given(getattr(connection, "connection_pool", None))

    def set_up() -> None:
        sock = connection._sock
        if connection.socket_timeout is not None:
            connection._sock = LimitedSocket(sock, connection.socket_timeout, limit)
        try:
            connection.on_connect() if given is None else _as_connection(given, connection)
        except TimeoutError as error:
            if time.monotonic() < limit:
                raise
            raise _late() from error
        finally:
            if connection._sock is not None:  # nothing has disconnected it
                _restore_socket(connection, sock)

    attributes = cast("dict[str, Any]", vars(connection))
    attributes.pop("_connect", None)  # an exception from outside may have left it
    connection._connect = _Opener(connection, limit)
    connection.redis_connect_func = _SetUp(set_up, given)
    if provider is not None:
        connection.credential_provider = _Credentials(provider, limit)
    if sentinels is not None:
        connection.connection_pool = _Sentinels(sentinels, limit)
    # hiredis crashes the process if a signal handler raises while it formats an int, such as the database.
    connection._command_packer = PythonRespSerializer(connection._buffer_cutoff, connection.encoder.encode)
    try:
        connection.connect()
    finally:
        connection.redis_connect_func, connection._command_packer = given, packer
        connection.credential_provider = provider
        if sentinels is not None:
            connection.connection_pool = sentinels
        attributes.pop("_connect", None)


def _given(value: Any) -> Any:
    """Returns what belongs to a connection. An exception from outside, after the handshake, has left a replacement."""
    return value.given if isinstance(value, (_NoRetries, _SetUp, _Credentials, _Sentinels)) else value


def _late() -> RoundTripError:
    """Returns an error that ends connecting: for an error of its own, redis-py would try again."""
    return RoundTripError(TimeoutError("Timeout connecting to server"), sent=False)


class _NoRetries(Retry):
    """The retries of a connection while the store connects it, and those that the user has set."""

    def __init__(self, given: Any) -> None:
        super().__init__(NoBackoff(), 0)
        self.given = given


class _SetUp:
    """What redis-py calls to set up a connection, and what it would have called."""

    def __init__(self, set_up: Callable[[], None], given: Any) -> None:
        self._set_up = set_up
        self.given = given

    def __call__(self, _: object) -> None:
        self._set_up()


class _Opener:
    """What redis-py calls to open the socket of a connection.

    Its own method looks up the name without a limit, and tries one address after another, with the whole timeout for
    each. So it runs in a thread if there is a name to look up. A socket that it opens too late is closed.
    """

    def __init__(self, connection: Any, limit: float) -> None:
        self._connection = connection
        self._limit = limit

    def __call__(self) -> socket.socket:
        host = getattr(self._connection, "host", None)  # Sentinel has only now set it
        kind = cast("Any", type(self._connection))
        open_socket = partial(kind._connect, self._connection)
        if not isinstance(host, str) or _needs_no_lookup(host) or _is_patched_in_part():
            return open_socket()
        return _until(self._limit, open_socket, _close)


def _needs_no_lookup(host: str) -> bool:
    """Whether a host is an IP address, or this machine, so that it has one address and is found at once."""
    if host == "localhost":
        return True
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError, ValueError):
            socket.inet_pton(family, host)
            return True
    return False


def _is_patched_in_part() -> bool:
    """Whether gevent has replaced sockets, but not threads: a socket then belongs to the thread that has opened it."""
    return socket.socket.__module__ != "socket" and _thread.start_new_thread.__module__ == "_thread"


def _close(sock: socket.socket) -> None:
    sock.close()


class _Credentials:
    """The user's provider of credentials, as redis-py sees it while it sets up a connection."""

    def __init__(self, provider: Any, limit: float) -> None:
        self.given = provider
        self._limit = limit

    def get_credentials(self) -> Any:
        """Returns the credentials; raises a redis-py error if there are none, or RoundTripError if it takes too long.

        If it does, the provider continues: it may cache the credentials for the next attempt.
        """
        return _until(self._limit, partial(_as_connection, self.given.get_credentials))


class _Sentinels:
    """What finds the address of a Sentinel service, as redis-py sees it while it sets up a connection."""

    def __init__(self, sentinels: Any, limit: float) -> None:
        self.given = sentinels
        self._limit = limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)

    def get_master_address(self) -> Any:
        """Asks one sentinel after another; raises RoundTripError if that takes too long."""
        return _until(self._limit, self.given.get_master_address)


def _until(limit: float, function: Callable[[], T], discard: Callable[[T], object] = lambda _: None) -> T:
    """Calls a function that takes part in connecting, and may take any time; returns what it returns.

    Args:
        limit: when to give up waiting for it, by the monotonic clock. It continues in its own thread.
        function: the function.
        discard: is called with a result that nothing waits for any more.

    Raises:
        RoundTripError: there is no result by then.
    """
    if limit == inf:
        return function()
    results: deque[T] = deque()
    is_abandoned: list[bool] = []
    call, caller = partial(copy_context().run, function), get_ident()

    def run() -> None:
        try:
            results.append(call())
        except Exception:
            raise
        except BaseException as error:  # such as CancelledError: in a thread of its own, it interrupts nothing
            if get_ident() == caller:
                raise
            raise ConnectionError(f"Connecting failed with {type(error).__name__}") from error
        if is_abandoned:
            discard_result()

    def discard_result() -> None:
        with suppress(IndexError):  # each thread does it after the other may have, so that one of them finds the result
            discard(results.pop())

    try:
        helper = Helper("squidstep-connect", run)
        helper.wait(limit)
        if helper.error is not None:
            raise helper.error
        if not results:
            raise _late()
        return results.pop()
    except BaseException:
        is_abandoned.append(True)
        discard_result()
        raise


def _as_connection(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a user's function that takes part in connecting: if it raises, connecting has failed.

    An exception of a signal handler is raised as it is.
    """
    try:
        return function(*args)
    except RedisError:
        raise
    except Exception as error:
        if is_raised_by_handler(error):
            raise
        raise ConnectionError(f"{_name_of(function)} failed with {type(error).__name__}") from error


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


@contextmanager
def limited_replies(connection: Any, limit: float) -> Generator[Callable[[], object]]:
    """Limits how long redis-py reads each reply in the `with` block. Call the block's variable before each reply.

    Args:
        connection: a redis-py connection. If its class is not redis-py's own, or it has no timeout, nothing
            changes.
        limit: when all replies must have been read, by the monotonic clock.
    """
    if not has_plain_stream(cast("type[object]", type(connection))) or connection.socket_timeout is None:
        yield int
        return
    sock = connection._sock
    if sock is None:  # redis-py would connect it in unbounded time
        raise ConnectionError("Connection closed by another thread.")
    limited = LimitedSocket(sock, connection.socket_timeout, limit)
    _set_socket(connection, limited)
    try:
        yield limited.begin_reply
    finally:
        if connection._sock is limited:  # it was neither disconnected nor, by a health check, reconnected
            _restore_socket(connection, sock)


def _restore_socket(connection: Any, sock: socket.socket) -> None:
    _set_socket(connection, sock)
    try:
        sock.settimeout(connection.socket_timeout)
    except OSError:
        if sock.fileno() >= 0:  # so a signal handler raised it
            raise
        connection._sock = None  # another thread has disconnected it


def _set_socket(connection: Any, sock: Any) -> None:
    parser = connection._parser
    holder: Any
    for holder in (connection, parser, getattr(parser, "_buffer", None)):
        if hasattr(holder, "_sock"):
            holder._sock = sock


class LimitedSocket:
    """The socket of a connection while redis-py reads replies: redis-py's own timeout is for each piece of a reply."""

    def __init__(self, sock: socket.socket, timeout: float, limit: float) -> None:
        """Begins with the first reply.

        Args:
            sock: the socket.
            timeout: seconds for each reply.
            limit: when all replies must have been read, by the monotonic clock.
        """
        self._sock = sock
        self._timeout = timeout
        self._limit = limit
        self.begin_reply()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, data: Any) -> None:
        """Sends a command; its reply has the whole timeout."""
        self.begin_reply()
        self._limit_wait()
        self._sock.sendall(data)
        self.begin_reply()

    def begin_reply(self) -> None:
        """Gives the next reply the whole timeout."""
        self._until = min(time.monotonic() + self._timeout, self._limit)

    def recv_into(self, *args: Any) -> int:
        """Reads a piece of a reply."""
        self._limit_wait()
        return self._sock.recv_into(*args)

    def recv(self, *args: Any) -> bytes:
        """Reads a piece of a reply."""
        self._limit_wait()
        return self._sock.recv(*args)

    def _limit_wait(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:  # a server that trickles bytes always sends some in time
            raise builtins.TimeoutError
        self._sock.settimeout(left)
