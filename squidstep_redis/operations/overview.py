"""The operation that reads the state of the whole store: the counts and the first entries of all indexes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from squidstep_redis.operations.context import Context
from squidstep_redis.operations.indexes import Listing, select
from squidstep_redis.operations.listing import read_page
from squidstep_redis.operations.pacing import CALL_WORK, load
from squidstep_redis.operations.reads import MAX_LIMIT
from squidstep_redis.operations.run_index import ALL
from squidstep_redis.operations.run_index import Bucket as BucketOfRuns
from squidstep_redis.operations.step_index import Bucket
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.call import Call, Reply, new_nonce
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import Workflow
from squidstep_redis.summaries import StoreOverview

_ENTRIES_WORK: Final = 24


def overview(context: Context, limit: int = 10, *, failures: int = 100) -> Workflow[StoreOverview]:
    """Counts the claims, the failed steps and the runs, and lists the first of each, in one pass.

    About 15 round trips, none of which blocks the server for more than a few milliseconds. The lists are the first
    pages of `lapsed_claims`, `live_claims`, `failed_steps` and `runs`; inputs and progress of the steps are not read.
    If a list is shorter than its limit, its count is exact. Otherwise, its count is that of `count_claims`,
    `count_failed` or `count_runs`. The parts are read one after the other: a step that changes in the meantime may be
    in two lists, or in none.

    Args:
        limit: how many claims of each kind and how many runs to list at most, from 1 to 1,000.
        failures: how many failed steps to list at most, from 1 to 1,000.

    Returns:
        The counts and the lists.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: an index key has a value of another type.
        ServerError: the server or the connection failed.
    """
    rows = arguments.integer("limit", limit, MAX_LIMIT)
    return _overview(context, rows, arguments.integer("failures", failures, MAX_LIMIT))


def _overview(context: Context, rows: int, failures: int) -> Workflow[StoreOverview]:
    keys = zip(context.keys.claims(), context.keys.failed(), context.keys.runs(), strict=True)
    buckets = [_Indexes(*each) for each in keys]
    yield from load(buckets, "overview")
    lapsed = yield from select(context, Listing("lapsed", payloads=False), [each.lapsed for each in buckets], rows)
    live = yield from select(context, Listing("live", payloads=False), [each.live for each in buckets], rows)
    failed = yield from select(context, Listing("failed", payloads=False), [each.failed for each in buckets], failures)
    page = yield from read_page(context, "overview", [each.runs for each in buckets], rows)
    counts = [sum(each.counts[index] for each in buckets) for index in range(4)]
    return StoreOverview(
        _exact(live, rows, counts[0]),
        _exact(lapsed, rows, counts[1]),
        _exact(failed, failures, counts[2]),
        _exact(page.runs, rows, counts[3]),
        lapsed,
        live,
        failed,
        page.runs,
    )


def _exact(found: Sequence[object], limit: int, count: int) -> int:
    """Returns how many there are: the index may count entries of runs that are gone."""
    return len(found) if len(found) < limit else count


class _Indexes:
    """The indexes of one bucket.

    Attributes:
        counts: of live claims, lapsed claims, failed steps and runs.
        lapsed: the index of claims, as far as lapsed ones are loaded.
        live: the index of claims, as far as live ones are loaded.
        failed: the index of failed steps, as far as it is loaded.
        runs: the index of runs, as far as it is loaded.
    """

    def __init__(self, claims: bytes, failed: bytes, runs: bytes) -> None:
        self._keys = claims, failed, runs
        self.counts: list[int] = []
        self.lapsed = Bucket(claims, "lapsed", 1)
        self.live = Bucket(claims, "live", 1)
        self.failed = Bucket(failed, "failed", 1)
        self.runs = BucketOfRuns(runs, ALL, None, 1)

    def call(self, operation: str) -> Call[Reply]:
        """Reads the counts, and the first entry of each index."""
        return Call(None, script("overview"), self._keys, (new_nonce(),), _without_words, part_of=operation)

    def load(self, part: Reply) -> int:
        """Sets what was read; returns the server's work."""
        *counts, lapsed, live, failed, runs = part
        self.counts = [int(each) for each in counts]
        live_claims, lapsed_claims, failed_steps, _ = self.counts
        self.lapsed.load_first(lapsed, lapsed_claims)
        self.live.load_first(live, live_claims)
        self.failed.load_first(failed, failed_steps)
        self.runs.load(runs)
        return CALL_WORK + _ENTRIES_WORK


def _without_words(reply: Reply) -> Reply:
    return reply[2:]
