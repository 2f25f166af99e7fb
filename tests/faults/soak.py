"""Workers of both stores at the same few steps, while they are killed, the network loses and the server goes away.

The hand that does it, and what came of it. `crew.py` has the workers, `relay.py` the network, `audit.py` the verdict.
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

from .audit import Verdict, audit
from .crew import PROCESSES, Crew
from .relay import Relay

PAUSE: Final = (0, 0.12)  # seconds between two faults, from and to
ENOUGH: Final = 2_000  # operations that a history must have before it tells anything


@dataclass
class Report:
    """What happened, and whether it may have."""

    seconds: float
    seconds_after: float  # that the verdict took when all was over
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
            "zombies refused": counts["zombies refused"],
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
    """The audit's process, and the pipe to it."""
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


def soak(seconds: float, directory: Path, *, binary: Path, lua: Path | None = None, seed: int = 0) -> Report:
    """Lets a crew work, while all that can go wrong does, for so long or until the first answer that is wrong.

    On a machine that is too busy for ENOUGH operations in that time it goes on, but for a minute more at most.
    """
    dice = random.Random(seed)
    options = {"appendonly": "yes", "appendfsync": "always"}  # everysec may put a write off while the disk is busy
    logs = directory / "logs"
    logs.mkdir(parents=True)
    with (
        EmbeddedServer(binary=binary, options=options, port=0) as server,
        Relay((server.host, server.port), dice) as relay,
        redis.Redis.from_url(server.url) as client,
        auditing(logs, server.url, lua and str(lua)) as auditor,
    ):
        faults = Counter[str]()
        began = time.monotonic()
        with Crew((server.url, f"redis://127.0.0.1:{relay.port}/0"), logs, dice, lua) as crew:

            def restart() -> None:
                server.kill()
                server.start()

            def pause() -> None:
                server.pause()
                time.sleep(dice.uniform(0, 0.2))
                server.resume()

            acts: dict[str, tuple[int, Callable[[], object]]] = {
                "workers killed": (6, crew.kill_one),
                "replies lost": (24, lambda: relay.lose_replies(dice.choice((1, 1, 3)))),
                "requests lost": (3, relay.lose_request),
                "requests late": (3, relay.delay_request),
                "scripts flushed": (4, client.script_flush),
                "server killed and restarted": (2, restart),
                "server paused": (2, pause),
            }
            weights = [weight for weight, _ in acts.values()]
            while time.monotonic() - began < seconds + 60 * (_written(logs) < ENOUGH):
                if auditor.poll(dice.uniform(*PAUSE)):
                    auditor.recv()
                    break
                name = dice.choices(list(acts), weights)[0]
                acts[name][1]()
                faults[name] += 1
            if ended := crew.ended_by_themselves():
                raise AssertionError(f"{ended} ended by themselves")
        lasted = time.monotonic() - began
        auditor.send("it is over")
        while not isinstance(verdict := auditor.recv(), Verdict):
            pass
    return Report(lasted, time.monotonic() - began - lasted, verdict, faults)


def _written(logs: Path) -> float:
    """About how many operations the logs tell of."""
    return sum(path.stat().st_size for path in logs.iterdir()) / 150
