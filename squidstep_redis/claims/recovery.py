"""Gives back a blocking store's claims, or records them as failed, if their own code could not do it: in a thread.

The code was interrupted by an exception from outside, or the server did not reply. The thread continues until the
server replies; the interrupted code waits for it at most a second.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, ClassVar, Final

from squidstep_redis.claims.retrying import FIRST_PAUSE, LAST_PAUSE
from squidstep_redis.claims.separate import SeparateTransport
from squidstep_redis.claims.threads import BackgroundThread
from squidstep_redis.claims.unfinished import UnfinishedClaim, recover
from squidstep_redis.errors import SquidstepError
from squidstep_redis.escaping import escaped
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.call import Call
from squidstep_redis.server_errors import ServerError
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.blocking import run_workflow

_log: Final = logging.getLogger("squidstep_redis")

_MAX_UNFINISHED: Final = 1_000
_CLOSE_SECONDS: Final = 1.0
_ATTEMPT_SECONDS: Final = 0.5  # until the last try of an attempt: the claims of other servers wait meanwhile


class Recovery(BackgroundThread):
    """Recovers the claims of one store that are handed over to it.

    Attributes:
        queue: claims to recover.
    """

    NAME: ClassVar = "squidstep-recovery"
    IDLE: ClassVar = 0.05

    def __init__(self, calls: Calls, transport: SeparateTransport) -> None:
        super().__init__()
        self._calls = calls
        self._transport = transport
        self._pending: list[UnfinishedClaim] = []  # of the thread
        self._pause = FIRST_PAUSE
        self._next_at = 0.0
        self._gives_up = False
        self.queue: deque[UnfinishedClaim] = deque(maxlen=_MAX_UNFINISHED)

    def recover(self, unfinished: UnfinishedClaim) -> None:
        """Recovers a claim. Call it in a plain thread, which nothing interrupts; if none can be started, use `queue`.

        Args:
            unfinished: the claim.
        """
        self.queue.append(unfinished)
        self._start()
        self.wake()

    def wait_for(self, unfinished: UnfinishedClaim, seconds: float) -> None:
        """Recovers a claim that was handed over, and waits for it.

        Args:
            unfinished: a claim, for which `recover` was called, or which was appended to `queue`.
            seconds: how long to wait at most.
        """
        try:
            self.start()
        except RuntimeError:  # no thread can be started: do what can be done here
            self.work()
        self.wake()
        deadline = time.monotonic() + seconds
        while not unfinished.is_recovered and time.monotonic() < deadline:
            time.sleep(0.001)

    def has_work(self) -> bool:
        """Whether there is a claim that is not recovered."""
        return bool(self.queue or self._pending)

    def work(self) -> float | None:
        """Tries to recover all claims; returns when to try again those that could not be."""
        while self.queue:
            self._pending.insert(0, self.queue.popleft())  # before those that have failed: its code waits for it
            self._next_at = 0.0
        if self._pending and time.monotonic() >= self._next_at:
            self._try_all()
        return self._next_at if self._pending else None

    def close(self) -> None:
        """Ends the thread, after a second at most; claims that are not recovered by then expire with their leases."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self.has_work() and self.is_running and time.monotonic() < deadline:
            time.sleep(0.001)
        self._gives_up = True
        super().close()

    def _try_all(self) -> None:
        """Tries to recover each claim, except those of a server that has just failed: they would only wait for it."""
        failed: list[UnfinishedClaim] = []
        skipped: list[UnfinishedClaim] = []
        down: set[object] = set()
        for unfinished in self._pending:
            server = self._server_of(unfinished)
            if server in down:
                skipped.append(unfinished)
            elif self._try(unfinished):
                unfinished.is_recovered = True
                unfinished.verdict_of = None  # it refers to the claim, which refers to it
            else:
                down.add(server)
                failed.append(unfinished)
        self._pending = [*skipped, *failed]  # next time, other claims come first: one slot alone may not be served
        self._pause = min(2 * self._pause, LAST_PAUSE) if self._pending else FIRST_PAUSE
        self._next_at = time.monotonic() + self._pause

    def _server_of(self, unfinished: UnfinishedClaim) -> object:
        call: Call[Any] | None = unfinished.begin
        if call is None and unfinished.step_run is not None:
            call = self._calls.get_run(unfinished.step_run.run_id)
        return None if call is None else self._transport.get().server_of(call)

    def _try(self, unfinished: UnfinishedClaim) -> bool:
        """Returns whether nothing remains to be done for a claim."""
        if unfinished.is_of_dead_process:
            return True
        try:
            run_workflow(self._transport.get().limited(_ATTEMPT_SECONDS), recover(self._calls, unfinished))
        except ServerError as error:
            if error.transient and not self._gives_up and time.monotonic() < unfinished.deadline:
                return False
            self._give_up(error)
        except SquidstepError as error:  # taken over, ended or deleted meanwhile
            _log.debug("a claim needed no recovery: %s", error)
        except Exception as error:  # noqa: BLE001 -- the others must be recovered nevertheless
            self._give_up(error)
        return True

    def _give_up(self, error: Exception) -> None:
        _log.warning(
            "a claim could not be given back; it expires with its lease: %s: %s",
            type(error).__name__,
            escaped(str(error)),
        )
