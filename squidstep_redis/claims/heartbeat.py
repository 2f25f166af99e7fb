"""Extends the leases of live claims of a blocking store, in a thread.

There is one heartbeat for each store and process. After a fork, the child has none: the parent extends its own claims.

Its thread only decides what to send. Each batch, for one server, is sent by a thread of its own: neither a server nor a
connection that does not reply delays the other batches.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Final, NamedTuple, cast

from squidstep_redis.claims.extensions import Claim, ExtensionSchedule, reply_seconds
from squidstep_redis.claims.recovery import Recovery
from squidstep_redis.claims.separate import SeparateTransport
from squidstep_redis.claims.threads import BackgroundThread
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.call import Call
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.blocking import BlockingTransport
from squidstep_redis.transport.connection import Connections
from squidstep_redis.transport.helper import Helper

_MAX_HELPERS: Final = 8  # for one server, of which all but one wait for a reply that is overdue

Replies = deque[Sequence[object] | Exception]


class _Batch(NamedTuple):
    """Extensions that are being sent to one server.

    Attributes:
        claims: the claims to extend.
        server: the connections to the server.
        sent_at: when it was sent, on the monotonic clock.
        until: when it counts as failed.
        replies: receives its results, or the error that it raised.
    """

    claims: Sequence[Claim]
    server: Connections | None
    sent_at: float
    until: float
    replies: Replies


class Heartbeat(BackgroundThread):
    """Extends the claims of one store in one process, with its own connection.

    Attributes:
        recovery: ends the claims that their own code cannot end.
    """

    NAME: ClassVar = "squidstep-heartbeat"
    IDLE: ClassVar = 5.0

    def __init__(self, calls: Calls, transport: BlockingTransport) -> None:
        super().__init__()
        self._schedule: ExtensionSchedule = ExtensionSchedule()
        self._batches: list[_Batch] = []
        self._helpers: list[tuple[Connections | None, Helper]] = []
        self._transport = SeparateTransport(transport)
        self.recovery = Recovery(calls, self._transport)

    def add(self, claim: Claim) -> None:
        """Extends a claim from now on."""
        due = self._schedule.add(claim)
        self.start()
        if due < self.waits_until:
            self.wake()

    def discard(self, claim: Claim) -> None:
        """Stops extending a claim."""
        self._schedule.discard(claim)
        if self.is_closing:
            self.wake()

    def has_work(self) -> bool:
        """Whether a claim is being extended."""
        return self._schedule.next_at() is not None

    def work(self) -> float | None:
        """Extends the claims that are due; returns when there is more to do."""
        self._apply_results()
        self._extend(self._schedule.due())  # no local variable: it would prevent a claim from being freed
        due = self._schedule.next_at()
        if due is None:
            self._batches.clear()
            return None
        return min([due, *(batch.until for batch in self._batches)])

    def on_end(self) -> None:
        """Closes the connection."""
        self.close_connections()

    def close_connections(self) -> None:
        """Closes idle connections. The next extension opens one again."""
        self._transport.close()

    def _extend(self, claims: Sequence[Claim]) -> None:
        """Sends the extensions of claims, in one batch for each server."""
        if not claims:
            return
        now = time.monotonic()
        indexes_of: dict[Connections | None, list[int]] = {}
        try:
            transport = self._transport.get()
            calls = [claim.extension() for claim in claims]
            for index, call in enumerate(calls):
                indexes_of.setdefault(transport.server_of(call), []).append(index)
        except Exception as error:  # noqa: BLE001 -- the next extension may succeed
            self._schedule.on_extension_results(claims, error, now)
            return
        for server, indexes in indexes_of.items():
            of_server = [claims[index] for index in indexes]
            batch = _Batch(of_server, server, now, now + reply_seconds(of_server), deque(maxlen=1))
            self._send(transport, batch, [calls[index] for index in indexes])

    def _send(self, transport: BlockingTransport, batch: _Batch, calls: Sequence[Call[Any]]) -> None:
        """Lets a thread send a batch, which it may not outlive: it holds no claim."""
        self._schedule.on_sent(batch.claims, batch.until)
        self._batches.append(batch)
        self._helpers = [(server, helper) for server, helper in self._helpers if helper.is_running]
        if sum(server is batch.server for server, _ in self._helpers) < _MAX_HELPERS:
            limited = transport.limited(batch.until - batch.sent_at)
            helper = Helper("squidstep-extension", partial(self._send_now, limited, calls, batch.replies))
            self._helpers.append((batch.server, helper))

    def _send_now(self, transport: BlockingTransport, calls: Sequence[Call[Any]], replies: Replies) -> None:
        try:
            replies.append(transport.send_batch(calls))
        except Exception as error:  # noqa: BLE001 -- the next extension may succeed
            replies.append(error)
        self.wake()

    def _apply_results(self) -> None:
        """Applies the results of batches. The results of a batch that is overdue are ignored, even if they arrive."""
        now = time.monotonic()
        in_flight: list[_Batch] = []
        for batch in self._batches:
            if batch.replies:
                self._schedule.on_extension_results(batch.claims, batch.replies[0], batch.sent_at)
            elif now < batch.until:
                in_flight.append(batch)
            else:
                if batch.server is not None:
                    batch.server.close()  # the idle connections may not reply either
                self._schedule.on_extension_results(batch.claims, TimeoutError("no reply"), batch.sent_at)
        self._batches = in_flight


class Heartbeats:
    """The heartbeat of one store in each process that uses the store."""

    def __init__(self, calls: Calls, transport: BlockingTransport) -> None:
        self._calls = calls
        self._transport = transport
        self._by_process: dict[int, Heartbeat] = {}

    def get(self) -> Heartbeat:
        """Returns the heartbeat of this process."""
        heartbeat = self._by_process.get(os.getpid())
        return self._add() if heartbeat is None else heartbeat

    def close(self) -> None:
        """Ends the threads of this process as soon as no claim needs them."""
        heartbeat = self._by_process.get(os.getpid())
        if heartbeat is not None:
            heartbeat.recovery.close()
            heartbeat.close()
            heartbeat.close_connections()

    def _add(self) -> Heartbeat:
        for pid in [*self._by_process]:
            if pid != os.getpid():  # of the parent
                self._by_process.pop(pid, None)
        return self._by_process.setdefault(os.getpid(), Heartbeat(self._calls, self._transport))


def heartbeat_of(store: Any) -> Heartbeat:
    """Returns the heartbeat of a blocking store in this process; makes it if necessary, without a lock."""
    heartbeats: Heartbeats | None = store.__dict__.get("_heartbeats")
    if heartbeats is None:
        made = Heartbeats(store.calls, store._transport)
        heartbeats = cast("Heartbeats", store.__dict__.setdefault("_heartbeats", made))
    return heartbeats.get()


def end_heartbeat(store: Any) -> None:
    """Ends the threads of a blocking store as soon as no claim needs them."""
    heartbeats: Heartbeats | None = store.__dict__.get("_heartbeats")
    if heartbeats is not None:
        heartbeats.close()
