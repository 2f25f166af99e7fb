"""The settings of a function as a step, checked when the function is decorated."""

from __future__ import annotations

from squidstep_redis.claims.request import ClaimSettings, FunctionSettings, claim_request
from squidstep_redis.functions.checks import check_accepts
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.fingerprints import check_fingerprint
from squidstep_redis.protocol.labels import labels_data


class AsyncCallSettings(ClaimSettings):
    """Keyword arguments of `run_step` of an asyncio store.

    Attributes:
        cancel_when_lost: whether to cancel the function when the claim is lost.
        cancel_with_run: whether to cancel the function when the run is cancelled.
    """

    cancel_when_lost: bool
    cancel_with_run: bool


def checked_settings(settings: FunctionSettings) -> ClaimSettings:
    """Returns the settings, which are checked as `run_step` and `begin_step` check them.

    Args:
        settings: the given settings, possibly with labels; the others have their defaults.

    Raises:
        InvalidArgumentError: a setting is rejected.
        TypeError: there is no such setting.
    """
    request = claim_request("", "", {}, **settings)  # what `claim_step` checks before it sends anything
    if request.max_attempts is not None:
        arguments.max_attempts(request.max_attempts)
    if (backoff := settings.get("backoff")) is not None:
        check_accepts("backoff", backoff, 1)
    arguments.owner(request.owner)
    labels_data(request.labels)
    check_fingerprint(request.fingerprint)
    if callable(request.fingerprint):
        check_accepts("fingerprint", request.fingerprint, {})
    return {**settings}


def asyncio_settings(settings: FunctionSettings, cancel_when_lost: bool, cancel_with_run: bool) -> AsyncCallSettings:
    """Returns the checked settings of an asyncio store's functions.

    Args:
        settings: the given settings, possibly with labels; the others have their defaults.
        cancel_when_lost: whether to cancel the function when the claim is lost.
        cancel_with_run: whether to cancel the function when the run is cancelled.

    Raises:
        InvalidArgumentError: a setting is rejected.
        TypeError: there is no such setting.
    """
    return {
        **checked_settings(settings),
        "cancel_when_lost": cancel_when_lost,
        "cancel_with_run": cancel_with_run,
    }
