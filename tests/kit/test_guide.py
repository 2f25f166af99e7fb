"""The handler in the guide fails the guide's test, and once it is mended passes it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "guide" / "testing.md"
FILES = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def ran(directory: Path, *options: str) -> str:
    asyncio = ("-o", "asyncio_default_fixture_loop_scope=function")  # pytest-asyncio wants to be told
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *asyncio, *options]
    environment = {"COLUMNS": "80", "PATH": ""}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("options", [(), ("--squidstep-server", "embedded")], ids=["fakeredis", "embedded"])
def test_the_handler_fails_and_once_mended_passes(tmp_path: Path, options: tuple[str, ...]) -> None:
    (first, naive), (test, tests), (again, mended) = FILES
    assert (first, test, again) == ("shop.py", "test_shop.py", "shop.py")
    (tmp_path / test).write_text(tests, "utf-8")

    (tmp_path / "shop.py").write_text(naive, "utf-8")
    output = ran(tmp_path, *options)
    shown = re.search(r"^```text\n(FAILED.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert shown[1] in output
    assert "2 failed, 1 passed" in output

    (tmp_path / "shop.py").write_text(mended, "utf-8")
    assert "3 passed" in ran(tmp_path, *options)
