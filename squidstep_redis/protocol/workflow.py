"""The protocol between operations and transports.

An operation that needs more than one call is a generator, a workflow. It yields an effect; a transport executes it
and resumes the generator with the result. What the generator returns is the result of the operation.

    effect               the transport                        the workflow receives
    Send(call)           sends one call, with retries         the call's result; its error is raised at the yield
    SendBatch(calls)     sends them together, with retries    a list: for each call its result or its error
    Broadcast(...)       sends commands to every server       a dict: by server, a list of replies or errors
    Sleep(seconds)       pauses                               None
    BlockOnStream(...)   blocks until the stream grows        whether the server replied; possibly early

`transport/blocking.py` and `transport/aio.py` each have one `run_workflow`. This module does no I/O.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from squidstep_redis.protocol.call import Call, Command

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send(Generic[T]):
    """Sends one call; the workflow receives its result, or its error is raised at the yield.

    Attributes:
        call: what is sent.
        seconds: until its last attempt, if that is sooner than the store's timeout; None: that timeout.
    """

    call: Call[T]
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class SendBatch:
    """Sends calls in one round trip per server; the workflow receives a result or an error for each, in order."""

    calls: Sequence[Call[Any]]


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Sends commands to every server, or to every primary of a cluster. They write nothing.

    The workflow receives a dict: by the server's name ("" for a single server, or if no node was found), a reply or an
    error of the server per command. If a server could not be reached, the error is a ServerError.

    Attributes:
        commands: what is sent.
        operation: the name of the operation.
        seconds: until the last attempt, if that is sooner than the store's timeout; None: that timeout.
    """

    commands: Sequence[Command]
    operation: str
    seconds: float | None = None


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
        return (b"XREAD", b"COUNT", b"1", b"BLOCK", b"%d" % milliseconds, b"STREAMS", self.stream, self.last)


Effect = Send[Any] | SendBatch | Broadcast | Sleep | BlockOnStream

Workflow = Generator[Effect, Any, T]
"""An operation that yields effects, is resumed with their results, and returns a `T`."""


def raise_first_error(results: Sequence[Any]) -> list[Any]:
    """Returns the results of a batch in which every call must succeed; raises the first error."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return list(results)
