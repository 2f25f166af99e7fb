"""Retry policy and error mapping; no I/O.

Every operation can be re-sent: the script recognizes it by its nonce or token. So transient errors are retried until a
deadline. All other errors, and transient errors that last until the deadline, become one of three errors that say what
was written.
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Mapping, Sequence
from traceback import walk_tb
from types import FrameType
from typing import Any, Final, NamedTuple, TypeGuard

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ClusterError,
    ConnectionError,
    InvalidResponse,
    MasterDownError,
    MaxConnectionsError,
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

from squidstep_redis.escaping import escaped
from squidstep_redis.protocol.call import Call
from squidstep_redis.server_errors import (
    NotSentError,
    OutcomeUnknownError,
    RefusedError,
    ReplyMismatchError,
    ServerError,
)
from squidstep_redis.signals import is_raised_by_handler
from squidstep_redis.steady import steady_time as time


class RoundTripError(Exception):
    """A round trip with a server failed: there is no reply.

    Attributes:
        cause: the error that redis-py raised, or would raise.
        sent: whether any byte of the calls may have left this process.
        follows_refusal: whether the server refused, in the same attempt, what was sent to it before.
    """

    def __init__(self, cause: Exception, *, sent: bool, follows_refusal: bool = False) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.sent = sent
        self.follows_refusal = follows_refusal


# No OSError: connections convert theirs to a RoundTripError, and one that a signal handler raises must not be caught.
FAILURES: Final = (RoundTripError, RedisError, RedisClusterException, ReplyMismatchError)
"""What sending a call may raise, apart from the refusals of its script."""

RIGHTS: Final = "~<prefix>:{* +@read +@write +@scripting +@transaction -@dangerous +time"
"""The ACL rights that a user needs for everything that a store does on one server."""

UNREADABLE: Final = (AttributeError, LookupError, OverflowError, TypeError, ValueError)
"""What redis-py and hiredis raise for a reply or an address that they cannot read, apart from their own errors.

OverflowError is raised for a timeout or a port that is too large.
"""

# By its text: blocking and asyncio sentinels have a class each, and redis-py may wrap it.
_NOT_FOUND: Final = re.compile(r"""No (master|slave) found for ('[^']*'|"[^"]*"|\S+)""")

NO_REPLY: Final = (ConnectionError, TimeoutError, InvalidResponse, RedisClusterException)

_FIRST_PAUSE: Final = 0.02
_LAST_PAUSE: Final = 0.5


def as_redis_error(error: Exception) -> Exception:
    """Returns a redis-py error for an error that redis-py raised or let through.

    A client that is used in several event loops raises RuntimeError, and a cluster client also KeyError or IndexError.
    The `socket` module raises UnicodeError for an invalid host name. If the user's code takes part in connecting, such
    as a provider of credentials, what it raises means that connecting has failed. Its text is not shown.

    Raises:
        Exception: the error itself, because something else raised it, such as a signal handler.
    """
    if isinstance(error, (RedisError, RedisClusterException)):
        return error
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    if not frames or _package_of(frames[-1]) not in ("redis", "asyncio", "uvloop", "socket", "encodings"):
        if not (_is_of_set_up(error) or _is_out_of_descriptors(error)) or is_raised_by_handler(error):
            raise error
        lacks_files = _is_out_of_descriptors(error)
        failure = ConnectionError(error.strerror if lacks_files else f"Connecting failed with {type(error).__name__}")
        failure.__cause__ = error
        return failure
    if isinstance(error, RuntimeError):
        return ConnectionError(f"The connection belongs to another event loop: {error}")
    return ConnectionError(f"redis-py failed with {type(error).__name__}: {error}")


def _is_out_of_descriptors(error: BaseException) -> TypeGuard[OSError]:
    """Whether a file could not be opened. Since version 8, redis-py reads one whenever it makes a connection."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _is_of_set_up(error: BaseException) -> bool:
    """Whether code that redis-py calls to set up a connection raised an error."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    functions = [frame.f_code.co_name for frame in frames if _package_of(frame) == "redis"]
    # The latter call the `redis_connect_func` of a client.
    return any(each.startswith("on_connect") for each in functions) or functions[-1:] in (
        ["connect"],
        ["connect_check_health"],
    )


def text_of(error: Exception) -> str:
    """Returns the text of a redis-py error, without what it quotes from elsewhere.

    If no sentinel knows a server, redis-py quotes the clients of the sentinels, with their passwords. What the user's
    code said while connecting is not shown either.
    """
    source = error.__cause__ or error.__context__  # redis-py wraps some errors, and quotes them
    text = str(error)
    if not_found := _NOT_FOUND.match(text):
        return f"no sentinel knows a {not_found[1]} for the service {not_found[2]}"
    if source is not None and str(source) in text and not isinstance(source, RedisError) and _is_of_set_up(source):
        return f"Connecting failed with {type(source).__name__}"
    return text or type(error).__name__


def unsent(error: BaseException) -> RoundTripError | None:
    """Returns what an error means while connecting, before a call is sent; None if redis-py did not raise it."""
    if isinstance(error, UNREADABLE) or _is_out_of_descriptors(error):
        error = as_redis_error(error)
    return RoundTripError(error, sent=False) if isinstance(error, (RedisError, RedisClusterException)) else None


class Refusal(NamedTuple):
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
_REFUSALS: Final[Mapping[str, Refusal]] = {
    "LOADING": Refusal(True, True, "the server is loading its data; retry later"),
    "BUSY": Refusal(True, True, "another client's script blocks the server; see SCRIPT KILL"),
    "READONLY": Refusal(True, True, "the server is a replica; connect to the primary, or use Sentinel's master_for"),
    "MASTERDOWN": Refusal(True, True, "the replica has lost its primary; connect to the new one"),
    "NOREPLICAS": Refusal(True, True, "the server has fewer replicas than its min-replicas-to-write; check them"),
    "CLUSTERDOWN": Refusal(True, True, "some slots of the cluster are not served; check its nodes"),
    "TRYAGAIN": Refusal(True, True, "the slot is migrating to another node; retry"),
    "OOM": Refusal(True, False, "the server's memory is full; raise maxmemory, or delete runs"),
    "MISCONF": Refusal(True, False, "the server cannot save to its disk; check the disk"),
    "NOAUTH": Refusal(False, False, "configure a user and a password that the server accepts"),
    "NOPERM": Refusal(False, False, f"grant the user {RIGHTS} (and +select for a database other than 0)"),
    "COMMAND": Refusal(
        False, False, "the store needs EVALSHA, EVAL and, with RESP3, HELLO; the server renamed or forbids it"
    ),
    "NOSCRIPT": Refusal(True, True, "retry later; there was no time left to send the script"),
    "MOVED": Refusal(False, False, "the server is a cluster node; use a redis.RedisCluster client"),
    "ASK": Refusal(False, False, "the server is a cluster node; use a redis.RedisCluster client"),
}

_DEMOTIONS: Final = tuple(_REFUSALS[word] for word in ("READONLY", "MASTERDOWN", "LOADING", "NOAUTH"))

# redis-py removes the word from these errors. The first matching class applies.
_WORDS: Final[Mapping[type[Exception], str]] = {
    BusyLoadingError: "LOADING",
    ReadOnlyError: "READONLY",
    MasterDownError: "MASTERDOWN",
    ClusterDownError: "CLUSTERDOWN",
    TryAgainError: "TRYAGAIN",
    NoScriptError: "NOSCRIPT",
    ClusterError: "TRYAGAIN",  # redirected several times, and refused each time
    OutOfMemoryError: "OOM",
    NoPermissionError: "NOPERM",
    AuthenticationError: "NOAUTH",
    AuthorizationError: "NOAUTH",
    MovedError: "MOVED",
    AskError: "ASK",
}
# Redis 6.2 puts its own words before the error of a command in a script: "ERR Error running script …: -OOM …".
_WORD: Final = re.compile(r"(?:^|[ :]-)(BUSY|READONLY|MASTERDOWN|NOREPLICAS|OOM|MISCONF)\b")
_UNKNOWN_COMMAND: Final = re.compile(r"(?:ERR )?unknown command ['`]", re.IGNORECASE)  # not: "… called from script"
_FULL: Final = re.compile(r"max number of clients\b")  # redis-py knows the text of a server alone, not of a cluster
_HALFWAY: Final = re.compile(r"ACL failure in script|can't run this command|can't access at least one of the keys")


def check_resent(replies: Sequence[Any], times: int) -> None:
    """Raises RoundTripError if the server refused what the client had already sent before, and may have executed then.

    Args:
        replies: the replies to what was sent last.
        times: how often the client sent it.
    """
    for reply in replies:
        if isinstance(reply, Exception) and (cause := undecided(reply, times)) is not reply:
            raise RoundTripError(cause, sent=True) from reply


class RetryState:
    """The retries of one call, or of a batch, whose first attempt failed.

    Attributes:
        began: when it was first sent, on the monotonic clock.
        attempted_at: when the last attempt began.
        may_have_run: whether one of the attempts may have taken effect.
        was_refused: whether the server received one of the attempts and refused it.
    """

    def __init__(
        self,
        call: Call[Any] | None,
        began: float,
        timeout: float,
        *,
        may_have_run: bool = False,
        operation: str = "batch",
    ) -> None:
        """Begins with the first attempt.

        Args:
            call: what is sent; None for a batch.
            began: when it was first sent, by the monotonic clock.
            timeout: seconds from then until the last attempt.
            may_have_run: whether it may have taken effect before.
            operation: the name of the operation, without a call.
        """
        self._call = call
        self._operation = operation
        self.began = began
        self.attempted_at = began
        self._timeout = timeout
        self._pause = _FIRST_PAUSE
        self.may_have_run = may_have_run or (call is not None and call.may_have_run)
        self.was_refused = False

    def next_pause(self, error: Exception) -> float:
        """Records why an attempt failed.

        Returns:
            Seconds to pause before the next attempt.

        Raises:
            ServerError: the error is not transient, or the deadline is too close.
        """
        sent = True
        if isinstance(error, RoundTripError):
            self.was_refused = self.was_refused or error.follows_refusal
            error, sent = error.cause, error.sent
        refusal = refusal_of(error)
        if sent and refusal is None:
            self.may_have_run = True
        elif sent:
            self.was_refused = True
        retryable = refusal.retryable if refusal is not None else _is_of_connection(error)
        if self._call is not None and not self._call.retryable:
            retryable = False
        elapsed = time.monotonic() - self.began
        if not retryable or elapsed >= self._timeout:
            if isinstance(error, ReplyMismatchError):
                raise error
            raise map_error(
                error,
                self._call,
                self.may_have_run,
                elapsed,
                was_refused=self.was_refused,
                operation=self._operation,
            ) from error
        pause = self._pause * random.uniform(0.5, 1.0)
        self._pause = min(2 * self._pause, _LAST_PAUSE)
        return min(pause, self._timeout - elapsed)  # the last attempt begins at the deadline


def may_be_elsewhere(error: Exception) -> bool:
    """Whether an attempt may have failed because another node of the cluster serves the slot by now."""
    cause = error.cause if isinstance(error, RoundTripError) else error
    return isinstance(cause, (*NO_REPLY, ClusterError, ReadOnlyError)) and not isinstance(cause, MaxConnectionsError)


def map_error(
    error: Exception,
    call: Call[Any] | None,
    may_have_run: bool,
    elapsed: float,
    *,
    was_refused: bool = False,
    operation: str = "batch",
) -> ServerError:
    """Maps an error of redis-py to one of this library.

    Args:
        error: the error of the last attempt.
        call: what was sent; None for a batch.
        may_have_run: whether an attempt may have taken effect.
        elapsed: seconds since the first attempt.
        was_refused: whether the server received an attempt and refused it.
        operation: the name of the operation, without a call.
    """
    operation, run, step = (call.operation, call.run_id, call.step) if call else (operation, None, None)
    text = escaped(text_of(error)).rstrip(".")
    refusal = refusal_of(error)
    if may_have_run:
        transient = _is_of_connection(error) if refusal is None else refusal.transient
        if refusal is not None:
            problem = f"got no reply to an earlier attempt, and was refused now: {text}. What to do: {refusal.advice}"
        elif isinstance(error, NO_REPLY):
            problem = f"no reply within {elapsed:.1f} s: {text}"
        elif _HALFWAY.search(text):
            problem = f"the server's ACL stopped the script halfway; run doctor(): {text}"
        else:
            problem = f"the server returned an error: {text}"
        sent = call._replace(may_have_run=True) if call else None
        return OutcomeUnknownError(operation, run, step, problem, transient, sent)
    if refusal is not None:
        problem = f"the server refused; nothing was written: {text}. What to do: {refusal.advice}"
        return RefusedError(operation, run, step, problem, refusal.transient)
    transient = _is_of_connection(error)  # other errors, while redis-py connects, are about the client's settings
    advice = "Retry later" if transient else "Check the client's settings: user, password, database and protocol"
    if was_refused:
        problem = f"the server refused earlier, and could not be reached now: {text}. Nothing was written. {advice}"
        return RefusedError(operation, run, step, problem, transient)
    problem = f"could not connect within {elapsed:.1f} s; nothing was sent: {text}. {advice}"
    return NotSentError(operation, run, step, problem, transient)


def _is_of_connection(error: Exception) -> bool:
    """Whether an error is about a connection, so that another connection may get a reply."""
    return isinstance(error, (*NO_REPLY, ReplyMismatchError)) or _FULL.search(str(error)) is not None


def is_demotion(error: Exception) -> bool:
    """Returns whether the server refused because it is not a primary, or is no longer one.

    A server that is loading may have been demoted and be copying its new primary. A server that asks for credentials,
    on a connection that has sent them, is not the server that checked them.
    """
    return refusal_of(error) in _DEMOTIONS


def undecided(error: Exception, count: int) -> Exception:
    """Returns the error of a round trip in a form that says nothing about what the server has executed.

    It is the error itself, unless it refuses one of several commands: the server may have executed the others.

    Args:
        error: what redis-py raised.
        count: how many commands were sent, counting those that a client re-sent by itself.
    """
    if count <= 1 or refusal_of(error) is None:
        return error
    return ConnectionError(f"One of {count} commands was refused: {error}")


def refusal_of(error: Exception) -> Refusal | None:
    """Returns what an error means if the server refused before anything was written; None if that is not known."""
    for kind, word in _WORDS.items():
        if isinstance(error, kind):
            return _REFUSALS[word]
    if not isinstance(error, RedisError):
        return None
    text = str(error)
    if _UNKNOWN_COMMAND.match(text):
        return _REFUSALS["COMMAND"]
    found = _WORD.search(text)
    return _REFUSALS[found[1]] if found else None
