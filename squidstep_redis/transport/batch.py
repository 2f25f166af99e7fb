"""The commands for several calls on one connection, and the reply to each call.

Scripts are loaded first, if need be. Then come the calls, and the commands that their durability requires (WAIT,
WAITAOF).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeVar

from squidstep_redis.escaping import escaped
from squidstep_redis.protocol.call import Call, Command
from squidstep_redis.protocol.groups import divided
from squidstep_redis.protocol.scripts import Script
from squidstep_redis.server_errors import NotReplicatedError

T = TypeVar("T")


class Durability(NamedTuple):
    """What a transition waits for, on the connection on which it was sent: WAIT does not cover other connections.

    Attributes:
        replicas: how many replicas must have it.
        aof: whether the server's own AOF must be on disk.
        timeout_ms: how long to wait, in milliseconds.
    """

    replicas: int
    aof: bool
    timeout_ms: int

    def commands(self, key: bytes) -> list[Command]:
        """Returns the commands to send after the transitions.

        The server waits for the last write of this connection. A re-sent call may write nothing, so a marker is
        written: it is replicated after all earlier writes.
        """
        marker = key[: key.index(b"}") + 1] + b":wait"  # in the slot of the keys
        return [(b"SET", marker, b"", b"PX", b"1000"), *self._waits()]

    def _waits(self) -> list[Command]:
        waits: list[Command] = []
        if self.replicas:
            waits.append((b"WAIT", b"%d" % self.replicas, b"%d" % self.timeout_ms))
        if self.aof:
            waits.append((b"WAITAOF", b"1", b"0", b"%d" % self.timeout_ms))
        return waits

    def unmet(self, replies: Sequence[Any]) -> tuple[str, int | None] | None:
        """Returns what the replies to `commands` fail to confirm, and how many replicas did; None if all is well."""
        marker, *confirmations = replies
        if isinstance(marker, Exception):  # without it, the next replies may be about an earlier write
            return f"SET of the marker failed: {str(marker).rstrip('.')}", None
        replicas: int | None = None
        for (name, *_), reply in zip(self._waits(), confirmations, strict=True):
            if isinstance(reply, Exception):
                return f"{name.decode()} failed: {escaped(str(reply)).rstrip('.')}", replicas
            try:
                count = int(reply if name == b"WAIT" else reply[0])
            except (LookupError, TypeError, ValueError):  # of a proxy, perhaps
                return f"{name.decode()} returned an unexpected reply of the type {type(reply).__name__}", replicas
            if name == b"WAIT":
                replicas = count
                if replicas < self.replicas:
                    return f"{replicas} of {self.replicas} replicas confirmed it within {self.timeout_ms} ms", replicas
            elif not count:
                return f"the AOF was not on disk within {self.timeout_ms} ms", replicas
        return None


def scripts_to_load(calls: Sequence[Call[Any]], known: Collection[bytes]) -> list[Script]:
    """Returns the scripts that a batch loads, which takes as long as a few calls.

    If calls depend on the order, it loads all: if the scripts are flushed before the last call, all later calls fail,
    so re-sending them preserves the order. Calls on different runs do not depend on it.

    Args:
        calls: the calls for one server.
        known: the digests of the scripts that this server has loaded, unless it has lost them since.
    """
    scripts = {call.script.sha: call.script for call in calls}
    runs = {call.run_id for call in calls}
    if None in runs or len(runs) < len(calls):  # None: a call that spans runs
        known = ()
    return [script for sha, script in scripts.items() if sha not in known]


def commands(
    calls: Sequence[Call[Any]], durability: Durability | None = None, load: Sequence[Script] = ()
) -> list[Command]:
    """Returns the commands of a batch for one server. It loads scripts in one transaction, before the calls."""
    loading: list[Command] = []
    if load:
        loading = [(b"MULTI",), *((b"SCRIPT", b"LOAD", script.source) for script in load), (b"EXEC",)]
    return [*loading, *(call.evalsha() for call in calls), *waits(calls, durability)]


def replies_to(calls: Sequence[Call[Any]], replies: list[Any], durability: Durability | None = None) -> list[Any]:
    """Returns the reply to each call, given the replies to `commands`."""
    end = len(replies) - len(waits(calls, durability))
    replied = replies[end - len(calls) : end]
    unmet = durability.unmet(replies[end:]) if durability and end < len(replies) else None
    if unmet is None:
        return replied
    return [
        _NotConfirmed(reply, *unmet) if call.script.is_transition and not isinstance(reply, Exception) else reply
        for call, reply in zip(calls, replied, strict=True)
    ]


def replies_of_group(sent: Call[Any], calls: Sequence[Call[Any]], reply: Any) -> list[Any]:
    """Returns the reply to each call of a group, given the reply to the call that was sent for it."""
    if isinstance(reply, _NotConfirmed):
        replies = divided(sent, calls, reply.reply)
        return [each if isinstance(each, Exception) else reply._replace(reply=each) for each in replies]
    return divided(sent, calls, reply)


def waits(calls: Sequence[Call[Any]], durability: Durability | None) -> list[Command]:
    """Returns the commands that make the server wait until calls are durable."""
    if durability is None or not any(call.script.is_transition for call in calls):
        return []
    return durability.commands(calls[0].keys[0])


class _NotConfirmed(NamedTuple):
    """A reply of the primary whose durability was not confirmed."""

    reply: Any
    problem: str
    replicas: int | None


def read(call: Call[T], reply: object) -> T:
    """Reads one of the replies of `replies_to`.

    Raises:
        NotReplicatedError: the primary executed it, but its durability was not confirmed.
        SquidstepError: what `Call.decode` raises.
        Exception: the reply itself, if it is one.
    """
    if isinstance(reply, Exception):
        raise reply
    if isinstance(reply, _NotConfirmed):
        raise not_replicated(call, call.decode(reply.reply), reply.problem, reply.replicas)
    return call.decode(reply)


def not_replicated(call: Call[T], result: T, problem: str, replicas: int | None = None) -> NotReplicatedError:
    """Returns the error for a transition whose durability was not confirmed."""
    executed = call._replace(may_have_run=True)
    return NotReplicatedError(call.operation, call.run_id, call.step, problem, True, executed, result, replicas)
