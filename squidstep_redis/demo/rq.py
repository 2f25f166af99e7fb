"""`squidstep demo rq`: the demo's work as jobs of real RQ workers, which are killed and started anew.

RQ delivers: again what died with a horse or a worker, also while the horse of a dead worker is still at it. On top,
some jobs are enqueued twice and some finished ones requeued. The check is that of `squidstep demo`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import click
from rich.console import RenderableType
from rich.text import Text
from rq.job import JobStatus

from squidstep_redis import Outcome
from squidstep_redis.demo.rq_supervisor import Supervisor
from squidstep_redis.demo.stage import Options, Stage, options, perform, progress, screen
from squidstep_redis.demo.work import check_runs, sequential


@click.command("demo rq")
@options(files=60, workers=2)
def command(**chosen: Any) -> None:
    """Does the same as jobs of RQ, whose workers are killed.

    Each file under PATH (by default the .py files of Python's standard library) is a job of three steps: its digest,
    its compressed size, its lines and words. A work-horse is killed inside a step, then a worker together with its
    horse, and a worker alone, whose horse lives on while RQ delivers the job again. A fifth of the jobs is enqueued
    twice, a fifth requeued when finished. Exits with 0 only if each job finished, nothing was lost, nothing was
    executed twice save the killed steps, and every output agrees with a plain sequential computation.

    RQ's intervals are shortened: seconds, instead of minutes, until it takes a job for abandoned. A file or directory
    called "rq" is "./rq".
    """
    perform(Options(**chosen), _play, _rows)


def _play(stage: Stage) -> dict[str, Any]:
    supervisor = Supervisor(stage)
    workers = f"{stage.workers} workers of RQ {version('rq')}"
    with stage.showing(workers, lambda: _screen(stage, supervisor)):
        supervisor.run()
    with stage.console.status("checking every output"):
        problems = check(stage, supervisor)
    counts = supervisor.tally.counts
    return stage.figures(
        supervisor.tally,
        problems,
        supervisor.seconds,
        rq=version("rq"),
        jobs_finished=supervisor.finished,
        deliveries=counts["delivered"],
        enqueued_twice=len(supervisor.twice),
        requeued=len(supervisor.requeued),
        told_to_wait=counts["busy"],
        steps_skipped=counts["skipped"],
        takeovers=counts["takeovers"],
        workers_restarted=supervisor.restarts,
        killed_inside=[
            {
                "killed": fate,
                "run_id": run_id,
                "step": step,
                "attempts": [
                    {"owner": attempt.owner, "outcome": attempt.outcome}
                    for attempt in stage.store.attempts(run_id, step)
                ],
            }
            for (run_id, step), fate in supervisor.fates.items()
        ],
    )


# The check


def check(stage: Stage, supervisor: Supervisor) -> list[str]:
    """Holds the store, RQ, and what the horses told, against a plain sequential computation.

    Returns:
        What is wrong: nothing, if all is well.
    """
    twice = {key for key, fate in supervisor.fates.items() if fate != "worker"}
    problems = list(
        check_runs(
            stage.store,
            stage.files,
            supervisor.tally,
            twice,
            as_input=lambda known: {"known": known},
            as_output=lambda output: {"result": output},
        )
    )
    problems += _wrong_jobs(stage, supervisor)
    problems += _wrong_attempts(stage, supervisor)
    counts, enqueued = supervisor.tally.counts, len(stage.files) + len(supervisor.twice) + len(supervisor.requeued)
    if counts["takeovers"] != len(twice):
        problems.append(f"there were {counts['takeovers']} takeovers, not {len(twice)}")
    if counts["delivered"] < enqueued + len(supervisor.fates):
        problems.append(
            f"{enqueued} times a job was enqueued, {len(supervisor.fates)} were killed: "
            f"RQ delivered {counts['delivered']} times, which is too few"
        )
    return problems


def _wrong_jobs(stage: Stage, supervisor: Supervisor) -> Iterator[str]:
    for name, id in supervisor.jobs.items():
        with suppress(OSError):  # of which `check_runs` tells
            expected = {key: value for _, _, output in sequential(stage.files[name]) for key, value in output.items()}
            job = supervisor.queue.fetch_job(id)
            if job is None:
                yield f"{name}: its job is gone"
            elif (status := job.get_status()) != JobStatus.FINISHED or job.return_value() != expected:
                latest = job.latest_result()
                error = (latest.exc_string or "").strip().rpartition("\n")[2] if latest is not None else ""
                yield f"{name}: its job is {status.value}, with {error or job.return_value()}"


def _wrong_attempts(stage: Stage, supervisor: Supervisor) -> Iterator[str]:
    for key, fate in supervisor.fates.items():
        attempts, horse = stage.store.attempts(*key), supervisor.hit.get(key)
        outcomes = [attempt.outcome for attempt in attempts]
        if outcomes != [Outcome.LEASE_EXPIRED, Outcome.COMPLETED][fate == "worker" :]:
            yield f"{key[0]}: the attempts at {key[1]}, when a {fate} was killed, are {attempts}"
        elif horse is None or f":{horse.horse} " not in str(attempts[0].owner):
            yield f"{key[0]}: {key[1]} was first begun by {attempts[0].owner}, not by {horse}"


# What is shown


def _screen(stage: Stage, supervisor: Supervisor) -> RenderableType:
    """How far it is, while it runs."""
    counts = supervisor.tally.counts
    rows: dict[str, RenderableType] = {
        "jobs finished": progress(supervisor.finished, len(stage.files)),
        "deliveries": str(counts["delivered"]),
        "told to wait": str(counts["busy"]),
        "takeovers": str(counts["takeovers"]),
    }
    for worker in list(supervisor.workers):
        rows[worker.title] = Text(worker.state, style="red" if worker.ended else "")
    return screen(rows)


def _rows(result: dict[str, Any]) -> dict[str, Any]:
    again = f"{result['enqueued_twice']} jobs were enqueued twice, {result['requeued']} requeued"
    rows = {
        "jobs finished": f"{result['jobs_finished']} of {result['files']}",
        "deliveries": f"{result['deliveries']}; {again}",
        "told to wait": result["told_to_wait"],
        "steps skipped": result["steps_skipped"],
        "takeovers": result["takeovers"],
        "workers restarted": result["workers_restarted"],
    }
    for killed in result["killed_inside"]:
        owners = [str(attempt["owner"]).partition(" ")[0] for attempt in killed["attempts"]]  # without the job
        outcomes = [attempt["outcome"] for attempt in killed["attempts"]]
        attempts = [f"{n}: {of}, {by}" for n, (of, by) in enumerate(zip(outcomes, owners, strict=True), 1)]
        rows[f"{killed['killed']} killed"] = "\n".join((f"inside {killed['step']} of {killed['run_id']}", *attempts))
    return rows
