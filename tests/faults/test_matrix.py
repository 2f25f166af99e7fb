"""The tests that the table in README.md names exist, and a killed test run leaves nothing behind."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.servers import wait_until

HERE = Path(__file__).parent
TESTS = HERE.parent
# A file, or a name in the last file before it: `wire/test_batches.py`: `TestBatch`.
NAMED = re.compile(r"`((?:\w+/)?\w+\.py)`|`((?:Test|test_)\w+)`")


def rows() -> list[list[str]]:
    """Returns the cells of each row of the table."""
    lines = (HERE / "README.md").read_text("utf-8").partition("\n## ")[0].splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [row for row in table if row[0] != "fault"]


def find(file: str) -> Path:
    return next(path for path in (HERE / file, TESTS / file) if path.exists())


def names_in(path: Path) -> set[str]:
    found = {path.name}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_tests_named_in_a_row_exist(row: list[str]) -> None:
    assert len(row) == 3
    named = NAMED.findall(row[2])
    assert named, "no test is named"
    names: set[str] = set()
    for file, name in named:
        if file:
            names = names_in(find(file))
        else:
            assert name in names
    # Nothing else is in backticks, or a misspelled name would pass as prose.
    assert len(named) == row[2].count("`") // 2


def test_every_fault_test_is_in_the_table() -> None:
    named = {find(file).name for row in rows() for file, _ in NAMED.findall(row[2]) if file}
    kit_tests = {"test_matrix.py", "test_history.py", "test_machine_mutants.py"}
    assert {path.name for path in HERE.glob("test_*.py")} - kit_tests <= named


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary directory with a short path, because the paths of its sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="killed-") as path:
        yield Path(path)


@pytest.mark.parametrize(("processes", "test"), [("0", "test_sentinel.py"), ("2", "test_cluster.py")])
def test_killed_test_run_leaves_no_process_port_or_directory(processes: str, test: str, scratch: Path) -> None:
    mark = f"SQUIDSTEP_TEST_RUN={scratch}"
    environment = {**os.environ, "TMPDIR": str(scratch), "SQUIDSTEP_TEST_RUN": str(scratch)}
    command = [sys.executable, "-m", "pytest", "-q", "-n", processes, "-p", "no:cacheprovider", "--servers=valkey"]
    with subprocess.Popen(
        [*command, str(HERE / test)],
        env=environment,
        cwd=TESTS.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as run:
        try:
            wait_until(lambda: len(list(scratch.glob("squidstep-*/server.sock"))) >= 6, timeout=60)
            ports = {port for pid in processes_marked(mark) if (port := port_of(pid))}
        finally:
            run.kill()

    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not processes_marked(mark), timeout=30)
    assert [command_line(pid) for pid in processes_marked(mark)] == []
    assert len(ports) >= 6
    assert [port for port in ports if is_open(port)] == []
    left = [path.name for path in scratch.iterdir()]
    assert [name for name in left if not name.startswith("pytest-of-")] == []  # pytest keeps that for later runs


def processes_marked(mark: str) -> list[int]:
    """Returns the processes of a test run, which all inherit its environment."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def port_of(pid: int) -> int | None:
    """Returns the port in a server's command line; None if the process has none."""
    words = command_line(pid)
    return int(words[words.index("--port") + 1]) if "--port" in words else None


def command_line(pid: int) -> list[str]:
    """Returns the words of a process's command line; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
