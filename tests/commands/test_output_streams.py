"""`squidstep` with the streams that a shell or a cron job gives it: closed, on a full disk, or a closed pipe."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from support.commands import empty_store, options_of, run_encoded
from support.demos import SQUIDSTEP
from support.servers import find_binary

from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.usefixtures("default_environment")

COMMANDS = ("stats", "export run", "cancel run", "dashboard")
FORCED = {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "30"}

# Each command runs and ends in a process of its own, with the streams of the shell. They are forked from one process,
# because the imports take longer than the commands. It opens no file before that: a file can get a closed stream's
# number.
RUN_EACH = """
import json, os, sys
from squidstep_redis.cli import cancel, changes, connect, dashboard, listing, transfer
from squidstep_redis.cli import main

report, *lines = sys.argv[1:]
codes = []
for line in lines:
    child = os.fork()
    if child == 0:
        sys.argv = ["squidstep", *json.loads(line)]
        sys.exit(main())
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
with open(report, "w") as file:
    json.dump(codes, file)
"""


class Ended(NamedTuple):
    codes: list[int]
    stderr: str


@pytest.fixture(scope="module")
def options() -> Iterator[list[str]]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server, empty_store(server) as store:
        store.begin_step("run", "step", {"text": "x" * 20_000}, lease=60)
        yield options_of(server, store)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "report"


def in_shell(commands: tuple[str, ...], options: list[str], redirection: str, report: Path) -> Ended:
    """Runs commands with the streams of a redirection; returns their exit codes, and what they wrote to stderr."""
    lines = [[*command.split(), *([] if command == "dashboard" else options)] for command in commands]
    words = [sys.executable, "-c", RUN_EACH, str(report), *map(json.dumps, lines)]
    line = f"{shlex.join(words)} {redirection}"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, timeout=50)
    assert report.exists(), ended.stderr
    return Ended(json.loads(report.read_text()), ended.stderr)


def test_a_full_disk_is_reported(options: list[str], report: Path) -> None:
    ended = in_shell(COMMANDS, options, "> /dev/full", report)
    assert ended.codes == [1] * len(COMMANDS)
    assert ended.stderr == "squidstep: cannot write the output: No space left on device\n" * len(COMMANDS)


def test_a_closed_pipe_is_not_an_error(options: list[str], report: Path) -> None:
    assert in_shell(COMMANDS, options, "| true", report).stderr == ""


@pytest.mark.parametrize("redirection", ["<&- >&-", "<&- >&- 2>&-"])
def test_a_command_works_without_any_stream(options: list[str], report: Path, redirection: str) -> None:
    assert in_shell(COMMANDS, options, redirection, report) == ([0] * len(COMMANDS), "")


def test_closed_input_is_empty(options: list[str], report: Path) -> None:
    ended = in_shell(("delete run", "import"), options, "<&-", report)
    assert ended == ([1, 0], "Delete run (1 running)? [y/N]: Aborted!\n")


@pytest.mark.parametrize("command", ["stats", "runs", "doctor", "watch --once", "watch run --once"])
def test_pipe_is_no_terminal_whatever_the_variables_say(options: list[str], command: str) -> None:
    """A terminal of 30 columns would fold lines and drop columns."""
    plain = run_encoded("utf-8", *command.split(), *options).stdout.decode()
    with mock.patch.dict(os.environ, FORCED):
        forced = run_encoded("utf-8", *command.split(), *options).stdout.decode()

    assert "\x1b" not in forced
    assert len(forced.splitlines()) == len(plain.splitlines()) > 0


def test_pipe_of_a_shell_is_no_terminal(options: list[str]) -> None:
    line = f"{shlex.join([SQUIDSTEP, 'watch', 'run', '--once', *options])} | cat"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True, env={**os.environ, **FORCED})

    assert "\x1b" not in ended.stdout
    plain = run_encoded("utf-8", "watch", "run", "--once", *options)
    assert len(ended.stdout.splitlines()) == len(plain.stdout.splitlines())
