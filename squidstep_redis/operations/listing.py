"""The operations that list and count runs, by the index of runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from math import ceil
from typing import Final, cast

from squidstep_redis.model import STATUS, StepStatus
from squidstep_redis.operations.context import Context
from squidstep_redis.operations.cursors import format_cursor, parse_cursor
from squidstep_redis.operations.pacing import load
from squidstep_redis.operations.reads import MAX_LIMIT
from squidstep_redis.operations.run_index import Bucket, Entry, Position, Selection, listed_at
from squidstep_redis.operations.runs import checked_status, scan_runs
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Labels
from squidstep_redis.protocol.labels import labels_data
from squidstep_redis.protocol.workflow import Workflow
from squidstep_redis.summaries import RunPage, RunSummary

_LOOKED_AT: Final = 3  # runs of each bucket whose steps are looked at first
_MAX_LOOKED_AT: Final = 6_000  # for one page
_MAX_READ_IN_ALL: Final = 1_000  # runs that are read for one page; with a status, usually only those that have it
_MIN_READ: Final = 20  # with a status, runs that are read at once
_MAX_READ: Final = 200


def runs(
    context: Context,
    *,
    labels: Labels | None = None,
    status: StepStatus | str | None = None,
    run_id_prefix: str = "",
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> Workflow[RunPage]:
    """Lists runs, newest first by creation time, one page at a time.

    Five round trips read the index (about ten in a large store), and one more for every 65 runs of the page. A run
    that has more than 500 fields needs one more for each 500 of them, and a filter needs one for each 4,000 runs that
    it skips. None blocks the server for more than a few milliseconds. The entries of runs that have expired are dropped
    from the index.

    The next page continues where this one ends, even if runs were created, deleted or changed in between.

    Args:
        labels: only runs with all of these labels, a dict of str by name; None: all runs.
        status: only runs with at least one step of this status; None: all runs.
        run_id_prefix: only runs whose id has this prefix; empty: all runs.
        since: only runs created at or after this time, a datetime with a time zone; None: all runs.
        until: only runs created before this time, a datetime with a time zone; None: all runs.
        limit: how many runs a page has at most, from 1 to 1,000. With `status`, it may have fewer, even none: a page
            ends after 3,000 to 6,000 runs, or 1,000 large runs, have been checked.
        cursor: `cursor` of the previous page; None: the first page.

    Returns:
        The page, and the cursor of the next one: None after the last.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: an index key has a value of another type.
        ServerError: the server or the connection failed.
    """
    wanted = checked_status(status)
    selection = _selection(labels, run_id_prefix, since, until, wanted)
    full = arguments.integer("limit", limit, MAX_LIMIT)
    return _list(context, selection, wanted, full, _position(cursor))


def count_runs(
    context: Context,
    *,
    labels: Labels | None = None,
    run_id_prefix: str = "",
    since: datetime | None = None,
    until: datetime | None = None,
) -> Workflow[int]:
    """Counts runs.

    Five round trips; with `labels` or `run_id_prefix`, one more for each 4,000 runs. A run that has expired is counted
    until its entry is dropped from the index: by `runs`, or when other runs are created that expire.

    Args:
        labels: only runs with all of these labels, a dict of str by name; None: all runs.
        run_id_prefix: only runs whose id has this prefix; empty: all runs.
        since: only runs created at or after this time, a datetime with a time zone; None: all runs.
        until: only runs created before this time, a datetime with a time zone; None: all runs.

    Returns:
        The count.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: an index key has a value of another type.
        ServerError: the server or the connection failed.
    """
    return _count(context, _selection(labels, run_id_prefix, since, until))


def _count(context: Context, selection: Selection) -> Workflow[int]:
    buckets = [Bucket(key, selection, None, 0) for key in context.keys.runs()]
    incomplete = buckets
    while incomplete:
        yield from load(incomplete, "count_runs")
        incomplete = [each for each in incomplete if each.loaded_to is not None]
    return sum(each.count for each in buckets)


def _list(
    context: Context, selection: Selection, status: StepStatus | None, full: int, after: Position | None
) -> Workflow[RunPage]:
    # The newest runs are spread over the buckets, so a page needs only the first entry from most buckets.
    size = 1 + full // 400 if status is None else _LOOKED_AT
    buckets = [Bucket(key, selection, after, size) for key in context.keys.runs()]
    yield from load(buckets, "runs")
    return (yield from read_page(context, "runs", buckets, full, status))


def read_page(
    context: Context, operation: str, buckets: Sequence[Bucket], full: int, status: StepStatus | None = None
) -> Workflow[RunPage]:
    """Reads a page of runs.

    Args:
        context: the store's settings.
        operation: the operation that sends the calls.
        buckets: the buckets; the first part of each is loaded.
        full: how many runs a page has at most.
        status: only runs with at least one step of this status; None: all runs.
    """
    found: list[RunSummary] = []
    read = 0
    while True:
        # Runs that are older than a bucket's loaded part may be older than runs of that bucket that are not loaded.
        settled_to = min((each.loaded_to for each in buckets if each.loaded_to is not None), default=None)
        settled = sorted(entry for each in buckets for entry in each.take(settled_to))
        while settled:
            room = full - len(found)  # large runs may have no step of the status
            chunk, settled = _split(settled, min(room if status is None else max(room, _MIN_READ), _MAX_READ))
            for entry, summary in (yield from _read(context, operation, chunk)):
                if status is None or summary.counts[status] > 0:
                    found.append(summary)
                    if len(found) == full:
                        is_last = entry is chunk[-1] and not settled and settled_to is None
                        return RunPage(found, None if is_last else _cursor(entry.position))
            read += len(chunk)
            if read >= _MAX_READ_IN_ALL and (settled or settled_to is not None):
                return RunPage(found, _cursor(chunk[-1].position))
        if settled_to is None:
            return RunPage(found, None)
        incomplete = _buckets_to_load(buckets, full - len(found))
        looked_at = sum(each.count for each in buckets) + sum(each.size for each in incomplete)
        if status is not None and looked_at > _MAX_LOOKED_AT:
            return RunPage(found, _cursor((settled_to, b"")))
        yield from load(incomplete, operation)


def _buckets_to_load(buckets: Sequence[Bucket], needed: int) -> list[Bucket]:
    """Returns the buckets whose unloaded entries may be among the `needed` next ones."""
    loaded = sorted(entry.position[0] for each in buckets for entry in each.entries)
    incomplete = [each for each in buckets if each.loaded_to is not None]
    if len(loaded) < needed:
        return incomplete
    return [each for each in incomplete if cast("int", each.loaded_to) <= loaded[needed - 1]]


def _split(entries: Sequence[Entry], size: int) -> tuple[Sequence[Entry], Sequence[Entry]]:
    return entries[:size], entries[size:]


def _read(context: Context, operation: str, entries: Sequence[Entry]) -> Workflow[list[tuple[Entry, RunSummary]]]:
    """Reads the runs of some entries; omits those that are gone."""
    scans = yield from scan_runs(context, operation, [entry.position[1] for entry in entries])
    by_id = {scan.run_id: scan for scan in scans}
    return [
        (entry, scan.summary())
        for entry in entries
        # If a run was created again, an entry with its former labels may remain.
        if (scan := by_id.get(entry.position[1].decode())) and (scan.problem or scan.labels == entry.labels)
    ]


def _selection(
    labels: object, run_id_prefix: str, since: object, until: object, status: StepStatus | None = None
) -> Selection:
    """Checks the arguments."""
    letters = b"".join(letter for letter, of in STATUS.items() if of is status)
    lines = labels_data(labels)
    first, end = arguments.moment_ms("since", since), arguments.moment_ms("until", until)
    return Selection(
        None if end is None else ceil(end) - 1,
        None if first is None else ceil(first),
        arguments.run_id_prefix(run_id_prefix),
        letters,
        tuple(lines.split(b"\n")) if lines else (),
    )


def _cursor(position: Position) -> str:
    return format_cursor(-position[0], position[1])


def _position(cursor: object) -> Position | None:
    """Returns the position of a cursor that a caller passed; None for the first page."""
    parsed = parse_cursor(cursor)
    return None if parsed is None else (-listed_at(parsed[0]), parsed[1])
