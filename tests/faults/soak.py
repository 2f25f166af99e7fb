"""Workers of both stores execute the same few steps, while faults hit the workers, the network and the server.

This module injects the faults and makes the report. `crew.py` and `cancellations.py` have the workers, `relay.py` the
network, `audit.py` the checks.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis

from squidstep_redis.embedded import EmbeddedServer

from . import cancellations
from .audit import Verdict, audit
from .crew import PROCESSES, Crew
from .relay import Relay
from .topologies import Pair, connected

PAUSE: Final = (0, 0.12)  # seconds between two faults: least and most
MIN_OPERATIONS: Final = 2_000  # a shorter history proves nothing


@dataclass
class Report:
    """The result of a soak and the number of faults."""

    seconds: float
    seconds_after: float  # from the end of the soak to the verdict
    verdict: Verdict
    faults: Counter[str]

    @property
    def problems(self) -> list[str]:
        return self.verdict.findings.problems

    def lines(self) -> Iterator[str]:
        counts, findings = self.verdict.counts, self.verdict.findings
        rows: dict[str, float] = {
            "operations": counts["operations"],
            "operations per second": counts["operations"] / self.seconds,
            **self.faults,
            "takeovers": counts["takeovers"],
            "zombies rejected": counts["zombies rejected"],
            "operations sent more than once": counts["sent more than once"],
            "operations without a reply": counts["replies never received"],
            "completions found at the end": counts["completions found at the end"],
            "lost": len(findings.lost),
            "doubly executed": len(findings.doubly_executed),
            "undecided": len(findings.undecided),
            "seconds": self.seconds,
            "seconds of checking": self.verdict.busy,
            "seconds from the end to the verdict": self.seconds_after,
        }
        yield from (f"{count:>12,.0f}  {name}" for name, count in rows.items())
        verdict = "linearizable" if not (self.problems or findings.undecided) else "NOT linearizable"
        yield f"{'verdict':>12}  {verdict}{'' if not self.verdict.errors else ', with errors'}"
        yield from [*self.problems, *findings.undecided, *self.verdict.errors][:10]


@contextmanager
def auditing(*args: Any) -> Iterator[Any]:
    """Runs the audit's process, and yields the pipe to it."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=audit, args=(*args, there), daemon=True)
    process.start()
    there.close()
    with here:
        try:
            yield here
        finally:
            process.kill()
            process.join()


Actions = dict[str, tuple[int, Callable[[], object]]]
"""The faults, each with its weight and with what injects it."""


def soak(seconds: float, directory: Path, *, binary: Path, lua: Path | None = None, seed: int = 0) -> Report:
    """Injects faults while a crew works, until the time is over or the audit finds a wrong result.

    On a slow machine, the soak continues for up to a minute, until it has MIN_OPERATIONS operations.

    Args:
        seconds: the length of the soak.
        directory: where the workers write their logs.
        binary: the server binary.
        lua: a directory of scripts to use instead of the package's; None: the package's.
        seed: the seed of the random faults.
    """
    dice = random.Random(seed)
    options = {"appendonly": "yes", "appendfsync": "always"}  # everysec can delay a write while the disk is busy
    logs = _make_logs(directory)
    with (
        EmbeddedServer(binary=binary, options=options, port=0) as server,
        Relay((server.host, server.port), dice) as relay,
        redis.Redis.from_url(server.url) as client,
        auditing(logs, server.url, lua and str(lua)) as auditor,
    ):
        crew = Crew((server.url, f"redis://127.0.0.1:{relay.port}/0"), logs, dice, lua)

        def restart() -> None:
            server.kill()
            server.start()

        actions: Actions = {
            "workers killed": (6, crew.kill_one),
            **_network_faults(relay, dice),
            "scripts flushed": (4, client.script_flush),
            "server killed and restarted": (2, restart),
            "server paused": (2, lambda: _pause(server, dice)),
        }
        return _run(seconds, crew, actions, auditor)


def soak_of_cancellations(
    seconds: float,
    directory: Path,
    *,
    binary: Path,
    lua: Path | None = None,
    target: Callable[..., None] = cancellations.work,
    seed: int = 0,
) -> Report:
    """The same for asyncio workers whose tasks are cancelled, while the primary changes behind one address.

    Args:
        seconds: the length of the soak.
        directory: where the workers write their logs.
        binary: the server binary.
        lua: a directory of scripts to use instead of the package's; None: the package's.
        target: what a worker's process runs.
        seed: the seed of the random faults.
    """
    dice = random.Random(seed)
    logs = _make_logs(directory)
    with Pair(binary) as pair, Relay((pair.primary.host, pair.primary.port), dice) as relay:
        address = f"redis://127.0.0.1:{relay.port}/0"
        with auditing(logs, address, lua and str(lua)) as auditor:
            crew = Crew((address,), logs, dice, lua, size=4, target=target)

            def lead_to(server: EmbeddedServer) -> None:
                relay.server = (server.host, server.port)

            def demote() -> None:
                pair.change_roles(lead_to, dice.uniform(0, 0.2), moves_first=dice.random() < 0.5)

            def kill_connections() -> None:
                with connected(pair.primary) as admin:
                    ids = [each["id"] for each in admin.client_list(_type="normal") if each["cmd"] != "client|list"]
                    for killed in dice.sample(ids, min(len(ids), dice.choice((1, 1, 2, 4)))):
                        admin.client_kill_filter(_id=killed)

            def flush_scripts() -> None:
                with connected(pair.primary) as admin:
                    admin.script_flush()

            actions: Actions = {
                "workers killed": (2, crew.kill_one),
                **_network_faults(relay, dice),
                "connections killed": (16, kill_connections),
                "primaries demoted": (6, demote),
                "scripts flushed": (4, flush_scripts),
                "server paused": (2, lambda: _pause(pair.primary, dice)),
            }
            return _run(seconds, crew, actions, auditor)


def _run(seconds: float, crew: Crew, actions: Actions, auditor: Any) -> Report:
    faults = Counter[str]()
    dice, logs = crew.dice, crew.logs
    began = time.monotonic()
    with crew:
        weights = [weight for weight, _ in actions.values()]
        while time.monotonic() - began < seconds + 60 * (_count_operations(logs) < MIN_OPERATIONS):
            if auditor.poll(dice.uniform(*PAUSE)):
                auditor.recv()
                break
            name = dice.choices(list(actions), weights)[0]
            actions[name][1]()
            faults[name] += 1
        ended = crew.unexpected_ends()
    lasted = time.monotonic() - began
    auditor.send("finish")
    while not isinstance(verdict := auditor.recv(), Verdict):
        pass
    verdict.errors += [f"{worker} ended unexpectedly" for worker in ended]
    return Report(lasted, time.monotonic() - began - lasted, verdict, faults)


def _make_logs(directory: Path) -> Path:
    logs = directory / "logs"
    logs.mkdir(parents=True)
    return logs


def _network_faults(relay: Relay, dice: random.Random) -> Actions:
    return {
        "replies lost": (24, lambda: relay.lose_replies(dice.choice((1, 1, 3)))),
        "requests lost": (3, relay.lose_request),
        "requests late": (3, relay.delay_request),
    }


def _pause(server: EmbeddedServer, dice: random.Random) -> None:
    server.pause()
    time.sleep(dice.uniform(0, 0.2))
    server.resume()


def _count_operations(logs: Path) -> float:
    """Estimates the number of operations from the size of the logs."""
    return sum(path.stat().st_size for path in logs.iterdir()) / 150
