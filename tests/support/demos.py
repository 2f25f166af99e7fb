"""What the tests of all demos share: the command, files to work on, and a look at what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from squidstep_redis.demo import work as demo_work

SQUIDSTEP = str(Path(sysconfig.get_path("scripts"), "squidstep"))


def plant(directory: Path) -> Path:
    """Four files to work on, and some to leave out."""
    for name in ("a.py", "b/one.py", "b/two.txt", "c/empty.py", ".hidden/x.py", "__pycache__/x.py"):
        path = directory / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the words of {name}\n" * 1_000 if "empty" not in name else "")
    (directory / "tree" / "link.py").symlink_to("a.py")
    (directory / "tree" / "large.py").write_bytes(b"x" * (demo_work.MAX_BYTES + 1))
    os.mkfifo(directory / "tree" / "pipe.py")
    return directory / "tree"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in arguments]
    return subprocess.run([SQUIDSTEP, *words], capture_output=True, text=True, check=False, timeout=60)


def result_of(*arguments: object) -> dict[str, Any]:
    ended = run(*arguments, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)


def until_line(process: subprocess.Popen[str], wanted: str) -> None:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if wanted in line:
            return
    raise AssertionError(f"no {wanted!r} in {seen!r}")


def running_in(directory: Path) -> set[int]:
    """The processes with this among their environment or arguments, whoever their parent is by now."""
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended by now; and of a zombie there is nothing to read
            if any(os.fsencode(directory) in (process / name).read_bytes() for name in ("environ", "cmdline")):
                found.add(int(process.name))
    return found
