"""One operation as data: what is sent, and how its reply is read. No I/O."""

from __future__ import annotations

import os
from binascii import b2a_base64
from collections.abc import Callable, Generator, Iterable
from itertools import count
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

from redis.client import NEVER_DECODE

from squidstep_redis.errors import (
    CorruptRunError,
    InvalidArgumentError,
    NewerFormatError,
    RunDeletedError,
    SquidstepError,
    StaleStepRunError,
    described,
)
from squidstep_redis.protocol.scripts import Script
from squidstep_redis.server_errors import ReplyMismatchError

T = TypeVar("T", covariant=True)  # noqa: PLC0105 -- the only type variable here; a list of mixed calls is a list of calls of their union

Command = tuple[bytes, ...]
"""The words of a command. All are bytes: hiredis crashes if a signal handler raises while it formats another type."""

Reply = list[Any]

# Payloads are bytes, even if the client decodes other replies.
OPTIONS: Final[dict[str, Any]] = {NEVER_DECODE: True}

_nonces = count()


def new_nonce() -> bytes:
    """Returns a number that is unique in this process. That is enough: processes do not share connections."""
    return b"%d" % next(_nonces)


_senders: Final[dict[int, bytes]] = {}  # by process: a forked child is a different sender


def sender() -> bytes:
    """Returns a name for this process, for calls whose order matters: the nonces of one sender ascend."""
    return _senders.get(os.getpid()) or _senders.setdefault(os.getpid(), new_token()[:8])


def new_token() -> bytes:
    """Returns 72 random bits in 12 characters: unique among all claims, and short enough for a compact state line."""
    return b2a_base64(os.urandom(9), newline=False)


class Call(NamedTuple, Generic[T]):
    """One operation, ready to be sent.

    Attributes:
        run_id: the run it is about; None if it spans runs.
        script: the script to run.
        keys: the script's keys, all in one hash slot.
        args: the script's arguments. The first is the nonce, which the script echoes.
        parse: reads the reply, after the checks that it belongs to this call and is not a refusal.
        if_deleted: returns the result for a run that was deleted; None: RunDeletedError is raised.
        step: the step it is about, for error messages.
        retryable: whether the store retries it after a transient error.
        part_of: the operation that sends it, if the script has another name.
        may_have_run: whether it was sent before with an unknown outcome, and may have taken effect.
    """

    run_id: str | None
    script: Script
    keys: tuple[bytes, ...]
    args: tuple[bytes, ...]
    parse: Callable[[Reply], T]
    if_deleted: Callable[[], T] | None = None
    step: str | None = None
    retryable: bool = True
    part_of: str | None = None
    may_have_run: bool = False

    def __repr__(self) -> str:
        """Omits the arguments, which contain payloads: errors that carry a call appear in logs."""
        place = "" if self.run_id is None else f" run {self.run_id!r}"
        return f"<Call {self.operation}{place}{'' if self.step is None else f', step {self.step!r}'}>"

    @property
    def operation(self) -> str:
        """The name of the operation, for events and error messages."""
        return self.part_of or self.script.name

    def evalsha(self) -> Command:
        """Returns the command for a server that knows the script."""
        return (b"EVALSHA", self.script.sha, b"%d" % len(self.keys), *self.keys, *self.args)

    def eval(self) -> Command:
        """Returns the command for a server that may not know the script."""
        return (b"EVAL", self.script.source, b"%d" % len(self.keys), *self.keys, *self.args)

    def words_of(self, reply: Any) -> Reply:
        """Divides the server's reply into its words.

        Raises:
            ReplyMismatchError: it is the reply to another call.
        """
        # A reply without payloads is one string, which saves the server a table.
        words: Reply = reply.split(b" ", 2) if type(reply) is bytes else reply
        # A signal handler that raises in the middle of a command can leave its reply on the connection.
        if type(words) is not list or len(words) < 2 or words[1] != self.args[0]:
            kind = type(reply).__name__  # without quoting the reply, which may contain a payload
            problem = f"an earlier call on this connection was interrupted; received a reply to it, of the type {kind}"
            sent = self._replace(may_have_run=True)
            raise ReplyMismatchError(self.operation, self.run_id, self.step, problem, True, sent)
        return words

    def decode(self, reply: Any) -> T:
        """Decodes the server's reply.

        Raises:
            ReplyMismatchError: it is the reply to another call.
            SquidstepError: the script refused; nothing was written.
        """
        parts = self.words_of(reply)
        refusal = _REFUSALS.get(parts[0])
        if refusal is not None:
            if refusal is _deleted and self.if_deleted is not None:
                return self.if_deleted()
            raise refusal(self.run_id or "", *(text.decode(errors="backslashreplace") for text in parts[2:]))
        return self.parse(parts)

    def outcome(self, reply: Any) -> T | Exception:
        """Decodes the server's reply, or returns the error that the operation raises. A server error is returned as is.

        Raises:
            ReplyMismatchError: it is the reply to another call.
        """
        if isinstance(reply, Exception):
            return reply
        try:
            return self.decode(reply)
        except ReplyMismatchError:
            raise
        except SquidstepError as error:
            return error


class EqualOutputError(StaleStepRunError):
    """The script refused an output whose bytes differ from the stored ones, although the two decode to equal outputs.

    The driver sends `resend`, which has the stored bytes. In your own pipeline, nothing is sent again.
    """

    resend: Call[Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return StaleStepRunError, (self.current, self.problem)  # a call has functions, which cannot be pickled


def _deleted(run_id: str, _: str) -> SquidstepError:
    return RunDeletedError(run_id, None, "was deleted recently; nothing was written. Use a new run id")


def _torn(run_id: str, key: str) -> SquidstepError:
    return CorruptRunError(
        run_id,
        key,
        f"does not match the other key of run {run_id!r}: one of the two was evicted, deleted or overwritten. "
        "Nothing was written; set the server's maxmemory-policy to noeviction, then call delete_run",
    )


def _wrong_type(run_id: str, key: str) -> SquidstepError:
    return CorruptRunError(run_id, key, "holds a value of a different type than squidstep_redis stores there")


def corrupt(run_id: str, key: str, field: str) -> SquidstepError:
    """Returns the error for a field that is missing or that this library would not write."""
    return CorruptRunError(run_id, key, f"field {field!r} is missing, or squidstep_redis did not write it")


def newer(run_id: str, key: str, format: str) -> SquidstepError:
    """Returns the error for a record in a format that this version does not know."""
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


def check_call(argument: str, value: object) -> Call[Any]:
    """Returns the value if it is a Call; raises InvalidArgumentError otherwise."""
    if isinstance(value, Generator):
        problem = "is an operation of several calls: use the method of the store"
        raise InvalidArgumentError(argument, problem)
    if not isinstance(value, Call):
        raise InvalidArgumentError(argument, f"must be a Call from store.calls, not {described(value)}")
    return cast("Call[Any]", value)


def check_calls(calls: object) -> list[Call[Any]]:
    """Returns the items as a list; raises InvalidArgumentError unless each of them is a Call."""
    if not isinstance(calls, Iterable):
        raise InvalidArgumentError("calls", f"must be an iterable of calls from store.calls, not {described(calls)}")
    items = list(cast("Iterable[Call[Any]]", calls))
    for index, item in enumerate(items):
        if type(item) is not Call:
            check_call(f"calls[{index}]", item)
    return items
