"""The operations that read one step or one run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Final

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.model import Attempt, StepRun, StepStatus
from squidstep_redis.operations.context import Context
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Step
from squidstep_redis.protocol.call import Call, Reply, new_nonce
from squidstep_redis.protocol.records import NO_PAYLOADS, step_name
from squidstep_redis.protocol.scripts import script
from squidstep_redis.summaries import StepPage

MAX_LIMIT: Final = 1_000

# The parts of a record, by the first byte of their field: the state line, then the payloads.
_PAYLOADS: Final = (b"i", b"o", b"e", b"p")
_PARTS: Final = (b"s", *_PAYLOADS)

_FIELDS_PER_STEP: Final = 3  # approximately: state, input, and output or error
_MAX_STEPS: Final = 10**9

_by_position = attrgetter("position")


def get_step_run(context: Context, run_id: RunId, step: Step) -> Call[StepRun | None]:
    """Reads one step run; it carries no claim.

    One round trip.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
            str, else its name).

    Returns:
        The step run; None if there is no record.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)
    name = arguments.step(step)

    def parse(reply: Reply) -> StepRun | None:
        found = reply[0] == b"found"
        return context.records.record(run.text, name.text, reply[2:], run.keys.steps) if found else None

    args = (new_nonce(), name.data)
    return Call(run.text, script("get_step_run"), run.keys[:2], args, parse, lambda: None, name.text)


def get_run(context: Context, run_id: RunId) -> Call[list[StepRun]]:
    """Reads all step runs of a run at one moment, in order of creation.

    One round trip. A run of 10,000 steps blocks the server for 0.04 to 0.1 s; `scan_steps` reads it in pages.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.

    Returns:
        The step runs; an empty list if there is no such run.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)

    def parse(reply: Reply) -> list[StepRun]:
        fields = dict(pairs(reply[2]))
        found: list[StepRun] = []
        for field, line in fields.items():
            if field[:1] == b"s":
                step = field[1:]
                values = [line, *(fields.get(kind + step) for kind in _PAYLOADS)]
                name = step_name(run.text, step, run.keys.steps)
                found.append(context.records.record(run.text, name, values, run.keys.steps))
        return sorted(found, key=_by_position)

    return Call(run.text, script("get_run"), run.keys[:2], (new_nonce(),), parse, list)


def scan_steps(context: Context, run_id: RunId, *, limit: int = 100, cursor: str | None = None) -> Call[StepPage]:
    """Reads the step runs of a run one page at a time, without blocking the server, however long the run is.

    One round trip. Each step run is as it was when its page was read; `get_run` reads all of them at one moment. A step
    that exists from the first page to the last is returned, unless a failover or a slot migration happens in between.
    It may be returned twice; the later one is newer.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        limit: approximate number of step runs in a page, from 1 to 1,000. A run of a few dozen steps is one page.
        cursor: `cursor` of the previous page; None: the first page.

    Returns:
        The page, in no particular order, and the cursor of the next one: None after the last.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)
    fields = _FIELDS_PER_STEP * arguments.integer("limit", limit, MAX_LIMIT)

    def parse(reply: Reply) -> StepPage:
        flat: list[bytes] = reply[3]
        found: list[StepRun] = []
        for at in range(0, len(flat), 1 + len(_PARTS)):
            values = [value or None for value in flat[at + 1 : at + 1 + len(_PARTS)]]
            name = step_name(run.text, flat[at][1:], run.keys.steps)
            found.append(context.records.record(run.text, name, values, run.keys.steps))
        return StepPage(found, None if reply[2] == b"0" else reply[2].decode())

    args = (new_nonce(), _hscan_cursor(cursor), b"%d" % fields)
    return Call(run.text, script("scan_steps"), run.keys[:2], args, parse, lambda: StepPage([], None))


def attempts(context: Context, run_id: RunId, step: Step) -> Call[list[Attempt]]:
    """Reads the known attempts of a step, oldest first: the latest and up to eight before it.

    One round trip.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
            str, else its name).

    Returns:
        The attempts; an empty list if the step was never claimed.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)
    name = arguments.step(step)

    def parse(reply: Reply) -> list[Attempt]:
        return [context.records.attempt(run.text, name.text, entry, run.keys.steps) for entry in reply[2:]]

    return Call(run.text, script("attempts"), run.keys[:2], (new_nonce(), name.data), parse, list, name.text)


def completed_steps(context: Context, run_id: RunId, *, after: int = 0, limit: int | None = None) -> Call[list[str]]:
    """Lists the completed steps of a run, in the order of their completion.

    One round trip. The position of a listed step does not change, so a long run can be read in parts, or followed: pass
    as `after` the number of steps that you have.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        after: how many steps to skip at the beginning.
        limit: how many steps to return at most; None: all.

    Returns:
        The steps' names.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)

    def parse(reply: Reply) -> list[str]:
        return [step_name(run.text, step, run.keys.done) for step in reply[2]]

    args = (new_nonce(), *_range(after, limit))
    return Call(run.text, script("completed_steps"), run.keys[:2], args, parse, list)


def completed_outputs(
    context: Context, run_id: RunId, *, after: int = 0, limit: int | None = None
) -> Call[list[dict[str, Any]]]:
    """Lists the outputs of a run's completed steps, in the order of their completion.

    One round trip. All 10,000 outputs of a run block the server for 0.02 to 0.07 s; read them in parts with `limit`.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        after: how many outputs to skip at the beginning. The position of a completed step does not change.
        limit: how many outputs to return at most; None: all.

    Returns:
        The outputs.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        UndecodablePayloadError: the store's codec cannot read an output.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)

    def parse(reply: Reply) -> list[dict[str, Any]]:
        return [
            context.payloads.decode(output, run.text, step_name(run.text, step, run.keys.done), "output")
            for step, output in zip(reply[2], reply[3], strict=True)
        ]

    args = (new_nonce(), *_range(after, limit))
    return Call(run.text, script("completed_outputs"), run.keys[:2], args, parse, list)


def step_statuses(context: Context, run_id: RunId) -> Call[dict[str, StepStatus]]:
    """Reads the status of each step of a run at one moment, in order of creation.

    One round trip. A run of 10,000 steps blocks the server for 0.03 to 0.1 s.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.

    Returns:
        The status by step.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)

    def parse(reply: Reply) -> dict[str, StepStatus]:
        key = run.keys.steps
        found = [
            context.records.step_run(run.text, step_name(run.text, field[1:], key), line, NO_PAYLOADS, key)
            for field, line in zip(reply[2], reply[3], strict=True)
        ]
        return {step_run.step: step_run.status for step_run in sorted(found, key=_by_position)}

    return Call(run.text, script("step_statuses"), run.keys[:2], (new_nonce(),), parse, dict)


def pairs(flat: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Returns the pairs of a flat reply: field, value, field, value, …."""
    return zip(flat[::2], flat[1::2], strict=True)


def _hscan_cursor(cursor: object) -> bytes:
    if cursor is None:
        return b"0"
    if not isinstance(cursor, str) or not re.fullmatch(r"[0-9]{1,20}", cursor) or int(cursor) >= 2**64:
        raise InvalidArgumentError("cursor", f"must be the cursor of another page, not {described(cursor)}")
    return cursor.encode()


def _range(after: int, limit: int | None) -> tuple[bytes, bytes]:
    """Returns the first and the last index to list, from 0; -1: the last step."""
    first = arguments.integer("after", after, _MAX_STEPS, minimum=0)
    last = -1 if limit is None else first + arguments.integer("limit", limit, _MAX_STEPS) - 1
    return b"%d" % first, b"%d" % last
