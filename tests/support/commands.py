"""Runs the `squidstep` commands: in this process, in a separate process, or on a terminal."""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from typing import Any
from unittest import mock

import click.testing
from click.testing import CliRunner, Result

from squidstep_redis import StepRunStore
from squidstep_redis.cli.entry import build_group, main
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


def run(*arguments: object, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process, and returns its result as a completed process."""
    result = invoke(*map(str, arguments), input=input)
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def invoke_on_terminal(columns: int, *arguments: str, **environment: str) -> Result:
    """Runs a command in this process, as on a terminal of this width."""
    with mock.patch.object(click.testing._NamedTextIOWrapper, "isatty", return_value=True):
        return invoke(*arguments, TERM="xterm", COLUMNS=str(columns), **environment)


def on_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """Returns the output of a command on a terminal of this width, run in this process."""
    return invoke_on_terminal(columns, *arguments, **environment).stdout


def run_on_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """Returns the output of a command on a real terminal of this width, run in a separate process."""
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


@contextlib.contextmanager
def _kept_process_state() -> Iterator[None]:
    """Restores what `main` changes for the whole process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    hook, limit = sys.unraisablehook, sys.getrecursionlimit()
    try:
        yield
    finally:
        sys.unraisablehook = hook
        sys.setrecursionlimit(limit)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_encoded(encoding: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Runs the whole program in this process, with an output of this encoding, as PYTHONIOENCODING sets it."""
    streams = [TextIOWrapper(BytesIO(), encoding=encoding, errors="strict", newline="\n") for _ in range(2)]
    code: Any = 0
    patches = (mock.patch.object(sys, "argv", ["squidstep", *arguments]), _kept_process_state())
    with patches[0], patches[1], mock.patch.multiple(sys, stdout=streams[0], stderr=streams[1]):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        for stream in streams:
            stream.flush()
    printed = [stream.buffer.getvalue() for stream in streams if isinstance(stream.buffer, BytesIO)]
    return subprocess.CompletedProcess(arguments, code, *printed)


def complete(shell: str, words: str) -> str:
    """Returns the shell completions of the last word of a command line."""
    *before, last = words.split(" ")
    index = last if shell == "fish" else str(len(before))
    return invoke(_SQUIDSTEP_COMPLETE=f"{shell}_complete", COMP_WORDS=words, COMP_CWORD=index).stdout


def options_of(server: EmbeddedServer, store: StepRunStore) -> list[str]:
    """Returns the options that name a store."""
    return ["-u", server.url, "--prefix", store.calls.prefix]
