"""Groups calls of one kind on steps of one run into one call, whose script reads, checks and writes once for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from redis.exceptions import NoScriptError

from squidstep_redis.protocol.call import Call, Reply

MAX_MERGED: Final = 100  # calls: the server runs nothing else for the time that they take together


class GroupRefusedError(NoScriptError):
    """A group of calls was refused: each is sent by itself, like a call whose script the server does not know."""


class _Layout(NamedTuple):
    """The arguments and replies of a script that runs several calls as one.

    Attributes:
        own: which arguments each step has separately.
        shared: which arguments all steps share.
        optional: which arguments each step has separately if the first one has them; empty for none.
        more: where the arguments of further steps begin.
        word: the word that a bare state line stands for in a reply about several steps.
    """

    own: slice
    shared: slice
    optional: slice
    more: int
    word: bytes


_LAYOUTS: Final = {
    "begin_step": _Layout(slice(0, 3), slice(3, 9), slice(9, 10), 11, b"execute"),
    "complete_step": _Layout(slice(1, 4), slice(4, 6), slice(6, 6), 6, b"completed"),
    "extend_claim": _Layout(slice(1, 3), slice(3, 5), slice(5, 5), 5, b"extended"),
}
_OF_RUN: Final = (b"tombstone", b"torn")  # refusals of every call on the run


def group(calls: Sequence[Call[Any]], indexes: Iterable[int]) -> list[list[int]]:
    """Groups the calls that can be sent as one. Calls on one run stay in order.

    Args:
        calls: all calls of a batch.
        indexes: indexes of the calls to group, which are for one server.

    Returns:
        The indexes of the calls in each group.
    """
    groups: list[list[int]] = []
    latest: dict[bytes, tuple[list[int], set[bytes]]] = {}  # by run: its last group, and the steps in it
    for index in indexes:
        call = calls[index]
        args, key = call.args, call.keys[0]
        layout = _LAYOUTS.get(call.script.name)
        if layout is None or len(args) > layout.more:
            groups.append([index])
            if call.run_id is None:
                latest.clear()
            else:
                latest.pop(key, None)
            continue
        if (known := latest.get(key)) is not None:
            members, steps = known
            first = calls[members[0]]
            if (
                first.script is call.script
                and args[1] not in steps
                and first.args[layout.shared] == args[layout.shared]
                and len(first.args) == len(args)
                and len(members) < MAX_MERGED
            ):
                members.append(index)
                steps.add(args[1])
                continue
        members = [index]
        groups.append(members)
        latest[key] = (members, {args[1]})
    return groups


def merged(calls: Sequence[Call[Any]]) -> Call[Any]:
    """Returns the call that is sent for a group of several calls."""
    first = calls[0]
    layout = _LAYOUTS[first.script.name]
    args = [*padded(first.script.name, first.args)]
    for call in calls[1:]:
        args += call.args[layout.own] + call.args[layout.optional]
    return first._replace(args=tuple(args))


def padded(script: str, args: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Returns all arguments of a call about one step, including empty ones at the end."""
    return args + (b"",) * (_LAYOUTS[script].more - len(args))


def divided(sent: Call[Any], calls: Sequence[Call[Any]], reply: Any) -> list[Any]:
    """Returns the reply, or an error, for each call of a group.

    Args:
        sent: the call that was sent for the group.
        calls: the calls of the group.
        reply: the server's reply.

    Raises:
        ReplyMismatchError: it is the reply to another call.
    """
    if isinstance(reply, Exception):
        return [reply] * len(calls)
    word, _, *parts = sent.words_of(reply)
    if word == b"each":
        return replies_in(sent.script.name, parts, [call.args[0] for call in calls])
    if word in _OF_RUN:
        return [[word, call.args[0], *parts] for call in calls]
    # One of the records or an index is corrupt. Nothing was written. Sent by itself, each call has its own outcome, but
    # it takes effect after the later calls of the batch.
    return [GroupRefusedError("the group was refused")] * len(calls)


def replies_in(script: str, parts: Sequence[Any], nonces: Sequence[bytes]) -> list[Reply]:
    """Returns the replies in a reply about several steps, each with its own nonce."""
    word = _LAYOUTS[script].word
    replies: list[Reply] = []
    for part, nonce in zip(parts, nonces, strict=True):
        if type(part) is bytes:
            replies.append([word, nonce, part])
        else:
            part[1] = nonce
            replies.append(part)
    return replies
