"""Decides when to extend which leases; no I/O. The heartbeats of both stores use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from weakref import ref

from squidstep_redis.claims.retrying import LAST_PAUSE
from squidstep_redis.claims.rules import BaseClaim
from squidstep_redis.steady import steady_time as time

Claim = BaseClaim[Any]

_SHORTEST_TIMEOUT: Final = 1.0  # seconds


def reply_seconds(claims: Sequence[Claim]) -> float:
    """Returns how long to wait for the replies to a batch: usually a third of the shortest lease.

    Then the batch counts as failed, whatever the client's timeouts are, so that there is time to send another one.

    Args:
        claims: the claims whose extensions wait for it.
    """
    return max(_SHORTEST_TIMEOUT, min((claim.interval for claim in claims), default=0.0))


class ExtensionSchedule:
    """Decides when to extend which claims, in as few batches as possible.

    Unreferenced claims are dropped; their leases expire. `add` and `discard` may be called, and interrupted, in any
    thread at any time. So each of them is one operation of a dict, and the others work on a copy.
    """

    def __init__(self) -> None:
        # When the extension of each claim is due. Not a WeakKeyDictionary, because it runs a callback for each claim
        # that is freed, and an exception that a signal handler raises there is lost. The keys are not ids, because ids
        # are reused.
        self._due: dict[ref[Claim], float] = {}

    def __len__(self) -> int:
        return sum(reference() is not None for reference in self._due.copy())

    def add(self, claim: Claim) -> float:
        """Adds a claim; returns when its extension is due, on the monotonic clock."""
        due = self._due[ref(claim)] = claim.next_extension_at
        return due

    def discard(self, claim: Claim) -> None:
        """Removes a claim."""
        self._due.pop(ref(claim), None)

    def next_at(self) -> float | None:
        """Returns when the next extension is due; None if there is no live claim."""
        earliest = None
        for reference, due in self._due.copy().items():
            claim = reference()
            if claim is not None and claim.is_live:
                earliest = due if earliest is None else min(earliest, due)
                continue
            self._due.pop(reference, None)
            if claim is not None and claim.is_live:  # its next block was entered meanwhile
                self.add(claim)
                return self.next_at()
        return earliest

    def due(self) -> list[Claim]:
        """Returns the claims to extend now: if one is due, also those due soon, so that they share later batches."""
        now = time.monotonic()
        earliest = self.next_at()
        if earliest is None or earliest > now:
            return []
        found: list[Claim] = []
        for reference, due in self._due.copy().items():
            claim = reference()
            if claim is not None and claim.is_live and due - claim.interval / 2 <= now:
                found.append(claim)
        return found

    def live(self) -> list[Claim]:
        """Returns all claims whose leases must be extended."""
        claims = [reference() for reference in self._due.copy()]
        return [claim for claim in claims if claim is not None and claim.is_live]

    def on_sent(self, claims: Sequence[Claim], until: float) -> None:
        """Makes claims whose batch is sent now part of no other batch before `until` (monotonic clock)."""
        for claim in claims:
            if ref(claim) in self._due:
                self._due[ref(claim)] = until + claim.interval / 2  # `due` returns them that much earlier

    def on_extension_results(
        self, claims: Sequence[Claim], results: Sequence[object] | Exception, sent_at: float
    ) -> None:
        """Applies the results of a batch, or the error that the batch raised."""
        if isinstance(results, Exception):
            results = [results] * len(claims)
        now = time.monotonic()
        for claim, result in zip(claims, results, strict=True):
            if ref(claim) not in self._due:  # it ended in the meantime
                continue
            if not claim.on_extension_result(result, sent_at):
                self.discard(claim)
                continue
            failed = isinstance(result, Exception)
            # A batch that failed late has paused already.
            due = max(now, sent_at + min(LAST_PAUSE, claim.interval / 2)) if failed else claim.next_extension_at
            self._due[ref(claim)] = due
