"""Examines whether a store can provide its guarantees with its client and its server; no I/O.

`examine` is a workflow, which both stores' `doctor` runs. The checks that it applies to the replies are in checks.py.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from typing import Any, Final, NamedTuple, TypeVar, cast

from redis.crc import key_slot
from redis.exceptions import AuthenticationError, BusyLoadingError, TimeoutError

from squidstep_redis.doctor.checks import CHECKS_OF_CLIENTS, CHECKS_OF_SERVERS, SETTINGS, Client, Found, Level, Server
from squidstep_redis.errors import SquidstepError
from squidstep_redis.escaping import escaped
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol.call import Command
from squidstep_redis.protocol.fingerprints import Fingerprints
from squidstep_redis.protocol.workflow import Broadcast, Send, SendBatch, Workflow
from squidstep_redis.server_errors import ServerError
from squidstep_redis.transport.retry import NO_REPLY, RIGHTS, text_of

S = TypeVar("S")

_SEVERITY: Final = (Level.OK, Level.UNKNOWN, Level.WARNING, Level.FAILURE)


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        check: the name of the check, which is stable: "eviction", "persistence", …
        level: the severity.
        message: what the check found, and advice.
        server: "host:port" of a cluster node; "" for a standalone server, and for checks of the client.
    """

    check: str
    level: Level
    message: str
    server: str = ""


class Diagnosis(NamedTuple):
    """The results of all checks, in the order of the checks."""

    findings: list[Finding]

    @property
    def level(self) -> Level:
        """The highest severity: failure, then warning, then unknown, then ok."""
        return max((finding.level for finding in self.findings), key=_SEVERITY.index)


_SECONDS: Final = 1.0  # to the last attempt: an outage is what the doctor reports, and does not wait for
_COMMANDS: Final[list[Command]] = [
    (b"TIME",),
    (b"INFO", b"default"),
    (b"CLUSTER", b"INFO"),
    (b"CLUSTER", b"NODES"),
    *((b"CONFIG", b"GET", name.encode()) for name in SETTINGS),
]


def examine(calls: Calls, client: Client) -> Workflow[Diagnosis]:
    """Examines the client and the server of one store.

    Args:
        calls: builds the store's calls.
        client: the facts about the store's client.

    Returns:
        A workflow that sends the commands of the examination and returns the diagnosis.
    """
    findings = list(_findings(CHECKS_OF_CLIENTS, client))
    sent_at = time.time()
    replies: Mapping[str, list[Any]] = yield Broadcast(_COMMANDS, "doctor", _SECONDS)
    elapsed = time.time() - sent_at
    for name, (clock, *rest) in replies.items():
        found = [_connection(clock)]
        if found[0].level is Level.OK:
            info, cluster, nodes, *settings = rest
            found += yield from _self_test(calls, _slots(nodes) if client.is_cluster else None)
            found += _server(info, cluster, settings, _skew(clock, sent_at, elapsed), client)
        findings += [finding._replace(server=name) for finding in found]
    return Diagnosis([each._replace(message=escaped(each.message)) for each in findings])  # quotes the server


def _findings(checks: Mapping[str, Callable[[S], Found]], subject: S) -> Iterator[Finding]:
    for name, check in checks.items():
        if (found := check(subject)) is not None:
            yield Finding(name, *found)


# The replies of a server


def _connection(clock: Any) -> Finding:
    """Returns whether the server is reachable."""
    if isinstance(clock, ServerError):
        clock = clock.__cause__
    if not isinstance(clock, NO_REPLY):
        return Finding("connection", Level.OK, "the server is reachable")
    if isinstance(clock, AuthenticationError):
        advice = "Check the user name and the password: redis://user:password@host:port"
    elif isinstance(clock, BusyLoadingError):
        advice = "The server is loading its data from disk. Wait; INFO persistence shows the progress"
    elif isinstance(clock, TimeoutError):
        advice = "The server hangs, or a firewall drops the packets. Check both"
    else:
        advice = "Check that the server is running, and that host, port and TLS (rediss://) are right"
    return Finding("connection", Level.FAILURE, f"{text_of(clock).rstrip('.')}. {advice}")


def _server(info: Any, cluster: Any, settings: list[Any], skew: float, client: Client) -> Iterator[Finding]:
    fields = _parse_fields(info)
    if fields:
        values = {name: value for name, reply in zip(SETTINGS, settings, strict=True) for value in _setting(reply)}
        yield from _findings(CHECKS_OF_SERVERS, Server(fields, values, _parse_fields(cluster), skew, client))
    else:
        yield Finding(
            "server",
            Level.UNKNOWN,
            f"the server refuses INFO, which all other checks need: {str(info).rstrip('.')}. Grant +info",
        )


def _parse_fields(reply: Any) -> dict[str, str]:
    """Parses a reply such as INFO's, with one field per line; empty if the command was refused."""
    if isinstance(reply, Mapping):  # redis-py parsed it, because something hooks the client's `execute_command`
        return {str(name): str(value) for name, value in cast("Mapping[Any, Any]", reply).items()}
    return dict(re.findall(r"^(\w+):(.*?)\r?$", _text(reply), re.MULTILINE))


def _setting(reply: Any) -> Iterator[str]:
    """Yields the value in a reply to CONFIG GET; nothing if the command was refused, or the setting is unknown."""
    if isinstance(reply, Mapping):  # RESP3
        reply = [part for pair in cast("Mapping[Any, Any]", reply).items() for part in pair]
    for value in cast("list[Any]", reply)[1:2] if isinstance(reply, list) else []:
        yield _text(value)


def _text(reply: Any) -> str:
    """Returns a reply as text, whether or not the client decodes; empty for an error."""
    return reply.decode(errors="replace") if isinstance(reply, bytes) else reply if isinstance(reply, str) else ""


def _skew(clock: Any, sent_at: float, elapsed: float) -> float:
    if not isinstance(clock, list | tuple):
        return 0.0  # the server refuses TIME, which the self-test reports
    seconds, microseconds = (int(part) for part in cast("list[Any]", clock))
    now = seconds + microseconds / 1_000_000
    return max(sent_at - now, now - sent_at - elapsed, 0.0)


# The scratch run


def _self_test(calls: Calls, slots: list[range] | None) -> Workflow[list[Finding]]:
    """Tests every transition on a scratch run: the permissions, the key types and the scripts."""
    calls = copy(calls)
    calls.fingerprints = Fingerprints(None)  # its function is made for other inputs
    run = _scratch_run(calls, slots)
    if run is None:  # this node serves no slot that the store uses
        return []
    try:
        yield Send(calls.schedule_step(run, "step", {}))
        yield Send(calls.expire_run(run, 60))  # removes the run even if every later call fails
        result = yield Send(calls.begin_step(run, "step", {}, lease=60, max_attempts=3))
        yield Send(calls.release_step(result.step_run))
        result = yield Send(calls.begin_step(run, "step", {}, lease=60, max_attempts=3))
        yield Send(calls.fail_step(result.step_run, {}))
        result = yield Send(calls.begin_step(run, "step", {}, lease=60, max_attempts=3))
        yield Send(calls.extend_claim(result.step_run, 60))
        yield Send(calls.complete_step(result.step_run, {}, schedule={"next": {}}))
        yield Send(calls.delete_pending_steps(run, ["next"]))
        replies = yield SendBatch((calls.completed_outputs(run), calls.delete_run(run, tombstone=0.001)))
    except SquidstepError as error:
        with suppress(SquidstepError):
            yield Send(calls.delete_run(run, tombstone=0.001))
        reason = str(error).rstrip(".")
        problem = f"a scratch run failed with {type(error).__name__}: {reason}{_advice(error)}"
        return [Finding("self-test", Level.FAILURE, problem)]
    if replies != [[{}], True]:
        problem = f"a batch on a scratch run returned {replies}{_advice(replies)}"
        return [Finding("self-test", Level.FAILURE, problem)]
    return [Finding("self-test", Level.OK, "a scratch run went through every transition")]


def _scratch_run(calls: Calls, slots: list[range] | None) -> str | None:
    """Returns the id of a run whose keys lie in the given slots, or None if there is none.

    Args:
        calls: builds the store's calls.
        slots: slot ranges; None accepts any slot.
    """
    for _ in range(20_000):  # enough to hit each of the 1,024 buckets
        run = f"doctor-{secrets.token_hex(8)}"
        if slots is None or any(key_slot(calls.keys.run(run).keys.steps) in span for span in slots):
            return run
    return None


def _slots(nodes: Any) -> list[range] | None:
    """Parses the node's own slots from CLUSTER NODES; None if it was refused."""
    own = re.search(r"^\S+ \S+ \S*myself\S* .*$", _text(nodes), re.MULTILINE)
    if own is None:
        return None
    found = [word.partition("-") for word in own[0].split()[8:] if word[0] != "["]  # skips slots that are migrating
    return [range(int(first), int(last or first) + 1) for first, _, last in found]


def _advice(error: object) -> str:
    # RefusedError already gives advice if the command itself is refused. If a command within a script is refused, the
    # message depends on the server.
    if re.search(r"ACL|can't run", text := str(error)) and RIGHTS not in text:
        return f". What to do: grant the user {RIGHTS}"
    return ""
