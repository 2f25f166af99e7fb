"""`squidstep` and the signals that end it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# The command's work is replaced by code that receives the signal at a given moment, and would go on for a minute.
PROGRAM = """
import gc, os, sys, time, weakref
from squidstep_redis.cli import entry

class Connection:
    def __del__(self):
        os.kill(os.getpid(), {number})
        sum(range(1_000))

def in_finalizer():
    Connection()

def in_collected_cycle():
    connection = Connection()
    connection.itself = connection
    del connection
    gc.collect()

def in_weakref_callback():
    class Target: ...
    target = Target()
    reference = weakref.ref(target, lambda _: Connection.__del__(None))
    del target

def in_function():
    Connection.__del__(None)

def work():
    try:
        {moment}()
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

entry._EXIT_AGAIN_SECONDS = {seconds}
entry.build_group = lambda: work
entry.main()
"""


@pytest.mark.parametrize(
    "seconds", ["0.001, 0.25", "0.000_001, 0.1"]
)  # at once: while the exception is still being discarded
@pytest.mark.parametrize("moment", ["in_function", "in_finalizer", "in_collected_cycle", "in_weakref_callback"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_at_any_moment(number: signal.Signals, moment: str, seconds: str) -> None:
    program = PROGRAM.format(number=int(number), moment=moment, seconds=seconds)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50)
    assert (ended.returncode, ended.stderr) == (128 + number, f"squidstep: terminated by {number.name}\n")
    assert ended.stdout == "cleaned up\n"


def test_other_exceptions_in_a_finalizer_are_reported() -> None:
    program = PROGRAM.replace("os.kill(os.getpid(), {number})", "1 / 0").replace("time.sleep(60)", "pass")
    program = program.format(moment="in_finalizer", seconds="0.001, 0.25")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=50)
    assert ended.returncode == 0
    assert "ZeroDivisionError" in ended.stderr
