"""Without RQ, or with an RQ that is too old, the import fails with an error that says what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis

REPOSITORY = Path(__file__).parents[2]


def import_error(*path: Path) -> str:
    """Imports squidstep_redis.rq with these directories as the only path, and returns what is printed to stderr."""
    return subprocess.run(
        [sys.executable, "-S", "-c", "import squidstep_redis.rq"],
        env={"PYTHONPATH": os.pathsep.join(map(str, path))},
        check=False,
        stderr=subprocess.PIPE,
        text=True,
    ).stderr


def test_missing_rq_names_the_extra(tmp_path: Path) -> None:
    packages = tmp_path / "packages"  # everything that is installed next to redis-py, except RQ
    packages.mkdir()
    for path in Path(redis.__file__).parents[1].iterdir():
        if not path.name.startswith("rq"):
            (packages / path.name).symlink_to(path)
    error = import_error(REPOSITORY, packages)
    assert "ImportError: squidstep_redis.rq needs RQ: pip install 'squidstep_redis[rq]'" in error


@pytest.mark.parametrize(
    ("installed", "is_rejected"), [("1.16.2", True), ("2.0", True), ("2.1b1", False), ("10.0", False)]
)
def test_rq_before_2_1_is_rejected(tmp_path: Path, installed: str, is_rejected: bool) -> None:
    metadata = tmp_path / "old" / f"rq-{installed}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: rq\nVersion: {installed}\n")
    error = import_error(tmp_path / "old", REPOSITORY, *map(Path, sys.path))
    message = "squidstep_redis.rq needs RQ 2.1 or later, where a job function can return Retry; RQ"
    assert (f"ImportError: {message} {installed} is installed: pip install " in error) == is_rejected
    assert (error == "") != is_rejected
