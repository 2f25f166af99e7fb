"""The operations on a running claim: extending its lease, ending it, and recording progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from squidstep_redis.errors import StaleStepRunError
from squidstep_redis.model import StepRun
from squidstep_redis.operations.context import Context
from squidstep_redis.operations.transitions import check_prefix, claim_of, transition, transition_call
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Seconds
from squidstep_redis.protocol.call import Call, sender


def extend_claim(
    context: Context, step_run: StepRun | str, lease: Seconds | None, *, progress: Mapping[str, Any] | None = None
) -> Call[StepRun]:
    """Restarts the lease of a claim: it then expires `lease` seconds from now, by the server's clock.

    One round trip.

    Args:
        step_run: the step run that `begin_step` returned with "execute"; or a bare `StepRun.id`, which stands for the
            current holder of the claim.
        lease: seconds or a timedelta; None: the claim never expires by itself.
        progress: a dict to store for the next attempt as well, as `checkpoint_step` does; None: the stored one stays.

    Returns:
        The running step run, which carries the claim.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent, such as a step run of another prefix.
            PayloadError for the progress.
        StaleStepRunError: the claim is not held: taken over, ended, or never granted.
        StepRunNotFoundError: there is no such record; RunDeletedError if the run was deleted.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    lease_ms = arguments.lease_ms(lease)
    if progress is not None:
        return _checkpoint(context, step_run, progress, (lease_ms,))._replace(part_of="extend_claim")
    return transition(context, "extend_claim", step_run, (lease_ms,))


def checkpoint_step(context: Context, step_run: StepRun | str, progress: Mapping[str, Any]) -> Call[StepRun]:
    """Stores how far the work has come, for the next attempt; replaces the progress of an earlier checkpoint.

    One round trip. The lease and the input stay as they are. The progress outlives a failure, a release, a takeover and
    `retry_step`, until the step is completed. A copy of the call that arrives after a later checkpoint of the same
    process changes nothing.

    Args:
        step_run: the step run that `begin_step` returned with "execute"; or a bare `StepRun.id`, which stands for the
            current holder of the claim.
        progress: a dict, stored under the same rules and the same limit as an input.

    Returns:
        The running step run, which carries the claim and the stored progress.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent, such as a step run of another prefix.
            PayloadError for the progress.
        StaleStepRunError: the claim is not held: taken over, ended, or never granted. Nothing was written.
        StepRunNotFoundError: there is no such record; RunDeletedError if the run was deleted.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    return _checkpoint(context, step_run, progress)


def expire_claim(context: Context, step_run: StepRun | str) -> Call[StepRun]:
    """Ends the lease of a claim whose holder is known to be dead, so that it can be taken over immediately.

    One round trip.

    Args:
        step_run: a step run from any read, such as `live_claims` or `get_step_run`: exactly the claim that it shows
            expires, not a later one. Or a bare `StepRun.id`, which stands for the current holder of the claim.

    Returns:
        The step run: running, with an expired lease. The next `begin_step` is a takeover.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent, such as a step run of another prefix.
        StaleStepRunError: the claim is no longer held, or the step was never claimed.
        StepRunNotFoundError: there is no such record; RunDeletedError if the run was deleted.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    if not isinstance(step_run, StepRun):
        return transition(context, "extend_claim", step_run, (b"0",))._replace(part_of="expire_claim")
    check_prefix(context, step_run)
    token = step_run.token or step_run.current_token
    if not token:
        raise StaleStepRunError(step_run, "expire_claim was refused: the step was never claimed. Nothing was sent")
    run, name = context.keys.run(step_run.run_id), arguments.step(step_run.step)
    call = transition_call(context, "extend_claim", step_run, run, name, token, (b"0",))
    return call._replace(part_of="expire_claim")


def _checkpoint(
    context: Context, step_run: StepRun | str, progress: Mapping[str, Any], lease: tuple[bytes, ...] = ()
) -> Call[StepRun]:
    run, name, token = claim_of(context, "checkpoint_step", step_run)
    data = context.payloads.encode("progress", progress, run.text, name.text, "progress")
    args = (sender(), data)
    return transition_call(context, "checkpoint_step", step_run, run, name, token, args, lease, progress=data)
