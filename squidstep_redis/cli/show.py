"""`squidstep show`: one run, step by step."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

import click
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from squidstep_redis import Attempt, StepRun, StepStatus
from squidstep_redis.cli.base import Where, as_json, complain, on_a_store, reached, show, show_json, steps_of
from squidstep_redis.cli.texts import (
    STYLES,
    attempt_as_dict,
    brief_error,
    clean,
    error_in_brief,
    fitted,
    lease_left,
    payload_of,
    span,
    step_run_as_dict,
    took,
    traceback_of,
    width_of,
)


@click.command("show", epilog="Example: squidstep show order-1 charge --full")
@on_a_store
@click.argument("run")
@click.argument("step", required=False)
@click.option("--full", is_flag=True, help="Show payloads and errors whole, tracebacks too.")
@as_json
def command(url: str, prefix: str, run: str, step: str | None, full: bool, as_json: bool) -> None:
    """Shows the steps of a run: status, attempts, owner, lease, and what went in and came out.

    With a STEP, that one alone, with each of its attempts. The exit code is 1 if there is no such run or step.
    """
    with reached(Where(url, prefix)) as store:
        if step is None:
            step_runs, attempts = steps_of(store, run), []
        else:
            found = store.get_step_run(run, step)
            step_runs, attempts = ([found], store.attempts(run, step)) if found else ([], [])
    if not step_runs:
        complain(f"run {run!r}: there is no such {'step' if step is not None else 'run'}", 1)
    if as_json:
        told = [step_run_as_dict(each) for each in step_runs]
        if step is None:
            show_json(told)
        else:
            show_json({**told[0], "attempts": [attempt_as_dict(attempt) for attempt in attempts]})
        sys.exit(0)
    show(*rendered(run, step_runs, attempts, full=full))


def rendered(
    run: str, step_runs: list[StepRun], attempts: list[Attempt], *, full: bool = False, payloads: bool = True
) -> Iterator[RenderableType]:
    """What is shown of step runs: a line each, and below it what went in and came out."""
    yield heading(run, step_runs)
    names = width_of((each.step for each in step_runs), 30)
    owners = width_of((each.owner or "" for each in step_runs), 24)
    for each in step_runs:
        yield line_of(each, names, owners)
        for attempt in attempts:
            yield _attempt(attempt)
            if attempt.error is not None:
                yield Padding(Text(error_in_brief(attempt.error), "red", overflow="fold"), (0, 0, 0, 8))
        if payloads:
            yield from _payloads(each, full)


def heading(run: str, step_runs: list[StepRun]) -> Text:
    """The run, and how far it is."""
    counts = Counter(each.status for each in step_runs)
    parts = [Text(f"{counts[status]} {status}", STYLES[status]) for status in STYLES if counts[status]]
    return Text.assemble((clean(run), "bold"), "  ", Text(", ").join(parts))


def line_of(step_run: StepRun, names: int, owners: int) -> Text:
    """One step run in one line."""
    attempt = f"attempt {step_run.attempt}" if step_run.attempt > 1 else ""
    line = Text.assemble(
        f"{fitted(step_run.step, names)}  ",
        (f"{step_run.status:9}", STYLES[step_run.status]),
        f"  {took(step_run):>10}",
        f"  {fitted(step_run.owner or '', owners)}" if owners else "",
        f"  {attempt}" if attempt else "",
    )
    if left := lease_left(step_run):
        line.append(f"  {left}", "magenta" if left.startswith("lapsed") else "cyan")
    return line


def _payloads(step_run: StepRun, full: bool) -> Iterator[RenderableType]:
    if (input := payload_of(step_run, "input", full=full)) not in (None, "{}"):
        yield _folded("in   ", input or "")
    if (output := payload_of(step_run, "output", full=full)) is not None:
        yield _folded("out  ", output)
    if step_run.status is not StepStatus.FAILED:
        return
    yield _folded("error", brief_error(step_run), "red")
    if full:
        for line in traceback_of(step_run):
            yield Padding(Text(clean(line), "red", overflow="fold"), (0, 0, 0, 10))


def _folded(label: str, text: str, style: str = "") -> RenderableType:
    return Padding(Text.assemble((f"{label} ", "dim"), (text, style), overflow="fold"), (0, 0, 0, 4))


def _attempt(attempt: Attempt) -> Text:
    ended = "" if attempt.ended_at is None else span((attempt.ended_at - attempt.started_at).total_seconds())
    started = f"{attempt.started_at:%Y-%m-%d %H:%M:%S}"
    return Text(
        f"    attempt {attempt.number}  {started}  {ended:>10}  {attempt.outcome}  {clean(attempt.owner or '')}"
    )
