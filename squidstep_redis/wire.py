"""How a call travels: as data, without any I/O.

A `Call` is one operation, ready to be sent and able to read its own reply. `Exchange` is a batch of them: it says
what to send and is told the replies. The two stores, and a pipeline of the user's own, only move the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

from redis import RedisError
from redis.client import NEVER_DECODE
from redis.exceptions import (
    AskError,
    ClusterDownError,
    ConnectionError,
    MovedError,
    NoScriptError,
    TimeoutError,
    TryAgainError,
)

from squidstep_redis.errors import (
    CorruptRunError,
    InvalidArgumentError,
    NewerFormatError,
    ReplyMismatchError,
    RunDeletedError,
    SquidstepError,
    UnsupportedClientError,
    described,
)
from squidstep_redis.scripts import Script

T = TypeVar("T")

Command = tuple[Any, ...]
Reply = list[Any]

# Payloads are bytes, whatever the client makes of other replies.
OPTIONS: Final[dict[str, Any]] = {NEVER_DECODE: True}


class Call(NamedTuple, Generic[T]):
    """One operation, ready to be sent.

    Attributes:
        run_id: the run it is about, for error messages; None if it spans runs.
        script: what the server is to run.
        keys: all in one hash slot.
        args: the first is the nonce, which the script echoes.
        parse: reads the reply, once it is known to be this call's and no refusal.
        deleted: what to answer of a run that was deleted; None: RunDeletedError.
    """

    run_id: str | None
    script: Script
    keys: tuple[bytes, ...]
    args: tuple[bytes, ...]
    parse: Callable[[Reply], T]
    deleted: Callable[[], T] | None = None

    def evalsha(self) -> Command:
        """The command to send."""
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.args)

    def eval(self) -> Command:
        """The command to send to a server that may not know the script."""
        return ("EVAL", self.script.source, len(self.keys), *self.keys, *self.args)

    def answer(self, reply: object) -> T:
        """Reads the server's reply.

        Raises:
            ReplyMismatchError: it is the reply to another call.
            SquidstepError: the script refused; nothing was written.
        """
        # A signal handler that raises in the middle of a command can leave its reply on the connection.
        if not isinstance(reply, list) or cast("Reply", reply)[1:2] != [self.args[0]]:
            raise ReplyMismatchError(
                f"{self.script.name} got the reply to another call, {described(cast('object', reply))}: "
                "the connection was interrupted; whether this call took effect is unknown, send it again"
            )
        reply = cast("Reply", reply)
        refuse = _REFUSALS.get(reply[0])
        if refuse is not None:
            if refuse is _deleted and self.deleted is not None:
                return self.deleted()
            raise refuse(self.run_id or "", *(text.decode(errors="backslashreplace") for text in reply[2:]))
        return self.parse(reply)


def _deleted(run_id: str, _: str) -> SquidstepError:
    return RunDeletedError(run_id, None, "was deleted a short while ago; nothing was written. Use a new run id")


def _torn(run_id: str, key: str) -> SquidstepError:
    return CorruptRunError(
        run_id,
        key,
        f"does not agree with the other key of run {run_id!r}: one of the two was evicted, deleted or overwritten. "
        "Nothing was written; see to it that the server's maxmemory-policy is noeviction, then delete_run",
    )


def _wrong_type(run_id: str, key: str) -> SquidstepError:
    return CorruptRunError(run_id, key, "holds another type of value than squidstep_redis keeps there")


def corrupt(run_id: str, key: str, field: str) -> SquidstepError:
    """The error for a field that is missing or not what this library writes."""
    return CorruptRunError(run_id, key, f"field {field!r} is missing or not what squidstep_redis writes")


def newer(run_id: str, key: str, format: str) -> SquidstepError:
    """The error for a record in a format that this version does not know."""
    return NewerFormatError(
        run_id, key, f"was written in format {format} by a later version of squidstep_redis: upgrade this process"
    )


_REFUSALS: Final[dict[bytes, Callable[..., SquidstepError]]] = {
    b"tombstone": _deleted,
    b"torn": _torn,
    b"wrongtype": _wrong_type,
    b"corrupt": corrupt,
    b"newer": newer,
}


UNANSWERED: Final = (ConnectionError, TimeoutError)
_NOT_RUN: Final = (NoScriptError, MovedError, AskError, TryAgainError, ClusterDownError)

Exchange = Generator[Sequence[Call[Any]], list[Any], T]
"""An operation that takes several batches: yields calls, is sent a result or an exception for each, returns."""

Plan = Generator[Call[Any] | float | list[Command], Any, T]
"""What to do, in order, for what takes more than calls. Of a call the result is sent back, or its error thrown in; a
number is seconds to pause; a list of commands goes to every server, and replies or errors come back by server."""


def commands(calls: Sequence[Call[Any]]) -> list[Command]:
    """The commands of a batch for one server: first those that load the scripts, then one for each call.

    The scripts are loaded all at once. If the server forgets them before the last call, all calls from there on fail
    alike, and can be sent once more without any of them coming after one that should have followed it.
    """
    load = [("SCRIPT LOAD", source) for source in dict.fromkeys(call.script.source for call in calls)]
    return [("MULTI",), *load, ("EXEC",), *(call.evalsha() for call in calls)]


def must_resend(reply: object) -> bool:
    """Whether this call of a batch is to be sent once more, by itself.

    It was not run, because the scripts were flushed between two commands or the slot is elsewhere; or a node of a
    cluster did not answer, and the call may have run or not. A cluster client finds the way by itself.
    """
    return isinstance(reply, _NOT_RUN + UNANSWERED)


def answer_or_error(call: Call[T], reply: object) -> T | Exception:
    """Reads one reply of a batch."""
    if isinstance(reply, Exception):
        return reply
    try:
        return call.answer(reply)
    except SquidstepError as error:
        return error


@dataclass(frozen=True, slots=True)
class Queued(Generic[T]):
    """An operation that waits in a pipeline of the user's own.

    Attributes:
        call: the operation.
        index: its place among the pipeline's commands.
    """

    call: Call[T]
    index: int

    def result(self, replies: Sequence[Any]) -> T:
        """Reads the operation's reply out of what the pipeline's `execute()` answered.

        Raises:
            SquidstepError: as the operation itself; it wrote nothing, but other commands of the pipeline ran.
            redis.RedisError: the server's own, if the pipeline was executed with `raise_on_error=False`.
        """
        reply = replies[self.index]
        if isinstance(reply, RedisError):
            raise reply
        return self.call.answer(reply)


def queue(pipeline: Any, call: Call[T]) -> Queued[T]:
    """Appends a call to a redis-py pipeline, blocking or asyncio.

    It carries the script's source: inside a transaction a script that the server does not know would fail alone,
    while the commands around it take effect.
    """
    if not isinstance(cast("object", call), Call):
        raise InvalidArgumentError("call", f"must be a Call from store.calls, not {described(call)}")
    if not (hasattr(pipeline, "execute") and hasattr(pipeline, "__len__")):
        raise UnsupportedClientError("pipeline", f"must be a redis-py pipeline, not {described(pipeline)}")
    # A cluster's pipeline leaves transactions to a strategy. asyncio's calls the attribute is_transaction, for
    # transaction is a method of its base class.
    state = getattr(pipeline, "_execution_strategy", pipeline)
    explicit = getattr(state, "explicit_transaction", getattr(state, "_explicit_transaction", False))
    if getattr(state, "watching", getattr(state, "_watching", False)) and not explicit:
        raise UnsupportedClientError("pipeline", "is watching and would run the command at once: call multi() first")
    asked_for = getattr(pipeline, "is_transaction", getattr(pipeline, "transaction", False))
    transaction = explicit or hasattr(state, "_watching") or (not callable(asked_for) and asked_for)
    owner = getattr(pipeline, "cluster_client", pipeline)
    connections = getattr(owner, "connection_pool", None) or getattr(owner, "nodes_manager", None)
    if transaction and getattr(connections, "connection_kwargs", {}).get("decode_responses"):
        raise UnsupportedClientError(
            "pipeline", "decodes all that a transaction answers, payloads too: use a client without decode_responses"
        )
    index = len(pipeline)
    pipeline.execute_command(*call.eval(), **OPTIONS)
    return Queued(call, index)


def check_calls(calls: object) -> list[Call[Any]]:
    """Raises InvalidArgumentError unless every item is a Call."""
    items: list[object] = list(cast("Iterable[object]", calls))
    for index, item in enumerate(items):
        if not isinstance(item, Call):
            raise InvalidArgumentError(f"calls[{index}]", f"must be a Call from store.calls, not {described(item)}")
    return cast("list[Call[Any]]", items)
