"""Claims on several steps at once: beginning and completing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.model import BeginResult, StepRun
from squidstep_redis.operations.begin import begin_args, parse_begin
from squidstep_redis.operations.context import Context, settings_of_new_run
from squidstep_redis.operations.schedule import encode_inputs
from squidstep_redis.operations.transitions import complete_call
from squidstep_redis.protocol.arguments import Labels, RunId, Seconds, StepInputs
from squidstep_redis.protocol.call import Call, Reply, new_token
from squidstep_redis.protocol.fingerprints import Fingerprint, mismatch
from squidstep_redis.protocol.groups import padded, replies_in
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import SendBatch, Workflow

MAX_STEPS: Final = 1_000
"""Steps in one call: they block the server for about 10 ms, and a script can pass on about 8,000 arguments."""

_ALL_OR_NONE: Final = b"1"


def begin_steps(
    context: Context,
    run_id: RunId,
    steps: StepInputs,
    *,
    lease: Seconds | None = None,
    max_attempts: int | None = None,
    owner: str | None = None,
    fingerprint: Fingerprint | None = None,
    labels: Labels | None = None,
) -> Call[dict[str, BeginResult]]:
    """Claims several steps of a run for this delivery, or returns why they must be skipped: `begin_step` for each.

    One round trip and one script, which costs the server about half as much as single calls: 1,000 steps block it for
    about 10 ms. If it raises an error, none of the steps was claimed, unless the outcome is unknown. Re-sent after a
    lost reply, it returns the same decisions with the same claims.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        steps: a dict of input by step, of 1 to 1,000 steps. An input is stored unless the step was scheduled with its
            own; a new attempt after a failure replaces it.
        lease: seconds, or a timedelta, after which another delivery may take over a step, by the server's clock. None:
            the claims never expire by themselves, so a worker that dies blocks the steps until someone intervenes.
        max_attempts: number of claims to grant on each step in total, not counting released ones; None: no limit.
        owner: who claims, shown to operators: a str of up to 256 bytes without control characters; None: not stored.
        fingerprint: what identifies the input of each step. True: all of it, in any order of its keys; a function of
            the input: what it returns, which may be anything that a payload may contain; a str of up to 256 bytes
            without control characters: the str itself; False: nothing; None: the store's setting. If one of the steps
            has a different fingerprint, the call is refused.
        labels: labels of the run if this call creates it, a dict of up to 8 str of up to 64 bytes by name, by which
            `runs` finds it; None: none. An existing run keeps its own.

    Returns:
        By step, in the given order, what `begin_step` returns.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent; PayloadError for an input.
        InputMismatchError: one of the steps has a different fingerprint; nothing was written.
        RunDeletedError: the run was deleted recently.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    run = context.keys.run(run_id)
    inputs = encode_inputs(context, run, "steps", steps, fingerprint)
    if not 0 < len(inputs) <= MAX_STEPS:
        raise InvalidArgumentError("steps", f"must be 1 to {MAX_STEPS:,} steps, not {len(inputs):,}")
    name, data, printed = inputs[0]
    first = begin_args(run, name, data, lease, max_attempts, owner, printed, settings_of_new_run(context, labels))
    tokens = [first[0], *(new_token() for _ in inputs[1:])]
    args = [*first]
    if len(inputs) > 1:
        args = [*padded("begin_step", first)]
        args[-1] = _ALL_OR_NONE
    for token, (name, data, printed) in zip(tokens[1:], inputs[1:], strict=True):
        args += (token, name.data, data, printed) if printed else (token, name.data, data)

    def parse(reply: Reply) -> dict[str, BeginResult]:
        if reply[0] == b"mismatch":
            given = next(each for each in inputs if each.step.data == reply[2])
            raise mismatch(run.text, given.step.text, given.fingerprint, reply)
        parts = replies_in("begin_step", reply[2:], tokens) if len(inputs) > 1 else [reply]
        return {
            name.text: parse_begin(context, run, name, token, data, printed, part)
            for token, (name, data, printed), part in zip(tokens, inputs, parts, strict=True)
        }

    return Call(run.text, script("begin_step"), run.keys, tuple(args), parse, part_of="begin_steps")


def complete_steps(
    context: Context, completions: Iterable[tuple[StepRun | str, Mapping[str, Any]]]
) -> Workflow[list[StepRun | Exception]]:
    """Ends several claims with an output each, on any runs: `complete_step` for each.

    One round trip per server, and one script for up to 100 consecutive steps of each run, which costs the server about
    half as much as single calls. The claims are ended in the given order, which is the completion order.

    Args:
        completions: pairs of a step run and an output. The step run is the one that `begin_step` returned with
            "execute", or a bare `StepRun.id`, which stands for the current holder of the claim. The output is a dict.

    Returns:
        For each pair, in order, the completed step run, or the error that `complete_step` would have raised.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent; PayloadError for an output.
        StaleStepRunError: one of the step runs carries no claim; nothing was sent.
        ServerError: the server could not be reached, or did not reply, within the store's `timeout`. After an
            OutcomeUnknownError any of the claims may have been ended; repeating the call is safe.
    """
    return _send(_completions(context, completions))


def _send(calls: list[Call[StepRun]]) -> Workflow[list[StepRun | Exception]]:
    return (yield SendBatch(calls)) if calls else []


def _completions(context: Context, completions: object) -> list[Call[StepRun]]:
    if not isinstance(completions, Iterable):
        raise InvalidArgumentError("completions", f"must be an iterable of pairs, not {described(completions)}")
    calls: list[Call[StepRun]] = []
    for index, pair in enumerate(cast("Iterable[object]", completions)):
        if not isinstance(pair, tuple | list) or len(cast("tuple[Any, ...]", pair)) != 2:
            raise InvalidArgumentError(
                f"completions[{index}]", f"must be a pair of a step run and an output, not {described(pair)}"
            )
        step_run, output = cast("tuple[Any, Any]", pair)
        calls.append(complete_call(context, step_run, f"output of completions[{index}]", output))
    return calls
