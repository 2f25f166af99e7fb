"""Batches that do not hold the server up: it turns to other clients only after a whole batch.

Work is measured in entries of an index that the server scans in the same time, 0.3 to 0.6 µs each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.workflow import SendBatch, Workflow, raise_first_error

CALL_WORK: Final = 16  # of a call by itself
_MAX_WORK: Final = 4_000  # of a batch: about 2 ms
_FIRST_CALLS: Final = 32


class Pace:
    """How many calls fit into the next batch, according to those before it.

    Attributes:
        calls: that number.
    """

    def __init__(self) -> None:
        self.calls = _FIRST_CALLS

    def after(self, calls: int, work: int) -> None:
        """Takes a batch into account: how many calls it had, and how much work they were in all."""
        self.calls = max(1, _MAX_WORK * calls // work)


class Bucket(Protocol):
    """The index of one bucket, as far as it is loaded."""

    def call(self, operation: str) -> Call[Any]:
        """Reads the next part."""
        ...

    def load(self, part: Any) -> int:
        """Adds a part that was read; returns how much work it was."""
        ...


def load(buckets: Sequence[Bucket], operation: str) -> Workflow[None]:
    """Reads the next part of each bucket."""
    first, pace = 0, Pace()
    while first < len(buckets):
        batch = buckets[first : first + pace.calls]
        parts = raise_first_error((yield SendBatch([each.call(operation) for each in batch])))
        work = sum(each.load(part) for each, part in zip(batch, parts, strict=True))
        first += len(batch)
        pace.after(len(batch), work)


def in_batches(calls: Sequence[Call[Any]], work: int = CALL_WORK) -> Iterator[SendBatch]:
    """Divides calls into batches, given how much work each of them is."""
    size = _MAX_WORK // work
    return (SendBatch(calls[first : first + size]) for first in range(0, len(calls), size))
