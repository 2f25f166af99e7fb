"""The guide's examples: the naive handler fails the tests, the repaired one passes them, and so do the jobs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "tests" / "guide" / "testing.md"
FILES = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def ran(directory: Path, *options: str) -> str:
    """Runs the tests of a directory in a pytest process, and returns its output."""
    asyncio = ("-o", "asyncio_default_fixture_loop_scope=function")  # else pytest-asyncio warns
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *asyncio, *options]
    # Wide, so that pytest does not truncate the errors in its summary. With this checkout's package, even if another is
    # installed.
    environment = {"COLUMNS": "1000", "PATH": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def shown_failures() -> list[str]:
    """Returns the failures that the guide shows, each up to its ellipsis, sorted."""
    shown = re.search(r"^```text\n(FAILED.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert shown is not None
    return sorted(line.removesuffix("…") for line in shown[1].splitlines())


def write(directory: Path, *files: tuple[str, str]) -> None:
    for name, code in files:
        (directory / name).write_text(code, "utf-8")


def test_naive_handler_fails(tmp_path: Path) -> None:
    write(tmp_path, *FILES[:2])

    output = ran(tmp_path)

    assert "2 failed, 1 passed" in output
    # Sorted, because pytest-randomly may be installed.
    failures = sorted(line for line in output.splitlines() if line.startswith("FAILED"))
    for failure, shown in zip(failures, shown_failures(), strict=True):
        assert failure.startswith(shown)


def test_repaired_handler_passes_and_jobs_use_the_tests_store(tmp_path: Path) -> None:
    assert [name for name, _ in FILES] == ["shop.py", "test_shop.py", "shop.py", "jobs.py", "test_jobs.py"]
    write(tmp_path, *FILES[1:])
    assert "5 passed" in ran(tmp_path)


def test_repaired_handler_passes_on_an_embedded_server(tmp_path: Path) -> None:
    write(tmp_path, *FILES[1:3])
    assert "3 passed" in ran(tmp_path, "--squidstep-server", "embedded")
