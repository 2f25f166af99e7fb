"""The operations that read: of one step, of one run, and across runs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from squidstep_redis.errors import CorruptRunError, InvalidArgumentError, WaitTimeoutError, described
from squidstep_redis.model import Attempt, ClaimCounts, StepPage, StepRun, StepStatus
from squidstep_redis.operations.context import Operations, Run, nonce
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Name, RunId, Seconds, Step
from squidstep_redis.protocol.call import BlockOnStream, Call, Exchange, Plan, Reply
from squidstep_redis.protocol.keys import member_prefix, parse_member
from squidstep_redis.protocol.scripts import script

MAX_LIMIT: Final = 1_000

_FIRST_POLL: Final = 0.02  # seconds until a waiter looks again for a record that is not there yet
_LAST_POLL: Final = 1.0

# The parts of a record, by the first byte of their field: the state line, and those beside it.
_KINDS: Final = (b"i", b"o", b"e")
_PARTS: Final = (b"s", *_KINDS)

_FIELDS_PER_STEP: Final = 3  # more or less: state, input, output or error
_MOST_STEPS: Final = 10**9


class Reads(Operations):
    """Makes the call for each operation that reads."""

    def get_step_run(self, run_id: RunId, step: Step) -> Call[StepRun | None]:
        """Reads one step run; it carries no claim. None if there is no record. One round trip.

        Raises:
            InvalidArgumentError: refused before anything was sent.
            CorruptRunError: what is stored cannot be trusted.
        """
        run = self._run(run_id)
        name = arguments.step(step)

        def parse(reply: Reply) -> StepRun | None:
            found = reply[0] == b"found"
            return self._records.record(run.text, name.text, reply[2:], run.keys.steps) if found else None

        args = (nonce(), name.data)
        return Call(run.text, script("get_step_run"), run.keys[:2], args, parse, lambda: None, name.text)

    def get_run(self, run_id: RunId) -> Call[list[StepRun]]:
        """Reads all step runs of a run, as they are at one moment, in the order they came to be.

        One round trip. All of a run of 10,000 steps holds the server up for 0.04 to 0.1 s: where that is too long, see
        `scan_steps`.

        Raises:
            As `get_step_run`.
        """
        run = self._run(run_id)

        def parse(reply: Reply) -> list[StepRun]:
            fields = dict(_pairs(reply[2]))
            found = [
                self._records.record(
                    run.text,
                    field[1:].decode(),
                    [line, *(fields.get(kind + field[1:]) for kind in _KINDS)],
                    run.keys.steps,
                )
                for field, line in fields.items()
                if field[:1] == b"s"
            ]
            return sorted(found, key=_nth)

        return Call(run.text, script("get_run"), run.keys[:2], (nonce(),), parse, list)

    def scan_steps(self, run_id: RunId, *, limit: int = 100, cursor: str | None = None) -> Call[StepPage]:
        """Reads the step runs of a run a page at a time: of a run of any length, without holding the server up.

        One round trip. Each step run is as it was when its page was read: for all of them at one moment, see `get_run`.
        A step that is there from the first page to the last is answered, unless a failover or a moving slot comes in
        between; twice, now and then: what came last is newer.

        Args:
            run_id: as for `get_step_run`.
            limit: about how many step runs make a page, up to 1,000. A run of a few dozen comes as one.
            cursor: of the page before; None: the first page.

        Returns:
            The page, in no order, and the cursor of the next: None after the last.

        Raises:
            As `get_step_run`.
        """
        run = self._run(run_id)
        fields = _FIELDS_PER_STEP * arguments.integer("limit", limit, MAX_LIMIT)

        def parse(reply: Reply) -> StepPage:
            flat: list[bytes] = reply[3]
            found: list[StepRun] = []
            for at in range(0, len(flat), 1 + len(_PARTS)):
                values = [value or None for value in flat[at + 1 : at + 1 + len(_PARTS)]]
                found.append(self._records.record(run.text, flat[at][1:].decode(), values, run.keys.steps))
            return StepPage(found, None if reply[2] == b"0" else reply[2].decode())

        args = (nonce(), _scanned(cursor), b"%d" % fields)
        return Call(run.text, script("scan_steps"), run.keys[:2], args, parse, lambda: StepPage([], None))

    def attempts(self, run_id: RunId, step: Step) -> Call[list[Attempt]]:
        """Reads what is known of a step's attempts, oldest first: the latest and up to eight before it.

        One round trip.

        Raises:
            As `get_step_run`.
        """
        run = self._run(run_id)
        name = arguments.step(step)

        def parse(reply: Reply) -> list[Attempt]:
            return [self._records.attempt(run.text, name.text, entry, run.keys.steps) for entry in reply[2:]]

        return Call(run.text, script("attempts"), run.keys[:2], (nonce(), name.data), parse, list, name.text)

    def completed_steps(self, run_id: RunId, *, after: int = 0, limit: int | None = None) -> Call[list[str]]:
        """Lists the completed steps of a run, in the order of their completion. One round trip.

        What has been listed keeps its place, so that a long run can be read, or followed, bit by bit:
        `after` is how many you have.

        Args:
            run_id: as for `get_step_run`.
            after: how many to leave out at the beginning.
            limit: how many at most; None: all the others.

        Raises:
            As `get_step_run`.
        """
        run = self._run(run_id)

        def parse(reply: Reply) -> list[str]:
            return [step.decode() for step in reply[2]]

        args = (nonce(), *_places(after, limit))
        return Call(run.text, script("completed_steps"), run.keys[:2], args, parse, list)

    def completed_outputs(
        self, run_id: RunId, *, after: int = 0, limit: int | None = None
    ) -> Call[list[dict[str, Any]]]:
        """Lists the outputs of a run's completed steps, in the order of their completion. One round trip.

        `after` and `limit` as for `completed_steps`. All 10,000 of a run hold the server up for 0.02 to 0.07 s.

        Raises:
            As `get_step_run`, and UndecodablePayloadError.
        """
        run = self._run(run_id)

        def parse(reply: Reply) -> list[dict[str, Any]]:
            return [
                self.payloads.decode(output, run.text, step.decode(), "output")
                for step, output in zip(reply[2], reply[3], strict=True)
            ]

        args = (nonce(), *_places(after, limit))
        return Call(run.text, script("completed_outputs"), run.keys[:2], args, parse, list)

    def step_statuses(self, run_id: RunId) -> Call[dict[str, StepStatus]]:
        """Reads where each step of a run stands at one moment, in the order the steps came to be.

        One round trip. A run of 10,000 steps holds the server up for 0.03 to 0.1 s.

        Raises:
            As `get_step_run`.
        """
        run = self._run(run_id)

        def parse(reply: Reply) -> dict[str, StepStatus]:
            found = [
                self._records.step_run(run.text, field[1:].decode(), line, (None, None, None), run.keys.steps)
                for field, line in zip(reply[2], reply[3], strict=True)
            ]
            return {step_run.step: step_run.status for step_run in sorted(found, key=_nth)}

        return Call(run.text, script("step_statuses"), run.keys[:2], (nonce(),), parse, dict)

    def wait_for_step(self, run_id: RunId, step: Step, timeout: Seconds) -> Plan[StepRun]:
        """Waits until a step is completed or has failed; so a skipped duplicate can answer with the winner's output.

        Woken by the script that ends the step. It looks again each second all the same, for a wake-up may be lost, and
        more often while nobody has scheduled or begun the step: one round trip for each look, one for each pause. A
        connection is in use meanwhile.

        Args:
            run_id: as for `get_step_run`.
            step: likewise.
            timeout: seconds to wait at most, from 0.001.

        Returns:
            The completed or failed step run. Who retries a failed step makes it running again: wait again then.

        Raises:
            WaitTimeoutError: the step was not over in time.
            RunDeletedError: the run was deleted.
            InvalidArgumentError: refused before anything was sent.
            CorruptRunError: what is stored cannot be trusted.
            ServerError: the server could not be asked.
        """
        run = self._run(run_id)
        name = arguments.step(step)
        limit = arguments.seconds("timeout", timeout, arguments.MAX_WAIT)
        return self._waiting(run, name, limit)

    def _waiting(self, run: Run, step: Name, limit: float) -> Plan[StepRun]:
        end = time.monotonic() + limit
        pause = _FIRST_POLL
        while True:
            step_run, last = yield self._await_step(run, step)
            if step_run is not None and last is None:
                return step_run
            left = end - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(run.text, step.text, limit, step_run)
            if last is None:
                yield min(pause, left)
                pause = min(2 * pause, _LAST_POLL)
            else:
                yield BlockOnStream(run.wake, last, min(left, _LAST_POLL))

    def _await_step(self, run: Run, step: Name) -> Call[tuple[StepRun | None, bytes | None]]:
        """Answers the step run and, if it is not over, behind which entry of the run's stream to wait for that."""

        def parse(reply: Reply) -> tuple[StepRun | None, bytes | None]:
            if reply[0] == b"missing":
                return None, None
            values = [value or None for value in reply[2:6]]
            last = reply[6] if reply[0] == b"waiting" else None
            return self._records.record(run.text, step.text, values, run.keys.steps), last

        return Call(run.text, script("await_step"), run.keys[:2], (nonce(), step.data), parse, None, step.text)

    # Across runs

    def lapsed_claims(self, limit: int = 100) -> Exchange[list[StepRun]]:
        """Lists step runs whose lease is over and that nobody has taken over, longest over first.

        Two round trips per server as a rule: one reads the index of each of 1,024 buckets, one holds what was found
        against its record. An entry without its record is dropped from the index.

        Args:
            limit: how many at most, up to 1,000.

        Raises:
            InvalidArgumentError: refused before anything was sent.
        """
        return self._scan(b"lapsed", self.keys.claims(), limit)

    def live_claims(self, limit: int = 100, *, owner: str | None = None) -> Exchange[list[StepRun]]:
        """Lists step runs that are being executed under a lease, soonest over first.

        Round trips and errors as for `lapsed_claims`; with an `owner`, one more for each `limit` of live claims that
        are not its own, out of the thousand or so soonest over of each of 1,024 buckets.

        Args:
            limit: how many at most, up to 1,000.
            owner: whose claims alone, as it was given to `begin_step`; None: anybody's.
        """
        return self._scan(b"live", self.keys.claims(), limit, arguments.owner(owner))

    def count_claims(self) -> Exchange[ClaimCounts]:
        """Counts the claims under a lease, and those whose lease is over, across all runs.

        One round trip per server, of 1,024 small calls. Entries of runs that have expired or were deleted are counted
        until `lapsed_claims` or `live_claims` come upon them and drop them.

        Raises:
            ServerError: the server could not be asked.
            CorruptRunError: a key of the index holds something else.
        """

        def parse(reply: Reply) -> ClaimCounts:
            return ClaimCounts(int(reply[2]), int(reply[3]))

        counted = yield [Call(None, script("count_claims"), (key,), (nonce(),), parse) for key in self.keys.claims()]
        counts: list[ClaimCounts] = _all(counted)
        return ClaimCounts(sum(each.live for each in counts), sum(each.lapsed for each in counts))

    def failed_steps(self, limit: int = 100) -> Exchange[list[StepRun]]:
        """Lists failed step runs, newest first, out of the newest thousand or so of each of 1,024 buckets.

        Round trips, `limit` and errors as for `lapsed_claims`.
        """
        return self._scan(b"failed", self.keys.failed(), limit)

    def _scan(self, mode: bytes, indexes: list[bytes], limit: int, owner: bytes = b"") -> Exchange[list[StepRun]]:
        wanted = arguments.integer("limit", limit, MAX_LIMIT)
        # The first of all are spread over the buckets: a few of each make a page, as a rule.
        first_page = MAX_LIMIT if owner else 4 + wanted // 250
        asked = buckets = [_Bucket(key, first_page) for key in indexes]
        confirmed: dict[bytes, StepRun | None] = {}
        while True:
            if asked:
                pages = yield [
                    Call(None, script("list_index"), (each.key,), (*each.args(), mode), _entries) for each in asked
                ]
                for each, page in zip(asked, _all(pages), strict=True):
                    each.load(page)
            merged = [_Entry(*entry, each) for each in buckets for entry in each.entries]
            merged.sort(key=_rank, reverse=mode == b"failed")
            # What ranks behind the last of a bucket that has more to tell may rank behind what that has to tell.
            settled = next((place + 1 for place, each in enumerate(merged) if each.is_end), len(merged))
            found: list[StepRun] = []
            for start in range(0, settled, wanted):
                entries = merged[:settled][start : start + wanted]
                unseen = [each for each in entries if each.member not in confirmed]
                yield from self._verify_all(mode, unseen, owner, confirmed)
                found += [step_run for each in entries if (step_run := confirmed[each.member])]
                if len(found) >= wanted:
                    return found[:wanted]
            if settled == len(merged) and not (merged and merged[-1].is_end):
                return found
            # On with those buckets that may hold what is missing.
            asked = [each.bucket for each in merged[: settled + wanted] if each.is_end and each.bucket.needs_page()]

    def _verify_all(
        self, mode: bytes, entries: list[_Entry], owner: bytes, confirmed: dict[bytes, StepRun | None]
    ) -> Exchange[None]:
        """Holds entries against their records, in one round trip."""
        if not entries:
            return
        answers = yield [self._verify(mode, each.member, owner) for each in entries]
        for each, answer in zip(entries, answers, strict=True):
            confirmed[each.member] = answer if isinstance(answer, StepRun) else None
            if isinstance(answer, bool):
                each.bucket.dropped += answer
            elif not isinstance(answer, (StepRun, CorruptRunError)):  # a corrupt run must not hide the others
                raise answer

    def _verify(self, mode: bytes, member: bytes, owner: bytes) -> Call[StepRun | bool]:
        """Reads the step run that an entry stands for; or answers whether the entry has left its place in the index."""
        run, step = parse_member(member)
        keys = self.keys.run(run)

        def parse(reply: Reply) -> StepRun | bool:
            if len(reply) > 2:
                return self._records.record(run.decode(), step.decode(), reply[2:], keys.steps)
            return reply[0] == b"dropped" or mode == b"lapsed"  # what is live has been put where it belongs

        index = keys.failed if mode == b"failed" else keys.claims
        args = (nonce(), step, member_prefix(run), mode, owner)
        return Call(run.decode(), script("confirm_entry"), (keys.steps, keys.done, index), args, parse)


class _Bucket:
    """The index of one bucket, as far as it has been read.

    Attributes:
        entries: score and member, the first ones first.
        size: how many it was asked for.
        has_more: whether there may be others behind them.
        dropped: how many of them turned out to have left the index, and so made room for others.
    """

    __slots__ = ("dropped", "entries", "has_more", "key", "size")

    def __init__(self, key: bytes, size: int) -> None:
        self.key = key
        self.size = size
        self.entries: list[tuple[float, bytes]] = []
        self.has_more = True
        self.dropped = 0

    def args(self) -> tuple[bytes, ...]:
        return nonce(), b"%d" % self.size

    def load(self, entries: list[tuple[float, bytes]]) -> None:
        self.entries = entries
        self.has_more = len(entries) >= self.size
        self.dropped = 0

    def needs_page(self) -> bool:
        """Sets how many to ask for next; answers whether to ask at all."""
        if self.size >= MAX_LIMIT and not self.dropped:
            self.has_more = False
        self.size = min(8 * self.size, MAX_LIMIT)
        return self.has_more


class _Entry(NamedTuple):
    """An entry among those of all buckets."""

    score: float
    member: bytes
    bucket: _Bucket

    @property
    def is_end(self) -> bool:
        """Whether its bucket may hold others that come next after it."""
        return self.bucket.has_more and self.member == self.bucket.entries[-1][1]


def _rank(entry: _Entry) -> tuple[float, bytes]:
    return entry[:2]


def _scanned(cursor: object) -> bytes:
    if cursor is None:
        return b"0"
    if not isinstance(cursor, str) or not re.fullmatch(r"[0-9]{1,20}", cursor):
        raise InvalidArgumentError("cursor", f"must be that of another page, not {described(cursor)}")
    return cursor.encode()


def _places(after: int, limit: int | None) -> tuple[bytes, bytes]:
    """The first and the last place to list, from 0; -1 for the last there is."""
    first = arguments.integer("after", after, _MOST_STEPS, least=0)
    last = -1 if limit is None else first + arguments.integer("limit", limit, _MOST_STEPS) - 1
    return b"%d" % first, b"%d" % last


def _entries(reply: Reply) -> list[tuple[float, bytes]]:
    return [(float(score), member) for member, score in _pairs(reply[2])]


def _nth(step_run: StepRun) -> int:
    return step_run.position


def _pairs(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def _all(results: list[Any]) -> list[Any]:
    """The results of a batch whose calls all have to succeed."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
