"""Servers that fail over: a primary and a replica, a master with sentinels, and a cluster of six nodes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

import redis
import redis.sentinel
from redis.crc import key_slot
from support.proxy import Proxy
from support.servers import EmbeddedCluster, wait_until

from squidstep_redis.embedded import EmbeddedServer

SERVICE: Final = "main"
REPLICATION: Final = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1"}


@contextlib.contextmanager
def connected(server: EmbeddedServer) -> Iterator[Any]:
    """Connects to one server, without retries, so that each reply shows the state of that moment."""
    options: dict[str, Any] = {"decode_responses": True, "socket_timeout": 5, "retry": None}
    with redis.Redis(host=server.host, port=server.port, **options) as client:
        yield client


def role(server: EmbeddedServer) -> str:
    """Returns "master" or "slave"."""
    with connected(server) as client:
        return client.info("replication")["role"]


def replicate(replica: EmbeddedServer, master: EmbeddedServer) -> None:
    """Makes one server the replica of another and waits until it has all its data."""
    with connected(replica) as client:
        client.execute_command("REPLICAOF", master.host, master.port)
        wait_until(lambda: client.info("replication")["master_link_status"] == "up", timeout=30)


class Pair:
    """A primary and its replica, which run during the `with` block and can change roles without losing a write.

    Clients that stay connected to the demoted server get MASTERDOWN or READONLY, and no data that is out of date.

    Attributes:
        primary: the server that accepts writes.
        replica: the other one.
    """

    def __init__(self, binary: Path) -> None:
        options = {**REPLICATION, "replica-serve-stale-data": "no"}
        self.primary, self.replica = (EmbeddedServer(binary=binary, port=0, options=options) for _ in range(2))
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for server in (self.primary, self.replica):
                stack.enter_context(server)
            replicate(self.replica, self.primary)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def change_roles(self, lead_to: Callable[[EmbeddedServer], None], seconds: float, *, moves_first: bool) -> None:
        """Promotes the replica, and demotes the primary.

        Args:
            lead_to: lets new connections lead to a server.
            seconds: for how long the demoted server keeps its connections.
            moves_first: whether new connections lead to the promoted server meanwhile. Then the calls on the old ones
                get MASTERDOWN. Otherwise all connections lead to the demoted server, and calls get READONLY.
        """
        with connected(self.primary) as demoted, connected(self.replica) as promoted:
            demoted.client_pause(60_000, all=False)
            wait_until(lambda: _offset(demoted, "master") == _offset(promoted, "slave"))
            promoted.replicaof("NO", "ONE")
            if moves_first:
                demoted.replicaof("127.0.0.1", 1)
                lead_to(self.replica)
            else:
                demoted.replicaof(self.replica.host, self.replica.port)
            demoted.client_unpause()
            time.sleep(seconds)
            demoted.client_pause(60_000, all=False)  # from now on, what the demoted server has is out of date
            lead_to(self.replica)
            demoted.client_kill_filter(_type="normal", skipme=True)
            demoted.client_unpause()
            demoted.replicaof(self.replica.host, self.replica.port)
            wait_until(lambda: demoted.info("replication")["master_link_status"] == "up", timeout=30)
        self.primary, self.replica = self.replica, self.primary


def _offset(client: Any, role: str) -> int:
    return client.info("replication")[f"{role}_repl_offset"]


class Sentinels:
    """A master, two replicas and three sentinels, which run during the `with` block."""

    def __init__(self, binary: Path, scratch: Path, options: dict[str, str] | None = None) -> None:
        """Prepares the servers and the sentinels; the `with` block starts them.

        Args:
            binary: the server binary, which also runs the sentinels.
            scratch: a directory for the program that starts a sentinel.
            options: further configuration of the three servers.
        """
        launcher = scratch / "sentinel"
        # A sentinel refuses to start without a configuration file.
        launcher.write_text(f'#!/bin/sh\n: > sentinel.conf\nexec "{binary}" sentinel.conf --sentinel "$@"\n')
        launcher.chmod(0o700)
        settings = {**REPLICATION, **(options or {})}
        self.servers = [EmbeddedServer(binary=binary, port=0, options=settings) for _ in range(3)]
        self.sentinels = [EmbeddedServer(binary=launcher, port=0) for _ in range(3)]
        self._stack = contextlib.ExitStack()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [(sentinel.host, sentinel.port) for sentinel in self.sentinels]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for server in (*self.servers, *self.sentinels):
                stack.enter_context(server)
            master, *replicas = self.servers
            for replica in replicas:
                replicate(replica, master)
            for sentinel in self.sentinels:
                with connected(sentinel) as client:
                    client.execute_command("SENTINEL", "MONITOR", SERVICE, master.host, master.port, 2)
                    settings = {"down-after-milliseconds": 500, "failover-timeout": 3000, "parallel-syncs": 2}
                    for name, value in settings.items():
                        client.execute_command("SENTINEL", "SET", SERVICE, name, value)
            wait_until(self._are_discovered, timeout=30)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def master(self) -> EmbeddedServer:
        """Returns the master according to a sentinel."""
        options: dict[str, Any] = {"socket_timeout": 5}
        found = redis.sentinel.Sentinel(self.addresses, **options)
        try:
            _, port = found.discover_master(SERVICE)
        finally:
            for client in found.sentinels:
                client.close()
        return next(server for server in self.servers if server.port == port)

    def wait_for_new_master(self, old: EmbeddedServer) -> EmbeddedServer:
        """Waits until another server is the master and accepts writes; returns it."""

        def promoted() -> bool:
            with contextlib.suppress(redis.RedisError):
                return self.master() is not old and role(self.master()) == "master"
            return False

        wait_until(promoted, timeout=60)
        return self.master()

    def _are_discovered(self) -> bool:
        """Returns whether each sentinel has found both replicas and the other sentinels."""
        for sentinel in self.sentinels:
            with connected(sentinel) as client:
                known = client.info("sentinel")["master0"]
                if (known["status"], known["slaves"], known["sentinels"]) != ("ok", 2, 3):
                    return False
        return True


class Cluster(EmbeddedCluster):
    """A cluster of three primaries. By default each has a replica, which takes over within seconds."""

    def __init__(self, binary: Path, *, replicated: bool = True, spares: int = 0) -> None:
        options = {**REPLICATION, "cluster-node-timeout": "4000", "cluster-replica-validity-factor": "0"}
        super().__init__(binary=binary, replicated=replicated, spares=spares, options=options)

    def nodes_of(self, slot: int) -> list[EmbeddedServer]:
        """Returns the slot's primary, then its replica, according to the majority of the running nodes."""
        replies: list[tuple[int, ...]] = []
        for node in self.nodes:
            with contextlib.suppress(redis.RedisError), connected(node) as client:
                for first, last, *nodes in client.execute_command("CLUSTER SLOTS"):
                    if first <= slot <= last:
                        replies.append(tuple(node[1] for node in nodes))
        ports = max(set(replies), key=replies.count)
        return [next(node for node in self.nodes if node.port == port) for port in ports]

    def fail_over(self, slot: int) -> None:
        """Runs a manual failover: the primary hands over to its replica, and no write is lost."""
        _, replica = self.nodes_of(slot)
        for _ in range(6):
            with connected(replica) as client:
                client.execute_command("CLUSTER FAILOVER")
            # The replica gives up after five seconds, because primaries do not vote soon after another failover.
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: self.nodes_of(slot)[0] is replica, timeout=6)
                break
        wait_until(self.is_ready, timeout=30)
        assert self.nodes_of(slot)[0] is replica

    def replace_primary(self, slot: int) -> EmbeddedServer:
        """Kills a slot's primary and lets the replica take over at once, without the vote; returns the old primary."""
        old, replica = self.nodes_of(slot)
        with connected(old) as client:
            client.execute_command("WAIT", 1, 5_000)
        old.kill()
        with connected(replica) as client:
            client.execute_command("CLUSTER FAILOVER", "TAKEOVER")
        self.wait_for_new_primary(slot, old)
        return old

    def wait_for_new_primary(self, slot: int, old: EmbeddedServer) -> EmbeddedServer:
        """Waits until another node serves the slot and all running nodes know it; returns that node."""

        def promoted() -> bool:
            for node in self.nodes:
                if node is not old:
                    with connected(node) as client:
                        if client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                            return False
            return self.nodes_of(slot)[0] is not old

        wait_until(promoted, timeout=60)
        return self.nodes_of(slot)[0]


class Migration:
    """A slot that moves from one primary to another, key by key, as in a resharding."""

    def __init__(self, cluster: Cluster, slot: int, target: EmbeddedServer | None = None) -> None:
        self.cluster = cluster
        self.slot = slot
        self.source = cluster.nodes_of(slot)[0]
        primaries = [cluster.nodes_of(other)[0] for other in range(0, 16_384, 5_000)]
        self.target = target or next(node for node in primaries if node is not self.source)
        self._is_over = False
        self._ids = {node: self._id(node) for node in (self.source, self.target)}

    @staticmethod
    def _id(node: EmbeddedServer) -> str:
        with connected(node) as client:
            return client.execute_command("CLUSTER MYID")

    def __enter__(self) -> Self:
        with connected(self.target) as client:
            client.execute_command("CLUSTER SETSLOT", self.slot, "IMPORTING", self._ids[self.source])
        with connected(self.source) as client:
            client.execute_command("CLUSTER SETSLOT", self.slot, "MIGRATING", self._ids[self.target])
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finish()

    def move(self, *keys: bytes) -> None:
        """Moves those of the keys that exist."""
        assert all(key_slot(key) == self.slot for key in keys)
        with connected(self.source) as client:
            client.execute_command("MIGRATE", self.target.host, self.target.port, "", 0, 5_000, "KEYS", *keys)

    def cancel(self) -> None:
        """Leaves the slot where it was; keys that have moved are lost. Only for a target that serves no slot."""
        with connected(self.target) as client:
            client.execute_command("FLUSHALL")
        for node in (self.target, self.source):
            with connected(node) as client:
                client.execute_command("CLUSTER SETSLOT", self.slot, "STABLE")
        self._is_over = True

    def finish(self) -> None:
        """Moves the remaining keys and assigns the slot on all nodes. Calling it again does nothing."""
        if self._is_over:
            return
        with connected(self.source) as client:
            while keys := client.execute_command("CLUSTER GETKEYSINSLOT", self.slot, 100):
                self.move(*(key.encode() for key in keys))
        for node in (self.target, self.source, *self.cluster.nodes):
            with connected(node) as client, contextlib.suppress(redis.ResponseError):  # a replica learns it by gossip
                client.execute_command("CLUSTER SETSLOT", self.slot, "NODE", self._ids[self.target])
        wait_until(lambda: self.cluster.nodes_of(self.slot)[0] is self.target)


class Fronts:
    """Proxies of all nodes of a cluster. For clients that go through them, a node is dead once its proxy is closed.

    So no test has to wait for a new cluster, and none damages one that others use.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._proxies = {node.port: Proxy((node.host, node.port)) for node in cluster.nodes}
        self._stack = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """The URL of the first node."""
        return f"redis://127.0.0.1:{self._proxies[self._cluster.nodes[0].port].port}"

    def remap(self, address: tuple[str, int]) -> tuple[str, int]:
        """Is a client's `address_remap`."""
        host, port = address
        return host, self._proxies[port].port if port in self._proxies else port

    def _translate(self, reply: bytes) -> bytes:
        """Remaps a redirect, because not all clients of redis-py do."""
        if reply.startswith((b"-MOVED", b"-ASK")):
            address, _, port = reply.rstrip().rpartition(b":")
            return b"%s:%d\r\n" % (address, self._proxies[int(port)].port)
        return reply

    def of(self, slot: int) -> Proxy:
        """Returns the proxy of a slot's primary."""
        return self._proxies[self._cluster.nodes_of(slot)[0].port]

    def kill(self, *slots: int) -> None:
        """Closes the proxies of the primaries of these slots; without slots, all."""
        for proxy in map(self.of, slots) if slots else self._proxies.values():
            proxy.refuse()
            proxy.disconnect()

    def lead_to(self, server: EmbeddedServer) -> None:
        """Closes all connections; new ones lead to this server, for any node."""
        for proxy in self._proxies.values():
            proxy.server = (server.host, server.port)
            proxy.disconnect()

    def __enter__(self) -> Self:
        for proxy in self._proxies.values():
            proxy.translate = self._translate
            self._stack.enter_context(proxy)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
