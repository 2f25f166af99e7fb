"""The runs themselves, across a store: listing them by SCAN, and purging those that are over and old."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar, cast

from redis.crc import key_slot

from squidstep_redis.errors import CorruptRunError, InvalidArgumentError, described
from squidstep_redis.model import RunPage, RunSummary, StepRun, StepStatus, moment
from squidstep_redis.operations.context import Operations, nonce, token
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Seconds
from squidstep_redis.protocol.call import Call, Plan, Reply
from squidstep_redis.protocol.scripts import script

T = TypeVar("T")
Batches = Generator[tuple[Call[Any], ...], list[Any], T]
"""What a plan and an exchange can both yield from."""

MAX_LIMIT: Final = 1_000
_KEYS_AT_ONCE: Final = 1_000  # passed by one SCAN: 0.5 ms of the server's
_FIELDS_AT_ONCE: Final = 500  # of one run: 1 to 2 ms
_STRETCHES: Final = 100  # for one page
_RUNS_LOOKED_AT: Final = 5_000  # likewise
_MOST_FAILED: Final = 1_000  # steps of a run to be purged: they are held against their records in one script
_CURSOR: Final = re.compile(r"(\d+)-(\d+)-(\w*)")


@dataclass(slots=True)
class RunScan:
    """What a walk through the records of one run has seen.

    Attributes:
        unfinished: the step runs that are not completed, by step, without their payloads.
        lines: their state lines.
    """

    run_id: str
    made: bytes = b""
    completed: bytes = b"0"
    newest: StepRun | None = None
    unfinished: dict[bytes, StepRun] = field(default_factory=dict[bytes, StepRun])
    lines: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    problem: str | None = None

    def summary(self) -> RunSummary:
        """What it comes to."""
        counts = dict.fromkeys(StepStatus, 0)
        counts[StepStatus.COMPLETED] = int(self.completed)
        changes = [_changed_at(self.newest)] if self.newest else []
        for step_run in self.unfinished.values():
            counts[step_run.status] += 1
            changes.append(_changed_at(step_run))
        return RunSummary(self.run_id, counts, max(changes, default=None), self.problem)


class _Place(NamedTuple):
    """A server with keys of the store: its name, and the key of a bucket that lies there."""

    name: str
    key: bytes


class _Position(NamedTuple):
    """How far a listing has come."""

    scanned: bytes
    passed: int
    place: str

    @property
    def cursor(self) -> str:
        """As it is handed out: opaque, but for this."""
        return f"{self.scanned.decode()}-{self.passed}-{self.place}"


class ScanPage(NamedTuple):
    """What one SCAN found.

    Attributes:
        progress: how far through the keys of all servers this is, from 0 to 1.
        now: by the server's clock.
    """

    walked: list[RunScan]
    next: _Position | None
    progress: float
    now: datetime


class Listing(Operations):
    """Makes the plan for each operation on the runs of a store."""

    def runs(
        self,
        *,
        status: StepStatus | str | None = None,
        run_id_prefix: str = "",
        limit: int = 100,
        cursor: str | None = None,
    ) -> Plan[RunPage]:
        """Lists runs, a page at a time: newest change first within the page, in no order from page to page.

        There is no index of runs: this is a SCAN, which passes all keys of the server, bit by bit. A run that is there
        from the first page to the last is listed, unless a failover or a moving slot comes in between. Two round trips
        for a thousand keys, one more for each 500 fields of a run that has more.

        Args:
            status: that at least one step of the run has; None: any run.
            run_id_prefix: what the run's id begins with.
            limit: when the page is full, up to 1,000. It may hold some more, since keys come in handfuls; and with a
                filter fewer, even none: it ends after 5,000 runs or 100,000 keys.
            cursor: of the page before; None: the first page.

        Returns:
            The page, and the cursor of the next: None after the last.

        Raises:
            InvalidArgumentError: refused before anything was sent.
            ServerError: see there.
        """
        wanted = _status(status)
        prefix = _prefix(run_id_prefix)
        full = arguments.integer("limit", limit, MAX_LIMIT)
        position = _position(cursor)
        places = yield from self._places()
        found: list[RunSummary] = []
        looked_at = 0
        progress = 1.0
        count = max(10, full)  # a run has two keys, as a rule
        for _ in range(_STRETCHES):
            count = min(2 * count, _KEYS_AT_ONCE)
            stretch = yield from self._stretch(places, position, prefix, count)
            looked_at += len(stretch.walked)
            found += [
                summary
                for summary in (walked.summary() for walked in stretch.walked)
                if wanted is None or summary.counts[wanted]
            ]
            position, progress = stretch.next, stretch.progress
            if position is None or len(found) >= full or looked_at >= _RUNS_LOOKED_AT:
                break
        found.sort(key=_newest_first)
        return RunPage(found, None if position is None else position.cursor, progress)

    def purge(
        self,
        older_than: Seconds,
        *,
        run_id_prefix: str = "",
        dry_run: bool = False,
        tombstone: Seconds = 3_600,
    ) -> Plan[list[RunSummary]]:
        """Deletes the runs all of whose steps are completed or failed, and in which nothing changed for so long.

        It passes all keys of the server as `runs` does, in as many round trips and one more for each thousand keys
        with such runs among them. Each run goes at once, if it has not changed since it was looked at, whatever its
        size: its memory is freed in the background. One with more than 1,000 failed steps stays; see `delete_run`.

        Args:
            older_than: seconds since the last change, by the server's clock; up to ten years.
            run_id_prefix: what the ids of the runs begin with.
            dry_run: whether to leave them all where they are, and only tell.
            tombstone: as for `delete_run`.

        Returns:
            What was deleted, or would be: the one that changed longest ago first.

        Raises:
            InvalidArgumentError: refused before anything was sent.
            ServerError: see there. Runs that were deleted before it stay deleted.
        """
        age = timedelta(seconds=arguments.seconds("older_than", older_than, arguments.MAX_TTL))
        tombstone_ms = b"%d" % round(arguments.seconds("tombstone", tombstone, arguments.MAX_TTL) * 1_000)
        prefix = _prefix(run_id_prefix)
        places = yield from self._places()
        purged: list[RunSummary] = []
        position: _Position | None = None
        while True:
            stretch = yield from self._stretch(places, position, prefix, _KEYS_AT_ONCE)
            over: list[tuple[RunScan, RunSummary]] = []
            for walked in stretch.walked:
                summary = walked.summary()
                if summary.is_over and summary.changed_at and summary.changed_at < stretch.now - age:
                    over.append((walked, summary))
            over = [(walked, summary) for walked, summary in over if len(walked.lines) <= _MOST_FAILED]
            if over and not dry_run:
                calls = tuple(self._purge(walked, tombstone_ms) for walked, _ in over)
                answers = raise_unless_corrupt((yield calls))
                over = [each for each, answer in zip(over, answers, strict=True) if answer is True]
            purged += [summary for _, summary in over]
            position = stretch.next
            if position is None:
                return sorted(purged, key=_newest_first, reverse=True)

    def _walk(self, run_ids: Iterable[bytes]) -> Batches[list[RunScan]]:
        """Reads where the unfinished steps of some runs stand; runs that are gone are left out."""
        walks = {run_id: RunScan(run_id.decode()) for run_id in run_ids}
        cursors = dict.fromkeys(walks, b"0")
        while cursors:
            calls = tuple(self._summarize(run_id, cursor) for run_id, cursor in cursors.items())
            answers = raise_unless_corrupt((yield calls))
            asked, cursors = list(cursors), {}
            for run_id, answer in zip(asked, answers, strict=True):
                try:
                    cursor = answer if answer is None else self._take_in(walks[run_id], answer)
                except CorruptRunError as error:  # which must not hide the others
                    cursor, walks[run_id].problem = b"0", str(error)
                if cursor is None:
                    del walks[run_id]
                elif cursor != b"0":
                    cursors[run_id] = cursor
        return list(walks.values())

    def _take_in(self, walked: RunScan, answer: Reply | CorruptRunError) -> bytes:
        """Takes in a stretch of a run's records; answers the cursor of the next."""
        if isinstance(answer, CorruptRunError):
            raise answer
        cursor, walked.made, walked.completed, last, lines = answer
        key = self.keys.run(walked.run_id.encode()).steps
        if last:
            walked.newest = self._records.step_run(walked.run_id, "", last, (None, None, None), key)
        for step, line in zip(lines[::2], lines[1::2], strict=True):
            step_run = self._records.step_run(walked.run_id, step.decode(), line, (None, None, None), key)
            walked.unfinished[step], walked.lines[step] = step_run, line
        return cursor

    def _summarize(self, run_id: bytes, cursor: bytes) -> Call[Reply | None]:
        def parse(reply: Reply) -> Reply | None:
            return reply[2:] if reply[0] == b"summary" else None

        keys = self.keys.run(run_id)[:2]
        args = (nonce(), cursor, b"%d" % _FIELDS_AT_ONCE)
        return Call(run_id.decode(), script("summarize_run"), keys, args, parse, lambda: None)

    def _purge(self, walked: RunScan, tombstone_ms: bytes) -> Call[bool]:
        def parse(reply: Reply) -> bool:
            return reply[0] == b"purged"

        run = self._run(walked.run_id)
        steps, done, _, failed = run.keys
        lines = [part for line in walked.lines.items() for part in line]
        args = (token(), run.member, tombstone_ms, walked.made, walked.completed, *lines)
        return Call(run.text, script("purge_run"), (steps, done, failed), args, parse)

    def _stretch(
        self, places: list[_Place], position: _Position | None, run_id_prefix: bytes, count: int
    ) -> Plan[ScanPage]:
        """Passes so many keys of one server, from a position on, and looks at the runs among them."""
        names = [place.name for place in places]
        # A server that is gone by now: on with the next, in the order of their names.
        index = 0 if position is None else next((i for i, name in enumerate(names) if name >= position.place), None)
        if index is None:
            return ScanPage([], None, 1.0, moment(0))
        place = places[index]
        here = position if position is not None and position.place == place.name else _Position(b"0", 0, place.name)

        def parse(reply: Reply) -> Reply:
            return reply[2:]

        args = (nonce(), here.scanned, self.keys.pattern(run_id_prefix), b"%d" % count)
        found: Reply = yield Call(None, script("scan_runs"), (place.key,), args, parse)
        scanned, keys, total, now = found
        walked = yield from self._walk(dict.fromkeys(self._runs_of(keys, run_id_prefix)))
        passed = here.passed + count
        if scanned != b"0":
            after: _Position | None = _Position(scanned, passed, place.name)
            progress = (index + min(passed / max(total, 1), 1.0)) / len(places)
        else:
            after = _Position(b"0", 0, names[index + 1]) if index + 1 < len(names) else None
            progress = (index + 1) / len(places)
        return ScanPage(walked, after, progress, moment(int(now)))

    def _runs_of(self, keys: list[bytes], run_id_prefix: bytes) -> Iterator[bytes]:
        """The runs that have one of these keys; what only looks like it is another program's."""
        for key in keys:
            run_id = self.keys.run_of(key)
            if run_id is not None and run_id.startswith(run_id_prefix):
                with suppress(UnicodeDecodeError):  # another program's
                    run_id.decode()
                    yield run_id

    def _places(self) -> Plan[list[_Place]]:
        """The servers that have keys of this store, in the order of their names."""
        buckets = self.keys.claims()
        replies: dict[str, list[Any]] = yield [("CLUSTER", "SLOTS")]
        maps = [cast("list[Any]", reply) for (reply,) in replies.values() if isinstance(reply, list)]
        if not maps or "" in replies:
            return [_Place("", buckets[0])]
        owners: list[tuple[range, str]] = []
        for first, last, primary, *_ in maps[0]:
            name = primary[2].decode() if isinstance(primary[2], bytes) else str(primary[2])
            owners.append((range(int(first), int(last) + 1), name))
        found: dict[str, bytes] = {}
        for bucket in buckets:
            slot = key_slot(bucket)
            for range_, name in owners:
                if slot in range_:
                    found.setdefault(name, bucket)
        return [_Place(name, key) for name, key in sorted(found.items())]


def raise_unless_corrupt(answers: list[Any]) -> list[Any]:
    """Answers of a batch, in which a run that is corrupt is an answer like another."""
    for answer in answers:
        if isinstance(answer, Exception) and not isinstance(answer, CorruptRunError):
            raise answer
    return answers


def _changed_at(step_run: StepRun) -> datetime:
    return step_run.ended_at or step_run.started_at or step_run.created_at


def _newest_first(summary: RunSummary) -> tuple[float, str]:
    changed = summary.changed_at
    return (-changed.timestamp() if changed else 0, summary.run_id)


def _status(status: object) -> StepStatus | None:
    try:
        return None if status is None else StepStatus(cast("str", status))
    except ValueError:
        raise InvalidArgumentError(
            "status", f"must be one of {', '.join(StepStatus)}, not {described(status)}"
        ) from None


def _prefix(run_id_prefix: object) -> bytes:
    return b"" if run_id_prefix == "" else arguments.identifier("run_id_prefix", run_id_prefix).data


def _position(cursor: object) -> _Position | None:
    if cursor is None:
        return None
    match = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
    if match is None:
        raise InvalidArgumentError("cursor", f"must be that of another page, not {described(cursor)}")
    return _Position(match[1].encode(), int(match[2]), match[3])
