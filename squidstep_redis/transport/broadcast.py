"""What is sent to every server, in which order, and what follows a failure; no I/O. A driver, as in driver.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from squidstep_redis.protocol.call import Command
from squidstep_redis.server_errors import ServerError
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport.base import as_it_is, cause_of
from squidstep_redis.transport.driver import Driver, Pause, Refresh, RoundTrip, RoundTrips, Servers
from squidstep_redis.transport.retry import FAILURES, RetryState, RoundTripError, may_be_elsewhere, refusal_of


def broadcast(commands: Sequence[Command], operation: str, timeout: float) -> Driver[dict[str, list[Any]]]:
    """Sends commands to every server, one after another, and retries what fails until the timeout.

    Args:
        commands: they write nothing: an operation sends them before its first call.
        operation: the name of the operation.
        timeout: seconds until the last attempt.

    Returns:
        A driver that returns, by the name of the server ("" if none was found), a reply or an error of the server for
        each command, and the same ServerError for all that were not served.
    """
    began = time.monotonic()
    states: defaultdict[str, RetryState] = defaultdict(lambda: RetryState(None, began, timeout, operation=operation))
    replies: dict[str, list[Any]] = {}
    while True:
        attempted_at = time.monotonic()
        try:
            servers: Mapping[str, Any] = yield Servers()
        except FAILURES as error:
            replies = {"": []}
            failed: dict[str, Exception] = {"": error}
        else:
            replies = {name: replies.get(name, []) for name in servers}
            failed = yield from _send_once(commands, servers, replies)
        pauses: list[float] = []
        for name, error in failed.items():
            try:
                pauses.append(states[name].next_pause(RoundTripError(cause_of(error), sent=False)))
            except ServerError as failure:
                replies[name] += [failure] * (len(commands) - len(replies[name]))
        if not pauses:
            return replies
        yield Pause(max(pauses))
        if any(may_be_elsewhere(error) for error in failed.values()):
            yield Refresh(attempted_at)


def _send_once(
    commands: Sequence[Command], servers: Mapping[str, Any], replies: Mapping[str, list[Any]]
) -> Driver[dict[str, Exception]]:
    """Sends each server the commands that it has not served, and adds its replies; returns errors, by server."""
    failed: dict[str, Exception] = {}
    while names := [name for name in servers if name not in failed and len(replies[name]) < len(commands)]:
        outcomes: list[Any] = yield RoundTrips(
            [RoundTrip(servers[name], [commands[len(replies[name])]], as_it_is) for name in names]
        )
        for name, outcome in zip(names, outcomes, strict=True):
            if isinstance(outcome, Exception):
                failed[name] = outcome
            elif _is_transient(outcome[0]):
                failed[name] = outcome[0]
            else:
                replies[name].append(outcome[0])
    return failed


def _is_transient(reply: Any) -> bool:
    refusal = refusal_of(reply) if isinstance(reply, Exception) else None
    return refusal is not None and refusal.retryable
