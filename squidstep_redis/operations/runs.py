"""The operations that summarize runs, and purge old ones."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, cast

from squidstep_redis.errors import CorruptRunError, InvalidArgumentError, described
from squidstep_redis.model import STATUS, StateLine, StepRun, StepStatus, moment
from squidstep_redis.operations.context import Context
from squidstep_redis.operations.indexes import drop_stale_entries
from squidstep_redis.operations.lifecycle import tombstone_ms
from squidstep_redis.operations.pacing import Pacer
from squidstep_redis.operations.reads import pairs
from squidstep_redis.operations.run_index import created_at, drop_stale_runs
from squidstep_redis.operations.scans import find_shards, scan_page
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Seconds
from squidstep_redis.protocol.call import Call, Reply, new_nonce, new_token
from squidstep_redis.protocol.labels import parse_labels
from squidstep_redis.protocol.records import NO_PAYLOADS, step_name
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import SendBatch, Workflow
from squidstep_redis.summaries import RunSummary

_KEYS_PER_SCAN: Final = 1_000  # 0.5 ms of the server's time
_FIELDS_PER_SCAN: Final = 500  # of one run: 1 to 2 ms
_RUN_WORK: Final = 60  # of reading a run
_STEP_WORK: Final = 5  # and of each unfinished step
_MAX_FAILED: Final = 1_000  # failed steps of a run to purge: one script compares them with their records


def summarize_run(context: Context, run_id: RunId) -> Workflow[RunSummary | None]:
    """Counts the steps of a run by status, and says whether the run is cancelled. It reads no payloads.

    One round trip, one more for every 500 fields of a run that has more.

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
    """Deletes the runs in which every step is completed or failed and nothing has changed for some time.

    It scans all keys of the server: one round trip for each thousand keys, a second one that reads the runs among them,
    and a third if some are to be deleted. Each run is deleted in one call, whatever its size, if it has not changed
    since it was read; its memory is freed in the background. A run with more than 1,000 failed steps is not deleted;
    use `delete_run`. Entries that expired runs have left in the indexes are removed, in 15 round trips or more.

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
    wanted = checked_status(status)
    if wanted in (StepStatus.PENDING, StepStatus.RUNNING):
        raise InvalidArgumentError("status", f"must be completed or failed, not {wanted}")
    prefix = arguments.run_id_prefix(run_id_prefix)
    purged: list[RunSummary] = []
    for shard in (yield from find_shards(context, "purge")):
        cursor: bytes | None = None
        while cursor != b"0":
            run_ids, cursor, now = yield from scan_page(context, "purge", shard, cursor or b"0", prefix, _KEYS_PER_SCAN)
            old: list[tuple[RunScan, RunSummary]] = []
            for scan in (yield from scan_runs(context, "purge", run_ids)):
                summary = scan.summary()
                is_old = summary.changed_at is not None and summary.changed_at < now - age
                outcome = StepStatus.FAILED if summary.counts[StepStatus.FAILED] else StepStatus.COMPLETED
                if summary.is_over and is_old and wanted in (None, outcome) and len(scan.lines) <= _MAX_FAILED:
                    old.append((scan, summary))
            if old and not dry_run:
                results = yield SendBatch([_purge_run(context, scan, lifetime) for scan, _ in old])
                raise_unless_corrupt(results)
                old = [each for each, result in zip(old, results, strict=True) if result is True]
            purged += [summary for _, summary in old]
    if not dry_run:
        yield from drop_stale_entries(context)
        yield from drop_stale_runs(context)
    return sorted(purged, key=_newest_first, reverse=True)


# One run


@dataclass(slots=True)
class RunScan:
    """What a scan of one run's records has found so far.

    Attributes:
        created: number of steps created, from the run line.
        completed: number of steps completed, from the run line.
        newest: state line of the step that was completed last.
        lines: the state lines of the steps that are not completed, by step.
        states: the same lines, parsed.
        problem: why the records are corrupt.
        cancel_reason: why the run was cancelled; None if it is not.
        labels: of the run, as they are stored.
        entered: when the run was created, in milliseconds; empty if the index does not say.
    """

    run_id: str
    created: bytes = b""
    completed: bytes = b"0"
    newest: StateLine | None = None
    lines: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    states: dict[bytes, StateLine] = field(default_factory=dict[bytes, StateLine])
    problem: str | None = None
    cancel_reason: str | None = None
    labels: bytes = b""
    entered: bytes = b""

    def unfinished(self, context: Context) -> list[StepRun]:
        """Returns the step runs that are not completed, without payloads."""
        key = context.keys.of_run(self.run_id.encode()).steps
        return [
            context.records.step_run(self.run_id, step.decode(), line, NO_PAYLOADS, key)
            for step, line in self.lines.items()
        ]

    def summary(self) -> RunSummary:
        """Returns the counts and the newest change."""
        counts = dict.fromkeys(StepStatus, 0)
        counts[StepStatus.COMPLETED] = int(self.completed)
        for letter, number in Counter(state.letter for state in self.states.values()).items():
            counts[STATUS[letter]] += number
        states = [*self.states.values(), self.newest] if self.newest else self.states.values()
        changed = max((state.changed_ms for state in states), default=None)
        return RunSummary(
            self.run_id,
            counts,
            None if changed is None else moment(changed),
            self.problem,
            self.cancel_reason,
            created_at(self.entered),
            parse_labels(self.labels),
        )


def scan_runs(context: Context, operation: str, run_ids: Iterable[bytes]) -> Workflow[list[RunScan]]:
    """Reads the unfinished steps of some runs, without payloads. Runs that no longer exist are omitted."""
    scans = {run_id: RunScan(run_id.decode()) for run_id in run_ids}
    parts = deque((run_id, b"0") for run_id in scans)
    pacer = Pacer()
    while parts:
        batch = [parts.popleft() for _ in range(min(pacer.batch_size, len(parts)))]
        results = yield SendBatch([_summarize_run(context, operation, run_id, cursor) for run_id, cursor in batch])
        raise_unless_corrupt(results)
        work = 0
        for (run_id, _), result in zip(batch, results, strict=True):
            work += _RUN_WORK
            try:
                if result is None:
                    del scans[run_id]
                else:
                    cursor, steps = _load(context, scans[run_id], result)
                    work += _STEP_WORK * steps
                    if cursor != b"0":
                        parts.append((run_id, cursor))
            except CorruptRunError as error:  # it must not hide the other runs
                scans[run_id].problem = str(error)
        pacer.adapt(len(batch), work)
    return list(scans.values())


def raise_unless_corrupt(results: list[Any]) -> None:
    """Raises the first error of a batch that is not a CorruptRunError: one corrupt run must not hide the others."""
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, CorruptRunError):
            raise result


def _load(context: Context, scan: RunScan, result: Reply | CorruptRunError) -> tuple[bytes, int]:
    """Adds one part of a run's records to its scan; returns the cursor of the next part, and the number of steps."""
    if isinstance(result, CorruptRunError):
        raise result
    cursor, scan.created, scan.completed, last, lines, scan.labels, scan.entered, *cancelled = result
    scan.cancel_reason = cancelled[0].decode(errors="backslashreplace") if cancelled else None
    key = context.keys.of_run(scan.run_id.encode()).steps
    if last:
        scan.newest = context.records.state(scan.run_id, "", last, key)
    for step, line in pairs(lines):
        name = step_name(scan.run_id, step, key)
        scan.lines[step], scan.states[step] = line, context.records.state(scan.run_id, name, line, key)
    return cursor, len(lines) // 2


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


def _newest_first(summary: RunSummary) -> tuple[float, str]:
    changed = summary.changed_at
    return (-changed.timestamp() if changed else 0, summary.run_id)


def checked_status(status: object) -> StepStatus | None:
    """Returns the status of an argument; None for None."""
    try:
        return None if status is None else StepStatus(cast("str", status))
    except ValueError:
        problem = f"must be one of {', '.join(StepStatus)}, not {described(status)}"
        raise InvalidArgumentError("status", problem) from None
