"""The indexes of claims and of failed steps: one sorted set of each bucket, which is read in pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple

from squidstep_redis.operations.pacing import CALL_WORK
from squidstep_redis.operations.reads import MAX_LIMIT, pairs
from squidstep_redis.protocol.call import Call, Reply, new_nonce
from squidstep_redis.protocol.scripts import script

_GROWTH: Final = 8  # each further page of a bucket is this many times as large

Mode = Literal["failed", "lapsed", "live"]
Scored = tuple[float, bytes]  # a score and a member


class Bucket:
    """The index of one bucket, as far as it is loaded.

    Attributes:
        entries: score and member of the entries that were loaded and not removed since, in the order of the listing.
        size: how many the next page has at most.
        has_more: whether further entries may exist.
        last: the entry after which the next page begins, usually the last one that was loaded; None: it begins with
            the first entry.
    """

    __slots__ = ("_mode", "entries", "has_more", "key", "last", "size")

    def __init__(self, key: bytes, mode: Mode, size: int, last: Scored | None = None) -> None:
        self.key = key
        self._mode: Mode = mode
        self.size = size
        self.entries: deque[Scored] = deque()
        self.has_more = True
        self.last = last

    def call(self, operation: str) -> Call[list[Scored]]:
        """Reads the next page."""
        position = (b"", b"") if self.last is None else (repr(self.last[0]).encode(), self.last[1])
        args = (new_nonce(), b"%d" % self.size, self._mode.encode(), *position)
        return Call(None, script("list_index"), (self.key,), args, _entries_of, part_of=operation)

    def load(self, part: list[Scored]) -> int:
        """Adds a page that was read; returns the server's work, in entries scanned."""
        if part:
            self.entries += part
            self.last = part[-1]
        self.has_more = len(part) >= self.size
        self.size = min(_GROWTH * self.size, MAX_LIMIT)
        return CALL_WORK + len(part)

    def load_first(self, flat: list[Any], count: int) -> None:
        """Adds the first entry, and sets how many entries there are."""
        self.load(_scored(flat))
        self.has_more = len(self.entries) < count

    def remaining(self) -> Iterator[Entry]:
        """Yields the entries, each with its bucket."""
        return (Entry(score, member, self) for score, member in self.entries)


class Entry(NamedTuple):
    """An entry among those of all buckets."""

    score: float
    member: bytes
    bucket: Bucket

    @property
    def position(self) -> tuple[bytes, bytes]:
        """The entry's index and member: a member that is foreign in one index may be valid in another."""
        return self.bucket.key, self.member

    @property
    def is_last_loaded(self) -> bool:
        """Whether its bucket may have further entries right after it."""
        return self.bucket.has_more and rank(self) == self.bucket.last


def rank(entry: Entry) -> Scored:
    """Returns what entries are ordered by."""
    return entry[:2]


def _scored(flat: list[Any]) -> list[Scored]:
    """Returns the entries of a flat reply: member, score, …."""
    return [(float(score), member) for member, score in pairs(flat)]


def _entries_of(reply: Reply) -> list[Scored]:
    return _scored(reply[2])
