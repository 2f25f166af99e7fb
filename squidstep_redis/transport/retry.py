"""Retry policy and error mapping; no I/O.

Every operation can be re-sent: the script recognizes it by its nonce or token. So transient errors are retried until a
deadline. All other errors, and those that last until the deadline, become one of three errors that say what was
written.
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
from squidstep_redis.protocol.call import Call
from squidstep_redis.transport.batch import read
from squidstep_redis.transport.client import ClientFacts

T = TypeVar("T")

# No OSError: redis-py turns them into ConnectionErrors, and the TimeoutError of a signal handler must not be caught.
FAILURES: Final = (RedisError, RedisClusterException, ReplyMismatchError)
"""What sending a call may raise, apart from the errors that its script returns."""

RIGHTS: Final = "~<prefix>:{* +@read +@write +@scripting +@transaction -@dangerous +time"
"""The ACL rights that a user needs for everything that a store does on one server."""

NO_REPLY: Final = (ConnectionError, TimeoutError, RedisClusterException)

_FIRST_PAUSE: Final = 0.02
_LAST_PAUSE: Final = 0.5


class _Refusal(NamedTuple):
    """How to handle a server error that refuses a script before it writes anything.

    Attributes:
        transient: whether it may succeed later, without a change of settings.
        retryable: whether to retry it, because the cause usually lasts only seconds.
        advice: what to do.
    """

    transient: bool
    retryable: bool
    advice: str


# By the first word of the server's error.
_REFUSALS: Final[Mapping[str, _Refusal]] = {
    "LOADING": _Refusal(True, True, "the server is loading its data; retry later"),
    "BUSY": _Refusal(True, True, "another client's script blocks the server; see SCRIPT KILL"),
    "READONLY": _Refusal(True, True, "the server is a replica; connect to the primary, or use Sentinel's master_for"),
    "MASTERDOWN": _Refusal(True, True, "the replica has lost its primary; connect to the new one"),
    "NOREPLICAS": _Refusal(True, True, "the server has fewer replicas than its min-replicas-to-write; check them"),
    "CLUSTERDOWN": _Refusal(True, True, "some slots of the cluster are not served; check its nodes"),
    "TRYAGAIN": _Refusal(True, True, "the slot is migrating to another node; retry"),
    "OOM": _Refusal(True, False, "the server's memory is full; raise maxmemory, or delete runs"),
    "MISCONF": _Refusal(True, False, "the server cannot save to its disk; check the disk"),
    "NOAUTH": _Refusal(False, False, "configure a user and a password that the server accepts"),
    "NOPERM": _Refusal(False, False, f"grant the user {RIGHTS}"),
    "MOVED": _Refusal(False, False, "the server is a cluster node; use a redis.RedisCluster client"),
    "ASK": _Refusal(False, False, "the server is a cluster node; use a redis.RedisCluster client"),
}

# redis-py removes the word from these errors. The first matching class applies.
_WORDS: Final[Mapping[type[Exception], str]] = {
    BusyLoadingError: "LOADING",
    ReadOnlyError: "READONLY",
    MasterDownError: "MASTERDOWN",
    ClusterDownError: "CLUSTERDOWN",
    TryAgainError: "TRYAGAIN",
    ClusterError: "TRYAGAIN",  # "TTL exhausted": redirected several times, and refused each time
    OutOfMemoryError: "OOM",
    NoPermissionError: "NOPERM",
    AuthenticationError: "NOAUTH",
    AuthorizationError: "NOAUTH",
    MovedError: "MOVED",
    AskError: "ASK",
}
# Redis 6.2 puts its own words before the error of a command in a script: "ERR Error running script …: -OOM …".
_WORD: Final = re.compile(r"(?:^|[ :]-)(BUSY|READONLY|MASTERDOWN|NOREPLICAS|OOM|MISCONF)\b")
_HALFWAY: Final = re.compile(r"ACL failure in script|can't run this command|can't access at least one of the keys")


class RetryPolicy(NamedTuple):
    """How long a store retries a call.

    Attributes:
        timeout: seconds for a call in total.
        sends: how many times the client itself sends a command that gets no reply.
        last_send: seconds to reserve for the last send. If one send can take longer than half the timeout, half of it
            is reserved, and the call can overrun.
    """

    timeout: float
    sends: int
    last_send: float

    @classmethod
    def of(cls, timeout: float, client: ClientFacts) -> RetryPolicy:
        """Returns the policy for a store's timeout and its client."""
        sends = client.sends if client.sends > 0 else 1_000
        if client.is_cluster:
            sends = 2  # it follows redirects
        one = (client.connect_timeout or 0) + (client.socket_timeout or 0)
        return cls(timeout, sends, min(sends * one, timeout / 2))


class RetryState:
    """The retries of one call, or of a batch, whose first attempt failed.

    Attributes:
        began: when it was first sent, on the monotonic clock.
        may_have_run: whether one of the attempts may have taken effect.
    """

    def __init__(
        self, call: Call[Any] | None, began: float, policy: RetryPolicy, *, may_have_run: bool = False
    ) -> None:
        """`call` is None for a batch."""
        self._call = call
        self.began = began
        self._retry_policy = policy
        self._pause = _FIRST_PAUSE
        self.may_have_run = may_have_run

    def next_pause(self, error: Exception) -> float:
        """Records why an attempt failed.

        Returns:
            Seconds to pause before the next attempt.

        Raises:
            ServerError: the error is not transient, or the deadline is too close.
        """
        refusal = _refusal(error)
        if refusal is None and not self._is_unsent(error):
            self.may_have_run = True
        retryable = refusal.retryable if refusal is not None else isinstance(error, (*NO_REPLY, ReplyMismatchError))
        if self._call is not None and not self._call.retryable:
            retryable = False
        elapsed = time.monotonic() - self.began
        pause = self._pause * random.uniform(0.5, 1.0)  # noqa: S311 -- not a secret
        if not retryable or elapsed + pause + self._retry_policy.last_send > self._retry_policy.timeout:
            if isinstance(error, ReplyMismatchError):
                raise error
            raise _map_error(error, self._call, self.may_have_run, elapsed) from error
        self._pause = min(2 * self._pause, _LAST_PAUSE)
        return pause

    def _is_unsent(self, error: Exception) -> bool:
        """Whether the attempt failed before anything was sent.

        redis-py raises the same errors when it connects and when it waits for a reply. A client with its own retries
        gets a connection from the pool before it sends anything, but may also reconnect later.
        """
        names = _function_names(error.__traceback__)
        return "get_connection" in names or (self._retry_policy.sends == 1 and "connect" in names)


class NeedsResend(NamedTuple):
    """Marks a call of a batch that must be re-sent individually."""

    error: Exception


def decode_replies(calls: Sequence[Call[Any]], offset: int, may_have_run: bool) -> Callable[[int, Any], Any]:
    """Returns a function that decodes the replies of a batch one by one; the first `offset` are not those of calls."""

    def decode(index: int, reply: Any) -> Any:
        return decode_reply(calls[index - offset], reply, may_have_run) if index >= offset else reply

    return decode


def decode_reply(call: Call[T], reply: object, may_have_run: bool) -> T | Exception | NeedsResend:
    """Decodes one reply of a batch: the result, the error that the operation would raise, or NeedsResend.

    NeedsResend means that the call did not run (the scripts were flushed between two commands, the slot is on another
    node, or the server refused it temporarily), got no reply, or got the reply to another call.

    Args:
        call: what was sent.
        reply: what was received.
        may_have_run: whether an earlier attempt at the batch may have taken effect. A refusal does not rule that out.
    """
    try:
        return call.decode(reply) if type(reply) in (bytes, list) else read(call, reply)
    except (NoScriptError, AskError, ReplyMismatchError, *NO_REPLY) as error:  # MovedError is an AskError
        return NeedsResend(error)
    except SquidstepError as error:
        return error
    except RedisError as error:
        refusal = _refusal(error)
        if refusal is not None and refusal.retryable:
            return NeedsResend(error)
        mapped = _map_error(error, call, may_have_run or refusal is None, 0.0)
        mapped.__cause__ = error
        return mapped


def _map_error(error: Exception, call: Call[Any] | None, may_have_run: bool, elapsed: float) -> ServerError:
    """Maps an error of redis-py to one of this library."""
    operation, run, step = (call.operation, call.run_id, call.step) if call else ("batch", None, None)
    text = (str(error) or type(error).__name__).rstrip(".")
    refusal = _refusal(error)
    if may_have_run:
        transient = isinstance(error, NO_REPLY) if refusal is None else refusal.transient
        if refusal is not None:
            problem = f"got no reply to an earlier attempt, and was refused now: {text}. What to do: {refusal.advice}"
        elif isinstance(error, NO_REPLY):
            problem = f"no reply within {elapsed:.1f} s: {text}"
        elif _HALFWAY.search(text):
            problem = f"the server's ACL stopped the script halfway; run doctor(): {text}"
        else:
            problem = f"the server returned an error: {text}"
        return OutcomeUnknownError(operation, run, step, problem, transient, call)
    if refusal is not None:
        problem = f"the server refused; nothing was written: {text}. What to do: {refusal.advice}"
        return RefusedError(operation, run, step, problem, refusal.transient)
    problem = f"could not connect within {elapsed:.1f} s; nothing was sent: {text}. Retry later"
    return NotSentError(operation, run, step, problem, True)


def _refusal(error: Exception) -> _Refusal | None:
    """Returns what an error means if the server refused before anything was written; None if that is not known."""
    for kind, word in _WORDS.items():
        if isinstance(error, kind):
            return _REFUSALS[word]
    found = _WORD.search(str(error)) if isinstance(error, RedisError) else None
    return _REFUSALS[found[1]] if found else None


def _function_names(traceback: TracebackType | None) -> set[str]:
    names: set[str] = set()
    while traceback is not None:
        names.add(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return names
