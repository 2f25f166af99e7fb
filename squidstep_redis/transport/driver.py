"""What is sent for a call or a batch, in which order, and what follows a failure; no I/O.

A send is a generator, like a workflow one layer up. It yields an action. A transport performs it and resumes the
generator with the outcome, or throws the error of the action into it.

    action                          the transport                                        the driver receives
    Execute(command, call)          sends the command of a call to the server of its key what `call.outcome` returned
    RoundTrip(node, commands, read) sends commands to one server in one write            a list of what `read` returned
    RoundTrips(round_trips)         performs several round trips                         a list of replies or errors
    Route(calls)                    groups calls by server                               pairs of a node and indexes
    Servers()                       finds all servers                                    a dict: nodes by name
    Redirect(error)                 follows MOVED or ASK                                 the node, after ASK
    Refresh(since)                  learns which node of a cluster serves each slot      None
    Pause(seconds)                  sleeps                                               None

`read` is called with the index of a command and its reply, while the connection is still in use. It returns errors. The
only error that it raises is ReplyMismatchError; the connection is then discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from redis.exceptions import AskError, ClusterError, NoScriptError, RedisError, TryAgainError

from squidstep_redis.errors import SquidstepError
from squidstep_redis.protocol.call import Call, Command, EqualOutputError
from squidstep_redis.protocol.groups import group, merged
from squidstep_redis.server_errors import ReplyMismatchError, ServerError
from squidstep_redis.steady import steady_time as time
from squidstep_redis.transport import batch
from squidstep_redis.transport.batch import Durability
from squidstep_redis.transport.retry import (
    FAILURES,
    RetryState,
    RoundTripError,
    map_error,
    may_be_elsewhere,
    refusal_of,
)

T = TypeVar("T")
Read = Callable[[int, Any], Any]


class Execute(NamedTuple):
    """Sends the command of one call to the server of its key."""

    command: Command
    call: Call[Any]


class RoundTrip(NamedTuple):
    """Sends commands to one server in one write, and reads a reply to each.

    Attributes:
        node: the server, as `Route` returned it.
        commands: what is sent.
        read: reads one reply.
        blocks: whether the server may wait before it replies to later commands on the same connection.
    """

    node: Any
    commands: Sequence[Command]
    read: Read
    blocks: bool = False


class Route(NamedTuple):
    """Groups calls by the server of their keys: pairs of a node and the indexes of its calls."""

    calls: Sequence[Call[Any]]


class Servers(NamedTuple):
    """Finds all servers, or all primaries of a cluster: a dict of nodes by name."""


class Redirect(NamedTuple):
    """Learns the node of a slot that has moved, or returns the node to which the keys of a slot are moving.

    Raises the error itself if the client is not a cluster client.
    """

    error: AskError


class Refresh(NamedTuple):
    """Learns which node of a cluster serves each slot, unless that happened after `since`; errors are ignored."""

    since: float


class RoundTrips(NamedTuple):
    """Performs several round trips, concurrently if the transport can; an outcome is a list of replies or an error."""

    round_trips: Sequence[RoundTrip]


class Pause(NamedTuple):
    """Sleeps for some seconds."""

    seconds: float


OtherAction = RoundTrip | RoundTrips | Route | Servers | Redirect | Refresh | Pause
Action = Execute | OtherAction
Driver = Generator[Action, Any, T]

_NOT_RUN: Final = (NoScriptError, AskError, EqualOutputError)  # MovedError is an AskError
_MAX_REDIRECTS: Final = 5  # of one attempt
_ASKING: Final = (b"ASKING",)  # lets the next command reach a slot that is still arriving


class _NeedsResend(NamedTuple):
    """The outcome of a call of a batch that is to be sent again by itself."""

    error: Exception


class _Sent(NamedTuple):
    """What is sent to one server for the calls of a batch.

    Attributes:
        calls: the calls that are sent, one for each group.
        groups: the indexes of the calls in each group.
        all_calls: all calls of the batch.
    """

    calls: list[Call[Any]]
    groups: list[list[int]]
    all_calls: Sequence[Call[Any]]

    @classmethod
    def of(cls, calls: Sequence[Call[Any]], indexes: Sequence[int]) -> _Sent:
        """Groups some of the calls of a batch."""
        groups = group(calls, indexes)
        sent = [calls[each[0]] if len(each) == 1 else merged([calls[index] for index in each]) for each in groups]
        return cls(sent, groups, calls)

    def outcome(self, position: int, reply: Any, state: RetryState) -> Any:
        """Reads the reply to a call that was sent: its outcome, or a list of the outcomes of the calls in its group."""
        call, indexes = self.calls[position], self.groups[position]
        if len(indexes) == 1:
            return _outcome(call, reply, state)
        members = [self.all_calls[index] for index in indexes]
        replies = batch.replies_of_group(call, members, reply)
        return [_outcome(each, part, state) for each, part in zip(members, replies, strict=True)]

    def assign(self, outcomes: Sequence[Any], results: list[Any]) -> None:
        """Assigns the outcome of each call to its place in the results of the batch."""
        for indexes, outcome in zip(self.groups, outcomes, strict=True):
            if len(indexes) == 1:
                results[indexes[0]] = outcome
            else:
                for index, each in zip(indexes, outcome, strict=True):
                    results[index] = each


def send(call: Call[T], timeout: float, durability: Durability | None) -> Driver[T]:
    """Sends one call, and retries it until the timeout.

    Returns:
        A driver that returns the call's result and raises its error.
    """
    waits = durability if call.script.is_transition else None
    began = time.monotonic()
    try:
        if waits is None:  # the common case
            result = yield Execute(call.evalsha(), call)
            return (yield from _follow(call, None, result)) if isinstance(result, Exception) else result
        return (yield from _attempt(call, waits))
    except FAILURES as error:
        return (yield from _retry(call, waits, RetryState(call, began, timeout), error))


def _retry(call: Call[T], durability: Durability | None, state: RetryState, error: Exception) -> Driver[T]:
    """Retries a call until an attempt succeeds or `state` raises the final error."""
    while True:
        yield from _pause(state, error)
        try:
            return (yield from _attempt(call, durability))
        except FAILURES as failure:
            error = failure


def _pause(state: RetryState, error: Exception) -> Driver[None]:
    """Pauses after a failed attempt, and checks whether another node has taken over."""
    yield Pause(state.next_pause(error))
    if may_be_elsewhere(error):
        yield Refresh(state.attempted_at)
    state.attempted_at = time.monotonic()


def _attempt(call: Call[T], durability: Durability | None) -> Driver[T]:
    result = yield from _send_once(call, call.evalsha(), durability, None)
    return (yield from _follow(call, durability, result)) if isinstance(result, Exception) else result


def _follow(call: Call[T], durability: Durability | None, result: Any) -> Driver[T]:
    """Sends a call as its reply asks for: with its script, to another node, or with the stored output."""
    command, node = call.evalsha, None
    for _ in range(_MAX_REDIRECTS):
        if isinstance(result, NoScriptError):
            command = call.eval
        elif isinstance(result, EqualOutputError):
            call, command = result.resend, result.resend.evalsha
        elif not isinstance(result, AskError):
            break
        try:
            if isinstance(result, AskError):
                node = yield Redirect(result)
            result = yield from _send_once(call, command(), durability, node)
        except RoundTripError as error:  # on asyncio, several tasks may have received the same error
            raise RoundTripError(error.cause, sent=error.sent, follows_refusal=True) from error
    if isinstance(result, AskError):
        raise ClusterError(f"redirected {_MAX_REDIRECTS} times: {result}")
    if isinstance(result, Exception):
        raise result
    return result


def _send_once(call: Call[Any], command: Command, durability: Durability | None, node: Any) -> Driver[Any]:
    """Sends one call; returns its result, or an error.

    Args:
        call: what is sent.
        command: its command.
        durability: what it waits for.
        node: the node to which the keys of its slot are moving; None: the node of its slot.
    """
    waits = batch.waits([call], durability)
    if node is None and not waits:
        return (yield Execute(command, call))
    commands = [command, *waits]
    asked = 0
    if node is None:
        ((node, _),) = yield Route([call])
    else:
        asked = len(commands[:2])  # the call and the write after it; WAIT has no key
        commands = [*(word for each in commands[:2] for word in (_ASKING, each)), *commands[2:]]
    position = min(asked, 1)

    def read(index: int, reply: Any) -> Any:
        if index == position and not isinstance(reply, Exception):
            call.words_of(reply)  # raises if it is the reply to another call
        return reply

    replies = yield RoundTrip(node, commands, read, blocks=bool(waits))
    replies = [*replies[1 : 2 * asked : 2], *replies[2 * asked :]]
    reply = batch.replies_to([call], replies, durability)[0]
    try:
        return reply if isinstance(reply, Exception) else batch.read(call, reply)
    except EqualOutputError as error:
        return error


def send_batch(calls: Sequence[Call[Any]], timeout: float, durability: Durability | None) -> Driver[list[Any]]:
    """Sends calls together, one write for each server, and retries them until the timeout.

    Returns:
        A driver that returns for each call its result or its error.
    """
    state = RetryState(None, time.monotonic(), timeout, may_have_run=any(call.may_have_run for call in calls))
    while True:
        try:
            results = yield from _send_together(calls, state, durability)
            break
        except FAILURES as error:
            yield from _pause(state, error)
    yield from _send_with_scripts(calls, results, state, durability)
    is_late = False
    for index, result in enumerate(results):
        if type(result) is _NeedsResend:
            error = _given_up(result.error) if is_late else result.error
            results[index] = outcome = yield from _resend(calls[index], error, state, timeout, durability)
            is_late = is_late or (isinstance(outcome, ServerError) and time.monotonic() >= state.began + timeout)
    return results


def _send_together(calls: Sequence[Call[Any]], state: RetryState, durability: Durability | None) -> Driver[list[Any]]:
    routes: list[tuple[Any, Sequence[int]]] = yield Route(calls)
    sent = [_Sent.of(calls, indexes) for _, indexes in routes]
    loads = [batch.scripts_to_load(each.calls, node.loaded) for (node, _), each in zip(routes, sent, strict=True)]
    round_trips: list[RoundTrip] = []
    for (node, _), each, load in zip(routes, sent, loads, strict=True):
        commands = batch.commands(each.calls, durability, load)
        blocks = bool(batch.waits(each.calls, durability))
        read = _raw_reader(each.calls, commands, durability) if blocks else _batch_reader(each, commands, state)
        round_trips.append(RoundTrip(node, commands, read, blocks))
    if len(round_trips) == 1:
        outcomes = [(yield round_trips[0])]
    else:
        outcomes = yield RoundTrips(round_trips)
    results: list[Any] = [None] * len(calls)
    for (node, indexes), each, load, round_trip, outcome in zip(
        routes, sent, loads, round_trips, outcomes, strict=True
    ):
        if isinstance(outcome, Exception):
            for index in indexes:
                results[index] = _NeedsResend(outcome)
            continue
        read_replies: list[Any] = outcome[-len(each.calls) :]
        if round_trip.blocks:
            replied = batch.replies_to(each.calls, outcome, durability)
            read_replies = [each.outcome(position, reply, state) for position, reply in enumerate(replied)]
        each.assign(read_replies, results)
        if _without_script(results, indexes):
            node.loaded = frozenset()
        elif load and not isinstance(outcome[len(load) + 1], Exception):  # the reply to EXEC
            node.loaded |= {script.sha for script in load}
    return results


def _send_with_scripts(
    calls: Sequence[Call[Any]], results: list[Any], state: RetryState, durability: Durability | None
) -> Driver[None]:
    """Sends those calls of a batch again whose server has lost the scripts, such as by a restart, in one more batch."""
    indexes = _without_script(results, range(len(results)))
    if len(indexes) < 2:
        return
    try:
        outcomes: list[Any] = yield from _send_together([calls[index] for index in indexes], state, durability)
    except FAILURES as error:
        outcomes = [_NeedsResend(error)] * len(indexes)
    for index, outcome in zip(indexes, outcomes, strict=True):
        results[index] = outcome


def _without_script(results: Sequence[Any], indexes: Iterable[int]) -> list[int]:
    """Returns the indexes of the calls that did not run, because their server does not know the script."""
    failed = [index for index in indexes if type(results[index]) is _NeedsResend]
    return [index for index in failed if type(results[index].error) is NoScriptError]


def _resend(
    call: Call[Any], error: Exception, of_batch: RetryState, timeout: float, durability: Durability | None
) -> Driver[Any]:
    """Sends one call of a batch again; returns its result or its error."""
    state = RetryState(call, of_batch.began, timeout, may_have_run=of_batch.may_have_run or call.may_have_run)
    state.attempted_at = of_batch.attempted_at
    state.was_refused = of_batch.was_refused
    waits = durability if call.script.is_transition else None
    try:
        if isinstance(error, _NOT_RUN):
            try:
                if isinstance(error, AskError):
                    return (yield from _follow(call, waits, error))
                return (yield from _attempt(call, waits))  # the first one of the batch loads the script
            except FAILURES as failure:
                error = failure
        return (yield from _retry(call, waits, state, error))
    except SquidstepError as failure:  # each call of a batch has its own outcome
        return failure


def _given_up(error: Exception) -> Exception:
    """Returns the error of a call that is not sent again: another call of its batch was not served by the deadline.

    Each further attempt might take as long as the client waits for a reply.
    """
    if isinstance(error, AskError):
        return TryAgainError(f"{type(error).__name__} {error}")
    return RoundTripError(error, sent=True) if isinstance(error, NoScriptError) else error


def _batch_reader(sent: _Sent, commands: Sequence[Command], state: RetryState) -> Read:
    """Returns a function that reads the replies to a batch one by one. The first ones are about loading scripts."""
    offset = len(commands) - len(sent.calls)

    def read(index: int, reply: Any) -> Any:
        return sent.outcome(index - offset, reply, state) if index >= offset else reply

    return read


def _raw_reader(calls: Sequence[Call[Any]], commands: Sequence[Command], durability: Durability | None) -> Read:
    """Returns a function that keeps the replies as they are: their meaning depends on those to WAIT and WAITAOF."""
    end = len(commands) - len(batch.waits(calls, durability))
    offset = end - len(calls)

    def read(index: int, reply: Any) -> Any:
        if offset <= index < end and not isinstance(reply, Exception):
            calls[index - offset].words_of(reply)  # raises if it is the reply to another call
        return reply

    return read


def _outcome(call: Call[Any], reply: Any, state: RetryState) -> Any:
    """Reads one reply of a batch: the result, the error that the operation would raise, or _NeedsResend.

    _NeedsResend is returned for a call that did not run (the scripts were flushed between two commands, the slot is on
    another node, or the server refused temporarily) and for a call without a reply.
    """
    try:
        return call.decode(reply) if type(reply) in (bytes, list) else batch.read(call, reply)
    except ReplyMismatchError:
        raise
    except (*_NOT_RUN, RoundTripError) as error:
        return _NeedsResend(error)
    except SquidstepError as error:
        return error
    except RedisError as error:
        refusal = refusal_of(error)
        if refusal is not None and refusal.retryable:
            return _NeedsResend(error)
        failure = map_error(error, call, state.may_have_run or refusal is None, 0.0)
        failure.__cause__ = error
        return failure
