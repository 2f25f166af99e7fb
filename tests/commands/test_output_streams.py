"""`squidstep` with the streams that a shell or a cron job gives it: closed, on a full disk, or a closed pipe."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from unittest import mock

import pytest
from support.commands import empty_store, options_of
from support.demos import SQUIDSTEP
from support.servers import find_binary

from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.usefixtures("default_environment")

COMMANDS = pytest.mark.parametrize("command", ["stats", "export run", "cancel run", "dashboard"])


@pytest.fixture(scope="module")
def options() -> Iterator[list[str]]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server, empty_store(server) as store:
        store.begin_step("run", "step", {"text": "x" * 20_000}, lease=60)
        yield options_of(server, store)


def in_shell(command: str, options: list[str], redirection: str) -> subprocess.CompletedProcess[str]:
    words = [SQUIDSTEP, *command.split(), *([] if command == "dashboard" else options)]
    line = f"{shlex.join(words)} {redirection}"
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False, timeout=50)


@COMMANDS
def test_a_full_disk_is_reported(options: list[str], command: str) -> None:
    ended = in_shell(command, options, "> /dev/full")
    assert (ended.returncode, ended.stderr) == (1, "squidstep: cannot write the output: No space left on device\n")


@COMMANDS
def test_a_closed_pipe_is_not_an_error(options: list[str], command: str) -> None:
    assert in_shell(command, options, "| true").stderr == ""


@COMMANDS
def test_a_command_works_without_any_stream(options: list[str], command: str) -> None:
    ended = in_shell(command, options, "<&- >&-")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert in_shell(command, options, "<&- >&- 2>&-").returncode == 0


def test_closed_input_is_empty(options: list[str]) -> None:
    ended = in_shell("delete run", options, "<&-")
    assert (ended.returncode, ended.stderr) == (1, "Delete run (1 running)? [y/N]: Aborted!\n")
    assert in_shell("import", options, "<&-").returncode == 0


@pytest.mark.parametrize("command", ["stats", "runs", "doctor", "watch --once", "watch run --once"])
def test_pipe_is_no_terminal_whatever_the_variables_say(options: list[str], command: str) -> None:
    """A terminal of 30 columns would fold lines and drop columns."""
    plain = in_shell(command, options, "| cat")
    with mock.patch.dict(os.environ, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "30"}):
        forced = in_shell(command, options, "| cat")

    assert "\x1b" not in forced.stdout
    assert len(forced.stdout.splitlines()) == len(plain.stdout.splitlines())
