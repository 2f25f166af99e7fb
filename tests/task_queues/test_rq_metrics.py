"""Metrics of forked work-horses: the store and its listeners are used after a fork, in files that do not pile up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from support.rq_harness import Harness

pytest_plugins = ["support.rq_fixtures"]


def test_work_horses_count_in_the_files_of_their_worker(harness: Harness, tmp_path: Path) -> None:
    files = tmp_path / "metrics"
    files.mkdir()
    environment = {
        **os.environ,
        "SQUIDSTEP_REDIS_URL": harness.url,
        "PROMETHEUS_MULTIPROC_DIR": str(files),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = "from support import rq_observed_jobs; rq_observed_jobs.work()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(files))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"squidstep_{name}", {"prefix": "squidstep", **labels})

    assert value("executes_total") == value("completions_total") == 3
    assert value("skips_total", reason="completed") == 2
    assert value("transition_seconds_count", operation="begin_step") == 5
    named = {file.name for file in files.iterdir()}
    assert {"counter_till-3.db", "histogram_till-3.db"} <= named
    assert len(named) == 4  # two of the worker's work-horses, and two of the process that executed the first job itself
