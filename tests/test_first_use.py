"""The names of the package are loaded when they are first used: also by several threads at the same time."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import random, sys, threading
import squidstep_redis

sys.setswitchinterval(1e-5)
barrier, failures = threading.Barrier(16), []

def use_all_names():
    names = random.sample(squidstep_redis.__all__, len(squidstep_redis.__all__))
    barrier.wait()
    try:
        for name in names:
            getattr(squidstep_redis, name)
    except Exception as error:
        failures.append(error)

threads = [threading.Thread(target=use_all_names) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
"""


def test_threads_can_be_the_first_to_use_names() -> None:
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=50)
        assert done.stderr == ""


def test_errors_and_results_do_not_load_redis() -> None:
    program = "import sys; from squidstep_redis import PayloadError, RunPage, StepRun; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=50).returncode == 0
