"""The doctor's checks: small functions of the facts about a client or a server; no I/O.

Each check returns a level and a message with its result and advice, or None if it does not apply. The tables at the end
list the checks by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Final, NamedTuple

OLDEST_SERVER: Final = (6, 2)
OLDEST_WITH_WAITAOF: Final = (7, 2)
OLDEST_WITH_GUARDED_SCRIPTS: Final = (7, 0)  # older servers do not apply min-replicas-to-write to scripts
NEARLY_FULL: Final = 0.9  # fraction of maxmemory
MAX_SKEW: Final = 1.0  # seconds between this machine's clock and the server's
LONG_TIMEOUT: Final = 60.0  # seconds
EVERYSEC: Final = 2.0  # seconds: the longest time between two flushes with appendfsync everysec
SLOTS: Final = 16_384


class Level(IntEnum):
    """The severity of a finding. The numbers are the exit codes that monitoring systems use."""

    OK = 0
    WARNING = 1
    """A guarantee is limited."""
    FAILURE = 2
    """A guarantee is broken."""
    UNKNOWN = 3
    """The server does not report what the check needs, usually because a managed server refuses CONFIG."""


OK, WARNING, FAILURE, UNKNOWN = Level
Found = tuple[Level, str] | None


class Client(NamedTuple):
    """The facts about a redis-py client and its store that are known without I/O.

    Attributes:
        is_cluster: whether it is a cluster client.
        socket_timeout: seconds it waits for a reply; None: without a limit.
        connect_timeout: seconds it waits for a connection; None: without a limit.
        sends: how many times, at most, its `execute_command` tries to connect or sends a command.
        decodes: whether it decodes replies.
        reuses_dirty_connections: whether an unread reply on a connection can become the reply to the next command.
        retry_pauses: the longest total time, in seconds, that it pauses between these attempts.
        is_hooked: whether the store calls its `execute_command`, so that the client re-sends commands by itself.
        timeout: the store's timeout for a call, in seconds: when its last attempt begins.
        wait_replicas: the number of replicas the store waits for.
        wait_aof: whether the store waits for the AOF.
        wait_timeout: seconds it waits for replicas and the AOF.
        lease: seconds of a lease that no heartbeat extends; None: not given.
        job_timeout: the maximum duration of the work, in seconds; None: not given.
    """

    is_cluster: bool
    socket_timeout: float | None
    connect_timeout: float | None
    sends: int
    decodes: bool
    reuses_dirty_connections: bool
    retry_pauses: float
    is_hooked: bool
    timeout: float
    wait_replicas: int
    wait_aof: bool
    wait_timeout: float
    lease: float | None
    job_timeout: float | None

    @property
    def longest_call(self) -> float | None:
        """Seconds that a call can take: until its last attempt begins, and for that attempt. None: without a limit."""
        if self.socket_timeout is None:
            return None
        attempt = (self.connect_timeout or 0.0) + self.socket_timeout
        if self.is_hooked:  # otherwise, the store connects and sends once in an attempt, and the client does not retry
            attempt = self.sends * attempt + self.retry_pauses
        return self.timeout + attempt


class Server(NamedTuple):
    """What a server reports about itself.

    Attributes:
        info: the fields of INFO.
        settings: the replies to CONFIG GET, without refused ones.
        cluster: the fields of CLUSTER INFO.
        skew: the smallest possible difference between its clock and this machine's, in seconds.
        client: the client that the doctor uses.
    """

    info: Mapping[str, str]
    settings: Mapping[str, str]
    cluster: Mapping[str, str]
    skew: float
    client: Client

    @property
    def replicas(self) -> int:
        """The number of replicas that are online and can acknowledge a write."""
        lines = (value for name, value in self.info.items() if re.fullmatch(r"slave\d+", name))
        return sum("state=online" in line for line in lines)

    @property
    def version(self) -> tuple[int, ...]:
        """Major and minor version; empty if unknown."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version_text)[:2])

    @property
    def version_text(self) -> str:
        """The version as text. Valkey reports its own version in addition to a Redis version."""
        return self.info.get("valkey_version") or self.info.get("redis_version", "")

    def number(self, name: str) -> int:
        """Returns a numeric field of INFO, 0 if it is missing.

        Args:
            name: the field's name.
        """
        return int(self.info.get(name, "0"))


SETTINGS: Final = ("appendfsync", "save", "min-replicas-to-write", "stop-writes-on-bgsave-error")


# Checks of the client

_PIECES: Final = (
    ". If a server sends a reply in small pieces, a call of a blocking client can take longer: something hooks its "
    "execute_command, and redis-py's own timeout is for each piece"
)


def _client_timeout(client: Client) -> Found:
    timeout = client.socket_timeout
    if timeout is None or timeout > LONG_TIMEOUT:
        setting = "no socket_timeout" if timeout is None else f"a socket_timeout of {timeout:g} s"
        wait = "forever" if timeout is None else "that long"
        return WARNING, f"the client has {setting}: a call to a server that hangs blocks {wait}. Set socket_timeout=3"
    return OK, f"the client waits {timeout:g} s for a reply"


def _client_deadline(client: Client) -> Found:
    longest, connect = client.longest_call, client.connect_timeout or 0.0
    if longest is None:
        return None  # _client_timeout reports it
    attempt = longest - client.timeout
    if attempt > client.timeout / 2:
        retries = client.is_hooked and client.sends > 1
        times = f"connects and sends up to {client.sends} times, " if retries else ""
        return WARNING, (
            f"a call can take {longest:.4g} s, although the store's timeout is {client.timeout:g} s: the last attempt "
            f"begins at the timeout and can take {attempt:.4g} s. The client {times}waits {connect:g} s for a "
            f"connection and {client.socket_timeout:g} s for a reply. Lower these timeouts"
            f"{' and the retries of the client (the store retries by itself)' if retries else ''}, or use from_url"
        )
    return OK, (
        f"a call ends within {longest:.4g} s: it is retried for {client.timeout:g} s, and an attempt takes at most "
        f"{attempt:.4g} s{_PIECES if client.is_hooked else ''}"
    )


def _client_protocol(client: Client) -> Found:
    if client.reuses_dirty_connections:
        return WARNING, (
            "with RESP3, this version of redis-py can return the reply of an interrupted command to the next command "
            "(the store detects it and raises ReplyMismatchError). Set protocol=2"
        )
    return None


def _client_decoding(client: Client) -> Found:
    if client.decodes:
        return WARNING, (
            "the client has decode_responses=True: operations cannot be queued in your own transactions. Use a client "
            "without it for such transactions"
        )
    return None


def _lease(client: Client) -> Found:
    lease, work = client.lease, client.job_timeout
    if lease is None:
        return None
    if work is not None and lease < work:
        return WARNING, (
            f"the lease of {lease:g} s is shorter than the {work:g} s that the work may last: a second worker begins "
            "while the first is still working. Set a longer lease, or let run_step or claim_step extend it"
        )
    longest = client.longest_call or client.timeout
    if lease <= longest:
        return WARNING, (
            f"the lease of {lease:g} s is not longer than a call can take, {longest:.4g} s with the store's timeout of "
            f"{client.timeout:g} s: it can expire before a re-sent begin_step returns. Set a longer lease, or a "
            "shorter timeout"
        )
    return OK, f"the lease of {lease:g} s is longer than the work and a call"


# Checks of the server


def _version(server: Server) -> Found:
    name = "Valkey" if server.info.get("server_name") == "valkey" else "Redis"
    text, version = server.version_text, server.version
    if not version:
        return UNKNOWN, f"the server does not report its version. {_dotted(OLDEST_SERVER)} or newer is required"
    if version < OLDEST_SERVER:
        return FAILURE, f"{name} {text} is not supported. Upgrade to {_dotted(OLDEST_SERVER)} or newer"
    if server.client.wait_aof and version < OLDEST_WITH_WAITAOF:
        return FAILURE, (
            f"{name} {text} has no WAITAOF, which wait_aof needs: each call raises NotReplicatedError. Upgrade to "
            f"Redis {_dotted(OLDEST_WITH_WAITAOF)} or Valkey, or turn wait_aof off"
        )
    return OK, f"{name} {text}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _role(server: Server) -> Found:
    if server.info.get("redis_mode") == "sentinel":
        return FAILURE, "this is a Sentinel, which stores no runs. Connect to its primary, with Sentinel's master_for"
    if server.info.get("role") == "slave":
        return FAILURE, "this is a replica, which rejects writes. Connect to the primary"
    return OK, f"the server is a primary; replicas online: {server.replicas}"


def _cluster(server: Server) -> Found:
    if server.info.get("cluster_enabled") != "1":
        return None
    if not server.client.is_cluster:
        if server.cluster.get("cluster_size") == "1":
            return OK, "a cluster of one node"
        return FAILURE, "this is one node of a cluster, which rejects most runs. Give the store a redis.RedisCluster"
    state = server.cluster.get("cluster_state")
    if state is None:
        return UNKNOWN, "the node refuses CLUSTER INFO. Grant +cluster|info, or check that cluster_state is ok"
    missing = SLOTS - int(server.cluster.get("cluster_slots_ok", "0"))
    if state != "ok":
        return FAILURE, f"cluster_state is {state}, and {missing:,} slots are not served. Check CLUSTER NODES"
    if missing:
        return FAILURE, f"{missing:,} slots are not served: the runs in them are unreachable. Check CLUSTER NODES"
    return OK, "cluster_state is ok, and all slots are served"


def _eviction(server: Server) -> Found:
    policy = server.info.get("maxmemory_policy")
    if policy is None:
        return UNKNOWN, "the server does not report maxmemory-policy. It must be noeviction"
    if policy != "noeviction":
        return FAILURE, f"maxmemory-policy is {policy}: runs can be evicted and re-executed. Set it to noeviction"
    return OK, "maxmemory-policy is noeviction"


def _evicted(server: Server) -> Found:
    if evicted := server.number("evicted_keys"):
        return WARNING, (
            f"{evicted:,} keys were evicted since the server started, runs possibly among them. Set maxmemory-policy "
            "to noeviction"
        )
    return None


def _memory(server: Server) -> Found:
    if "maxmemory" not in server.info:
        return UNKNOWN, "the server does not report maxmemory. It should be set"
    used, limit = server.number("used_memory"), server.number("maxmemory")
    if not limit:
        return WARNING, (
            "maxmemory is not set: if memory runs out, the operating system kills the server; with a limit, the server "
            "only rejects writes. Set it to what the machine can spare"
        )
    if used > NEARLY_FULL * limit:
        return WARNING, (
            f"{used / limit:.0%} of maxmemory is used: a full server rejects every write. Raise maxmemory, or remove "
            "runs with purge, expire_run or run_ttl"
        )
    return OK, f"{used / limit:.0%} of maxmemory is used"


def _persistence(server: Server) -> Found:
    aof, fsync = server.info.get("aof_enabled"), server.settings.get("appendfsync")
    if aof is None:
        return UNKNOWN, "the server does not report whether appendonly is on. It should be"
    if aof != "1":
        if server.client.wait_aof:
            return FAILURE, (
                "appendonly is off, but the store waits for the AOF: each call raises NotReplicatedError. Set "
                "appendonly to yes, or turn wait_aof off"
            )
        lost = "everything" if server.settings.get("save") == "" else "everything since the last snapshot"
        return WARNING, f"appendonly is off: a restart loses {lost}, and steps are re-executed. Set it to yes"
    if (store := server.client).wait_aof:
        if fsync == "everysec" and store.wait_timeout < EVERYSEC:
            return WARNING, (
                f"the store waits {store.wait_timeout:g} s for the AOF, which is flushed once a second: if it is slow, "
                f"calls raise NotReplicatedError. Set wait_timeout to {EVERYSEC:g} s or more, or appendfsync to always"
            )
        return OK, "appendonly is on, and the store waits for the AOF: acknowledged transitions survive"
    if fsync is None:
        return UNKNOWN, "appendonly is on, but the server does not report appendfsync. It should be always"
    if fsync == "always":
        return OK, "appendonly is on, and appendfsync is always: acknowledged transitions survive"
    lost = "a second or two" if fsync == "everysec" else "half a minute"
    return WARNING, (
        f"appendfsync is {fsync}: a power failure, or a crash of the server while its disk is busy, can lose {lost} of "
        "claims and completions. Set it to always, or give the store wait_aof=True"
    )


def _disk(server: Server) -> Found:
    info, settings = server.info, server.settings
    if info.get("aof_last_write_status") == "err":
        return FAILURE, "writing the AOF failed, and the server rejects writes. Check whether the disk is full"
    if info.get("rdb_last_bgsave_status") == "err":
        if settings.get("save") == "" or settings.get("stop-writes-on-bgsave-error") == "no":
            return WARNING, "the last snapshot failed. Check the server's log, and whether the disk is full"
        return FAILURE, (
            "the last snapshot failed, and the server rejects writes until one succeeds. Check whether the disk is full"
        )
    if info.get("aof_last_bgrewrite_status") == "err":
        return WARNING, "rewriting the AOF failed, so the file grows without limit. Check whether the disk is full"
    return (OK, "the last writes to disk succeeded") if "rdb_last_bgsave_status" in info else None


def _replication(server: Server) -> Found:
    wanted, required = server.client.wait_replicas, server.settings.get("min-replicas-to-write")
    good, guards_scripts = server.number("min_slaves_good_slaves"), server.version >= OLDEST_WITH_GUARDED_SCRIPTS
    if server.replicas < wanted:
        return FAILURE, (
            f"the store waits for {wanted} replicas, but {server.replicas} are online: each call raises "
            "NotReplicatedError. Start the missing replicas, or lower wait_replicas"
        )
    if required is not None and good < int(required) and guards_scripts:
        return FAILURE, (
            f"min-replicas-to-write is {required}, but {good} replicas are in sync: the server rejects writes "
            "(NOREPLICAS). Start the missing replicas"
        )
    if wanted:
        return OK, f"the store waits for {wanted} replicas"
    if not server.number("connected_slaves"):
        return None
    if required is None:
        return UNKNOWN, "the server does not report min-replicas-to-write. With replicas, it should be 1 or more"
    if int(required) == 0:
        return WARNING, (
            "min-replicas-to-write is 0, although there are replicas: after a failover, an isolated old primary still "
            "accepts writes, which are then lost. Set it to 1, or give the store wait_replicas=1"
        )
    if not guards_scripts:
        return WARNING, (
            f"min-replicas-to-write is {required}, but this server does not apply it to scripts: after a failover, an "
            "isolated old primary still accepts writes, which are then lost. Upgrade to Redis 7, or give the store "
            "wait_replicas=1"
        )
    return OK, f"min-replicas-to-write is {required}"


def _clock(server: Server) -> Found:
    if server.skew > MAX_SKEW:
        return WARNING, (
            f"the server's clock and this machine's differ by {server.skew:.1f} s: leases are unaffected, but the "
            "times in records are wrong. Check that NTP runs on both"
        )
    return OK, "the server's clock matches this machine's"


CHECKS_OF_CLIENTS: Final[Mapping[str, Callable[[Client], Found]]] = {
    "client timeout": _client_timeout,
    "client deadline": _client_deadline,
    "client protocol": _client_protocol,
    "client decoding": _client_decoding,
    "lease": _lease,
}
CHECKS_OF_SERVERS: Final[Mapping[str, Callable[[Server], Found]]] = {
    "version": _version,
    "role": _role,
    "cluster": _cluster,
    "eviction": _eviction,
    "evicted keys": _evicted,
    "memory": _memory,
    "persistence": _persistence,
    "disk": _disk,
    "replication": _replication,
    "clock": _clock,
}
