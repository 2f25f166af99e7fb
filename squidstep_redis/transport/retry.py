"""How often a call is sent, and what is raised when it does not get through. The rules, without any waiting.

Every operation can be sent again: it knows itself again by its nonce or token. So what may pass is sent again until a
deadline; what will not pass, and what has not passed by then, becomes one of three errors, which say what was written.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, TypeVar

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ClusterError,
    ConnectionError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    TimeoutError,
    TryAgainError,
)

from squidstep_redis.errors import (
    NotSentError,
    OutcomeUnknownError,
    RefusedError,
    ReplyMismatchError,
    ServerError,
    SquidstepError,
)
from squidstep_redis.protocol.call import Call, read

T = TypeVar("T")

# No OSError: redis-py makes ConnectionErrors of them, and the TimeoutError of a signal handler is not ours to catch.
FAILURES: Final = (RedisError, RedisClusterException, ReplyMismatchError)
"""What sending a call may raise, beside the refusals of its script."""

RIGHTS: Final = "~<prefix>:* +@read +@write +@scripting +@transaction -@dangerous +time"
"""What a user needs for all that a store does on one server."""

UNANSWERED: Final = (ConnectionError, TimeoutError, RedisClusterException)

_FIRST_PAUSE: Final = 0.02
_LAST_PAUSE: Final = 0.5


class _Refusal(NamedTuple):
    """What a server means that refuses a script before it writes anything."""

    transient: bool
    retryable: bool
    """Whether to send it again at once: it may pass within seconds."""
    advice: str


# By the word that the server's error begins with.
_REFUSALS: Final[Mapping[str, _Refusal]] = {
    "LOADING": _Refusal(True, True, "it is reading its data; try again when it has"),
    "BUSY": _Refusal(True, True, "another client's script holds it up; see SCRIPT KILL"),
    "READONLY": _Refusal(True, True, "it is a replica; connect to the master (Sentinel's master_for follows it)"),
    "MASTERDOWN": _Refusal(True, True, "it has lost its master; connect to the new one"),
    "NOREPLICAS": _Refusal(True, True, "it has fewer replicas than its min-replicas-to-write; see to them"),
    "CLUSTERDOWN": _Refusal(True, True, "a part of the cluster's slots is not served; see to its nodes"),
    "TRYAGAIN": _Refusal(True, True, "the slot is moving to another node; try again"),
    "OOM": _Refusal(True, False, "its memory is full; raise maxmemory, or delete runs"),
    "MISCONF": _Refusal(True, False, "it cannot save to its disk; see to that"),
    "NOAUTH": _Refusal(False, False, "name a user and a password that it knows"),
    "NOPERM": _Refusal(False, False, f"grant the user {RIGHTS}"),
    "MOVED": _Refusal(False, False, "it is a node of a cluster; use a redis.RedisCluster client"),
    "ASK": _Refusal(False, False, "it is a node of a cluster; use a redis.RedisCluster client"),
}

# redis-py takes the word off these. The first class that fits counts.
_WORDS: Final[Mapping[type[Exception], str]] = {
    BusyLoadingError: "LOADING",
    ReadOnlyError: "READONLY",
    MasterDownError: "MASTERDOWN",
    ClusterDownError: "CLUSTERDOWN",
    TryAgainError: "TRYAGAIN",
    ClusterError: "TRYAGAIN",  # "TTL exhausted": it was sent here, there and everywhere, and refused each time
    OutOfMemoryError: "OOM",
    NoPermissionError: "NOPERM",
    AuthenticationError: "NOAUTH",
    AuthorizationError: "NOAUTH",
    MovedError: "MOVED",
    AskError: "ASK",
}
# Of what a script was refused, Redis 6.2 tells behind words of its own: "ERR Error running script …: -OOM …".
_WORD: Final = re.compile(r"(?:^|[ :]-)(BUSY|READONLY|MASTERDOWN|NOREPLICAS|OOM|MISCONF)\b")
_HALFWAY: Final = re.compile(r"ACL failure in script|can't run this command|can't access at least one of the keys")


class RetryPolicy(NamedTuple):
    """How long a store goes on sending a call.

    Attributes:
        timeout: seconds for a call in all.
        sends: how often the client itself sends a command that is not answered.
        last_send: seconds to leave for the last send. A client that may take longer than half the time-out over one
            send still gets half of it to send again in; it can then overrun.
    """

    timeout: float
    sends: int
    last_send: float

    @classmethod
    def of(cls, timeout: float, options: Mapping[str, Any], is_cluster: bool) -> RetryPolicy:
        """What a client's connection options make of a store's time-out."""
        retries = getattr(options.get("retry"), "_retries", 0)
        sends = 2 if is_cluster else 1 + retries if retries >= 0 else 1_000  # a cluster's client follows the slots
        one = (options.get("socket_connect_timeout") or 0) + (options.get("socket_timeout") or 0)
        return cls(timeout, sends, min(sends * one, timeout / 2))


class RetryState:
    """One call, or a batch, that did not get through at the first go.

    Attributes:
        began: when it was first sent, by the monotonic clock.
        may_have_run: whether one of the times that it was sent may have taken effect.
    """

    def __init__(
        self, call: Call[Any] | None, began: float, patience: RetryPolicy, *, may_have_run: bool = False
    ) -> None:
        """`call` is None for a batch."""
        self._call = call
        self.began = began
        self._retry_policy = patience
        self._pause = _FIRST_PAUSE
        self.may_have_run = may_have_run

    def next_pause(self, error: Exception) -> float:
        """Takes in why it did not get through.

        Returns:
            Seconds to pause before it is sent again.

        Raises:
            ServerError: it is not to be sent again.
        """
        refusal = _refusal(error)
        if refusal is None and not self._is_unsent(error):
            self.may_have_run = True
        again = refusal.retryable if refusal is not None else isinstance(error, (*UNANSWERED, ReplyMismatchError))
        if self._call is not None and not self._call.retryable:
            again = False
        elapsed = time.monotonic() - self.began
        pause = self._pause * random.uniform(0.5, 1.0)  # noqa: S311 -- nothing secret
        if not again or elapsed + pause + self._retry_policy.last_send > self._retry_policy.timeout:
            if isinstance(error, ReplyMismatchError):
                raise error
            raise _explained(error, self._call, self.may_have_run, elapsed) from error
        self._pause = min(2 * self._pause, _LAST_PAUSE)
        return pause

    def _is_unsent(self, error: Exception) -> bool:
        """Whether it failed before a connection was to be had.

        redis-py raises the same errors from connecting and from waiting for a reply. A client that re-sends by itself
        takes its connection from the pool before it sends anything, but may also connect anew later.
        """
        names = _functions(error.__traceback__)
        return "get_connection" in names or (self._retry_policy.sends == 1 and "connect" in names)


class NeedsResend(NamedTuple):
    """What a call of a batch came to that is to be sent once more, by itself."""

    error: Exception


def decode_replies(calls: Sequence[Call[Any]], behind: int, may_have_run: bool) -> Callable[[int, Any], Any]:
    """What reads the replies to a batch one by one, by their places, of which the first are not the calls'."""

    def read_one(index: int, reply: Any) -> Any:
        return decode_reply(calls[index - behind], reply, may_have_run) if index >= behind else reply

    return read_one


def decode_reply(call: Call[T], reply: object, may_have_run: bool) -> T | Exception | NeedsResend:
    """Reads one reply of a batch: the result, the error that the operation would have raised, or that it is unsettled.

    NeedsResend is a call that was not run: the scripts were flushed between two commands, the slot is elsewhere, or the
    server could not just then; and one that was not answered, or with another call's reply.

    Args:
        call: what was sent.
        reply: what came back.
        may_have_run: whether the batch was sent before, to an unknown effect: of that a refusal says nothing.
    """
    try:
        return call.answer(reply) if type(reply) in (bytes, list) else read(call, reply)
    except (NoScriptError, AskError, ReplyMismatchError, *UNANSWERED) as error:  # MovedError is an AskError
        return NeedsResend(error)
    except SquidstepError as error:
        return error
    except RedisError as error:
        refusal = _refusal(error)
        if refusal is not None and refusal.retryable:
            return NeedsResend(error)
        explained = _explained(error, call, may_have_run or refusal is None, 0.0)
        explained.__cause__ = error
        return explained


def _explained(error: Exception, call: Call[Any] | None, may_have_run: bool, elapsed: float) -> ServerError:
    """The error of this library for one of redis-py's."""
    operation, run, step = (call.script.name, call.run_id, call.step) if call else ("batch", None, None)
    text = str(error) or type(error).__name__
    refusal = _refusal(error)
    if may_have_run:
        transient = isinstance(error, UNANSWERED) if refusal is None else refusal.transient
        if refusal is not None:
            problem = f"it was sent before, without an answer, and refused now: {text}. What to do: {refusal.advice}"
        elif isinstance(error, UNANSWERED):
            problem = f"no answer came within {elapsed:.1f} s: {text}"
        elif _HALFWAY.search(text):
            problem = f"the server's ACL stopped it half-way, see doctor(): {text}"
        else:
            problem = f"the server answered an error: {text}"
        return OutcomeUnknownError(operation, run, step, problem, transient, call)
    if refusal is not None:
        problem = f"the server refused, and nothing was written: {text}. What to do: {refusal.advice}"
        return RefusedError(operation, run, step, problem, refusal.transient)
    problem = f"no connection was to be had for {elapsed:.1f} s, and nothing was sent: {text}. Try again later"
    return NotSentError(operation, run, step, problem, True)


def _refusal(error: Exception) -> _Refusal | None:
    """What the server meant, if it refused before anything was written; None if that is not known."""
    for kind, word in _WORDS.items():
        if isinstance(error, kind):
            return _REFUSALS[word]
    found = _WORD.search(str(error)) if isinstance(error, RedisError) else None
    return _REFUSALS[found[1]] if found else None


def _functions(traceback: TracebackType | None) -> set[str]:
    names: set[str] = set()
    while traceback is not None:
        names.add(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return names
