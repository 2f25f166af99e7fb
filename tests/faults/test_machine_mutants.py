"""Bugs in scripts that the workers of the soak do not meet: the state machine in test_machine.py finds them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from squidstep_redis.protocol import scripts

from .mutants import Mutant

MUTANTS = {
    "a stale checkpoint is stored": Mutant(
        "checkpoint_step.lua", "if not holds(state, token) then", 'if not holds(state, "") then'
    ),
    "a cancelled run begins steps": Mutant("lib/begin.lua", "if run.cancelled then", "if false then"),
    "a write forgets that the run is cancelled": Mutant("lib/run.lua", "if run.cancelled then", "if false then"),
}

MAIN = """
import sys
from pathlib import Path
import pytest

class Broken:
    def pytest_configure(self):
        from squidstep_redis.protocol import scripts
        scripts.directory = lambda: Path(sys.argv[1])

options = ("-n", "0", "-p", "no:cacheprovider", "--servers=valkey", "--hypothesis-profile=thorough")
sys.exit(pytest.main([*options, "-k", "model and blocking", sys.argv[2]], [Broken()]))
"""


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MUTANTS)
def test_broken_script_is_caught_by_the_machine(name: str, tmp_path: Path) -> None:
    lua = tmp_path / "lua"
    shutil.copytree(scripts.directory(), lua)
    MUTANTS[name].apply(lua)
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", MAIN, str(lua), str(tests / "test_machine.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tests.parent)
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout[-3_000:] + ended.stderr[-3_000:]
    assert "AssertionError" in ended.stdout, ended.stdout[-3_000:]  # a wrong result, and no error of a script
