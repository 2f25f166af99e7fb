"""The operations that read the indexes: live and lapsed claims, and failed steps, across runs.

An index entry is a hint. Each is verified against its record before it is returned, and dropped if they disagree. An
entry that this library did not write, or that is in the index of another bucket, refers to no record and is dropped.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from datetime import datetime
from itertools import islice, takewhile
from typing import Any, Final, NamedTuple

from squidstep_redis.errors import CorruptRunError
from squidstep_redis.model import StepRun
from squidstep_redis.operations.context import Context
from squidstep_redis.operations.cursors import format_cursor, parse_cursor
from squidstep_redis.operations.pacing import CALL_WORK, in_batches, load
from squidstep_redis.operations.reads import MAX_LIMIT
from squidstep_redis.operations.step_index import Bucket, Entry, Mode, rank
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Step
from squidstep_redis.protocol.call import Call, Reply, new_nonce
from squidstep_redis.protocol.keys import member_prefix, parse_member
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import Workflow, raise_first_error
from squidstep_redis.summaries import ClaimCounts, StepRunList

_OPERATIONS: Final[dict[Mode, str]] = {"failed": "failed_steps", "lapsed": "lapsed_claims", "live": "live_claims"}

_VERIFY_WORK: Final = 30
_MAX_VERIFIED: Final = 100  # entries that are verified at once, after entries that were not wanted


def lapsed_claims(
    context: Context,
    limit: int = 100,
    *,
    run_id_prefix: str = "",
    step: Step | None = None,
    since: datetime | None = None,
    payloads: bool = True,
    cursor: str | None = None,
) -> Workflow[StepRunList]:
    """Lists step runs whose lease has expired and that no worker has taken over, earliest expiry first.

    Usually six round trips: five read the index of each of 1,024 buckets, and one verifies the entries against their
    records; 130 at once. If many entries are in one bucket or are not wanted, more are read, 1,000 of a bucket at once.
    An entry without its record, or that this library did not write, is dropped from the index.

    The next page continues where this one ends, even if claims were taken over, ended or lapsed in between.

    Args:
        limit: how many to return at most, from 1 to 1,000.
        run_id_prefix: only of runs whose id has this prefix; empty: of all runs.
        step: only steps of this name, a non-empty str of at most 512 bytes of UTF-8, or an enum member; None: all.
        since: only leases that ended at or after this time, a datetime with a time zone; None: all.
        payloads: whether to read inputs and progress. Without them, a list of steps with large inputs takes as long as
            one with small ones, and reading one raises PayloadNotReadError. The error of a failed step is always read.
        cursor: `cursor` of the previous page; None: the first page.

    Returns:
        The page, a list of step runs, and as its `cursor` that of the next page: None after the last. They carry no
        claim.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: an index key has a value of another type.
        ServerError: the server or the connection failed.
    """
    wanted = _wanted(run_id_prefix, step, since)
    return _list(context, Listing("lapsed", payloads), context.keys.claims(), limit, cursor, wanted)


def live_claims(
    context: Context,
    limit: int = 100,
    *,
    owner: str | None = None,
    payloads: bool = True,
    cursor: str | None = None,
) -> Workflow[StepRunList]:
    """Lists step runs that are running under a lease that has not expired, soonest expiry first.

    Usually six round trips, like `lapsed_claims`. With `owner`, one more for about every 100 live claims of others.

    The next page continues where this one ends. A claim that was extended in between may be on it again.

    Args:
        limit: how many to return at most, from 1 to 1,000.
        owner: only this owner's claims, as given to `begin_step`; None: every owner's.
        payloads: whether to read inputs and progress. Without them, a list of steps with large inputs takes as long as
            one with small ones, and reading one raises PayloadNotReadError. The error of a failed step is always read.
        cursor: `cursor` of the previous page; None: the first page.

    Returns:
        The page, a list of step runs, and as its `cursor` that of the next page: None after the last. They carry no
        claim.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: an index key has a value of another type.
        ServerError: the server or the connection failed.
    """
    return _list(context, Listing("live", payloads, arguments.owner(owner)), context.keys.claims(), limit, cursor)


def failed_steps(
    context: Context,
    limit: int = 100,
    *,
    run_id_prefix: str = "",
    step: Step | None = None,
    since: datetime | None = None,
    payloads: bool = True,
    cursor: str | None = None,
) -> Workflow[StepRunList]:
    """Lists failed step runs, newest failure first. The index holds the newest 1,000 of each of 1,024 buckets.

    Usually six round trips: five read the index of each bucket, and one verifies the entries against their records; 130
    at once. An entry without its record, or that this library did not write, is dropped from the index.

    The next page continues where this one ends, even if steps were retried or failed in between.

    Args:
        limit: how many to return at most, from 1 to 1,000.
        run_id_prefix: only of runs whose id has this prefix; empty: of all runs.
        step: only steps of this name, a non-empty str of at most 512 bytes of UTF-8, or an enum member; None: all.
        since: only failures at or after this time, a datetime with a time zone; None: all.
        payloads: whether to read inputs and progress. Without them, a list of steps with large inputs takes as long as
            one with small ones, and reading one raises PayloadNotReadError. The error of a failed step is always read.
        cursor: `cursor` of the previous page; None: the first page.

    Returns:
        The page, a list of step runs, and as its `cursor` that of the next page: None after the last.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: an index key has a value of another type.
        ServerError: the server or the connection failed.
    """
    wanted = _wanted(run_id_prefix, step, since)
    return _list(context, Listing("failed", payloads), context.keys.failed(), limit, cursor, wanted)


def count_claims(context: Context) -> Workflow[ClaimCounts]:
    """Counts live and lapsed claims across all runs: those whose lease has not expired, and those whose lease has.

    Five round trips, of up to 250 small calls each. Entries of expired or deleted runs, and entries that this library
    did not write, are counted until `lapsed_claims` or `live_claims` finds and drops them.

    Returns:
        The two counts.

    Raises:
        CorruptRunError: an index key has a value of another type.
        ServerError: the server or the connection failed.
    """
    return (yield from _count(context.keys.claims(), "count_claims"))


def count_failed(context: Context) -> Workflow[int]:
    """Counts the failed steps of all runs.

    Five round trips, of up to 250 small calls each. Entries of expired or deleted runs, and entries that this library
    did not write, are counted until `failed_steps` finds and drops them.

    Returns:
        The count.

    Raises:
        CorruptRunError: an index key has a value of another type.
        ServerError: the server or the connection failed.
    """
    return sum((yield from _count(context.keys.failed(), "count_failed")))


def _count(indexes: list[bytes], operation: str) -> Workflow[ClaimCounts]:
    """Counts the entries of these indexes after and before now."""

    def parse(reply: Reply) -> ClaimCounts:
        return ClaimCounts(int(reply[2]), int(reply[3]))

    count = script("count_claims")
    calls = [Call(None, count, (key,), (new_nonce(),), parse, part_of=operation) for key in indexes]
    counts: list[ClaimCounts] = []
    for batch in in_batches(calls):
        counts += raise_first_error((yield batch))
    return ClaimCounts(sum(each.live for each in counts), sum(each.lapsed for each in counts))


def drop_stale_entries(context: Context) -> Workflow[None]:
    """Drops the entries of both indexes that refer to no record, such as those of runs that have expired.

    Ten or more round trips read the indexes, and one more verifies about each 130 lapsed claims or failed steps.
    """
    indexes: dict[Mode, list[bytes]] = {"lapsed": context.keys.claims(), "failed": context.keys.failed()}
    for mode, keys in indexes.items():
        incomplete = [Bucket(key, mode, MAX_LIMIT) for key in keys]
        yield from load(incomplete, "purge")
        while incomplete:
            entries = [entry for each in incomplete for entry in each.remaining()]
            for start in range(0, len(entries), MAX_LIMIT):
                yield from _verify_all(context, Listing(mode, False), entries[start : start + MAX_LIMIT])
            incomplete = [each for each in incomplete if each.has_more]
            for each in incomplete:
                each.entries.clear()
            yield from _load_more(incomplete, "purge")


class _Wanted(NamedTuple):
    """Which entries of a listing are returned.

    Attributes:
        run_id_prefix: only of runs whose id has this prefix; empty: of all runs.
        step: only of this step; None: of all steps.
        since_ms: only from this score on; None: all. It is not for `includes`: the listing begins or ends there.
    """

    run_id_prefix: bytes = b""
    step: bytes | None = None
    since_ms: float | None = None

    @property
    def is_selective(self) -> bool:
        """Whether it excludes some entries between others."""
        return bool(self.run_id_prefix) or self.step is not None

    def includes(self, entry: Entry) -> bool:
        """Whether the entry may be returned. One that names no step is included, so that it is verified and dropped."""
        names = parse_member(entry.member) if self.is_selective else None
        if names is None:
            return True
        run, step = names
        return run.startswith(self.run_id_prefix) and self.step in (None, step)


_ALL: Final = _Wanted()


def _wanted(run_id_prefix: str, step: Step | None, since: datetime | None) -> _Wanted:
    """Checks the arguments."""
    prefix = arguments.run_id_prefix(run_id_prefix)
    name = None if step is None else arguments.step(step).data
    return _Wanted(prefix, name, arguments.moment_ms("since", since))


class Listing(NamedTuple):
    """What is listed.

    Attributes:
        mode: failed steps, lapsed claims, or live claims.
        payloads: whether to read the payloads; otherwise only the state and the error of each step are read.
        owner: only claims of this owner; empty: every owner's.
    """

    mode: Mode
    payloads: bool
    owner: bytes = b""


def _list(
    context: Context,
    listing: Listing,
    indexes: list[bytes],
    limit: int,
    cursor: str | None,
    wanted: _Wanted = _ALL,
) -> Workflow[StepRunList]:
    number = arguments.integer("limit", limit, MAX_LIMIT)
    begin = parse_cursor(cursor)
    if wanted.since_ms is not None and listing.mode != "failed":  # earliest first
        earliest = wanted.since_ms, b""  # before all entries of this score, since no member is empty
        begin = earliest if begin is None else max(begin, earliest)
    # The first entries are spread over the buckets, so a page needs one entry from most buckets. A second entry shows
    # whether there are more.
    first_page = MAX_LIMIT if listing.owner or wanted.is_selective else min(2 + number // 400, MAX_LIMIT)
    buckets = [Bucket(key, listing.mode, first_page, begin) for key in indexes]
    yield from load(buckets, _OPERATIONS[listing.mode])
    return (yield from select(context, listing, buckets, number, wanted))


def select(
    context: Context, listing: Listing, buckets: list[Bucket], number: int, wanted: _Wanted = _ALL
) -> Workflow[StepRunList]:
    """Returns the step runs of the first entries of all buckets. The first page of each bucket is loaded."""
    # By index and member: an entry whose score has grown since it was loaded is loaded again.
    found: dict[tuple[bytes, bytes], tuple[Entry, StepRun]] = {}
    since_ms = wanted.since_ms if listing.mode == "failed" else None  # newest first: the listing ends there
    size = number
    while True:
        merged = heapq.merge(*(each.remaining() for each in buckets), key=rank, reverse=listing.mode == "failed")
        if since_ms is not None:
            merged = takewhile(lambda entry: entry.score >= since_ms, merged)
        settled = list(_settled(merged))
        candidates = [each for each in settled if wanted.includes(each)]
        while candidates:
            for entry, step_run in (yield from _verify_all(context, listing, candidates[:size])):
                found.setdefault(entry.position, (entry, step_run))
            candidates = candidates[size:]
            if len(found) >= number:
                page = list(found.values())[:number]
                last, _ = page[-1]
                is_last = len(found) == number and not candidates and not settled[-1].is_last_loaded
                cursor = None if is_last else format_cursor(last.score, last.member)
                return StepRunList((step_run for _, step_run in page), cursor)
            size = max(size, min(2 * size, _MAX_VERIFIED))
        # Load more entries of the buckets that may have the missing ones.
        following = islice(merged, min(number, MAX_LIMIT))
        incomplete = [each.bucket for each in (*settled[-1:], *following) if each.is_last_loaded]
        if not incomplete:
            return StepRunList(step_run for _, step_run in found.values())
        for each in settled:
            each.bucket.entries.popleft()
        yield from _load_more(incomplete, _OPERATIONS[listing.mode])


def _settled(merged: Iterator[Entry]) -> Iterator[Entry]:
    """Yields entries up to the last loaded one of an incomplete bucket: entries that are not loaded may come next."""
    for entry in merged:
        yield entry
        if entry.is_last_loaded:
            return


def _load_more(buckets: list[Bucket], operation: str) -> Workflow[None]:
    """Loads the next page of buckets whose pages were full until now."""
    return load(buckets, operation, CALL_WORK + max((each.size for each in buckets), default=0))


def _verify_all(context: Context, listing: Listing, entries: list[Entry]) -> Workflow[list[tuple[Entry, StepRun]]]:
    """Verifies entries against their records; returns those that are listed, with their step runs."""
    results: list[Any] = []
    for batch in in_batches([_verify(context, listing, each) for each in entries], _VERIFY_WORK):
        results += yield batch
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, CorruptRunError):
            raise result  # a corrupt run must not hide the others
    return [(each, result) for each, result in zip(entries, results, strict=True) if isinstance(result, StepRun)]


def _verify(context: Context, listing: Listing, entry: Entry) -> Call[StepRun | None]:
    """Reads the step run of an entry; returns None if it is not listed."""
    mode, payloads, owner = listing
    names = parse_member(entry.member)
    if names is None:
        return _drop(mode, entry)
    run, step = names
    keys = context.keys.of_run(run)
    index = keys.failed if mode == "failed" else keys.claims
    if index != entry.bucket.key:
        return _drop(mode, entry)

    def parse(reply: Reply) -> StepRun | None:
        if len(reply) == 2:
            return None
        if payloads:
            return context.records.record(run.decode(), step.decode(), reply[2:], keys.steps)
        line, error = reply[2:]
        return context.records.step_run(run.decode(), step.decode(), line, (None, None, error, None), keys.steps)

    args = (new_nonce(), step, member_prefix(run), mode.encode(), owner, b"payloads" if payloads else b"")
    return Call(
        run.decode(), script("confirm_entry"), (keys.steps, keys.done, index), args, parse, part_of=_OPERATIONS[mode]
    )


def _drop(mode: Mode, entry: Entry) -> Call[None]:
    """Drops an entry that refers to no record."""

    def parse(_: Reply) -> None:
        return None

    args = (new_nonce(), entry.member)
    return Call(None, script("drop_entry"), (entry.bucket.key,), args, parse, part_of=_OPERATIONS[mode])
