"""Helpers for tests that run the `squidstep` command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from squidstep_redis import StepRunStore
from squidstep_redis.demo.scenario import DemoContext
from squidstep_redis.demo.work import MAX_BYTES, find_files
from squidstep_redis.embedded import EmbeddedServer
from support.servers import wait_until

SQUIDSTEP = str(Path(sysconfig.get_path("scripts"), "squidstep"))
TIMEOUT = 60.0  # seconds; only a test that fails waits this long


def create_tree(directory: Path) -> Path:
    """Creates a directory with four files for a demo, and others that it ignores."""
    for name in ("a.py", "b/one.py", "b/two.txt", "c/empty.py", ".hidden/x.py", "__pycache__/x.py"):
        path = directory / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the words of {name}\n" * 1_000 if "empty" not in name else "")
    (directory / "tree" / "link.py").symlink_to("a.py")
    (directory / "tree" / "large.py").write_bytes(b"x" * (MAX_BYTES + 1))
    os.mkfifo(directory / "tree" / "pipe.py")
    return directory / "tree"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in arguments]
    return subprocess.run([SQUIDSTEP, *words], capture_output=True, text=True, check=False, timeout=TIMEOUT)


def result_of(*arguments: object) -> dict[str, Any]:
    """Runs a command that must succeed, and returns the JSON that it prints."""
    ended = run(*arguments, "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout)


def start(*arguments: object, temporary: Path) -> subprocess.Popen[str]:
    """Starts a command in a new process group, with a directory for temporary files."""
    return subprocess.Popen(
        [SQUIDSTEP, *map(str, arguments)],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


@contextlib.contextmanager
def demo_context(files: Path) -> Iterator[DemoContext]:
    """Provides the context of a scenario that runs in the process of the test."""
    with EmbeddedServer() as server, StepRunStore.from_url(server.url) as store:
        yield DemoContext(find_files(files, 100), server.url, store, [].append, [].append)


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Provides a directory whose path is short enough for a unix socket."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def read_until(process: subprocess.Popen[str], wanted: str) -> None:
    """Reads lines of output until one contains this text."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if wanted in line:
            return
    raise AssertionError(f"no {wanted!r} in {seen!r}")


def processes_using(directory: Path) -> set[int]:
    """Returns the processes with a directory in their environment or arguments, orphans included."""
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has exited
            if any(os.fsencode(directory) in (process / name).read_bytes() for name in ("environ", "cmdline")):
                found.add(int(process.name))
    return found


def assert_leaves_nothing(*arguments: object, number: signal.Signals, moment: str, processes: int) -> None:
    """Asserts that a demo that a signal ends leaves no process and no file.

    Args:
        *arguments: The command line.
        number: The signal. SIGINT goes to the process group, as from a terminal.
        moment: A text in the line of output after which the signal is sent.
        processes: How many processes must be running before the signal is sent.
    """
    with temporary_directory() as temporary, start(*arguments, temporary=temporary) as process:
        read_until(process, moment)
        wait_until(lambda: len(processes_using(temporary)) >= processes, TIMEOUT)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.stderr is not None
        errors = process.stderr.read()
        status = process.wait(TIMEOUT)
        if number == signal.SIGKILL:
            assert status == -signal.SIGKILL  # a worker that loses its parent while it starts may print a traceback
        else:
            expected = (128 + number, f"squidstep: terminated by {number.name}\n")
            assert (status, errors) == expected, (status, errors)  # pytest explains only asserts of test modules
        wait_until(lambda: not processes_using(temporary), TIMEOUT)
        wait_until(lambda: not list(temporary.iterdir()), TIMEOUT)
