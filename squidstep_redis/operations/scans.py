"""Scans the keys of all servers for runs, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple, cast

from redis.crc import key_slot

from squidstep_redis.escaping import escaped
from squidstep_redis.model import moment
from squidstep_redis.operations.context import Context
from squidstep_redis.protocol.call import Call, Reply, new_nonce
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import Broadcast, Send, Workflow
from squidstep_redis.server_errors import RefusedError, ServerError


class Shard(NamedTuple):
    """A server with keys of the store: its name, and the key of one of its buckets."""

    name: str
    key: bytes


class ScanPage(NamedTuple):
    """What one SCAN found.

    Attributes:
        run_ids: the runs, in the order of their ids.
        cursor: of the next page; "0" after the last page of this server.
        now: the server's clock.
    """

    run_ids: list[bytes]
    cursor: bytes
    now: datetime


def scan_page(
    context: Context, operation: str, shard: Shard, cursor: bytes, run_id_prefix: bytes, count: int
) -> Workflow[ScanPage]:
    """Scans `count` keys of one server from a cursor ("0" for the first page), and finds the runs among them."""

    def parse(reply: Reply) -> ScanPage:
        run_ids = sorted(set(_runs_of(context, reply[3], run_id_prefix)))
        return ScanPage(run_ids, reply[2], moment(int(reply[4])))

    args = (new_nonce(), cursor, context.keys.pattern(run_id_prefix), b"%d" % count)
    return (yield Send(Call(None, script("scan_runs"), (shard.key,), args, parse, part_of=operation)))


def _runs_of(context: Context, keys: list[bytes], run_id_prefix: bytes) -> Iterator[bytes]:
    """Returns the runs of these keys; skips keys of other programs that only look like those of a run."""
    for key in keys:
        run_id = context.keys.run_of(key)
        if run_id is not None and run_id.startswith(run_id_prefix):
            with suppress(UnicodeDecodeError):  # a key of another program
                run_id.decode()
                yield run_id


def find_shards(context: Context, operation: str) -> Workflow[list[Shard]]:
    """Returns the servers that have keys of this store, in the order of their names.

    Raises:
        ServerError: no server could be asked, so that some might be missing.
    """
    buckets = context.keys.claims()
    replies: dict[str, list[Any]] = yield Broadcast([(b"CLUSTER", b"SLOTS")], operation)
    maps = [cast("list[Any]", reply) for (reply,) in replies.values() if isinstance(reply, list)]
    if "" in replies or not maps:
        for reply in (reply for (reply,) in replies.values() if isinstance(reply, ServerError)):
            raise reply
    if "" in replies:  # a single server, whatever it returned
        return [Shard("", buckets[0])]
    if not maps:
        reasons = "; ".join(sorted({str(reply) for (reply,) in replies.values()})) or "no primary is known"
        problem = f"no node returned its slots: {escaped(reasons)}. What to do: grant the user +cluster|slots"
        raise RefusedError(operation, None, None, problem, False)
    owners: list[tuple[range, str]] = []
    for first, last, primary, *_ in maps[0]:
        name = primary[2].decode() if isinstance(primary[2], bytes) else str(primary[2])
        owners.append((range(int(first), int(last) + 1), name))
    found: dict[str, bytes] = {}
    for bucket in buckets:
        slot = key_slot(bucket)
        # A slot that no server owns must not hide its runs: sending a call to it raises the reason.
        name = next((name for slots, name in owners if slot in slots), "")
        found.setdefault(name, bucket)
    return [Shard(name, key) for name, key in sorted(found.items())]
