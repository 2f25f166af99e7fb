"""The pages in which the keys of all servers are scanned for runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, Final, NamedTuple, cast

from redis.crc import key_slot

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.model import moment
from squidstep_redis.operations.context import Context
from squidstep_redis.protocol.call import Call, Reply, new_nonce
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import Broadcast, Send, Workflow

_CURSOR: Final = re.compile(r"(\d{1,20})-(\d{1,15})-(\w*)(?:-(\d{1,4})-(\d{1,10})-(\d{1,6}))?")


class Shard(NamedTuple):
    """A server with keys of the store: its name, and the key of one of its buckets."""

    name: str
    key: bytes


class Rest(NamedTuple):
    """What is left of the runs that one SCAN found, newest change first.

    Attributes:
        size: how many keys that SCAN was to pass.
        digest: of the runs and their changes. If the same SCAN finds something else, all of it is returned, so that no
            run is missed.
        returned: how many of them have been returned.
    """

    size: int
    digest: int
    returned: int


class Position(NamedTuple):
    """The position of a listing.

    Attributes:
        scan_cursor: where to continue.
        scanned: the number of keys scanned.
        shard: the server's name.
        rest: what is left of the runs after `scan_cursor`; None: nothing of them has been returned.
    """

    scan_cursor: bytes
    scanned: int
    shard: str
    rest: Rest | None = None

    @property
    def cursor(self) -> str:
        """The cursor that callers receive; opaque to them."""
        rest = "" if self.rest is None else "-".join(map(str, ("", *self.rest)))
        return f"{self.scan_cursor.decode()}-{self.scanned}-{self.shard}{rest}"


class ScanPage(NamedTuple):
    """What one SCAN found.

    Attributes:
        run_ids: the runs, in the order of their ids.
        at: the position of this page.
        next: the position of the next page; None: this is the last.
        progress: the scanned part of the keys of all servers, from 0 to 1.
        now: the server's clock.
    """

    run_ids: list[bytes]
    at: Position
    next: Position | None
    progress: float
    now: datetime


def scan_page(
    context: Context,
    operation: str,
    shards: list[Shard],
    position: Position | None,
    run_id_prefix: bytes,
    count: int,
) -> Workflow[ScanPage]:
    """Scans `count` keys of one server, from a position on, and finds the runs among them."""
    names = [shard.name for shard in shards]
    # If a server has left the cluster, continue with the next one, in the order of their names.
    index = 0 if position is None else next((i for i, name in enumerate(names) if name >= position.shard), None)
    if index is None:
        return ScanPage([], Position(b"0", 0, ""), None, 1.0, moment(0))
    shard = shards[index]
    here = position if position is not None and position.shard == shard.name else Position(b"0", 0, shard.name)

    def parse(reply: Reply) -> Reply:
        return reply[2:]

    args = (new_nonce(), here.scan_cursor, context.keys.pattern(run_id_prefix), b"%d" % count)
    reply: Reply = yield Send(Call(None, script("scan_runs"), (shard.key,), args, parse, part_of=operation))
    scan_cursor, keys, total, now = reply
    run_ids = sorted(set(_runs_of(context, keys, run_id_prefix)))
    scanned = here.scanned + count
    if scan_cursor != b"0":
        after: Position | None = Position(scan_cursor, scanned, shard.name)
        progress = (index + min(scanned / max(total, 1), 1.0)) / len(shards)
    else:
        after = Position(b"0", 0, names[index + 1]) if index + 1 < len(names) else None
        progress = (index + 1) / len(shards)
    return ScanPage(run_ids, here._replace(rest=None), after, progress, moment(int(now)))


def _runs_of(context: Context, keys: list[bytes], run_id_prefix: bytes) -> Iterator[bytes]:
    """Returns the runs of these keys; skips keys of other programs that only look like those of a run."""
    for key in keys:
        run_id = context.keys.run_of(key)
        if run_id is not None and run_id.startswith(run_id_prefix):
            with suppress(UnicodeDecodeError):  # a key of another program
                run_id.decode()
                yield run_id


def find_shards(context: Context) -> Workflow[list[Shard]]:
    """Returns the servers that have keys of this store, in the order of their names."""
    buckets = context.keys.claims()
    replies: dict[str, list[Any]] = yield Broadcast([(b"CLUSTER", b"SLOTS")])
    maps = [cast("list[Any]", reply) for (reply,) in replies.values() if isinstance(reply, list)]
    if not maps or "" in replies:
        return [Shard("", buckets[0])]
    owners: list[tuple[range, str]] = []
    for first, last, primary, *_ in maps[0]:
        name = primary[2].decode() if isinstance(primary[2], bytes) else str(primary[2])
        owners.append((range(int(first), int(last) + 1), name))
    found: dict[str, bytes] = {}
    for bucket in buckets:
        slot = key_slot(bucket)
        # A slot that no server owns must not hide its runs: sending to it shows why.
        name = next((name for slots, name in owners if slot in slots), "")
        found.setdefault(name, bucket)
    return [Shard(name, key) for name, key in sorted(found.items())]


def parse_cursor(cursor: object) -> Position | None:
    """Returns the position of a cursor that a caller passed; None for the first page."""
    if cursor is None:
        return None
    match = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
    if match is None:
        raise InvalidArgumentError("cursor", f"must be the cursor of another page, not {described(cursor)}")
    rest = None if match[4] is None else Rest(*map(int, match.groups()[3:]))
    return Position(match[1].encode(), int(match[2]), match[3], rest)
