"""A call of a batch that is re-sent alone: its deadline and its errors are those of the batch."""

from __future__ import annotations

from typing import Any

import pytest
from redis import exceptions
from support.backends import Bench
from support.internals import ScriptedConnections, give_up_early, plain_store, shorten_pauses, transport_clock

from squidstep_redis import OutcomeUnknownError, RefusedError, ServerError

# Of the client, the same with every server.
pytestmark = pytest.mark.servers("fakeredis")

TIMEOUT = 10.0  # seconds, of the store
SEND = 3.0  # seconds that each send takes
BUSY = exceptions.ResponseError("BUSY Redis is busy running a script. You can only call SCRIPT KILL")
CUT = exceptions.ConnectionError("Connection closed by server.")


class Clock:
    """A clock that advances by `sleep`, and by assignment."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def send_batch(bench: Bench, *replies: Exception, monkeypatch: pytest.MonkeyPatch) -> tuple[ServerError, float]:
    """Sends a batch of one call to a slow server that returns these errors, and then repeats the last.

    Returns:
        The call's error, and the seconds that it took.
    """
    shorten_pauses(monkeypatch, 0.001)
    store = bench.store()
    give_up_early(plain_store(store), TIMEOUT)
    clock = Clock()

    def reply(number: int) -> Any:
        clock.now += SEND
        error = replies[min(number, len(replies) - 1)]
        if error is CUT:
            raise error
        return error

    connections = ScriptedConnections(bench.runner is not None, reply)
    connections.replace_connections_of(plain_store(store))
    with transport_clock(clock):
        (result,) = store.batch([store.calls.begin_step("run", "pay", {})])
    assert isinstance(result, ServerError)
    assert connections.sends > 2
    return result, clock.now - 1_000.0


def test_resend_has_the_deadline_of_the_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    error, seconds = send_batch(bench, BUSY, monkeypatch=monkeypatch)

    assert type(error) is RefusedError
    assert seconds < TIMEOUT + SEND


def test_refusal_after_a_lost_batch_leaves_the_outcome_unknown(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    error, seconds = send_batch(bench, CUT, BUSY, monkeypatch=monkeypatch)

    assert type(error) is OutcomeUnknownError
    assert "got no reply to an earlier attempt, and was refused now" in str(error)
    assert seconds < TIMEOUT + SEND


def test_refusal_after_a_lost_resend_leaves_the_outcome_unknown(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    error, _ = send_batch(bench, BUSY, CUT, BUSY, monkeypatch=monkeypatch)

    assert type(error) is OutcomeUnknownError
