"""Starts the servers for the benchmark, each on a free loopback port, and stops them at the end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from bench.measure import MissingError
from support.servers import find_binary

from squidstep_redis.embedded import EmbeddedServer

SERVERS = {"valkey": "Valkey", "redis-7": "Redis 7"}
# Server options by durability, named as in the table.
DURABILITY: dict[str, dict[str, str]] = {
    "memory": {},
    "always": {"appendonly": "yes", "appendfsync": "always"},
    "everysec": {"appendonly": "yes", "appendfsync": "everysec"},
}
POSTGRES_VERSION = "15"
_START_SECONDS = 30
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def server(name: str = "valkey", durability: str = "memory") -> Iterator[EmbeddedServer]:
    """Starts a Valkey or Redis.

    Raises:
        MissingError: the binary is not installed.
    """
    with EmbeddedServer(binary=find_server(name), port=0, options=DURABILITY[durability]) as started:
        yield started


def find_server(name: str) -> Path:
    """Returns the path of a server binary.

    Raises:
        MissingError: it is not installed.
    """
    try:
        return find_binary(name)
    except LookupError as error:
        raise MissingError(str(error)) from error


def connect(started: EmbeddedServer, **options: Any) -> redis.Redis:
    """Returns a client with the settings that both sides of every comparison use."""
    return redis.Redis.from_url(started.url, protocol=2, **options)


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Starts a PostgreSQL with its default settings, and yields its URL, without `options`.

    Raises:
        MissingError: the required version is not installed.
    """
    binaries = _postgres_binaries()
    user = _unprivileged_user()
    with tempfile.TemporaryDirectory(prefix="squidstep-bench-") as directory:
        if user is not None:
            os.chown(directory, user.pw_uid, user.pw_gid)
        rights: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
        data = f"{directory}/data"
        initdb = [binaries / "initdb", "-D", data, "-U", "bench", "-A", "trust", "-E", "UTF8", "--no-locale"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=directory, **rights)
        port = _free_port()
        with Path(directory, "log").open("w+b") as log:
            process = subprocess.Popen(
                [binaries / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", directory],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                start_new_session=True,  # Ctrl-C goes to the benchmark only
                preexec_fn=die_with_parent,  # noqa: PLW1509 -- the benchmark has one thread
                **rights,
            )
            try:
                _wait_for_postgres(process, Path(directory, f".s.PGSQL.{port}"), Path(directory, "log"))
                yield f"postgresql://bench@127.0.0.1:{port}/postgres"
            finally:
                process.send_signal(signal.SIGINT)  # "fast shutdown"
                process.wait()


def _postgres_binaries() -> Path:
    for directory in (Path("/usr/lib/postgresql", POSTGRES_VERSION, "bin"), Path(shutil.which("initdb") or "-").parent):
        if os.access(directory / "initdb", os.X_OK) and os.access(directory / "postgres", os.X_OK):
            version = subprocess.run([directory / "postgres", "--version"], capture_output=True, text=True, check=True)
            if f" {POSTGRES_VERSION}." in version.stdout:
                return directory
    raise MissingError(f"PostgreSQL {POSTGRES_VERSION}: apt-get install postgresql-{POSTGRES_VERSION}")


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Returns the user to run PostgreSQL as, because it refuses to run as root; None: the current user."""
    if os.getuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres")
    return pwd.getpwnam("nobody")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent() -> None:
    """Makes Linux interrupt this process when its parent process exits."""
    if hasattr(libc := ctypes.CDLL(None), "prctl"):
        libc.prctl(_DIE_WITH_PARENT, signal.SIGINT)


def _wait_for_postgres(process: subprocess.Popen[bytes], socket_path: Path, log: Path) -> None:
    """Waits for the socket, which PostgreSQL creates just before it accepts connections."""
    deadline = time.monotonic() + _START_SECONDS
    while not (socket_path.exists() and b"ready to accept connections" in log.read_bytes()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text(errors='replace')}")
        time.sleep(0.02)
