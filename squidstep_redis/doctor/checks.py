"""What the doctor holds a client and a server against: each check is a small function of what is known of them.

It answers how bad it is, and what was found and what to do about it; or None, where there is nothing to say. The tables
at the end name them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Final, NamedTuple

OLDEST_SERVER: Final = (6, 2)
OLDEST_WITH_WAITAOF: Final = (7, 2)
FIRST_THAT_HOLDS_SCRIPTS: Final = (7, 0)  # to min-replicas-to-write
NEARLY_FULL: Final = 0.9  # of maxmemory
SKEW: Final = 1.0  # seconds between this machine's clock and the server's
LONG_TIMEOUT: Final = 60.0  # seconds
EVERYSEC: Final = 2.0  # seconds: what appendfsync everysec leaves between two, at most
SLOTS: Final = 16_384


class Level(IntEnum):
    """How bad it is; the numbers are the exit codes that monitoring knows."""

    OK = 0
    WARNING = 1
    """A promise has a limit here that you should know of."""
    FAILURE = 2
    """A promise cannot be kept here."""
    UNKNOWN = 3
    """The server does not say: a managed one that refuses CONFIG, as a rule."""


OK, WARNING, FAILURE, UNKNOWN = Level
Found = tuple[Level, str] | None


class Client(NamedTuple):
    """What is known of a redis-py client before it sends anything, and of the store that it serves.

    Attributes:
        is_cluster: whether it knows a whole cluster.
        socket_timeout: seconds it waits for a reply; None: for ever.
        connect_timeout: seconds it waits for a connection; None: for ever.
        sends: how often it sends a command that is not answered.
        decodes: whether it decodes replies.
        reuses_dirty_connections: whether it hands a reply that was left on a connection to the next command.
        timeout: seconds that the store allows a call.
        wait_replicas: of how many replicas the store waits to hear.
        wait_aof: whether the store waits for the AOF.
        wait_timeout: seconds for which it waits for these two.
        lease: seconds of the claims that nothing extends; None: not told.
        job_timeout: seconds that the work may take; None: not told.
    """

    is_cluster: bool
    socket_timeout: float | None
    connect_timeout: float | None
    sends: int
    decodes: bool
    reuses_dirty_connections: bool
    timeout: float
    wait_replicas: int
    wait_aof: bool
    wait_timeout: float
    lease: float | None
    job_timeout: float | None


class Server(NamedTuple):
    """What a server told.

    Attributes:
        info: what INFO answered.
        settings: of the CONFIG that is asked for, what it does not refuse.
        cluster: what CLUSTER INFO answered.
        skew: seconds by which its clock and this machine's differ at least.
        client: who asks.
    """

    info: Mapping[str, str]
    settings: Mapping[str, str]
    cluster: Mapping[str, str]
    skew: float
    client: Client

    @property
    def replicas(self) -> int:
        """How many replicas are up to date enough to be waited for."""
        lines = (value for name, value in self.info.items() if re.fullmatch(r"slave\d+", name))
        return sum("state=online" in line for line in lines)

    @property
    def version(self) -> tuple[int, ...]:
        """Major and minor; empty if it does not tell."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version_text)[:2])

    @property
    def version_text(self) -> str:
        """As it tells it; Valkey has a version of its own beside Redis's."""
        return self.info.get("valkey_version") or self.info.get("redis_version", "")

    def number(self, name: str) -> int:
        """A number out of INFO; 0 if it is not there."""
        return int(self.info.get(name, "0"))


SETTINGS: Final = ("appendfsync", "save", "min-replicas-to-write", "stop-writes-on-bgsave-error")


# Of clients


def _client_timeout(client: Client) -> Found:
    timeout = client.socket_timeout
    if timeout is None or timeout > LONG_TIMEOUT:
        span = "no socket_timeout" if timeout is None else f"a socket_timeout of {timeout:g} s"
        return WARNING, f"the client has {span}: a server that hangs holds its callers up as long"
    return OK, f"the client waits {timeout:g} s for a reply"


def _client_deadline(client: Client) -> Found:
    if client.socket_timeout is None:
        return None  # the check above says it
    connect, answer, sends = client.connect_timeout or 0.0, client.socket_timeout, client.sends
    # The store begins its last send so early that it ends in time, but no earlier than at half the time-out.
    half, one_send = client.timeout / 2, sends * (connect + answer)
    if one_send > half:
        times = "once" if sends == 1 else f"up to {sends} times"
        return WARNING, (
            f"a call to a server that hangs can take {half + one_send:g} s, though the store's timeout is "
            f"{client.timeout:g} s: the client sends it {times}, with {connect:g} s to connect and {answer:g} s to be "
            "answered. Lower these and its retries (the store has its own), or use from_url"
        )
    return OK, f"a call ends within {client.timeout:g} s"


def _client_protocol(client: Client) -> Found:
    if client.reuses_dirty_connections:
        return WARNING, (
            "with RESP3, this redis-py can hand a reply that an interrupted command left over to the next one (it is "
            "noticed, and raises ReplyMismatchError). Use protocol=2"
        )
    return None


def _client_decoding(client: Client) -> Found:
    if client.decodes:
        return WARNING, "decode_responses=True: transactions of your own cannot take operations"
    return None


def _lease(client: Client) -> Found:
    lease, work = client.lease, client.job_timeout
    if lease is None:
        return None
    if work is not None and lease < work:
        return WARNING, (
            f"the lease of {lease:g} s is shorter than the {work:g} s that the work may take: a second worker begins "
            "while the first is at it. Lengthen it, or have run_step or claim_step extend it"
        )
    if lease <= client.timeout:
        return WARNING, (
            f"the lease of {lease:g} s is not longer than the store's timeout of {client.timeout:g} s: it can be over "
            "before a begin_step that had to be sent again is answered"
        )
    return OK, f"a lease of {lease:g} s covers the work and the store's timeout"


# Of servers


def _version(server: Server) -> Found:
    name = "Valkey" if server.info.get("server_name") == "valkey" else "Redis"
    text, version = server.version_text, server.version
    if not version:
        return UNKNOWN, f"the server does not tell its version: {_dotted(OLDEST_SERVER)} is the oldest supported"
    if version < OLDEST_SERVER:
        return FAILURE, f"{name} {text} is not supported: the oldest is {_dotted(OLDEST_SERVER)}"
    if server.client.wait_aof and version < OLDEST_WITH_WAITAOF:
        oldest = _dotted(OLDEST_WITH_WAITAOF)
        return FAILURE, f"wait_aof needs Redis {oldest} or Valkey, this is {text}: each call raises NotReplicatedError"
    return OK, f"{name} {text}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _role(server: Server) -> Found:
    if server.info.get("redis_mode") == "sentinel":
        return FAILURE, "this is a Sentinel: connect to the master that it names (Sentinel's master_for does)"
    if server.info.get("role") == "slave":
        return FAILURE, "this is a replica: it refuses writes. Connect to the master"
    return OK, f"a master; replicas that are up to date: {server.replicas}"


def _cluster(server: Server) -> Found:
    if server.info.get("cluster_enabled") != "1":
        return None
    if not server.client.is_cluster:
        if server.cluster.get("cluster_size") == "1":
            return OK, "a cluster of one node"
        return FAILURE, "this is one node of a cluster, and refuses most runs: give the store a redis.RedisCluster"
    state = server.cluster.get("cluster_state")
    if state is None:
        return UNKNOWN, "the node refuses CLUSTER INFO: its cluster_state must be ok"
    missing = SLOTS - int(server.cluster.get("cluster_slots_ok", "0"))
    if state != "ok":
        return FAILURE, f"cluster_state is {state}: {missing:,} slots are not served. See CLUSTER NODES"
    if missing:
        return FAILURE, f"{missing:,} slots are not served, and with them some runs. See CLUSTER NODES"
    return OK, "cluster_state is ok, and all slots are served"


def _eviction(server: Server) -> Found:
    policy = server.info.get("maxmemory_policy")
    if policy is None:
        return UNKNOWN, "the server does not tell its maxmemory-policy: it must be noeviction"
    if policy != "noeviction":
        return FAILURE, f"maxmemory-policy is {policy}: runs can vanish, and be executed again. Set it to noeviction"
    return OK, "maxmemory-policy is noeviction"


def _evicted(server: Server) -> Found:
    if evicted := server.number("evicted_keys"):
        return WARNING, f"{evicted:,} keys were evicted since the server started"
    return None


def _memory(server: Server) -> Found:
    if "maxmemory" not in server.info:
        return UNKNOWN, "the server does not tell its maxmemory"
    used, most = server.number("used_memory"), server.number("maxmemory")
    if not most:
        return WARNING, (
            "maxmemory is not set: a server that outgrows its machine is killed, where one that is full refuses "
            "writes. Set it to what the machine can spare"
        )
    if used > NEARLY_FULL * most:
        return WARNING, f"{used / most:.0%} of maxmemory is used: when it is full, nothing can be begun"
    return OK, f"{used / most:.0%} of maxmemory is used"


def _persistence(server: Server) -> Found:
    aof, fsync = server.info.get("aof_enabled"), server.settings.get("appendfsync")
    if aof is None:
        return UNKNOWN, "the server does not tell whether appendonly is on"
    if aof != "1":
        if server.client.wait_aof:
            return FAILURE, "appendonly is off, and the store is to wait for it: each call raises NotReplicatedError"
        lost = "everything" if server.settings.get("save") == "" else "all since the last snapshot"
        return WARNING, f"appendonly is off: a restart forgets {lost}, and steps are executed again. Turn it on"
    if (wait := server.client).wait_aof:
        if fsync == "everysec" and wait.wait_timeout < EVERYSEC:
            return WARNING, (
                f"the store waits {wait.wait_timeout:g} s for an AOF that is written once a second: a slow disk makes "
                f"calls raise NotReplicatedError. Set wait_timeout to {EVERYSEC:g} s or more, or appendfsync to always"
            )
        return OK, "appendonly, and the store waits for it: what was acknowledged stays"
    if fsync is None:
        return UNKNOWN, "appendonly is on; the server does not tell its appendfsync"
    if fsync == "always":
        return OK, "appendonly with appendfsync always: what was acknowledged stays"
    lost = "a second or two" if fsync == "everysec" else "half a minute"
    return WARNING, (
        f"appendfsync is {fsync}: a power cut can take {lost} of claims and completions, and so can a crash of the "
        "server while its disk is busy. Set it to always, or give the store wait_aof=True"
    )


def _disk(server: Server) -> Found:
    told, settings = server.info, server.settings
    if told.get("aof_last_write_status") == "err":
        return FAILURE, "the AOF could not be written, and writes are refused: is the disk full?"
    if told.get("rdb_last_bgsave_status") == "err":
        if settings.get("save") == "" or settings.get("stop-writes-on-bgsave-error") == "no":
            return WARNING, "the last snapshot failed: is the disk full? The server's log says why"
        return FAILURE, "the last snapshot failed, and writes are refused until one succeeds: is the disk full?"
    if told.get("aof_last_bgrewrite_status") == "err":
        return WARNING, "the AOF could not be rewritten, and grows: is the disk full?"
    return (OK, "the last writes to disk succeeded") if "rdb_last_bgsave_status" in told else None


def _replication(server: Server) -> Found:
    wanted, least = server.client.wait_replicas, server.settings.get("min-replicas-to-write")
    good, holds_scripts = server.number("min_slaves_good_slaves"), server.version >= FIRST_THAT_HOLDS_SCRIPTS
    if server.replicas < wanted:
        there = f"the store waits for {wanted} replicas, and {server.replicas} are up to date"
        return FAILURE, f"{there}: each call raises NotReplicatedError"
    if least is not None and good < int(least) and holds_scripts:
        return FAILURE, f"min-replicas-to-write is {least}, and {good} keep up: writes are refused (NOREPLICAS)"
    if wanted:
        return OK, f"the store waits for {wanted} replicas"
    if not server.number("connected_slaves"):
        return None
    if least is None:
        return UNKNOWN, "the server does not tell its min-replicas-to-write"
    if int(least) == 0:
        return WARNING, (
            "there are replicas, and min-replicas-to-write is 0: an old master that was cut off goes on accepting "
            "writes, which are then lost. Set it to 1, or give the store wait_replicas=1"
        )
    if not holds_scripts:
        return WARNING, (
            f"min-replicas-to-write is {least}, to which this server holds no script: an old master that was cut off "
            "goes on accepting writes, which are then lost. Upgrade to Redis 7, or give the store wait_replicas=1"
        )
    return OK, f"min-replicas-to-write is {least}"


def _clock(server: Server) -> Found:
    if server.skew > SKEW:
        ahead = f"the server's clock and this machine's differ by {server.skew:.1f} s"
        return WARNING, f"{ahead}: leases are right, but times may mislead. Is NTP running on both?"
    return OK, "the server's clock agrees with this machine's"


CHECKS_OF_CLIENTS: Final[Mapping[str, Callable[[Client], Found]]] = {
    "client time-out": _client_timeout,
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
