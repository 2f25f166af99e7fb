"""The operations on claims: what each sends, and how its reply is read.

The rules themselves are Lua scripts, one per operation, with the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

from squidstep_redis.errors import InvalidArgumentError, StaleStepRunError, StepRunNotFoundError, described
from squidstep_redis.ids import parse_step_run_id
from squidstep_redis.model import StepRun, StepStatus
from squidstep_redis.operations.context import Context
from squidstep_redis.operations.repeats import are_equal, completed_before
from squidstep_redis.operations.schedule import encode_inputs, to_schedule
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Name, Seconds, StepInputs
from squidstep_redis.protocol.call import Call, Reply, new_nonce
from squidstep_redis.protocol.codec import error_payload
from squidstep_redis.protocol.keys import Run
from squidstep_redis.protocol.records import progress_payload
from squidstep_redis.protocol.scripts import script

# How many of a run's keys each transition of a claim uses.
_KEYS: Final[Mapping[str, int]] = {"fail_step": 4}  # of the others: 3


def complete_step(
    context: Context,
    step_run: StepRun | str,
    output: Mapping[str, Any],
    *,
    schedule: StepInputs | None = None,
) -> Call[StepRun]:
    """Ends a claim with an output, and schedules the following steps in the same atomic transition.

    One round trip. Repeating it with the same output, even as a new call, returns the same result. An expired lease
    does not matter as long as no other worker took over.

    Args:
        step_run: the step run that `begin_step` returned with "execute". Or a bare `StepRun.id`, which stands for the
            current holder of the claim: for operators and handovers.
        output: the step's output, a dict.
        schedule: a dict of input by step: the steps in it that have no record become pending; None: none.

    Returns:
        The completed step run.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent, such as a step run of another prefix.
        StaleStepRunError: the claim is not held: taken over, ended, or never granted.
        StepRunNotFoundError: there is no such record; RunDeletedError if the run was deleted.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    return complete_call(context, step_run, "output", output, schedule)


def fail_step(
    context: Context,
    step_run: StepRun | str,
    error: Mapping[str, Any] | BaseException,
    *,
    final: bool = False,
    retry_after: Seconds | None = None,
) -> Call[StepRun]:
    """Ends a claim with an error; the step can be claimed again at once, after a delay, or not at all.

    One round trip. Repeating it with the same error and `final`, even as a new call, returns the same result.

    Args:
        step_run: the step run that `begin_step` returned with "execute"; or a bare `StepRun.id`, which stands for the
            current holder of the claim.
        error: a dict; or an exception, which is stored as a dict of `type`, `message` and `traceback`.
        final: whether the step has failed permanently: `begin_step` then skips with the reason "failed", until
            `retry_step`.
        retry_after: seconds, or a timedelta, from 0.001: until then `begin_step` skips with the reason "delayed",
            unless `retry_step` resets the step; by the server's clock. None: the step can be claimed at once.

    Returns:
        The failed step run.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent, such as a step run of another prefix,
            or both `final` and `retry_after`.
        StaleStepRunError: the claim is not held: taken over, ended, or never granted.
        StepRunNotFoundError: there is no such record; RunDeletedError if the run was deleted.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run, name, token = claim_of(context, "fail_step", step_run)
    if isinstance(error, BaseException):
        data = context.payloads.encode_own(error_payload(error), run.text, name.text, "error")
    else:
        data = context.payloads.encode("error", error, run.text, name.text, "error")
    if not isinstance(cast("object", final), bool):
        raise InvalidArgumentError("final", f"must be a bool, not {described(final)}")
    delay = arguments.milliseconds("retry_after", retry_after, arguments.MAX_LEASE)
    if final and delay:
        raise InvalidArgumentError("retry_after", "cannot be given with final=True: the step is not retried")
    when = b"final" if final else delay
    more = (when,) if when else ()
    return transition_call(context, "fail_step", step_run, run, name, token, (data,), more, last_error=data)


def release_step(context: Context, step_run: StepRun | str) -> Call[StepRun]:
    """Releases a claim before its work took effect: the step becomes pending, with its input.

    One round trip. The attempt keeps its number, because it may have been used as a fencing token, but it does not
    count against `max_attempts`.

    Args:
        step_run: the step run that `begin_step` returned with "execute"; or a bare `StepRun.id`, which stands for the
            current holder of the claim.

    Returns:
        The pending step run.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent, such as a step run of another prefix.
        StaleStepRunError: the claim is not held: taken over, ended, or never granted.
        StepRunNotFoundError: there is no such record; RunDeletedError if the run was deleted.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    return transition(context, "release_step", step_run, ())


# What the transitions share


def complete_call(
    context: Context,
    step_run: StepRun | str,
    argument: str,
    output: Mapping[str, Any],
    schedule: StepInputs | None = None,
) -> Call[StepRun]:
    """Builds the call of complete_step; `argument` is what error messages call the output."""
    run, name, token = claim_of(context, "complete_step", step_run)
    inputs = encode_inputs(context, run, "schedule", schedule) if schedule is not None else []
    successors = to_schedule(inputs) if inputs else ()
    data = context.payloads.encode(argument, output, run.text, name.text, "output")
    return transition_call(context, "complete_step", step_run, run, name, token, (data,), successors, output=data)


def claim_of(context: Context, operation: str, step_run: StepRun | str) -> tuple[Run, Name, bytes]:
    """Returns run, step and token of a claim; the token is empty for a bare id."""
    if not isinstance(step_run, StepRun):
        run_id, step = _parse_id(context, step_run)
        return context.keys.run(run_id), arguments.step(step), b""
    check_prefix(context, step_run)
    if not step_run.token:
        raise StaleStepRunError(
            step_run,
            f"{operation} needs the step run that begin_step returned with 'execute'; this one carries no "
            "claim (an operator may pass its id). Nothing was sent",
        )
    return context.keys.run(step_run.run_id), arguments.step(step_run.step), step_run.token


def check_prefix(context: Context, step_run: StepRun) -> None:
    """Raises InvalidArgumentError unless a store with this prefix returned the step run."""
    if step_run.prefix != context.prefix:
        raise InvalidArgumentError(
            "step_run", f"belongs to a store with prefix {step_run.prefix!r}, this one has {context.prefix!r}"
        )


def raise_if_refused(context: Context, operation: str, run: Run, step: Name, token: bytes, reply: Reply) -> None:
    """Raises an error if the script did not find the claim."""
    if reply[0] == b"missing":
        raise StepRunNotFoundError(run.text, step.text, "there is no such step run; nothing was written")
    if reply[0] == b"stale":
        current = context.records.record(run.text, step.text, reply[2:7], run.keys.steps)
        if not token:
            why = f"is {current.status}, not running"
        elif current.status is StepStatus.RUNNING:
            why = f"was taken over: attempt {current.attempt} holds the claim"
        else:
            why = f"is {current.status} by attempt {current.attempt}, not by this call"
        raise StaleStepRunError(current, f"{operation} was refused: the step {why}. Nothing was written")


def transition(
    context: Context,
    operation: str,
    step_run: StepRun | str,
    args: tuple[bytes, ...],
) -> Call[StepRun]:
    """Builds the call of a transition of a claim, given the step run that carries it, or an id."""
    run, name, token = claim_of(context, operation, step_run)
    return transition_call(context, operation, step_run, run, name, token, args)


def transition_call(
    context: Context,
    operation: str,
    step_run: StepRun | str,
    run: Run,
    step: Name,
    token: bytes,
    args: tuple[bytes, ...],
    more: Sequence[bytes] = (),
    output: bytes | None = None,
    last_error: bytes | None = None,
    progress: bytes | None = None,
) -> Call[StepRun]:
    """Builds the call of a transition of a claim, given its run, step and token."""
    sent = (new_nonce(), step.data, token, *args, run.member, *more)
    parse = partial(_parse_end, context, operation, step_run, run, step, token, output, last_error, progress)
    return Call(run.text, script(operation), run.keys[: _KEYS.get(operation, 3)], sent, parse, None, step.text)


def _parse_end(
    context: Context,
    operation: str,
    step_run: StepRun | str,
    run: Run,
    step: Name,
    token: bytes,
    output: bytes | None,
    last_error: bytes | None,
    progress: bytes | None,
    reply: Reply,
) -> StepRun:
    """Parses the reply to a transition of a claim."""
    if reply[0] == b"stale":
        if output is not None and (ended := completed_before(context, run, step, token, output, reply)):
            return ended
        # The script adds an attempt that the same claim ended in the same way, with an error in a different encoding.
        if (
            last_error is not None
            and len(reply) > 7
            and are_equal(context, run, step, "last_error", reply[8], last_error)
        ):
            reply = [b"failed", reply[1], reply[7], reply[3], reply[6]]
    raise_if_refused(context, operation, run, step, token, reply)
    reason = None
    if len(reply) > 4:
        if reply[4] is not None:
            progress = progress_payload(run.text, step.text, reply[4], run.keys.steps)
        if reply[0] == b"cancelled":
            reason = reply[5]
    if not isinstance(step_run, StepRun):
        values = [*reply[2:4], output, last_error, None]
        step_run = context.records.record(run.text, step.text, values, run.keys.steps)
    try:
        return step_run.after_transition(reply[2], context.payloads.decode, output, last_error, progress, reason)
    except ValueError:
        raise context.records.unreadable(run.text, step.text, reply[2], run.keys.steps) from None


def _parse_id(context: Context, id: object) -> tuple[str, str]:
    if not isinstance(id, str):
        raise InvalidArgumentError("step_run", f"must be a StepRun or a StepRun.id, not {described(id)}")
    try:
        return parse_step_run_id(context.prefix, id)
    except ValueError:
        raise InvalidArgumentError(
            "step_run", f"is not the id of a step run of prefix {context.prefix!r}: {described(id)}"
        ) from None
