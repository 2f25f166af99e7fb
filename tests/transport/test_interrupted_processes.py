"""Exceptions from outside in a process that has just begun, and that connects by host name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.storm_length import StormLength
from support.storm_process import DATABASE

from squidstep_redis import StepRunStore, StepStatus
from squidstep_redis.embedded import EmbeddedServer

pytestmark = pytest.mark.servers("valkey")

TESTS = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "plain", "blocking pool", "hooked"])
@pytest.mark.parametrize("source", ["thread", "SIGUSR1", "SIGALRM"])
def test_new_process_survives_a_storm(binary: Path, kind: str, source: str, storm_length: StormLength) -> None:
    for _ in storm_length.rounds(1):
        with EmbeddedServer(binary=binary, port=0) as server:
            command = [sys.executable, "-m", "support.storm_process", str(server.port), kind, source, "1"]
            ended = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stderr

            with StepRunStore.from_url(f"redis://127.0.0.1:{server.port}/{DATABASE}") as store:
                assert store.step_statuses("run")["after"] is StepStatus.COMPLETED
            with StepRunStore.from_url(server.url) as in_the_default_database:
                assert in_the_default_database.step_statuses("run") == {}
