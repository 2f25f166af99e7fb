"""The table in README.md names tests that are there; and a test run that is killed leaves nothing behind."""

from __future__ import annotations

import ast
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
# A file, or a name in the file that came last: `wire/test_batches.py`: `TestBatch`.
NAMED = re.compile(r"`((?:\w+/)?\w+\.py)`|`((?:Test|test_)\w+)`")


def rows() -> list[list[str]]:
    """The rows of the table, each as its cells."""
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
def test_what_a_row_names_is_there(row: list[str]) -> None:
    assert len(row) == 3
    named = NAMED.findall(row[2])
    assert named, "no test is named"
    names: set[str] = set()
    for file, name in named:
        if file:
            names = names_in(find(file))
        else:
            assert name in names
    # Nothing else is in backquotes: a name that is spelt wrong would pass for prose.
    assert len(named) == row[2].count("`") // 2


def test_every_test_of_a_fault_is_in_the_table() -> None:
    named = {find(file).name for row in rows() for file, _ in NAMED.findall(row[2]) if file}
    of_the_kit = {"test_matrix.py", "test_history.py"}
    assert {path.name for path in HERE.glob("test_*.py")} - of_the_kit <= named


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary directory with a short name, for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="killed-") as path:
        yield Path(path)


@pytest.mark.parametrize(("processes", "test"), [("0", "test_sentinel.py"), ("2", "test_cluster.py")])
def test_a_test_run_that_is_killed_leaves_no_process_port_or_directory(
    processes: str, test: str, scratch: Path
) -> None:
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
            ports = {port for pid in marked(mark) if (port := port_of(pid))}
        finally:
            run.kill()

    wait_until(lambda: not marked(mark), timeout=30)
    assert len(ports) >= 6
    assert [port for port in ports if is_open(port)] == []
    left = [path.name for path in scratch.iterdir()]
    assert [name for name in left if not name.startswith("pytest-of-")] == []  # which pytest keeps for its next runs


def marked(mark: str) -> list[int]:
    """The processes that are of a test run: its environment comes down to all of them."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def port_of(pid: int) -> int | None:
    """The port that a server of a test run listens on, out of its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return int(words[words.index(b"--port") + 1]) if b"--port" in words else None


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
