"""One connection of the asyncio transport, on which the round trips of many tasks overlap.

What tasks send within one iteration of the event loop shares a few writes: the server works on the first commands while
the loop still runs the tasks that send more. The replies are matched with the round trips in order. The reply to a
cancelled round trip is read and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from math import inf
from threading import get_ident
from typing import Any, Final

from redis.exceptions import ConnectionError, InvalidResponse, RedisError, TimeoutError

from squidstep_redis.signals import is_raised_by_handler
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.retry import UNREADABLE, RoundTripError, is_demotion
from squidstep_redis.transport.spin import SECONDS, Spin, callers, let_others_run
from squidstep_redis.transport.stream import MORE, PUSH, new_reader

_MAX_PENDING: Final = 10_000  # calls on one connection
_MAX_UNSENT_BYTES: Final = 1_048_576  # of the calls that are written together
_SHORTEST_CHECK: Final = 0.01  # seconds between two looks at all round trips


class _Pending:
    """One round trip on a connection: its future receives the replies."""

    __slots__ = ("count", "data", "deadline", "future", "replies", "size")

    def __init__(self, future: asyncio.Future[list[Any]], data: bytes, count: int, deadline: float) -> None:
        self.future = future
        self.data = data
        self.size = len(data)
        self.count = count
        self.deadline = deadline
        self.replies: list[Any] = []


class _Waiter:
    """A round trip that waits for room on a connection.

    Attributes:
        turn: is resolved when it need not wait any longer.
        size: bytes of its commands.
        is_granted: whether it may be submitted; until then, its room is reserved.
    """

    __slots__ = ("is_granted", "size", "turn")

    def __init__(self, turn: asyncio.Future[None], size: int) -> None:
        self.turn = turn
        self.size = size
        self.is_granted = False


class Link(asyncio.Protocol):
    """A connection that redis-py opened, on which round trips overlap.

    The exception of a signal handler may arrive at any line. In a callback, the event loop would log it and continue.
    So no callback forgets a round trip before its future has an outcome, and an interrupted one closes the connection.
    A callback that is interrupted before its first line has no effect: a reply or a second timer does its work.

    Attributes:
        is_open: whether it can be used for another round trip.
        is_demoted: whether the server replied that it is no longer a primary.
    """

    def __init__(self, connection: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout: float | None = connection.socket_timeout
        self._reader: Any = new_reader(connection)
        self._writer: asyncio.StreamWriter = connection._writer  # a writer closes its transport when it is collected
        self._transport: Any = self._writer.transport
        connection._reader = connection._writer = None
        self._transport.set_protocol(self)
        self._unsent: list[_Pending] = []
        self._unsent_bytes = 0
        self._sent: deque[_Pending] = deque()
        self._is_paused = False
        self._waiters: deque[_Waiter] = deque()
        self._granted_bytes = 0
        self._granted = 0
        self._timers: tuple[asyncio.TimerHandle, ...] = ()
        self._progress_at = 0.0
        self._refused = 0  # how many of the last round trips a transport did not accept that is closed
        self._never_left = 0  # how many of the last round trips have not left, when all fail
        self._spin = Spin()
        self._spinning_since: float | None = None
        self.is_demoted = False
        self.is_open = not self._transport.is_closing()

    @property
    def has_room(self) -> bool:
        """Whether it is open, and a round trip does not have to wait until the server has read or replied more."""
        return not self._waiters and self._may_grant()

    def _may_grant(self) -> bool:
        """Whether one more of those that wait may be submitted, besides those that are about to be."""
        return (
            self.is_open
            and not (self._is_paused and self._sent)  # without any, an interruption kept it from being resumed
            and self._unsent_bytes + self._granted_bytes < _MAX_UNSENT_BYTES
            and len(self._sent) + len(self._unsent) + self._granted < _MAX_PENDING
        )

    async def room(self, size: int, deadline: float) -> None:
        """Waits, behind those that wait already, until a round trip may be submitted. Submit it at once.

        Args:
            size: bytes of its commands.
            deadline: when the call's timeout ends.

        Raises:
            RoundTripError: there is no room until then.
        """
        waiter = _Waiter(self._loop.create_future(), size)
        self._waiters.append(waiter)
        timer = None
        try:
            if deadline < inf:
                timer = self._loop.call_later(deadline - time.monotonic(), _resolve, waiter.turn)
            self._wake()
            await waiter.turn
            if not waiter.is_granted and self.is_open:
                raise RoundTripError(TimeoutError("Timeout waiting for the server to read earlier calls"), sent=False)
        except BaseException:
            _resolve(waiter.turn)  # it is passed over from now on
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if waiter.is_granted:
                self._granted -= 1
                self._granted_bytes -= size
            if self._waiters:
                self._wake()

    def submit(self, data: bytes, count: int, deadline: float) -> asyncio.Future[list[Any]]:
        """Sends packed commands, at the latest after this iteration of the loop, together with those of other tasks.

        Args:
            data: the commands.
            count: how many there are.
            deadline: when the call's timeout ends.

        Returns:
            A future of the replies; or of a RoundTripError. Once cancelled, the replies are dropped.
        """
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if not self.is_open:
            future.set_exception(RoundTripError(ConnectionError("Connection closed by server."), sent=False))
            return future
        unsent = self._unsent
        # Keeps the server busy; each write of a turn is twice as large.
        is_due = len(unsent) + 1 >= len(self._sent)
        if not is_due and not unsent:
            self._loop.call_soon(self._flush)
        unsent.append(_Pending(future, data, count, deadline))
        self._unsent_bytes += len(data)
        if is_due:
            self._flush()
        return future

    def close(self) -> None:
        """Closes the connection; round trips in progress fail."""
        self._fail(ConnectionError("Connection closed by its owner."))

    def retire(self) -> None:
        """Lets no further round trip begin."""
        self.is_open = False
        if not self._sent and not self._unsent:
            self.close()

    def _flush(self) -> None:
        try:
            pending = [round_trip for round_trip in self._unsent if not round_trip.future.done()]
            if not pending:
                self._unsent.clear()
                self._unsent_bytes = 0
                if self.is_open:
                    self._wake()
                else:
                    self.retire()
                return
            if not self._sent:
                self._progress_at = self._loop.time()
                if len(pending) == 1 and self._spinning_since is None:
                    self._begin_to_stay_awake()
            if not self._timers and self._timeout is not None:
                self._arm(self._timeout)
            data = pending[0].data if len(pending) == 1 else b"".join([each.data for each in pending])
            self._sent.extend(pending)
            self._unsent.clear()
            self._unsent_bytes = 0
            self._transport.write(data)
            if self._transport.is_closing():
                self.is_open = False
                self._refused = len(pending)
                self._transport.abort()
            for round_trip in pending:
                round_trip.data = b""
            if self._waiters:
                self._wake()
        except BaseException:
            self._fail(_interruption())
            raise

    def _begin_to_stay_awake(self) -> None:
        thread = get_ident()
        callers.add(thread)
        begun = self._spinning_since = self._spin.begin()
        if begun is None:
            callers.discard(thread)
        else:
            self._loop.call_soon(self._stay_awake, begun)

    def _stay_awake(self, begun: float) -> None:
        """Keeps the event loop from sleeping until the reply arrives or the time is over. Other tasks continue."""
        is_late = self._loop.time() >= self._progress_at + SECONDS
        if self._sent and not is_late:
            let_others_run()
            self._loop.call_soon(self._stay_awake, begun)
        else:
            self._spinning_since = None
            callers.discard(get_ident())
            self._spin.end(begun, in_time=not self._sent)

    def _arm(self, seconds: float) -> None:
        """Sets two timers: an interruption may end the callback of one of them before its first line."""
        earlier, call_later = self._timers, self._loop.call_later
        self._timers = (
            call_later(seconds, self._check_progress),
            call_later(seconds + _SHORTEST_CHECK, self._check_progress),
        )
        for timer in earlier:
            timer.cancel()

    def _disarm(self) -> None:
        timers, self._timers = self._timers, ()
        for timer in timers:
            timer.cancel()

    def _check_progress(self) -> None:
        """Fails all round trips if the server has completed no reply within the timeout.

        A batch whose replies arrive slowly, but within the timeout, exceeds its call's deadline by no more than that.
        Nor does a round trip that waits for earlier ones, whose calls may have later deadlines.
        """
        if not self._sent or self._timeout is None:
            self._disarm()
            return
        try:
            self._check_each(self._timeout)
        except BaseException:
            self._fail(_interruption())
            raise

    def _check_each(self, timeout: float) -> None:
        now = time.monotonic()
        left = self._progress_at + timeout - self._loop.time()
        left = min(left, self._sent[0].deadline + timeout - now)
        if left <= 0:
            self._fail(TimeoutError("Timeout reading from socket"))
            return
        for round_trip in self._sent:
            left_of_this = round_trip.deadline + timeout - now
            if left_of_this < left and not round_trip.future.done():
                if left_of_this > 0:
                    left = left_of_this
                else:  # its replies are dropped
                    late = RoundTripError(TimeoutError("Timeout waiting for the replies to earlier calls"), sent=True)
                    round_trip.future.set_exception(late)
        self._arm(max(left, _SHORTEST_CHECK))

    def data_received(self, data: bytes) -> None:
        """Matches replies with round trips, in order."""
        sent, gets = self._sent, self._reader.gets
        try:
            self._reader.feed(data)
            reply = gets()
            if reply is not MORE:
                self._progress_at = self._loop.time()
            while reply is not MORE:
                if type(reply) is not PUSH:
                    if isinstance(reply, Exception):
                        if is_demotion(reply):
                            self.is_open, self.is_demoted = False, True
                        elif isinstance(reply, ConnectionError):
                            self._fail_after(reply)
                            return
                    if not sent:
                        self._fail(ConnectionError("Unexpected reply."))
                        return
                    round_trip = sent[0]
                    round_trip.replies.append(reply)
                    if len(round_trip.replies) == round_trip.count:
                        if not round_trip.future.done():
                            round_trip.future.set_result(round_trip.replies)
                        sent.popleft()
                reply = gets()
            self._continue()
        except (InvalidResponse, *UNREADABLE) as error:
            self._fail(ConnectionError(f"Protocol error: {error}"))
        except BaseException:
            self._fail(_interruption())
            raise

    def _continue(self) -> None:
        if self._unsent and not self._sent:  # an interruption has kept `_flush` from its first line
            self._flush()
        if not self.is_open:
            self.retire()
        if self._waiters:
            self._wake()

    def _fail_after(self, reply: ConnectionError) -> None:
        """Fails all round trips after a reply that is about the connection, such as LOADING.

        Such a reply refuses only the first round trip. The server may have executed the others.
        """
        if self._sent:
            future = self._sent[0].future
            if not future.done():
                future.set_exception(RoundTripError(reply, sent=True))
            self._sent.popleft()
        self._fail(ConnectionError(f"Connection closed after an error: {type(reply).__name__}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fails the round trips in progress.

        If the transport was closed before the last write, or that write has failed at once, no byte of it has left.
        asyncio treats an exception of a signal handler like a failed write, but it may have come after the write.
        """
        if exc is None or (isinstance(exc, OSError) and not is_raised_by_handler(exc)):
            self._never_left = max(self._never_left, self._refused)
        self._fail(ConnectionError(f"Connection lost: {exc}" if exc else "Connection closed by server."))

    def pause_writing(self) -> None:
        """Makes further round trips wait: the server does not read as fast as they send."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Lets round trips continue."""
        self._is_paused = False
        self._wake()

    def _wake(self) -> None:
        """Lets those that wait go on, the first one first: as many as there is room for, or all if it is closed."""
        waiters = self._waiters
        while waiters and (not self.is_open or self._may_grant()):
            waiter = waiters[0]
            if not waiter.turn.done():
                if self.is_open:
                    self._granted += 1
                    self._granted_bytes += waiter.size
                    waiter.is_granted = True
                waiter.turn.set_result(None)
            waiters.popleft()

    def _fail(self, error: RedisError) -> None:
        self.is_open = False
        if self._loop.is_closed():
            self._sent.clear()
            self._unsent.clear()
            close_socket(self._transport)
            return
        try:
            self._fail_all(error)
        except BaseException:
            self._fail_all(error)
            raise

    def _fail_all(self, error: RedisError) -> None:
        """Decides which of the last round trips have not left, then fails all. To repeat it changes no decision."""
        sent = list(self._sent)
        self._never_left = max(self._never_left, self._count_in_buffer())
        self._transport.abort()  # drops its buffer; then it calls `connection_lost`
        _fail_each(sent[: max(0, len(sent) - self._never_left)], error, was_sent=True)
        _fail_each((*sent, *self._unsent), error, was_sent=False)
        self._sent.clear()
        self._unsent.clear()
        self._unsent_bytes = 0
        self._disarm()
        self._wake()

    def _count_in_buffer(self) -> int:
        """Returns how many of the last round trips are in asyncio's buffer as a whole, which `abort` drops at once."""
        if not self._sent or type(self._transport).__module__ != "asyncio.selector_events":  # others may still send it
            return 0
        count, left = 0, self._transport.get_write_buffer_size()
        for round_trip in reversed(self._sent):
            left -= round_trip.size
            if left < 0:
                break
            count += 1
        return count


def _fail_each(round_trips: Iterable[_Pending], error: RedisError, *, was_sent: bool) -> None:
    for round_trip in round_trips:
        if not round_trip.future.done():
            round_trip.future.set_exception(RoundTripError(error, sent=was_sent))


def _interruption() -> ConnectionError:
    return ConnectionError("Connection closed after an interruption.")


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def close_socket(transport: Any) -> None:
    """Closes the socket of a transport whose event loop is closed: the transport itself can no longer do it."""
    with contextlib.suppress(RuntimeError):
        transport.abort()  # marks it as closed, then fails to schedule the rest
    inner = getattr(getattr(transport, "_ssl_protocol", None), "_transport", transport)
    endpoint = getattr(inner, "_sock", None)
    if endpoint is not None:
        endpoint.close()
        inner._sock = None
