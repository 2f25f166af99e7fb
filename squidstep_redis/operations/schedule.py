"""The operations on steps that no delivery has claimed: scheduling them, and deleting those that are pending."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.model import ScheduleResult
from squidstep_redis.operations.context import Context
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import RunId, Step, StepInputs
from squidstep_redis.protocol.call import Call, Reply, new_nonce, new_token
from squidstep_redis.protocol.scripts import script


def schedule_step(context: Context, run_id: RunId, step: Step, input: Mapping[str, Any]) -> Call[ScheduleResult]:
    """Creates a pending record for a step that has none. A later begin_step does not replace this input.

    One round trip.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
            str, else its name).
        input: the step's input, a dict.

    Returns:
        `(step_run, "schedule")`, or `(step_run, "skip")` with the existing record.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent; PayloadError for the input.
        RunDeletedError: the run was deleted recently.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    created_by = new_token()[:8]
    run = context.keys.run(run_id)
    name = arguments.step(step)
    data = context.payloads.encode("input", input)

    def parse(reply: Reply) -> ScheduleResult:
        values = reply[2:] if len(reply) > 3 else [reply[2], data, None, None]
        decision = "schedule" if reply[0] == b"schedule" else "skip"
        return ScheduleResult(context.records.record(run.text, name.text, values, run.keys.steps), decision)

    args = (created_by, context.run_ttl_ms, name.data, data)
    return Call(run.text, script("schedule_step"), run.keys[:2], args, parse, step=name.text)


def schedule_steps(context: Context, run_id: RunId, steps: StepInputs) -> Call[list[str]]:
    """Creates pending records for those of many steps that have none: all of them or, on an error, none.

    One round trip and one script: 10,000 steps block the server for 0.04 to 0.1 s. If that is too long and the steps
    do not depend on each other, schedule them in batches of a thousand.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        steps: a dict of input by step.

    Returns:
        The newly scheduled steps, in the given order.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent; PayloadError for an input.
        RunDeletedError: the run was deleted recently.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)
    inputs = encode_inputs(context, "steps", steps)

    def parse(reply: Reply) -> list[str]:
        return [inputs[2 * int(position)].decode() for position in sorted(reply[2:])]

    args = (new_token()[:8], context.run_ttl_ms, *inputs)
    return Call(run.text, script("schedule_steps"), run.keys[:2], args, parse)


def delete_pending_steps(context: Context, run_id: RunId, steps: Iterable[Step]) -> Call[list[str]]:
    """Deletes those of the given steps that are pending; the others are left unchanged. A run without steps is gone.

    One round trip and one script: 10,000 steps block the server for up to 0.1 s.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        steps: the steps, each once.

    Returns:
        Those of the given steps that have no record now, in the given order. A step that is missing from this list was
        claimed before it could be deleted.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)
    names = arguments.steps(steps)

    def parse(reply: Reply) -> list[str]:
        return [names[int(position)].text for position in reply[2:]]

    args = (new_nonce(), *(name.data for name in names))
    if_deleted = [name.text for name in names].copy
    return Call(run.text, script("delete_pending_steps"), run.keys[:2], args, parse, if_deleted)


def encode_inputs(context: Context, argument: str, steps: object) -> list[bytes]:
    """Returns step, input, step, input, … as they are sent."""
    if not isinstance(steps, Mapping):
        raise InvalidArgumentError(argument, f"must be a dict of input by step, not {described(steps)}")
    items = cast("StepInputs", steps).items()
    names = arguments.distinct(argument, (arguments.step(step, f"a step of {argument}") for step, _ in items))
    sent: list[bytes] = []
    for name, (_, input) in zip(names, items, strict=True):
        sent += (name.data, context.payloads.encode(f"{argument}[{name.text!r}]", input))
    return sent
