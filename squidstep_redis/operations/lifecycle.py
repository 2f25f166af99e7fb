"""The operations on a whole run: expiry, cancellation, deletion."""

from __future__ import annotations

from squidstep_redis.operations.context import Context
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Seconds
from squidstep_redis.protocol.call import Call, Reply, new_nonce, new_token
from squidstep_redis.protocol.scripts import script


def expire_run(context: Context, run_id: RunId, ttl: Seconds | None) -> Call[bool]:
    """Sets how long after its last write a run expires. All its keys expire together.

    One round trip. Each further write renews the expiry. A run with a live claim does not expire, and a claim without a
    lease is live until it ends.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        ttl: seconds, up to ten years, or a timedelta; None: the run does not expire.

    Returns:
        Whether there is such a run.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    return _set(context, "expire_run", run_id, arguments.milliseconds("ttl", ttl))


def delete_run(context: Context, run_id: RunId, *, tombstone: Seconds = 3_600) -> Call[bool]:
    """Deletes a run. A tombstone rejects late writes for a while, so that they do not recreate the run.

    One round trip. It also deletes a run that is corrupt or partly evicted.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        tombstone: seconds, or a timedelta, for which writes are rejected with RunDeletedError.

    Returns:
        Whether there was such a run.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: one of the keys has a value of another type.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)

    def parse(reply: Reply) -> bool:
        return reply[0] == b"deleted"

    args = (new_token(), run.member, tombstone_ms(tombstone))
    return Call(run.text, script("delete_run"), run.keys, args, parse)


def cancel_run(context: Context, run_id: RunId, reason: str | None = None) -> Call[bool]:
    """Cancels a run: until `resume_run`, no step of it is scheduled or begins. No step record changes.

    One round trip. `begin_step` skips with the reason "cancelled", except for completed steps, whose output it returns.
    Work that has begun may continue: its claim can be completed, failed, released and extended, and `extend_claim` and
    `checkpoint_step` inform its holder. `complete_step` completes, but schedules no successors. Cancelling a cancelled
    run changes nothing.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        reason: why, shown to operators and to the holders of claims: a str of up to 512 bytes without control
            characters; None: not stored. The first reason stays until `resume_run`.

    Returns:
        Whether there is such a run.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    return _set(context, "cancel_run", run_id, arguments.reason(reason))


def resume_run(context: Context, run_id: RunId) -> Call[bool]:
    """Ends the cancellation of a run: its steps can be scheduled and begin again. It executes nothing by itself.

    One round trip. Resuming a run that is not cancelled changes nothing.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.

    Returns:
        Whether there is such a run.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    return _set(context, "resume_run", run_id)


def _set(context: Context, operation: str, run_id: RunId, *args: bytes) -> Call[bool]:
    run = context.keys.run(run_id)

    def parse(reply: Reply) -> bool:
        return reply[0] == b"set"

    return Call(run.text, script(operation), run.keys[:2], (new_nonce(), *args), parse, lambda: False)


def tombstone_ms(tombstone: Seconds) -> bytes:
    """Returns the lifetime of a tombstone in milliseconds, as it is sent."""
    return b"%d" % round(arguments.seconds("tombstone", tombstone, arguments.MAX_TTL) * 1_000)
