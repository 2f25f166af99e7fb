"""The settings of a function as a step: arguments of `run_step` that decorators and runs accept, too."""

from __future__ import annotations

from typing import TypedDict

from squidstep_redis.claims.failures import Backoff, Permanent
from squidstep_redis.claims.request import OnBusy, claim_request
from squidstep_redis.functions.checks import check_accepts
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Labels, Seconds
from squidstep_redis.protocol.fingerprints import Fingerprint, check_fingerprint
from squidstep_redis.protocol.labels import labels_data


class StepSettings(TypedDict):
    """How a step is claimed, and what a failure means: keyword arguments of `run_step`."""

    lease: Seconds | None
    max_attempts: int | None
    permanent: Permanent
    backoff: Backoff | None
    on_busy: OnBusy
    owner: str | None
    fingerprint: Fingerprint | None
    labels: Labels | None


def step_settings(
    *,
    lease: Seconds | None,
    max_attempts: int | None,
    permanent: Permanent,
    backoff: Backoff | None,
    on_busy: OnBusy,
    owner: str | None,
    fingerprint: Fingerprint | None,
    labels: Labels | None = None,
) -> StepSettings:
    """Returns the settings; raises InvalidArgumentError if one is rejected.

    Args:
        lease: seconds until another worker can take over the step from a dead one; None: never.
        max_attempts: the maximum number of attempts; None: no limit.
        permanent: a type of exception, or a tuple of them, after which the step has failed permanently.
        backoff: a function that returns the delay in seconds after a number of attempts; None: no delay.
        on_busy: "raise", or "wait" while the step cannot be claimed.
        owner: who claims; None: `host:pid`.
        fingerprint: what identifies the input; None: the store's setting.
        labels: of the run if the step creates it; None: none.
    """
    settings = StepSettings(
        lease=lease,
        max_attempts=max_attempts,
        permanent=permanent,
        backoff=backoff,
        on_busy=on_busy,
        owner=owner,
        fingerprint=fingerprint,
        labels=labels,
    )
    claim_request("", "", {}, **settings)  # what `claim_step` checks before it sends anything
    if max_attempts is not None:
        arguments.max_attempts(max_attempts)
    if backoff is not None:
        check_accepts("backoff", backoff, 1)
    arguments.owner(owner)
    labels_data(labels)
    check_fingerprint(fingerprint)
    if callable(fingerprint):
        check_accepts("fingerprint", fingerprint, {})
    return settings
