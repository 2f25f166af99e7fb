"""Runs the `squidstep` commands: in this process, in a separate process, or on a terminal."""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import re
import subprocess

from click.testing import CliRunner, Result

from squidstep_redis import StepRunStore
from squidstep_redis.cli.entry import build_group
from squidstep_redis.embedded import EmbeddedServer
from support.demos import SQUIDSTEP

CLOSED_PORT = "redis://127.0.0.1:1"
_numbers = itertools.count()
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def empty_store(server: EmbeddedServer) -> StepRunStore:
    """Opens a store whose prefix no other test uses."""
    return StepRunStore.from_url(server.url, prefix=f"test-{next(_numbers)}")


def add_failed_step(store: StepRunStore, run: str = "run", step: str = "pay") -> None:
    store.fail_step(store.begin_step(run, step, {"amount": 1}, owner="w").step_run, ValueError("declined"))


def invoke(*arguments: str, input: str | bytes | None = None, **environment: str) -> Result:
    """Runs a command in this process; a separate process would take half a second to start."""
    result = CliRunner().invoke(build_group(), list(arguments), input=input, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process, and returns its result as a completed process."""
    result = invoke(*arguments)
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def pipe(*arguments: str, input: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a separate process, with this text as its stdin."""
    return subprocess.run([SQUIDSTEP, *arguments], input=input, text=True, capture_output=True, check=False)


def run_on_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """Returns the output of a command on a terminal of this width."""
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **environment}
    printed = b""
    with subprocess.Popen([SQUIDSTEP, *arguments], stdout=terminal, env=environment):
        os.close(terminal)
        with contextlib.suppress(OSError):  # Linux raises it when the other end is closed
            while part := os.read(reader, 10_000):
                printed += part
    os.close(reader)
    return printed.decode().replace("\r\n", "\n")


def complete(shell: str, words: str) -> str:
    """Returns the shell completions of the last word of a command line."""
    environment = {**os.environ, "_SQUIDSTEP_COMPLETE": f"{shell}_complete", "COMP_WORDS": words}
    *before, last = words.split(" ")
    environment["COMP_CWORD"] = last if shell == "fish" else str(len(before))
    return subprocess.run([SQUIDSTEP], env=environment, capture_output=True, text=True, check=True).stdout


def options_of(server: EmbeddedServer, store: StepRunStore) -> list[str]:
    """Returns the options that name a store."""
    return ["-u", server.url, "--prefix", store.calls.prefix]
