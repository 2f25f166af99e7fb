"""The operations on steps that no delivery has claimed: scheduling them, and deleting those that are pending."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.model import ScheduleResult
from squidstep_redis.operations.context import Context, settings_of_new_run
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Labels, Name, RunId, Step, StepInputs
from squidstep_redis.protocol.call import Call, Reply, new_nonce, new_token
from squidstep_redis.protocol.fingerprints import Fingerprint, mismatch
from squidstep_redis.protocol.keys import Run
from squidstep_redis.protocol.scripts import script


class NotAllScheduled(list[str]):
    """The newly scheduled steps, if others were not scheduled because the run is cancelled."""


class StepInput(NamedTuple):
    """A step and its input, as they are sent; the fingerprint is empty for none."""

    step: Name
    data: bytes
    fingerprint: bytes


def schedule_step(
    context: Context,
    run_id: RunId,
    step: Step,
    input: Mapping[str, Any],
    *,
    fingerprint: Fingerprint | None = None,
    labels: Labels | None = None,
) -> Call[ScheduleResult]:
    """Creates a pending record for a step that has none. A later begin_step does not replace this input.

    One round trip.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
            str, else its name).
        input: the step's input, a dict.
        fingerprint: what identifies the input. True: all of it, in any order of its keys; a function of the input:
            what it returns, which may be anything that a payload may contain; a str of up to 256 bytes without
            control characters: the str itself; False: nothing; None: the store's setting. If the step has a
            different fingerprint, the call is refused.
        labels: labels of the run if this call creates it, a dict of up to 8 str of up to 64 bytes by name, by which
            `runs` finds it; None: none. An existing run keeps its own.

    Returns:
        `(step_run, "schedule")`, or `(step_run, "skip")` with the existing record. In a cancelled run a step without a
        record is skipped, too: its step run has a `cancel_reason`, and is not stored.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent; PayloadError for the input.
        InputMismatchError: the step has a different fingerprint; nothing was written.
        RunDeletedError: the run was deleted recently.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    created_by = new_token()[:8]
    run = context.keys.run(run_id)
    name = arguments.step(step)
    data = context.payloads.encode("input", input, run.text, name.text, "input")
    printed = context.fingerprints.of(fingerprint, "input", input)

    def parse(reply: Reply) -> ScheduleResult:
        if reply[0] == b"mismatch":
            raise mismatch(run.text, name.text, printed, reply)
        if reply[0] == b"cancelled":
            payloads = (data, None, None, None)
            step_run = context.records.step_run(
                run.text, name.text, reply[2], payloads, run.keys.steps, cancel_reason=reply[3]
            )
            return ScheduleResult(step_run, "skip")
        values = reply[2:] if len(reply) > 3 else [reply[2], data, None, None, None]
        decision = "schedule" if reply[0] == b"schedule" else "skip"
        return ScheduleResult(context.records.record(run.text, name.text, values, run.keys.steps), decision)

    args = (created_by, settings_of_new_run(context, labels), name.data, data, *((printed,) if printed else ()))
    return Call(run.text, script("schedule_step"), run.keys[:2], args, parse, step=name.text)


def schedule_steps(
    context: Context,
    run_id: RunId,
    steps: StepInputs,
    *,
    fingerprint: Fingerprint | None = None,
    labels: Labels | None = None,
) -> Call[list[str]]:
    """Creates pending records for the given steps that have none: all of them or, on an error, none.

    One round trip and one script: 10,000 steps block the server for 0.04 to 0.1 s. If that is too long and the steps
    do not depend on each other, schedule them in batches of a thousand.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        steps: a dict of input by step.
        fingerprint: what identifies the input of each step. True: all of it, in any order of its keys; a function of
            the input: what it returns, which may be anything that a payload may contain; a str of up to 256 bytes
            without control characters: the str itself; False: nothing; None: the store's setting. If one of the steps
            has a different fingerprint, the call is refused.
        labels: labels of the run if this call creates it, a dict of up to 8 str of up to 64 bytes by name, by which
            `runs` finds it; None: none. An existing run keeps its own.

    Returns:
        The newly scheduled steps, in the given order; none if the run is cancelled.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent; PayloadError for an input.
        InputMismatchError: one of the steps has a different fingerprint; nothing was written.
        RunDeletedError: the run was deleted recently.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)
    inputs = encode_inputs(context, run, "steps", steps, fingerprint)

    def parse(reply: Reply) -> list[str]:
        if reply[0] == b"mismatch":
            given = next(each for each in inputs if each.step.data == reply[2])
            raise mismatch(run.text, given.step.text, given.fingerprint, reply)
        scheduled = [inputs[int(position)].step.text for position in sorted(reply[2:])]
        return NotAllScheduled(scheduled) if reply[0] == b"cancelled" else scheduled

    args = (new_token()[:8], settings_of_new_run(context, labels), *to_schedule(inputs))
    return Call(run.text, script("schedule_steps"), run.keys[:2], args, parse)


def delete_pending_steps(context: Context, run_id: RunId, steps: Iterable[Step]) -> Call[list[str]]:
    """Deletes the given steps that are pending; the others are left unchanged. A run without steps is deleted.

    One round trip and one script: 10,000 steps block the server for up to 0.1 s.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        steps: the steps, each once.

    Returns:
        The given steps that have no record now, in the given order. A step that is missing from this list was claimed
        before it could be deleted.

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


def encode_inputs(
    context: Context, run: Run, argument: str, steps: object, fingerprint: Fingerprint | None = None
) -> list[StepInput]:
    """Returns steps of a run with their inputs. Either all of them have a fingerprint, or none has one."""
    if not isinstance(steps, Mapping):
        raise InvalidArgumentError(argument, f"must be a dict of input by step, not {described(steps)}")
    items = cast("StepInputs", steps).items()
    names = arguments.distinct(argument, (arguments.step(step, f"a step of {argument}") for step, _ in items))
    inputs: list[StepInput] = []
    for name, (_, input) in zip(names, items, strict=True):
        path = f"{argument}[{name.text!r}]"
        data = context.payloads.encode(path, input, run.text, name.text, "input")
        inputs.append(StepInput(name, data, context.fingerprints.of(fingerprint, path, input)))
    return inputs


def to_schedule(inputs: Sequence[StepInput]) -> list[bytes]:
    """Returns the arguments of a script that schedules steps: how many each step has, and then those of each step."""
    width = 3 if any(each.fingerprint for each in inputs) else 2
    sent = [b"%d" % width]
    for name, *rest in inputs:
        sent += (name.data, *rest[: width - 1])
    return sent
