"""Extends the leases of live claims of a blocking store, in a thread.

There is one heartbeat for each store and process. After a fork, the child has none: the parent extends its own claims.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from squidstep_redis.claims.extensions import Claim, ExtensionSchedule
from squidstep_redis.claims.recovery import Recovery
from squidstep_redis.claims.separate import SeparateTransport
from squidstep_redis.claims.threads import BackgroundThread
from squidstep_redis.operations.calls import Calls
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.blocking import BlockingTransport


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
        """Extends the claims that are due; returns when the next ones are."""
        self._extend(self._schedule.due())  # no local variable: it would prevent a claim from being freed
        return self._schedule.next_at()

    def on_end(self) -> None:
        """Closes the connection."""
        self.close_connections()

    def close_connections(self) -> None:
        """Closes idle connections. The next extension opens one again."""
        self._transport.close()

    def _extend(self, claims: Sequence[Claim]) -> None:
        if not claims:
            return
        sent_at = time.monotonic()
        try:
            results: Any = self._transport.get().send_batch([claim.extension() for claim in claims])
        except Exception as error:  # noqa: BLE001 -- the next extension may succeed
            results = error
        self._schedule.on_extension_results(claims, results, sent_at)


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
