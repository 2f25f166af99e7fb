"""The process between an embedded server and its owner: a script that runs one server, and ends when its owner does.

It is executed by itself for every server, so it imports nothing but the parts of the standard library that it needs.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SOCKET_NAME = "server.sock"
LOG_NAME = "server.log"
SIGNALS = {"kill": signal.SIGKILL, "pause": signal.SIGSTOP, "resume": signal.SIGCONT}
_START_SECONDS = 10
_STOP_SECONDS = 5
_ORPHAN_CHECK_SECONDS = 0.2
_LOG_TAIL_BYTES = 2_000


class Supervisor:
    """The process between owner and server: runs one server, and ends when its owner does."""

    def __init__(self, owner: int, scratch: Path, directory: Path, command: list[str]) -> None:
        self.owner = owner  # its process id
        self.scratch = scratch  # the temporary directory, with the socket
        self.directory = directory  # of the server's files; may be the same
        self.command = command  # the server's command line
        self.server: subprocess.Popen[bytes] | None = None
        self.libc = ctypes.CDLL(None)
        self.pid = os.getpid()

    def run(self) -> None:
        """Executes the owner's commands until it sends "stop" or ends."""
        endings = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in endings:
            signal.signal(number, lambda _number, _frame: sys.exit())
        self.scratch.mkdir(0o700)  # fails if it exists, because another user may have made it
        try:
            # The owner waits for each reply, except before "stop". A "stop" that is read together with an earlier
            # command is not a known command, which ends the loop as well.
            while (verb := self.next_verb()) in ("start", *SIGNALS):
                self.execute(verb)
        finally:
            for number in endings:
                signal.signal(number, signal.SIG_IGN)
            self.end_server()
            shutil.rmtree(self.scratch, ignore_errors=True)

    def next_verb(self) -> str:
        """Waits for the owner's next command; returns an empty string if the owner has ended."""
        # The pipe closes when the owner ends, unless a forked child of the owner has it open.
        while not select.select([0], [], [], _ORPHAN_CHECK_SECONDS)[0]:
            if os.getppid() != self.owner:
                return ""
        return os.read(0, 100).decode().strip()

    def execute(self, verb: str) -> None:
        """Executes "start" or a key of SIGNALS, and replies with the server's process id."""
        if verb == "start":
            if not self.server_pid():
                self.start_server()
        elif self.server is not None:
            self.server.send_signal(SIGNALS[verb])
            if verb == "kill":
                self.server.wait()
        os.write(1, b"%d\n" % self.server_pid())

    def server_pid(self) -> int:
        """Returns the server's process id, 0 if it is down."""
        return self.server.pid if self.server is not None and self.server.poll() is None else 0

    def start_server(self) -> None:
        """Starts the server and waits until it responds; exits with the reason if it does not."""
        with (self.directory / LOG_NAME).open("a+b") as log:
            log_begin = log.seek(0, os.SEEK_END)
            try:
                self.server = subprocess.Popen(  # noqa: S603 (the caller chooses the binary)
                    self.command,
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=self.tie_to_supervisor,  # noqa: PLW1509 (this process has no threads)
                )
            except OSError as error:
                sys.exit(str(error))
            deadline = time.monotonic() + _START_SECONDS
            while not self.server_responds():
                if self.server.poll() is not None:
                    reason = f"the server exited with status {self.server.returncode}"
                elif time.monotonic() > deadline:
                    reason = f"the server did not respond within {_START_SECONDS} seconds"
                else:
                    time.sleep(0.002)
                    continue
                log.seek(max(log_begin, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                sys.exit(f"{reason}\n{log.read().decode(errors='replace')}")

    def server_responds(self) -> bool:
        """Returns whether the server responds on its unix socket; another server may be using the port."""
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(1)
            connection.connect(str(self.scratch / SOCKET_NAME))
            connection.sendall(b"PING\r\n")
            reply = connection.recv(100)
            # Any error but LOADING means ready, because the options may require a password.
            return reply != b"" and not reply.startswith(b"-LOADING")
        return False

    def tie_to_supervisor(self) -> None:
        """Runs in the server's process: on Linux, has it killed when the supervisor ends."""
        if sys.platform == "linux":
            pr_set_pdeathsig = 1
            self.libc.prctl(pr_set_pdeathsig, signal.SIGKILL)
            if os.getppid() != self.pid:  # the supervisor ended before prctl
                os._exit(1)

    def end_server(self) -> None:
        """Ends the server and its children; by SIGTERM first if its files are kept."""
        server = self.server
        if server is None or not self.server_pid():
            return
        if self.directory != self.scratch:
            server.terminate()
            server.send_signal(signal.SIGCONT)  # a paused server does not handle SIGTERM
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(_STOP_SECONDS)
        if server.returncode is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


if __name__ == "__main__":
    Supervisor(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]).run()
