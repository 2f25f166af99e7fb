"""Is this server, seen by this client, one on which a store can keep its promises? The rules, without any waiting.

`examine` is a plan, which says what to send and is told the replies; the two stores' `doctor` carries it out.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, Final, NamedTuple, cast

from redis import RedisError
from redis.exceptions import NoPermissionError

from squidstep_redis.calls import Calls
from squidstep_redis.errors import SquidstepError
from squidstep_redis.wire import Command, Plan

OLDEST_SERVER: Final = (6, 2)
NEARLY_FULL: Final = 0.9  # of maxmemory
SKEW: Final = 1.0  # seconds between this machine's clock and the server's
LONG_TIMEOUT: Final = 60.0  # seconds


class Level(IntEnum):
    """How bad it is; the numbers are the exit codes that monitoring knows."""

    OK = 0
    WARNING = 1
    """A promise has a limit here that you should know of."""
    FAILURE = 2
    """A promise cannot be kept here."""
    UNKNOWN = 3
    """The server does not say: a managed one that refuses CONFIG, as a rule."""


class Finding(NamedTuple):
    """What one check found.

    Attributes:
        check: a word for it, the same each time: "eviction", "persistence", …
        level: how bad it is.
        message: what was found, and what to do about it.
        server: "host:port" of a node of a cluster; "" for the only server.
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
        """The worst that was found. What is unknown is not held against the server."""
        levels = [finding.level for finding in self.findings if finding.level is not Level.UNKNOWN]
        return max(levels, default=Level.UNKNOWN)


_COMMANDS: Final[list[Command]] = [
    ("INFO",),
    ("TIME",),
    ("CONFIG", "GET", "appendfsync"),
    ("CONFIG", "GET", "min-replicas-to-write"),
]


def examine(calls: Calls, client_options: Mapping[str, Any]) -> Plan[Diagnosis]:
    """The examination of one store.

    Args:
        calls: of the store.
        client_options: what its connections are made with.
    """
    findings = [*_client(client_options), (yield from _self_test(calls))]
    asked_at = time.time()
    replies: Mapping[str, list[Any]] = yield _COMMANDS
    answered_at = time.time()
    for server, (info, clock, fsync, replicas) in replies.items():
        found = _server(info, _setting(fsync), _setting(replicas), clock, asked_at, answered_at)
        findings += [finding._replace(server=server) for finding in found]
    return Diagnosis(findings)


def _self_test(calls: Calls) -> Plan[Finding]:
    """Takes a scratch step through every transition: rights, types and the scripts themselves."""
    run = f"doctor-{secrets.token_hex(8)}"
    try:
        yield calls.schedule_step(run, "step", {})
        begun = yield calls.begin_step(run, "step", {}, lease=60, max_attempts=3)
        yield calls.release_step(begun.step_run)
        begun = yield calls.begin_step(run, "step", {}, lease=60, max_attempts=3)
        yield calls.fail_step(begun.step_run, {})
        begun = yield calls.begin_step(run, "step", {}, lease=60, max_attempts=3)
        yield calls.extend_claim(begun.step_run, 60)
        yield calls.complete_step(begun.step_run, {}, schedule={"next": {}})
        yield calls.delete_pending_steps(run, ["next"])
        yield calls.expire_run(run, 60)
        outputs = yield calls.completed_outputs(run)
        yield calls.delete_run(run, tombstone=0.001)
    except (RedisError, SquidstepError) as error:
        return Finding(
            "self-test", Level.FAILURE, f"a scratch run failed with {type(error).__name__}: {error}{_advice(error)}"
        )
    if outputs != [{}]:
        return Finding("self-test", Level.FAILURE, f"a scratch run kept {outputs}, not what it was given")
    return Finding("self-test", Level.OK, "a scratch run went through every transition")


def _advice(error: Exception) -> str:
    # NOPERM comes with a text of its own for what a script may not do, a different one from each server.
    if isinstance(error, NoPermissionError) or re.search(r"NOPERM|ACL|can't run", str(error)):
        return ". Its user needs the keys ~<prefix>:* and the commands +@read +@write +@scripting +@transaction +time"
    return ""


def _client(options: Mapping[str, Any]) -> Iterator[Finding]:
    timeout = options.get("socket_timeout")
    if timeout is None or timeout > LONG_TIMEOUT:
        span = "no socket_timeout" if timeout is None else f"a socket_timeout of {timeout:g} s"
        yield Finding(
            "client time-out", Level.WARNING, f"the client has {span}: a server that hangs holds its callers up as long"
        )
    else:
        yield Finding("client time-out", Level.OK, f"{timeout:g} s")
    if str(options.get("protocol")) == "3":
        yield Finding(
            "client protocol",
            Level.WARNING,
            "RESP3: a reply left over by an interrupted command can reach the next one (it is noticed, and raises "
            "ReplyMismatchError). Use protocol=2",
        )
    if options.get("decode_responses"):
        yield Finding(
            "client decoding", Level.WARNING, "decode_responses=True: transactions of your own cannot take operations"
        )


def _setting(reply: Any) -> str | None:
    """The value of a CONFIG GET, None if it was refused."""
    if isinstance(reply, Mapping):
        values: list[Any] = list(cast("Mapping[Any, Any]", reply).values())
    else:
        values = cast("list[Any]", reply)[1:2] if isinstance(reply, list) else []
    return _text(values[0]) if values else None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _server(
    info: Any, fsync: str | None, replicas: str | None, clock: Any, asked_at: float, answered_at: float
) -> Iterator[Finding]:
    if isinstance(clock, list | tuple):
        seconds, microseconds = (int(part) for part in cast("list[Any]", clock))
        yield _skew(seconds + microseconds / 1_000_000, asked_at, answered_at)
    facts = _facts(info)
    if facts is None:
        yield Finding("server", Level.UNKNOWN, f"it refuses INFO: {info!r}")
        return
    yield _version(facts)
    if facts.get("role") in ("slave", "replica"):
        yield Finding("role", Level.FAILURE, "this is a replica: it refuses writes. Connect to the master")
    yield from _memory(facts)
    yield _persistence(facts, fsync)
    if int(facts.get("connected_slaves", "0")):
        yield _replication(replicas)


def _facts(info: Any) -> dict[str, str] | None:
    """INFO as a dict of str, however the client read it."""
    if isinstance(info, Mapping):
        return {_text(name): _text(value) for name, value in cast("Mapping[Any, Any]", info).items()}
    if isinstance(info, bytes | str):
        return dict(re.findall(r"^(\w+):(.*?)\r?$", _text(info), re.MULTILINE))
    return None


def _version(facts: Mapping[str, str]) -> Finding:
    name = "Valkey" if facts.get("server_name") == "valkey" else "Redis"
    text = facts.get("valkey_version") or facts.get("redis_version", "")
    version = tuple(int(part) for part in re.findall(r"\d+", text)[:2])
    if version < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        return Finding("version", Level.FAILURE, f"{name} {text} is not supported: the oldest is {oldest}")
    return Finding("version", Level.OK, f"{name} {text}")


def _memory(facts: Mapping[str, str]) -> Iterator[Finding]:
    policy = facts.get("maxmemory_policy")
    if policy is None:
        yield Finding("eviction", Level.UNKNOWN, "the server does not tell its maxmemory-policy: it must be noeviction")
    elif policy != "noeviction":
        yield Finding(
            "eviction",
            Level.FAILURE,
            f"maxmemory-policy is {policy}: runs can vanish, and be executed again. Set it to noeviction",
        )
    else:
        yield Finding("eviction", Level.OK, "maxmemory-policy is noeviction")
    if evicted := int(facts.get("evicted_keys", "0")):
        yield Finding("evicted keys", Level.WARNING, f"{evicted:,} keys were evicted since the server started")
    used, most = int(facts.get("used_memory", "0")), int(facts.get("maxmemory", "0"))
    if most and used > NEARLY_FULL * most:
        yield Finding(
            "memory",
            Level.WARNING,
            f"{used / most:.0%} of maxmemory is used: when it is full, nothing can be begun or completed",
        )


def _persistence(facts: Mapping[str, str], fsync: str | None) -> Finding:
    if facts.get("aof_enabled") != "1":
        lost = "all since the last snapshot" if facts.get("rdb_last_save_time") else "everything"
        return Finding(
            "persistence", Level.WARNING, f"appendonly is off: a restart forgets {lost}, and steps are executed again"
        )
    if fsync is None:
        return Finding("persistence", Level.UNKNOWN, "appendonly is on; the server does not tell its appendfsync")
    if fsync == "always":
        return Finding("persistence", Level.OK, "appendonly with appendfsync always: what was acknowledged stays")
    lost = "a second or two" if fsync == "everysec" else "half a minute"
    return Finding(
        "persistence",
        Level.WARNING,
        f"appendfsync is {fsync}: a power cut can take {lost} of claims and completions, and so can a crash of the "
        "server while its disk is busy",
    )


def _replication(replicas: str | None) -> Finding:
    if replicas is None:
        return Finding("replication", Level.UNKNOWN, "the server does not tell its min-replicas-to-write")
    if int(replicas) == 0:
        return Finding(
            "replication",
            Level.WARNING,
            "there are replicas, and min-replicas-to-write is 0: an old master that was cut off goes on accepting "
            "writes, which are then lost. Set it to 1",
        )
    return Finding("replication", Level.OK, f"min-replicas-to-write is {replicas}")


def _skew(clock: float, asked_at: float, answered_at: float) -> Finding:
    skew = max(asked_at - clock, clock - answered_at, 0.0)
    if skew > SKEW:
        return Finding(
            "clock",
            Level.WARNING,
            f"the server's clock and this machine's differ by {skew:.1f} s: leases are right, times may mislead",
        )
    return Finding("clock", Level.OK, f"agrees with this machine's to {max(answered_at - asked_at, skew):.3f} s")
