"""`squidstep demo`: real work under real faults, and a check that does not rest on the store's word.

The parent process is the queue: it delivers steps to worker processes, a fifth of them twice, kills one worker inside
a step and delivers again what was not acknowledged. Workers ask the store whether they may execute. Apart from the
store, they tell the parent of each effect that they begin and end.
"""

from __future__ import annotations

from typing import Any

import click
from rich.console import RenderableType
from rich.text import Text

from squidstep_redis import Outcome, StepRunStore
from squidstep_redis.demo.broker import Broker
from squidstep_redis.demo.stage import Options, Stage, options, perform, progress, screen
from squidstep_redis.demo.work import check_runs


@click.command("demo")
@options(files=300, workers=4)
def command(**chosen: Any) -> None:
    """Does real work under real faults, and checks the result.

    Each file under PATH (by default the .py files of Python's standard library) is a run of three steps: its digest,
    its compressed size, its lines and words. A fifth of the deliveries comes twice. One worker is killed inside a
    step; when its lease ends, another takes over. Exits with 0 only if nothing was lost, nothing was executed twice
    save the killed step, and every output agrees with a plain sequential computation.

    Left out are symbolic links, hidden directories, and files that are unreadable or over 4 MiB.
    """
    perform(Options(**chosen), _play, _rows)


def _play(stage: Stage) -> dict[str, Any]:
    broker = Broker(stage.settings, stage.files, stage.say)
    with stage.showing(f"{stage.workers} workers", lambda: _screen(broker)):
        broker.run(stage.workers)
    with stage.console.status("checking every output"):
        problems = check(stage.store, broker)
    counts = broker.tally.counts
    attempts = stage.store.attempts(*broker.victim)
    return stage.figures(
        broker.tally,
        problems,
        broker.seconds,
        duplicates=broker.duplicates,
        duplicates_skipped=counts["skipped"],
        told_to_wait=counts["busy"],
        takeovers=counts["takeovers"],
        workers_killed=int(broker.killed is not None),
        killed_step={
            "run_id": broker.victim[0],
            "step": broker.victim[1],
            "attempts": [{"owner": attempt.owner, "outcome": attempt.outcome} for attempt in attempts],
        },
    )


def check(store: StepRunStore, broker: Broker) -> list[str]:
    """Holds the store, and what the workers told, against a plain sequential computation.

    Returns:
        What is wrong: nothing, if all is well.
    """
    problems = list(check_runs(store, broker.files, broker.tally, {broker.victim}))
    attempts = store.attempts(*broker.victim)
    owners = [attempt.owner for attempt in attempts]
    if [attempt.outcome for attempt in attempts] != [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]:
        problems.append(f"the attempts at the killed step are {attempts}")
    elif broker.killed is None or owners[0] != broker.killed.owner or owners[1] == owners[0]:
        problems.append(f"the killed step was not taken over from {broker.killed}: {attempts}")
    counts = broker.tally.counts
    if counts["takeovers"] != 1:
        problems.append(f"there were {counts['takeovers']} takeovers, not 1")
    if counts["skipped"] != broker.duplicates:
        problems.append(f"{broker.duplicates} steps were delivered twice, {counts['skipped']} were skipped")
    return problems


def _screen(broker: Broker) -> RenderableType:
    """How far it is, while it runs."""
    counts = broker.tally.counts
    rows: dict[str, RenderableType] = {
        "steps done": progress(counts["completed"], broker.steps),
        "duplicates skipped": f"{counts['skipped']} of {broker.duplicates}",
        "takeovers": str(counts["takeovers"]),
    }
    for worker in list(broker.workers):
        rows[worker.owner] = Text(worker.state, style="red" if worker is broker.killed else "")
    return screen(rows)


def _rows(result: dict[str, Any]) -> dict[str, Any]:
    killed = result["killed_step"]
    attempts = (f"{n}: {attempt['outcome']}, {attempt['owner']}" for n, attempt in enumerate(killed["attempts"], 1))
    return {
        "duplicates skipped": f"{result['duplicates_skipped']} of {result['duplicates']}",
        "takeovers": result["takeovers"],
        "workers killed": result["workers_killed"],
        "the killed step": "\n".join((f"{killed['step']} of {killed['run_id']}", *attempts)),
    }
