"""The package works if Python imports it from a zip: a wheel on `sys.path`, a zipapp, a zipped layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from squidstep_redis.protocol.scripts import names, script

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import squidstep_redis
assert squidstep_redis.__file__.startswith(sys.argv[1]), squidstep_redis.__file__
"""
SCRIPTS = """
from squidstep_redis.protocol.scripts import names, script
print(json.dumps({name: script(name).sha.decode() for name in names()}))
"""
RUN = """
from squidstep_redis.testing import StepKit
with StepKit() as kit:
    kit.store.begin_step("run", "pay", {}, lease=30)
    kit.clock.advance(31)
    kit.faults.lose_reply("complete_step")
    again = kit.store.begin_step("run", "pay", {}, lease=30)
    kit.store.complete_step(again.step_run, {"paid": True})
    print(json.dumps([again.takeover is not None, kit.store.completed_outputs("run"), kit.faults.pending()]))
"""
SERVER = """
from squidstep_redis import StepRunStore
from squidstep_redis.embedded import EmbeddedServer
with EmbeddedServer() as server, StepRunStore.from_url(server.url) as store:
    print(json.dumps(store.run_step("run", "pay", lambda input: input, {"amount": 7})))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel, zipped as in a wheel."""
    path = tmp_path_factory.mktemp("zip") / "squidstep_redis.whl"
    with ZipFile(path, "w") as file:
        for source, inside in (("squidstep_redis", "squidstep_redis"), ("lua", "squidstep_redis/lua")):
            for each in sorted((ROOT / source).rglob("*")):
                if each.is_file() and "__pycache__" not in each.parts:
                    file.write(each, f"{inside}/{each.relative_to(ROOT / source).as_posix()}")
    return path


def printed(wheel: Path, code: str) -> object:
    """Returns what a program prints that imports the package from the zip."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PROGRAM + code, str(wheel)]
    done = subprocess.run(
        command, cwd=wheel.parent, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_script_is_built_as_in_a_directory(wheel: Path) -> None:
    shas = {name: script(name).sha.decode() for name in names()}
    assert "begin_step" in shas
    assert printed(wheel, SCRIPTS) == shas


def test_store_and_testing_kit_work(wheel: Path) -> None:
    assert printed(wheel, RUN) == [True, [{"paid": True}], []]


def test_embedded_server_starts(wheel: Path) -> None:
    assert printed(wheel, SERVER) == {"amount": 7}
