"""The one protocol between operations and transports.

An operation that takes more than one call is a generator, a workflow. It yields an effect; a transport performs it
and resumes the generator with the outcome. What the generator returns is the result of the operation.

    effect               the transport                        the workflow receives
    Send(call)           sends one call, with retries         the call's result; its error is thrown in
    SendBatch(calls)     sends them together, with retries    a list: for each call its result or its error
    Broadcast(commands)  sends commands to every server       a dict: by server, a list of replies or errors
    Sleep(seconds)       pauses                               None
    BlockOnStream(...)   blocks until the stream grows        None, perhaps early: it is a hint

`transport/blocking.py` and `transport/aio.py` each have one `run_workflow`; nothing here waits.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from squidstep_redis.protocol.call import Call, Command

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send(Generic[T]):
    """Sends one call; the workflow receives its result, or its error is thrown in."""

    call: Call[T]


@dataclass(frozen=True, slots=True)
class SendBatch:
    """Sends calls in one round trip per server; the workflow receives a result or an error for each, in order."""

    calls: Sequence[Call[Any]]


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Sends commands to every server, or to every primary of a cluster.

    The workflow receives a dict: by the server's name ("" for a single server), a reply or an error per command.
    """

    commands: Sequence[Command]


@dataclass(frozen=True, slots=True)
class Sleep:
    """Pauses for some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class BlockOnStream:
    """Blocks until a stream has an entry after `last`, for at most `seconds`. It may end early.

    Attributes:
        stream: the stream's key.
        last: id of the last known entry.
        seconds: the longest pause.
    """

    stream: bytes
    last: bytes
    seconds: float

    def command(self, longest: float) -> Command:
        """Returns the blocking command, for at most `longest` seconds."""
        milliseconds = max(1, round(1_000 * min(self.seconds, longest)))
        return ("XREAD", "COUNT", 1, "BLOCK", milliseconds, "STREAMS", self.stream, self.last)


Effect = Send[Any] | SendBatch | Broadcast | Sleep | BlockOnStream

Workflow = Generator[Effect, Any, T]
"""An operation that yields effects, is resumed with their outcomes, and returns a `T`."""


def results_of(outcomes: Sequence[Any]) -> list[Any]:
    """Returns the results of a batch in which every call has to succeed; raises the first error."""
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return list(outcomes)
