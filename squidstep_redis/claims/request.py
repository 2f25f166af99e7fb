"""What `run_step` and `claim_step` ask for."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, Literal, NamedTuple, cast

from squidstep_redis.claims.failures import Backoff, FailureRules, Permanent, failure_rules
from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.model import BeginResult
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.arguments import Labels, RunId, Seconds, Step, lease_ms
from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.fingerprints import Fingerprint

OnBusy = Literal["raise", "wait"]

DEFAULT_LEASE: Final = 30.0


@cache
def _hostname() -> str:
    return socket.gethostname()


def default_owner() -> str:
    """Returns the default owner of a claim: `host:pid`."""
    return f"{_hostname()}:{os.getpid()}"


class ClaimRequest(NamedTuple):
    """The arguments of `claim_step`, of which `lease` and those that are not sent are checked.

    Attributes:
        lease_seconds: the lease in seconds; 0 without one.
        failures: what an exception means for the next attempt.
    """

    run_id: RunId
    step: Step
    input: Mapping[str, Any]
    lease: Seconds | None
    lease_seconds: float
    max_attempts: int | None
    owner: str | None
    on_busy: OnBusy
    failures: FailureRules
    fingerprint: Fingerprint | None
    labels: Labels | None

    def begin(self, calls: Calls) -> Call[BeginResult]:
        """Returns a call of `begin_step` with a token of its own."""
        return calls.begin_step(
            self.run_id,
            self.step,
            self.input,
            lease=self.lease,
            max_attempts=self.max_attempts,
            owner=default_owner() if self.owner is None else self.owner,
            fingerprint=self.fingerprint,
            labels=self.labels,
        )


def claim_request(
    run_id: RunId,
    step: Step,
    input: Mapping[str, Any],
    *,
    lease: Seconds | None,
    max_attempts: int | None,
    permanent: Permanent,
    backoff: Backoff | None,
    on_busy: OnBusy,
    owner: str | None,
    fingerprint: Fingerprint | None,
    labels: Labels | None,
) -> ClaimRequest:
    """Returns the request; raises InvalidArgumentError if `lease`, `on_busy`, `permanent` or `backoff` is rejected."""
    if cast("object", on_busy) not in ("raise", "wait"):
        raise InvalidArgumentError("on_busy", f"must be 'raise' or 'wait', not {described(on_busy)}")
    lease_seconds = int(lease_ms(lease) or 0) / 1_000
    failures = failure_rules(permanent, backoff)
    return ClaimRequest(
        run_id, step, input, lease, lease_seconds, max_attempts, owner, on_busy, failures, fingerprint, labels
    )
