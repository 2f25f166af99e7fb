"""The row that counts the server's instructions with callgrind: unlike times, they do not depend on other load."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.budgets import BUDGETS
from bench.databases import SERVERS, connect, find_server
from bench.measure import MissingError, Pace, Result, Spread, Work, figure
from bench.ours import Blocking

from squidstep_redis.embedded import EmbeddedServer

_STEPS = 500  # a step is two transitions
_ROUNDS = 3
# The valgrind that runs a server is asked with vgdb for the instructions since the last request.
_SCRIPT = """#!/bin/sh
exec valgrind --quiet --tool=callgrind --vgdb-prefix={directory}/vgdb --callgrind-out-file={directory}/out {server} "$@"
"""


class CountingServer:
    """A server that runs in valgrind."""

    def __init__(self, server: EmbeddedServer, directory: Path) -> None:
        self.server = server
        self._directory = directory
        self._dumps = 0

    def instructions(self, work: Work, count: int) -> int:
        """The instructions that the server executes for `work(count)`."""
        self._dump()
        work(count)
        return self._dump()

    def _dump(self) -> int:
        command = ["vgdb", f"--vgdb-prefix={self._directory}/vgdb", f"--pid={self.server.pid}", "dump"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        self._dumps += 1
        dump = (self._directory / f"out.{self._dumps}").read_text()
        totals = re.search(r"^totals: (\d+)$", dump, re.MULTILINE)
        assert totals is not None, dump
        return int(totals[1])


@contextlib.contextmanager
def counting_server(name: str) -> Iterator[CountingServer]:
    """Starts a server in valgrind.

    Raises:
        MissingError: valgrind or the server is not installed.
    """
    binary = find_server(name)
    if shutil.which("valgrind") is None or shutil.which("vgdb") is None:
        raise MissingError("valgrind: apt-get install valgrind")
    with tempfile.TemporaryDirectory(prefix="squidstep-bench-") as directory:
        script = Path(directory, "server")
        script.write_text(_SCRIPT.format(directory=directory, server=shlex.quote(str(binary))))
        script.chmod(0o700)
        with EmbeddedServer(binary=script, port=0, options={"hz": "1"}) as started:  # as few timers as possible
            yield CountingServer(started, Path(directory))


def instructions(pace: Pace) -> Iterator[Result]:
    """Instructions of the server per transition, its parsing and replying included, against the yardstick."""
    steps = pace.of(_STEPS, minimum=100)
    for name, title in SERVERS.items():
        what = f"{title}: server instructions of a transition, in yardsticks"
        try:
            with counting_server(name) as counting, connect(counting.server) as client:
                ours = Blocking(client)
                ours.steps(50)
                ours.yardsticks(50)
                counts = [
                    (counting.instructions(ours.steps, steps), counting.instructions(ours.yardsticks, steps))
                    for _ in range(_ROUNDS)
                ]
        except MissingError as missing:
            yield Result(what, None, budget=BUDGETS["instructions"], note=str(missing))
        else:
            mine, theirs = (min(values) / (2 * steps) for values in zip(*counts, strict=True))
            yield Result(
                what,
                Spread.of([a / b for a, b in counts]),
                budget=BUDGETS["instructions"],
                note=f"{figure(mine)} against {figure(theirs)} instructions, by callgrind",
            )
