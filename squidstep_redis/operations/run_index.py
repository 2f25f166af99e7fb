"""The index of runs by creation time: one sorted set for each bucket, which is read in parts."""

from __future__ import annotations

from datetime import datetime
from typing import Final, NamedTuple

from squidstep_redis.model import moment
from squidstep_redis.operations.context import Context
from squidstep_redis.operations.pacing import load
from squidstep_redis.operations.reads import pairs
from squidstep_redis.protocol.call import Call, Reply, new_nonce
from squidstep_redis.protocol.keys import run_of_member
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import Workflow

_GROWTH: Final = 8  # each further part of a bucket's index is this many times as large
_GROWTH_IF_LOOKED_AT: Final = 2  # with a status, since that takes longer
_MAX_PART: Final = 500  # runs, at which one script looks: about 1 ms of the server's time

_LATEST: Final = 10**13  # ms; of state lines, too

Position = tuple[int, bytes]  # minus the time of the run's creation in milliseconds, and the run: ascending


class Entry(NamedTuple):
    """A run in the index."""

    position: Position
    labels: bytes


class Selection(NamedTuple):
    """Which runs are listed or counted, as it is sent.

    Attributes:
        newest: when the newest of them was created, in milliseconds; None: any time.
        oldest: when the oldest of them was created.
        prefix: prefix of the run ids; empty: any.
        letters: letters of state lines: a run must have a step with one of them; empty: any.
        labels: labels that a run must have, as they are stored.
    """

    newest: int | None = None
    oldest: int | None = None
    prefix: bytes = b""
    letters: bytes = b""
    labels: tuple[bytes, ...] = ()


ALL: Final = Selection()


class Bucket:
    """The index of one bucket, as far as it is loaded.

    Attributes:
        count: how many runs were counted or listed; with a status, how many were checked.
        entries: the entries that were loaded and not taken, newest first.
        size: how many the next part has at most.
    """

    __slots__ = ("_after", "_growth", "_key", "_newest", "_selection", "_skip", "count", "entries", "size")

    def __init__(self, key: bytes, selection: Selection, after: Position | None, size: int) -> None:
        """Sets up a bucket of which nothing is loaded.

        Args:
            key: key of the index.
            selection: which runs to load.
            after: only runs after this position; None: all.
            size: how many runs to list at first, or, with a status, to check; 0: count them.
        """
        self._key = key
        self._selection = selection
        self._after = after
        self.size = size
        self._skip = b"0"
        self._growth = _GROWTH_IF_LOOKED_AT if selection.letters else _GROWTH
        self.entries: list[Entry] = []
        self.count = 0
        # Where the next part begins; None: there is none.
        first = None if after is None or -after[0] >= _LATEST else -after[0]
        limits = [ms for ms in (selection.newest, first) if ms is not None]
        self._newest: bytes | None = b"%d" % min(limits) if limits else b"+inf"

    def call(self, operation: str) -> Call[Reply]:
        """Reads the next part."""
        _, oldest_ms, *filters, labels = self._selection
        oldest = b"-inf" if oldest_ms is None else b"%d" % oldest_ms
        args = (new_nonce(), self._newest or b"", self._skip, oldest, b"%d" % self.size, *filters, *labels)
        return Call(None, script("list_runs"), (self._key,), args, _without_words, part_of=operation)

    def load(self, part: Reply) -> int:
        """Adds a part that was read; returns the server's work, in entries scanned."""
        newest, skip, count, entries, work = part
        ties = {each.position for each in self.entries if each.position[0] == self.loaded_to}
        # The next part reads the runs of its first time again: if one of them is deleted in between, skipping as many
        # as were read would pass over another run. Counts must be exact, and parts must get on.
        must_skip = not self.size or (newest == self._newest and self.size == _MAX_PART)
        self._newest, self._skip = newest or None, b"%d" % int(skip) if must_skip else b"0"
        self.count += int(count)
        self.size = min(self._growth * self.size, _MAX_PART)
        for member, ms in pairs(entries):
            run_id, labels = run_of_member(member)
            position = (-listed_at(ms), run_id)
            if position not in ties and (self._after is None or position > self._after):
                self.entries.append(Entry(position, labels))
        return int(work)

    @property
    def loaded_to(self) -> int | None:
        """Minus the time of the last run that may be loaded in part; None if all are loaded."""
        return None if self._newest is None else -listed_at(self._newest)

    def take(self, settled_to: int | None) -> list[Entry]:
        """Removes and returns the loaded runs that are newer than a position; None: all of them."""
        taken = [each for each in self.entries if settled_to is None or each.position[0] < settled_to]
        self.entries = self.entries[len(taken) :]
        return taken


def listed_at(score: bytes | float) -> int:
    """Returns the milliseconds by which an entry is listed. A score that is out of range is clamped."""
    return int(min(max(float(score), 0), _LATEST))


def created_at(score: bytes) -> datetime | None:
    """Returns when the run of an entry was created; None if the entry does not say."""
    return moment(int(float(score))) if score and 0 <= float(score) < _LATEST else None


def drop_stale_runs(context: Context) -> Workflow[None]:
    """Drops the entries of runs that are gone: one round trip for about each 1,000 runs."""
    incomplete = [Bucket(key, ALL, None, _MAX_PART) for key in context.keys.runs()]
    while incomplete:
        yield from load(incomplete, "purge")
        incomplete = [each for each in incomplete if each.loaded_to is not None]
        for each in incomplete:
            each.take(None)


def _without_words(reply: Reply) -> Reply:
    return reply[2:]
