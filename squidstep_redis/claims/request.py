"""The arguments of `run_step` and `claim_step`: the settings of a step, their defaults and descriptions."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from functools import cache
from inspect import Parameter, signature
from typing import Any, Final, Literal, NamedTuple, TypedDict, cast

from squidstep_redis.claims.failures import Backoff, FailureRules, Permanent, failure_rules
from squidstep_redis.docstrings import with_settings
from squidstep_redis.errors import InvalidArgumentError, described
from squidstep_redis.model import BeginResult
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.arguments import Labels, RunId, Seconds, Step, lease_seconds
from squidstep_redis.protocol.call import Call
from squidstep_redis.protocol.fingerprints import Fingerprint

OnBusy = Literal["raise", "wait"]

DEFAULT_LEASE: Final = 30.0

# A new setting is added to one of these classes, to `claim_request` and to ClaimRequest. The functions that accept
# settings pass it on, and their signatures and docstrings show it.


class StepSettings(TypedDict, total=False):
    """The settings of a step that functions in a job or task accept, too. Each is an optional keyword argument.

    Attributes:
        lease: seconds, or a timedelta, after which another worker may take over the step from a worker that is dead or
            hangs; None: never. A heartbeat extends the lease while the work runs. Default: 30.
        max_attempts: number of claims to grant in total for one step, not counting released ones; None: no limit.
        permanent: a type of exception, or a tuple of them, besides PermanentError: if the work raises one, the step has
            failed permanently.
        backoff: how long the step cannot be claimed after any other exception: a function that returns the seconds, or
            a timedelta, given how many attempts there were, such as an ExponentialBackoff. It is not called after
            RetryLater. None: the step can be claimed at once.
        fingerprint: what identifies the input; a function's input is the dict of its given arguments. True: all of it,
            in any order of its keys; a function of the input: what it returns, which may be anything that a payload may
            contain; a str of up to 256 bytes without control characters: the str itself; False: nothing; None: the
            store's setting. If the step has a different fingerprint, InputMismatchError is raised.
    """

    lease: Seconds | None
    max_attempts: int | None
    permanent: Permanent
    backoff: Backoff | None
    fingerprint: Fingerprint | None


class FunctionSettings(StepSettings, total=False):
    """The settings of a function as a step. Each is an optional keyword argument of `store.step`.

    Attributes:
        on_busy: what to do while another worker holds the step, or while it may not be retried yet: "raise", or "wait"
            until it is completed or can be claimed (polling at most once a second).
        owner: who claims, shown to operators: a str of up to 256 bytes without control characters; None: `host:pid`.
    """

    on_busy: OnBusy
    owner: str | None


class ClaimSettings(FunctionSettings, total=False):
    """All settings of a step. Each is an optional keyword argument of `run_step` and `claim_step`.

    Attributes:
        labels: labels of the run if this call creates it, a dict of up to 8 str of up to 64 bytes by name, by which
            `runs` finds it; None: none. An existing run keeps its own.
    """

    labels: Labels | None


@cache
def _hostname() -> str:
    return socket.gethostname()


def default_owner() -> str:
    """Returns the default owner of a claim: `host:pid`."""
    return f"{_hostname()}:{os.getpid()}"


class ClaimRequest(NamedTuple):
    """The arguments of `claim_step`. `lease`, and the arguments that are not sent, are checked.

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
        """Returns a call of `begin_step` with its own token."""
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
    lease: Seconds | None = DEFAULT_LEASE,
    max_attempts: int | None = None,
    permanent: Permanent = (),
    backoff: Backoff | None = None,
    on_busy: OnBusy = "raise",
    owner: str | None = None,
    fingerprint: Fingerprint | None = None,
    labels: Labels | None = None,
    **unknown: object,
) -> ClaimRequest:
    """Returns the request. The settings are those of ClaimSettings, with their defaults.

    Raises:
        InvalidArgumentError: `lease`, `on_busy`, `permanent` or `backoff` is rejected.
        TypeError: there is no such setting.
    """
    if unknown:
        raise unknown_argument(unknown, ClaimSettings)
    if cast("object", on_busy) not in ("raise", "wait"):
        raise InvalidArgumentError("on_busy", f"must be 'raise' or 'wait', not {described(on_busy)}")
    failures, seconds = failure_rules(permanent, backoff), lease_seconds(lease)
    return ClaimRequest(
        run_id, step, input, lease, seconds, max_attempts, owner, on_busy, failures, fingerprint, labels
    )


def unknown_argument(names: Iterable[str], kind: type) -> TypeError:
    """Returns the error for an unknown keyword argument.

    Args:
        names: the names of the unknown arguments.
        kind: the TypedDict of the known settings.
    """
    known = ", ".join(sorted(kind.__annotations__))
    return TypeError(f"unexpected keyword argument {', '.join(map(repr, names))}; the settings of a step are {known}")


_PARAMETERS: Final[Mapping[str, Parameter]] = signature(claim_request).parameters

with_step_settings = with_settings(_PARAMETERS, StepSettings)
"""Decorates a function whose `**settings` are StepSettings: its signature and docstring show each of them."""

with_function_settings = with_settings(_PARAMETERS, StepSettings, FunctionSettings)
"""Decorates a function whose `**settings` are FunctionSettings: its signature and docstring show each of them."""

with_claim_settings = with_settings(_PARAMETERS, StepSettings, FunctionSettings, ClaimSettings)
"""Decorates a function whose `**settings` are ClaimSettings: its signature and docstring show each of them."""
