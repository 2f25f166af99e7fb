"""Batches of bounded size: the server executes a whole batch before it serves other clients.

The unit of work is the time in which the server scans one entry of an index, 0.3 to 0.6 µs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.workflow import SendBatch, Workflow, raise_first_error

CALL_WORK: Final = 16  # of a call by itself
_MAX_WORK: Final = 4_000  # of a batch: about 2 ms
_FIRST_CALLS: Final = 32


class Pacer:
    """Adapts the size of batches to the server's work for their calls.

    Attributes:
        batch_size: how many calls the next batch should have.
    """

    def __init__(self, work: int = CALL_WORK) -> None:
        """Chooses the size of the first batch.

        Args:
            work: the expected work of each call.
        """
        self.batch_size = max(1, min(_FIRST_CALLS, _MAX_WORK // work))

    def adapt(self, calls: int, work: int) -> None:
        """Adapts the size to the last batch, given its number of calls and its total work."""
        self.batch_size = max(1, _MAX_WORK * calls // work)


class Bucket(Protocol):
    """The index of one bucket, as far as it is loaded."""

    def call(self, operation: str) -> Call[Any]:
        """Reads the next part."""
        ...

    def load(self, part: Any) -> int:
        """Adds a part that was read; returns the server's work."""
        ...


def load(buckets: Sequence[Bucket], operation: str, work: int = CALL_WORK) -> Workflow[None]:
    """Reads the next part of each bucket.

    Args:
        buckets: the buckets.
        operation: the operation that sends the calls.
        work: the expected work of the server for each part.
    """
    first, pacer = 0, Pacer(work)
    while first < len(buckets):
        batch = buckets[first : first + pacer.batch_size]
        parts = raise_first_error((yield SendBatch([each.call(operation) for each in batch])))
        done = sum(each.load(part) for each, part in zip(batch, parts, strict=True))
        first += len(batch)
        pacer.adapt(len(batch), done)


def in_batches(calls: Sequence[Call[Any]], work: int = CALL_WORK) -> Iterator[SendBatch]:
    """Divides calls into batches, given the work of each call."""
    size = _MAX_WORK // work
    return (SendBatch(calls[first : first + size]) for first in range(0, len(calls), size))
