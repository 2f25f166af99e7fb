"""Is this server, seen by this client, one on which a store can keep its promises? The examination, without waiting.

`examine` is a plan, which says what to send and is told the replies; the two stores' `doctor` carries it out. What it
holds against the replies stands in checks.py.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeVar, cast

from redis.crc import key_slot
from redis.exceptions import AuthenticationError, BusyLoadingError, TimeoutError

from squidstep_redis.doctor.checks import CHECKS_OF_CLIENTS, CHECKS_OF_SERVERS, SETTINGS, Client, Found, Level, Server
from squidstep_redis.errors import SquidstepError
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.call import Command
from squidstep_redis.protocol.workflow import Broadcast, Send, SendBatch, Workflow
from squidstep_redis.transport.retry import RIGHTS, UNANSWERED

S = TypeVar("S")

_SEVERITY: Final = (Level.OK, Level.UNKNOWN, Level.WARNING, Level.FAILURE)


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        check: a word for it, the same each time: "eviction", "persistence", …
        level: how bad it is.
        message: what was found, and what to do about it.
        server: "host:port" of a node of a cluster; "" for the only server, and for what concerns the client.
    """

    check: str
    level: Level
    message: str
    server: str = ""


class Diagnosis(NamedTuple):
    """What all checks found, in the order they were made."""

    findings: list[Finding]

    @property
    def level(self) -> Level:
        """The worst that was found: a failure, else a warning, else what is unknown."""
        return max((finding.level for finding in self.findings), key=_SEVERITY.index)


# redis-py leaves the replies to these as they are: it knows INFO and CONFIG GET by other names.
_COMMANDS: Final[list[Command]] = [
    ("TIME",),
    ("INFO default",),
    ("CLUSTER", "INFO"),
    ("CLUSTER", "NODES"),
    *(("CONFIG", "GET", name) for name in SETTINGS),
]


def examine(calls: Calls, client: Client) -> Workflow[Diagnosis]:
    """The examination of one store.

    Args:
        calls: of the store.
        client: what is known of its client.
    """
    findings = list(_findings(CHECKS_OF_CLIENTS, client))
    asked_at = time.time()
    try:
        replies: Mapping[str, list[Any]] = yield Broadcast(_COMMANDS)
    except UNANSWERED as error:  # a cluster of which no node answers
        replies = {"": [error]}
    elapsed = time.time() - asked_at
    for name, (clock, *told) in replies.items():
        found = [_connection(clock)]
        if found[0].level is Level.OK:
            info, cluster, nodes, *settings = told
            found += yield from _self_test(calls, _slots(nodes) if client.is_cluster else None)
            found += _server(info, cluster, settings, _skew(clock, asked_at, elapsed), client)
        findings += [finding._replace(server=name) for finding in found]
    return Diagnosis(findings)


def _findings(checks: Mapping[str, Callable[[S], Found]], subject: S) -> Iterator[Finding]:
    for name, check in checks.items():
        if (found := check(subject)) is not None:
            yield Finding(name, *found)


# What a server tells


def _connection(clock: Any) -> Finding:
    """Whether the server can be reached at all."""
    if not isinstance(clock, UNANSWERED):
        return Finding("connection", Level.OK, "the server answers")
    if isinstance(clock, AuthenticationError):
        advice = "Give a user and a password that the server knows: redis://user:password@host:port"
    elif isinstance(clock, BusyLoadingError):
        advice = "It is reading its data from disk: wait. INFO persistence says how far it is"
    elif isinstance(clock, TimeoutError):
        advice = "The server hangs, or a firewall swallows what is sent to it"
    else:
        advice = "Is the server running, and are host, port and TLS (rediss://) right?"
    return Finding("connection", Level.FAILURE, f"{str(clock).rstrip('.')}. {advice}")


def _server(info: Any, cluster: Any, settings: list[Any], skew: float, client: Client) -> Iterator[Finding]:
    told = _lines(info)
    if told:
        values = {name: value for name, reply in zip(SETTINGS, settings, strict=True) for value in _setting(reply)}
        yield from _findings(CHECKS_OF_SERVERS, Server(told, values, _lines(cluster), skew, client))
    else:
        yield Finding("server", Level.UNKNOWN, f"it refuses INFO, on which all further checks rest: {info}")


def _lines(reply: Any) -> dict[str, str]:
    """What INFO and its like answer; empty if they were refused."""
    return dict(re.findall(r"^(\w+):(.*?)\r?$", _text(reply), re.MULTILINE))


def _setting(reply: Any) -> Iterator[str]:
    """The value of a CONFIG GET, unless it was refused or the server does not know the setting."""
    if isinstance(reply, Mapping):  # RESP3
        reply = [part for pair in cast("Mapping[Any, Any]", reply).items() for part in pair]
    for value in cast("list[Any]", reply)[1:2] if isinstance(reply, list) else []:
        yield _text(value)


def _text(reply: Any) -> str:
    """A reply, whether or not the client decodes; empty for an error."""
    return reply.decode(errors="replace") if isinstance(reply, bytes) else reply if isinstance(reply, str) else ""


def _skew(clock: Any, asked_at: float, elapsed: float) -> float:
    if not isinstance(clock, list | tuple):
        return 0.0  # it refuses TIME, of which the self-test will tell
    seconds, microseconds = (int(part) for part in cast("list[Any]", clock))
    now = seconds + microseconds / 1_000_000
    return max(asked_at - now, now - asked_at - elapsed, 0.0)


# The scratch run


def _self_test(calls: Calls, slots: list[range] | None) -> Workflow[list[Finding]]:
    """Takes a scratch step through every transition: rights, types and the scripts themselves."""
    run = _scratch_run(calls, slots)
    if run is None:  # no key of a store lies on this node
        return []
    try:
        yield Send(calls.schedule_step(run, "step", {}))
        yield Send(calls.expire_run(run, 60))  # should nothing after this get through
        begun = yield Send(calls.begin_step(run, "step", {}, lease=60, max_attempts=3))
        yield Send(calls.release_step(begun.step_run))
        begun = yield Send(calls.begin_step(run, "step", {}, lease=60, max_attempts=3))
        yield Send(calls.fail_step(begun.step_run, {}))
        begun = yield Send(calls.begin_step(run, "step", {}, lease=60, max_attempts=3))
        yield Send(calls.extend_claim(begun.step_run, 60))
        yield Send(calls.complete_step(begun.step_run, {}, schedule={"next": {}}))
        yield Send(calls.delete_pending_steps(run, ["next"]))
        answers = yield SendBatch((calls.completed_outputs(run), calls.delete_run(run, tombstone=0.001)))
    except SquidstepError as error:
        with suppress(SquidstepError):
            yield Send(calls.delete_run(run, tombstone=0.001))
        problem = f"a scratch run failed with {type(error).__name__}: {error}{_advice(error)}"
        return [Finding("self-test", Level.FAILURE, problem)]
    if answers != [[{}], True]:
        problem = f"a batch on a scratch run answered {answers}{_advice(answers)}"
        return [Finding("self-test", Level.FAILURE, problem)]
    return [Finding("self-test", Level.OK, "a scratch run went through every transition")]


def _scratch_run(calls: Calls, slots: list[range] | None) -> str | None:
    """A run whose keys lie in one of these slots, if there is such a run; None: in any."""
    for _ in range(20_000):  # each of 1,024 buckets comes up
        run = f"doctor-{secrets.token_hex(8)}"
        if slots is None or any(key_slot(calls.keys.run(run).keys.steps) in some for some in slots):
            return run
    return None


def _slots(nodes: Any) -> list[range] | None:
    """The slots of the node that answered CLUSTER NODES; None if it did not."""
    own = re.search(r"^\S+ \S+ \S*myself\S* .*$", _text(nodes), re.MULTILINE)
    if own is None:
        return None
    found = [word.partition("-") for word in own[0].split()[8:] if word[0] != "["]  # a slot that is on its way
    return [range(int(first), int(last or first) + 1) for first, _, last in found]


def _advice(error: object) -> str:
    # What a script may not do, each server says in its own words; what a command may not, `RefusedError` advises on.
    if re.search(r"ACL|can't run", text := str(error)) and RIGHTS not in text:
        return f". What to do: grant the user {RIGHTS}"
    return ""
