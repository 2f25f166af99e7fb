"""The operations that read many steps or runs: summaries, listing by SCAN, and purging old runs."""

from __future__ import annotations

from binascii import crc32
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, cast

from squidstep_redis.errors import CorruptRunError, InvalidArgumentError, described
from squidstep_redis.model import StepRun, StepStatus
from squidstep_redis.operations.context import Context
from squidstep_redis.operations.indexes import drop_stale_entries
from squidstep_redis.operations.lifecycle import tombstone_ms
from squidstep_redis.operations.reads import MAX_LIMIT, pairs
from squidstep_redis.operations.scans import Position, Rest, find_shards, parse_cursor, scan_page
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Seconds
from squidstep_redis.protocol.call import Call, Reply, new_nonce, new_token
from squidstep_redis.protocol.records import NO_PAYLOADS, step_name
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import SendBatch, Workflow
from squidstep_redis.summaries import RunPage, RunSummary

_KEYS_PER_SCAN: Final = 1_000  # 0.5 ms of the server's time
_FIELDS_PER_SCAN: Final = 500  # of one run: 1 to 2 ms
_SCANS_PER_PAGE: Final = 100
_RUNS_PER_PAGE: Final = 5_000  # examined, not returned
_MAX_FAILED: Final = 1_000  # failed steps of a run to purge: one script compares them with their records


def runs(
    context: Context,
    *,
    status: StepStatus | str | None = None,
    run_id_prefix: str = "",
    since: datetime | None = None,
    limit: int = 100,
    cursor: str | None = None,
) -> Workflow[RunPage]:
    """Lists runs one page at a time. Each page is sorted, newest change first; the pages are in no order.

    Runs that changed in the same millisecond are ordered by run id. There is no index of runs: this is a SCAN of all
    keys of the server, in small parts. A run that exists from the first page to the last is listed, unless a failover
    or a slot migration happens in between; it may be listed twice if runs change. Two round trips per
    thousand keys, one more for each 500 fields of a run that has more.

    Args:
        status: only runs with at least one step of this status; None: all runs.
        run_id_prefix: only runs whose id has this prefix; empty: all runs.
        since: only runs that changed at or after this time, a datetime with a time zone; None: all runs.
        limit: how many runs a page has at most, from 1 to 1,000; more only if runs change between two pages. With a
            filter it may have fewer, even none: a page ends after 5,000 runs or 100,000 keys.
        cursor: `cursor` of the previous page; None: the first page.

    Returns:
        The page, and the cursor of the next one: None after the last.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        ServerError: the server or the connection failed.
    """
    wanted = _status(status)
    prefix = arguments.run_id_prefix(run_id_prefix)
    since_ms = arguments.moment_ms("since", since)
    full = arguments.integer("limit", limit, MAX_LIMIT)
    position = parse_cursor(cursor)
    shards = yield from find_shards(context)

    def is_wanted(summary: RunSummary) -> bool:
        changed = summary.changed_at
        is_new = since_ms is None or (changed is not None and changed.timestamp() * 1_000 >= since_ms)
        return is_new and (wanted is None or summary.counts[wanted] > 0)

    found: list[RunSummary] = []
    examined = 0
    progress = 1.0
    is_filtered = wanted is not None or since_ms is not None
    count = max(10, full)
    for _ in range(_SCANS_PER_PAGE):
        # A run usually has two keys. The last SCAN should find few runs too many: the next page reads them again.
        count = min(2 * count if is_filtered else max(10, 8 * (full - len(found)) // 5), _KEYS_PER_SCAN)
        rest = None if position is None else position.rest
        if rest is not None:
            count = rest.size  # the same page again
        page = yield from scan_page(context, "runs", shards, position, prefix, count)
        scans = yield from scan_runs(context, "runs", page.run_ids)
        examined += len(page.run_ids)
        summaries = sorted(filter(is_wanted, (scan.summary() for scan in scans)), key=_newest_first)
        digest = crc32(repr([(each.run_id, each.changed_at) for each in summaries]).encode())
        if rest is not None and rest.digest != digest:
            end, room = 0, len(summaries)  # it has changed: all of it, so that none is missed, and the listing ends
        else:
            end, room = rest.returned if rest is not None else 0, full - len(found)
        found += summaries[end : end + room]
        end += room
        if end < len(summaries):
            position = page.at._replace(rest=Rest(count, digest, end))
            break
        position, progress = page.next, page.progress
        if position is None or len(found) >= full or examined >= _RUNS_PER_PAGE:
            break
    found.sort(key=_newest_first)
    return RunPage(found, None if position is None else position.cursor, progress)


def summarize_run(context: Context, run_id: RunId) -> Workflow[RunSummary | None]:
    """Counts the steps of a run by status, and says whether the run is cancelled. It reads no payloads.

    One round trip, one more for each 500 fields of a run that has more.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.

    Returns:
        The summary; None if there is no such run. `problem` says why its records are corrupt, if they are.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        ServerError: the server or the connection failed.
    """
    return _summary(context, context.keys.run(run_id).text)


def _summary(context: Context, run_id: str) -> Workflow[RunSummary | None]:
    scans = yield from scan_runs(context, "summarize_run", [run_id.encode()])
    return scans[0].summary() if scans else None


def purge(
    context: Context,
    older_than: Seconds,
    *,
    run_id_prefix: str = "",
    status: StepStatus | str | None = None,
    dry_run: bool = False,
    tombstone: Seconds = 3_600,
) -> Workflow[list[RunSummary]]:
    """Deletes the runs in which every step is completed or failed and nothing changed for some time.

    It scans all keys of the server like `runs`, with the same round trips and one more per thousand keys that include
    such runs. Each run is deleted in one call, whatever its size, if it has not changed since it was read; its memory
    is freed in the background. A run with more than 1,000 failed steps is not deleted; use `delete_run`. Entries that
    expired runs have left in the indexes are removed, which takes one to three round trips per server.

    Args:
        older_than: seconds since the last change, by the server's clock, up to ten years; or a timedelta.
        run_id_prefix: only runs whose id has this prefix; empty: all runs.
        status: "completed": only runs in which every step is completed; "failed": only runs with a failed step; None:
            both.
        dry_run: whether to delete nothing and only return what would be deleted.
        tombstone: seconds, or a timedelta, for which writes to a deleted run are rejected with RunDeletedError.

    Returns:
        The runs that were deleted, or would be, oldest change first.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        ServerError: the server or the connection failed. Runs deleted before it stay deleted.
    """
    age = timedelta(seconds=arguments.seconds("older_than", older_than, arguments.MAX_TTL))
    lifetime = tombstone_ms(tombstone)
    wanted = _status(status)
    if wanted in (StepStatus.PENDING, StepStatus.RUNNING):
        raise InvalidArgumentError("status", f"must be completed or failed, not {wanted}")
    prefix = arguments.run_id_prefix(run_id_prefix)
    shards = yield from find_shards(context)
    purged: list[RunSummary] = []
    position: Position | None = None
    while True:
        page = yield from scan_page(context, "purge", shards, position, prefix, _KEYS_PER_SCAN)
        old: list[tuple[RunScan, RunSummary]] = []
        for scan in (yield from scan_runs(context, "purge", page.run_ids)):
            summary = scan.summary()
            is_old = summary.changed_at is not None and summary.changed_at < page.now - age
            outcome = StepStatus.FAILED if summary.counts[StepStatus.FAILED] else StepStatus.COMPLETED
            if summary.is_over and is_old and wanted in (None, outcome) and len(scan.lines) <= _MAX_FAILED:
                old.append((scan, summary))
        if old and not dry_run:
            results = yield SendBatch([_purge_run(context, scan, lifetime) for scan, _ in old])
            raise_unless_corrupt(results)
            old = [each for each, result in zip(old, results, strict=True) if result is True]
        purged += [summary for _, summary in old]
        position = page.next
        if position is None:
            break
    if not dry_run:
        yield from drop_stale_entries(context)
    return sorted(purged, key=_newest_first, reverse=True)


# One run


@dataclass(slots=True)
class RunScan:
    """What a scan of one run's records has found.

    Attributes:
        created: number of steps created, from the run line.
        completed: number of steps completed, from the run line.
        newest: the step run that was completed last.
        unfinished: the step runs that are not completed, by step, without payloads.
        lines: their state lines.
        problem: why the records are corrupt.
        cancel_reason: why the run was cancelled; None if it is not.
    """

    run_id: str
    created: bytes = b""
    completed: bytes = b"0"
    newest: StepRun | None = None
    unfinished: dict[bytes, StepRun] = field(default_factory=dict[bytes, StepRun])
    lines: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    problem: str | None = None
    cancel_reason: str | None = None

    def summary(self) -> RunSummary:
        """Returns the counts and the newest change."""
        counts = dict.fromkeys(StepStatus, 0)
        counts[StepStatus.COMPLETED] = int(self.completed)
        changes = [_changed_at(self.newest)] if self.newest else []
        for step_run in self.unfinished.values():
            counts[step_run.status] += 1
            changes.append(_changed_at(step_run))
        return RunSummary(self.run_id, counts, max(changes, default=None), self.problem, self.cancel_reason)


def scan_runs(context: Context, operation: str, run_ids: Iterable[bytes]) -> Workflow[list[RunScan]]:
    """Reads the unfinished steps of some runs, without payloads. Runs that no longer exist are omitted."""
    scans = {run_id: RunScan(run_id.decode()) for run_id in run_ids}
    cursors = dict.fromkeys(scans, b"0")
    while cursors:
        results = yield SendBatch([_summarize_run(context, operation, run_id, at) for run_id, at in cursors.items()])
        raise_unless_corrupt(results)
        scanned, cursors = list(cursors), {}
        for run_id, result in zip(scanned, results, strict=True):
            try:
                cursor = result if result is None else _load(context, scans[run_id], result)
            except CorruptRunError as error:  # it must not hide the other runs
                cursor, scans[run_id].problem = b"0", str(error)
            if cursor is None:
                del scans[run_id]
            elif cursor != b"0":
                cursors[run_id] = cursor
    return list(scans.values())


def raise_unless_corrupt(results: list[Any]) -> None:
    """Raises the first error of a batch that is not a CorruptRunError: one corrupt run must not hide the others."""
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, CorruptRunError):
            raise result


def _load(context: Context, scan: RunScan, result: Reply | CorruptRunError) -> bytes:
    """Adds one part of a run's records to its scan; returns the cursor of the next part."""
    if isinstance(result, CorruptRunError):
        raise result
    cursor, scan.created, scan.completed, last, lines, *cancelled = result
    scan.cancel_reason = cancelled[0].decode(errors="backslashreplace") if cancelled else None
    key = context.keys.of_run(scan.run_id.encode()).steps
    if last:
        scan.newest = context.records.step_run(scan.run_id, "", last, NO_PAYLOADS, key)
    for step, line in pairs(lines):
        name = step_name(scan.run_id, step, key)
        step_run = context.records.step_run(scan.run_id, name, line, NO_PAYLOADS, key)
        scan.unfinished[step], scan.lines[step] = step_run, line
    return cursor


def _summarize_run(context: Context, operation: str, run_id: bytes, cursor: bytes) -> Call[Reply | None]:
    def parse(reply: Reply) -> Reply | None:
        return reply[2:] if reply[0] == b"summary" else None

    keys = context.keys.of_run(run_id)[:2]
    args = (new_nonce(), cursor, b"%d" % _FIELDS_PER_SCAN)
    return Call(run_id.decode(), script("summarize_run"), keys, args, parse, lambda: None, part_of=operation)


def _purge_run(context: Context, scan: RunScan, tombstone_ms: bytes) -> Call[bool]:
    def parse(reply: Reply) -> bool:
        return reply[0] == b"purged"

    run = context.keys.run(scan.run_id)
    steps, done, _, failed = run.keys
    lines = [part for line in scan.lines.items() for part in line]
    args = (new_token(), run.member, tombstone_ms, scan.created, scan.completed, *lines)
    return Call(run.text, script("purge_run"), (steps, done, failed), args, parse, part_of="purge")


def _changed_at(step_run: StepRun) -> datetime:
    return step_run.ended_at or step_run.started_at or step_run.created_at


def _newest_first(summary: RunSummary) -> tuple[float, str]:
    changed = summary.changed_at
    return (-changed.timestamp() if changed else 0, summary.run_id)


def _status(status: object) -> StepStatus | None:
    try:
        return None if status is None else StepStatus(cast("str", status))
    except ValueError:
        problem = f"must be one of {', '.join(StepStatus)}, not {described(status)}"
        raise InvalidArgumentError("status", problem) from None
