"""Runs ten-step DBOS workflows: `python dbos_workflows.py DATABASE_URL`.

Each line of its input is a number of workflows to run. It prints "ready" at the start, and "done" after each line.
It does not import squidstep_redis.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from dbos import DBOS

PAYLOAD = {"order": 123456, "items": ["a" * 20] * 6, "note": "x" * 40}  # as in ours.py


@DBOS.step()
def step(input: dict[str, Any]) -> dict[str, Any]:
    return input


@DBOS.workflow()
def workflow(input: dict[str, Any]) -> None:
    for _ in range(10):
        step(input)


def main(url: str) -> None:
    output = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):
        DBOS(
            config={
                "name": "bench",
                "system_database_url": url,
                "run_admin_server": False,
                "log_level": "ERROR",
                "console_log_level": "ERROR",
            }
        )
        DBOS.launch()
        print("ready", file=output, flush=True)
        for line in sys.stdin:
            for _ in range(int(line)):
                workflow(PAYLOAD)
            print("done", file=output, flush=True)
        DBOS.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
