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

from squidstep_redis.errors import (
    CorruptRunError,
    InvalidArgumentError,
    NewerFormatError,
    NotReplicatedError,
    ReplyMismatchError,
    RunDeletedError,
    SquidstepError,
    UnsupportedClientError,
    described,
)
from squidstep_redis.protocol.scripts import Script

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
        step: the step it is about, for error messages.
        retryable: whether a store may send it again when it does not get through.
    """

    run_id: str | None
    script: Script
    keys: tuple[bytes, ...]
    args: tuple[bytes, ...]
    parse: Callable[[Reply], T]
    deleted: Callable[[], T] | None = None
    step: str | None = None
    retryable: bool = True

    def evalsha(self) -> Command:
        """The command to send."""
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.args)

    def eval(self) -> Command:
        """The command to send to a server that may not know the script."""
        return ("EVAL", self.script.source, len(self.keys), *self.keys, *self.args)

    def answer(self, reply: Any) -> T:
        """Reads the server's reply.

        Raises:
            ReplyMismatchError: it is the reply to another call.
            SquidstepError: the script refused; nothing was written.
        """
        # A reply without payloads is one string, which saves the server a table.
        parts: Reply = reply.split(b" ", 2) if type(reply) is bytes else reply
        # A signal handler that raises in the middle of a command can leave its reply on the connection.
        if type(parts) is not list or len(parts) < 2 or parts[1] != self.args[0]:
            problem = f"the connection was interrupted before, and gave the reply to another call, {described(reply)}"
            raise ReplyMismatchError(self.script.name, self.run_id, self.step, problem, True, self)
        refuse = _REFUSALS.get(parts[0])
        if refuse is not None:
            if refuse is _deleted and self.deleted is not None:
                return self.deleted()
            raise refuse(self.run_id or "", *(text.decode(errors="backslashreplace") for text in parts[2:]))
        return self.parse(parts)


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


Exchange = Generator[Sequence[Call[Any]], list[Any], T]
"""An operation that takes several batches: yields calls, is sent a result or an exception for each, returns."""


class BlockOnStream(NamedTuple):
    """A pause that ends when a stream has an entry behind `last`; or earlier, for it is a hint.

    Attributes:
        stream: its key.
        last: the last entry that is known.
        seconds: how long at most.
    """

    stream: bytes
    last: bytes
    seconds: float

    def command(self, longest: float) -> Command:
        """What blocks until then, at most for so many seconds."""
        milliseconds = max(1, round(1_000 * min(self.seconds, longest)))
        return ("XREAD", "COUNT", 1, "BLOCK", milliseconds, "STREAMS", self.stream, self.last)


Plan = Generator[Call[Any] | tuple[Call[Any], ...] | float | list[Command] | BlockOnStream, Any, T]
"""What to do, in order, for what takes more than calls. Of a call the result is sent back, or its error thrown in; of a
tuple of calls, which is a batch, a result or error for each; a number is seconds to pause; a list of commands goes to
every server, and replies or errors come back by server."""


class Durability(NamedTuple):
    """What a transition is to wait for, on the connection that it was sent on: WAIT counts for no other.

    Attributes:
        replicas: how many are to have it.
        aof: whether the server's own AOF is to be on its disk.
        timeout_ms: for how long to wait.
    """

    replicas: int
    aof: bool
    timeout_ms: int

    def commands(self, key: bytes) -> list[Command]:
        """What to send behind the transitions.

        The server waits for what this connection wrote last. A call that is sent again may write nothing, so that
        there is always something to wait for, and all that came before it, a mark is written.
        """
        mark = key[: key.index(b"}") + 1] + b":wait"  # in the slot of the keys
        return [("SET", mark, "", "PX", 1_000), *self._waits()]

    def _waits(self) -> list[Command]:
        waits: list[Command] = []
        if self.replicas:
            waits.append(("WAIT", self.replicas, self.timeout_ms))
        if self.aof:
            waits.append(("WAITAOF", 1, 0, self.timeout_ms))
        return waits

    def unmet(self, replies: Sequence[Any]) -> tuple[str, int | None] | None:
        """Reads the replies to `commands`: what is missing, and how many replicas have it; None if nothing is."""
        replicas: int | None = None
        for (name, *_), reply in zip(self._waits(), replies[1:], strict=True):
            if isinstance(reply, Exception):
                return f"{name} was answered {reply}", replicas
            if name == "WAIT":
                replicas = int(reply)
                if replicas < self.replicas:
                    return f"{replicas} of {self.replicas} replicas confirmed it within {self.timeout_ms} ms", replicas
            elif not int(reply[0]):
                return f"the AOF was not on disk within {self.timeout_ms} ms", replicas
        return None


def commands(
    calls: Sequence[Call[Any]], durability: Durability | None = None, *, load_scripts: bool = True
) -> list[Command]:
    """The commands of a batch for one server: the scripts are loaded, then each call, then what it is to wait for.

    The scripts are loaded all at once. If the server forgets them before the last call, all calls from there on fail
    alike, and can be sent once more without any of them coming after one that should have followed it.
    """
    sources = dict.fromkeys(call.script.source for call in calls)
    load = [("MULTI",), *(("SCRIPT", "LOAD", source) for source in sources), ("EXEC",)] if load_scripts else []
    return [*load, *(call.evalsha() for call in calls), *_waits(calls, durability)]


def replies_to(calls: Sequence[Call[Any]], replies: list[Any], durability: Durability | None = None) -> list[Any]:
    """What the server answered to each call, out of what it answered to `commands`."""
    end = len(replies) - len(_waits(calls, durability))
    answered = replies[end - len(calls) : end]
    unmet = durability.unmet(replies[end:]) if durability and end < len(replies) else None
    if unmet is None:
        return answered
    return [
        _NotConfirmed(reply, *unmet) if call.script.is_transition and not isinstance(reply, Exception) else reply
        for call, reply in zip(calls, answered, strict=True)
    ]


def _waits(calls: Sequence[Call[Any]], durability: Durability | None) -> list[Command]:
    if durability is None or not any(call.script.is_transition for call in calls):
        return []
    return durability.commands(calls[0].keys[0])


class _NotConfirmed(NamedTuple):
    """A reply that stands on the master, but not where it was to stand."""

    reply: Any
    problem: str
    replicas: int | None


def read(call: Call[T], reply: object) -> T:
    """Reads one of what `replies_to` answered.

    Raises:
        NotReplicatedError: it stands on the master, but not where it was to stand.
        SquidstepError: as `Call.answer`.
        Exception: the reply itself, if it is one.
    """
    if isinstance(reply, Exception):
        raise reply
    if isinstance(reply, _NotConfirmed):
        raise not_replicated(call, call.answer(reply.reply), reply.problem, reply.replicas)
    return call.answer(reply)


def not_replicated(call: Call[T], result: T, problem: str, replicas: int | None = None) -> NotReplicatedError:
    """The error for a transition of which it is not known whether it is where it was to be."""
    return NotReplicatedError(call.script.name, call.run_id, call.step, problem, True, call, result, replicas)


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
