"""Calls of one kind about several steps of one run as one call, whose script reads, checks and writes once for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from redis.exceptions import NoScriptError

from squidstep_redis.protocol.call import Call, Reply, words_of

MAX_MERGED: Final = 100  # calls: the server runs nothing else for the time that they take together


class _Layout(NamedTuple):
    """The arguments of a script that runs several calls as one.

    Attributes:
        own: which arguments each step has of its own.
        rest: where the arguments begin that all steps share, apart from a nonce.
        more: where the arguments of further steps begin.
    """

    own: slice
    rest: int
    more: int


_LAYOUTS: Final = {
    "begin_step": _Layout(slice(0, 3), 3, 9),
    "complete_step": _Layout(slice(1, 4), 4, 6),
    "extend_claim": _Layout(slice(1, 3), 3, 5),
}
_OF_RUN: Final = (b"tombstone", b"torn")  # refusals of every call on the run


def group(calls: Sequence[Call[Any]], indexes: Iterable[int]) -> list[list[int]]:
    """Groups the calls that can be sent as one. Calls on one run stay in order.

    Args:
        calls: all calls of a batch.
        indexes: of the calls to group: those for one server.

    Returns:
        The indexes of the calls in each group.
    """
    groups: list[list[int]] = []
    latest: dict[
        bytes, tuple[Call[Any], list[int], set[bytes]]
    ] = {}  # of each run: its last group, and the steps in it
    for index in indexes:
        call = calls[index]
        layout = _LAYOUTS.get(call.script.name)
        if layout is None or len(call.args) > layout.more:
            groups.append([index])
            if call.run_id is None:
                latest.clear()
            else:
                latest.pop(call.keys[0], None)
            continue
        args, key = call.args, call.keys[0]
        known = latest.get(key)
        if known is not None:
            first, members, steps = known
            if (
                first.script is call.script
                and args[1] not in steps
                and first.args[layout.rest :] == args[layout.rest :]
                and len(members) < MAX_MERGED
            ):
                members.append(index)
                steps.add(args[1])
                continue
        groups.append([index])
        latest[key] = (call, groups[-1], {args[1]})
    return groups


def merged(calls: Sequence[Call[Any]]) -> Call[Any]:
    """Returns the call that is sent for the calls of a group."""
    first = calls[0]
    if len(calls) == 1:
        return first
    own, _, more = _LAYOUTS[first.script.name]
    padding = [b""] * (more - len(first.args))
    return first._replace(args=(*first.args, *padding, *(word for call in calls[1:] for word in call.args[own])))


def divided(sent: Call[Any], calls: Sequence[Call[Any]], reply: Any) -> list[Any]:
    """Returns the reply, or an error, for each call of a group.

    Args:
        sent: the call that was sent for the group.
        calls: those of the group.
        reply: the server's reply.

    Raises:
        ReplyMismatchError: it is the reply to another call.
    """
    if isinstance(reply, Exception):
        return [reply] * len(calls)
    word, _, *parts = sent.words_of(reply)
    if word == b"each":
        return [_with_nonce(call, part) for call, part in zip(calls, parts, strict=True)]
    if word in _OF_RUN:
        return [[word, call.args[0], *parts] for call in calls]
    # One of the records or an index is corrupt. Nothing was written. Each call by itself has its own outcome, although
    # it then takes effect after the later calls of the batch.
    return [NoScriptError("the group was refused")] * len(calls)


def _with_nonce(call: Call[Any], reply: Any) -> Reply:
    words: Reply = words_of(reply)
    words[1] = call.args[0]
    return words
