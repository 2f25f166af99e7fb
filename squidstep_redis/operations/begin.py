"""The operations that claim a step: what they send, and how the reply is read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final, cast

from squidstep_redis.errors import InvalidArgumentError
from squidstep_redis.model import BeginResult, SkipReason, StepRun
from squidstep_redis.operations.context import Context, settings_of_new_run
from squidstep_redis.operations.repeats import completed_before
from squidstep_redis.operations.transitions import claim_of, raise_if_refused
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Labels, Name, RunId, Seconds, Step
from squidstep_redis.protocol.call import Call, EqualOutputError, Reply, new_token
from squidstep_redis.protocol.fingerprints import Fingerprint, mismatch
from squidstep_redis.protocol.keys import Run
from squidstep_redis.protocol.records import LEASE_EXPIRED, progress_payload
from squidstep_redis.protocol.scripts import script

_BEGIN_ARGS: Final = 9  # arguments of begin_step without a fingerprint


def begin_step(
    context: Context,
    run_id: RunId,
    step: Step,
    input: Mapping[str, Any],
    *,
    lease: Seconds | None = None,
    max_attempts: int | None = None,
    owner: str | None = None,
    fingerprint: Fingerprint | None = None,
    labels: Labels | None = None,
) -> Call[BeginResult]:
    """Claims the step for this delivery, or returns why it must be skipped.

    One round trip. Re-sent after a lost reply, it returns the same decision with the same claim.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
            str, else its name).
        input: the step's input, a dict. It is stored unless the step was scheduled with its own; a new attempt after
            a failure replaces it.
        lease: seconds, or a timedelta, after which another delivery may take over, by the server's clock. None: the
            claim never expires by itself, so a worker that dies blocks the step until someone intervenes.
        max_attempts: number of claims to grant in total, not counting released ones; None: no limit.
        owner: who claims, shown to operators: a str of up to 256 bytes without control characters; None: not stored.
        fingerprint: what identifies the input. True: all of it, in any order of its keys; a function of the input:
            what it returns, which may be anything that a payload may contain; a str of up to 256 bytes without
            control characters: the str itself; False: nothing; None: the store's setting. If the step has a
            different fingerprint, the call is refused.
        labels: labels of the run if this call creates it, a dict of up to 8 str of up to 64 bytes by name, by which
            `runs` finds it; None: none. An existing run keeps its own.

    Returns:
        `(step_run, "execute")` for exactly one delivery per attempt; its step run carries the claim. For all other
        deliveries `(step_run, "skip")`, with the stored record and the `reason`.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent; PayloadError for the input.
        InputMismatchError: the step has a different fingerprint; nothing was written.
        RunDeletedError: the run was deleted recently.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)
    name = arguments.step(step)
    data = context.payloads.encode("input", input, run.text, name.text, "input")
    printed = context.fingerprints.of(fingerprint, "input", input)
    settings = settings_of_new_run(context, labels)
    args = begin_args(run, name, data, lease, max_attempts, owner, printed, settings)
    parse = partial(parse_begin, context, run, name, args[0], data, printed)
    return Call(run.text, script("begin_step"), run.keys, args, parse, None, name.text)


def advance_step(
    context: Context,
    step_run: StepRun | str,
    output: Mapping[str, Any],
    step: Step,
    input: Mapping[str, Any],
    *,
    lease: Seconds | None = None,
    max_attempts: int | None = None,
    owner: str | None = None,
    fingerprint: Fingerprint | None = None,
) -> Call[BeginResult]:
    """Completes a step and begins the next one of its run: `complete_step` and `begin_step` in one transition.

    One round trip: a worker needs eleven for a chain of ten steps. If the completion is refused, the next step is not
    claimed. If another worker holds the next step, or it is completed, the first step is still completed.

    Args:
        step_run: the step run to complete, which `begin_step` or `advance_step` returned with "execute"; or a bare
            `StepRun.id`, which stands for the current holder of the claim.
        output: output of the step to complete, a dict.
        step: the step to begin, a different step of the same run: a non-empty str of at most 512 bytes of UTF-8, or an
            enum member (its value if that is a str, else its name).
        input: input of the step to begin, a dict. It is stored unless the step was scheduled with its own.
        lease: seconds, or a timedelta, after which another delivery may take over the next step, by the server's
            clock; None: never.
        max_attempts: number of claims to grant on the next step in total, not counting released ones; None: no limit.
        owner: who claims the next step, shown to operators: a str of up to 256 bytes without control characters;
            None: not stored.
        fingerprint: what identifies the input of the step to begin. True: all of it, in any order of its keys; a
            function of the input: what it returns, which may be anything that a payload may contain; a str of up to
            256 bytes without control characters: the str itself; False: nothing; None: the store's setting. If that
            step has a different fingerprint, the call is refused, and neither step changes.

    Returns:
        What `begin_step` returns, for the next step.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent; PayloadError for a payload.
        InputMismatchError: the step to begin has a different fingerprint; nothing was written.
        StaleStepRunError: the claim is not held: taken over, ended, or never granted.
        StepRunNotFoundError: there is no such record; RunDeletedError if the run was deleted.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run, from_step, from_token = claim_of(context, "advance_step", step_run)
    data = context.payloads.encode("output", output, run.text, from_step.text, "output")
    name = arguments.step(step)
    if name == from_step:
        raise InvalidArgumentError("step", f"must differ from the step to complete, {from_step.text!r}")
    next_input = context.payloads.encode("input", input, run.text, name.text, "input")
    printed = context.fingerprints.of(fingerprint, "input", input)
    args = begin_args(run, name, next_input, lease, max_attempts, owner)  # the run exists

    def parse(reply: Reply) -> BeginResult:
        if reply[0] == b"stale" and (ended := completed_before(context, run, from_step, from_token, data, reply)):
            error = EqualOutputError(ended, "advance_step was refused: the stored output is encoded differently")
            error.resend = call._replace(args=(*completing, reply[4], *fingerprints))
            raise error
        raise_if_refused(context, "advance_step", run, from_step, from_token, reply)
        return parse_begin(context, run, name, args[0], next_input, printed, reply)

    completing, fingerprints = (*_padded(args), from_step.data, from_token), (printed,) if printed else ()
    sent = (*completing, data, *fingerprints)
    call = Call(run.text, script("advance_step"), run.keys, sent, parse, step=from_step.text)
    return call


# What they share


def begin_args(
    run: Run,
    step: Name,
    input: bytes,
    lease: Seconds | None,
    max_attempts: int | None,
    owner: str | None,
    fingerprint: bytes = b"",
    new_run: bytes = b"",
) -> tuple[bytes, ...]:
    """Returns the arguments of begin_step, without empty ones at the end: each takes time to send."""
    if max_attempts is not None:
        limit = b"%d" % arguments.max_attempts(max_attempts)
        limits = (new_run, limit, LEASE_EXPIRED)
    else:
        limits = (new_run,) if new_run else ()
    claimed_by = arguments.owner(owner)
    owned = (claimed_by, *limits) if claimed_by or limits else ()
    args = (new_token(), step.data, input, run.member, arguments.lease_ms(lease), *owned)
    return (*_padded(args), fingerprint) if fingerprint else args


def _padded(args: tuple[bytes, ...]) -> tuple[bytes, ...]:
    return args + (b"",) * (_BEGIN_ARGS - len(args))


def parse_begin(
    context: Context, run: Run, step: Name, token: bytes, input: bytes, fingerprint: bytes, reply: Reply
) -> BeginResult:
    """Parses the reply to begin_step."""
    if reply[0] in (b"execute", b"takeover"):
        progress = None
        if len(reply) > 3 and reply[3] is not None:
            input = reply[3]
        if len(reply) > 4:
            progress = progress_payload(run.text, step.text, reply[4], run.keys.steps)
        payloads = (input, None, None, progress)
        claimed = context.records.step_run(run.text, step.text, reply[2], payloads, run.keys.steps, token)
        return BeginResult(claimed, None, None, reply[0] == b"takeover")
    if reply[0] == b"mismatch":
        raise mismatch(run.text, step.text, fingerprint, reply)
    values, rest = reply[2:7], reply[7] if len(reply) > 7 else None
    is_cancelled = reply[0] == b"cancelled"
    if is_cancelled and values[1] is None:  # there is no record
        values[1] = input
    reason = rest if is_cancelled else None
    step_run = context.records.record(run.text, step.text, values, run.keys.steps, reason)
    retry_in = int(rest) / 1_000 if rest and not is_cancelled else None
    return BeginResult(step_run, cast("SkipReason", reply[0].decode()), retry_in)
