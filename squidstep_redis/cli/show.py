"""`squidstep show`: prints the steps of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import click
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from squidstep_redis import Attempt, RunSummary, StepRun, StepStatus
from squidstep_redis.cli.cancel import format_run
from squidstep_redis.cli.completion import run_argument
from squidstep_redis.cli.connect import read_attempts, read_steps, store_or_exit
from squidstep_redis.cli.formatting import (
    STATUS_STYLES,
    fit,
    format_counts,
    format_error,
    format_last_error,
    format_payload,
    widest,
)
from squidstep_redis.cli.json_output import as_dict, as_shown
from squidstep_redis.cli.options import StoreOptions, json_option, store_options
from squidstep_redis.cli.output import fail, print_json, print_text, terminal_width
from squidstep_redis.durations import format_duration
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import format_lease, format_time, traceback_lines


@click.command("show", epilog="Example: squidstep show order-1 charge --full")
@store_options
@run_argument
@click.argument("step", required=False)
@click.option("--status", type=click.Choice([str(status) for status in StepStatus]), help="Only steps of this status.")
@click.option("--full", is_flag=True, help="Do not cut names, payloads and errors, and print tracebacks.")
@json_option
def show_command(
    options: StoreOptions, run: str, step: str | None, status: str | None, full: bool, as_json: bool
) -> None:
    """Shows the steps of a run.

    For each step, it shows status, attempt, owner, lease, times, input, and output or error. With a STEP, it shows that
    step and each of its attempts. Times are in UTC. `squidstep explain` says what to do about a step. The exit code is
    1 if the run or the step does not exist.
    """
    with store_or_exit(options) as store:
        if step is None:
            step_runs, attempts = read_steps(store, run), []
        else:
            found = store.get_step_run(run, step)
            step_runs, attempts = ([found], read_attempts(store, run, [step])[0]) if found else ([], [])
        summary = store.summarize_run(run)
    if not step_runs:
        fail(f"run {run!r}: no such run" if step is None else f"run {run!r}, step {step!r}: no such step", 1)
    if step is not None and status not in (None, step_runs[0].status):
        fail(f"run {run!r}, step {step!r}: the step is {step_runs[0].status}, not {status}", 1)
    counts = summary.counts if summary else Counter(each.status for each in step_runs)
    step_runs = [each for each in step_runs if status in (None, each.status)]
    if not as_json:
        print_text(*render_steps(run, step_runs, attempts, full=full, counts=counts, summary=summary))
    elif step is None:
        print_json([as_shown(each, summary) for each in step_runs])
    else:
        print_json({**as_shown(step_runs[0], summary), "attempts": [as_dict(attempt) for attempt in attempts]})


def render_steps(
    run: str,
    step_runs: list[StepRun],
    attempts: list[Attempt],
    *,
    full: bool = False,
    counts: Mapping[StepStatus, int],
    summary: RunSummary | None = None,
) -> Iterator[RenderableType]:
    """Renders step runs: a line for each, and its times, attempts and payloads below it.

    Args:
        run: The run's id.
        step_runs: The step runs to show, in order.
        attempts: The attempts of the step, if only one step is shown; empty for a whole run.
        full: Do not cut names, payloads and errors, and include tracebacks.
        counts: The number of the run's steps by status, which may include more than the steps to show.
        summary: The run's summary, for its creation, its labels, and whether it is cancelled; None: they are not shown.
    """
    yield render_heading(run, counts)
    for text, style in format_run(summary):
        yield Padding(Text(text, style, overflow="fold"), (0, 0, 0, 4))
    widths = column_widths(step_runs, None if full else terminal_width())
    for each in step_runs:
        yield render_line(each, *widths)
        yield Text(f"    when  {_format_times(each)}", "dim")
        for attempt in attempts:
            yield _render_attempt(attempt)
            if attempt.error is not None:
                yield Padding(Text(format_error(attempt.error, full=full), "red", overflow="fold"), (0, 0, 0, 8))
        yield from _render_payloads(each, full, with_error=not attempts)


def render_heading(run: str, counts: Mapping[StepStatus, int]) -> Text:
    """Renders the run's id and the number of its steps by status."""
    return Text.assemble((escaped(run), "bold"), "  ", format_counts(counts))


def column_widths(step_runs: list[StepRun], width: int | None) -> tuple[int, int]:
    """Returns the widths of the step column and the owner column.

    Args:
        step_runs: The step runs to show.
        width: The width of the terminal, in columns; None: nothing is cut.
    """
    most_step, most_owner = (10_000, 10_000) if width is None else (max(width // 2 - 10, 20), max(width // 4, 16))
    return widest((each.step for each in step_runs), most_step), widest(
        (each.owner or "" for each in step_runs), most_owner
    )


def render_line(step_run: StepRun, step_width: int, owner_width: int) -> Text:
    """Renders a step run as one line, with step and owner in columns of these widths (see `column_widths`)."""
    duration = ""
    if step_run.started_at is not None and step_run.status is not StepStatus.PENDING:
        seconds = ((step_run.ended_at or datetime.now(UTC)) - step_run.started_at).total_seconds()
        duration = f"{'for' if step_run.ended_at is None else 'took'} {format_duration(seconds)}"
    line = Text.assemble(
        f"{fit(step_run.step, step_width)}  ",
        (f"{step_run.status:9}", STATUS_STYLES[step_run.status]),
        f"  {duration:15}",
        f"  {fit(step_run.owner or '', owner_width)}" if owner_width else "",
        f"  attempt {step_run.attempt}" if step_run.attempt > 1 else "",
    )
    if lease := format_lease(step_run):
        line.append(f"  {lease}", "magenta" if "expired" in lease else "cyan")
    return line


def _format_times(step_run: StepRun) -> str:
    """Returns when a step was scheduled or begun, and ended, in UTC."""
    if step_run.started_at is None:
        return f"scheduled {format_time(step_run.created_at)} UTC"
    began = f"began {format_time(step_run.started_at)}"
    return f"{began}, ended {format_time(step_run.ended_at)} UTC" if step_run.ended_at else f"{began} UTC"


def _render_payloads(step_run: StepRun, full: bool, *, with_error: bool) -> Iterator[RenderableType]:
    if (input := format_payload(step_run, "input", full=full)) not in (None, "{}"):
        yield _render_payload("in   ", input or "")
    if (output := format_payload(step_run, "output", full=full)) is not None:
        yield _render_payload("out  ", output)
    if (progress := format_payload(step_run, "progress", full=full)) is not None:
        yield _render_payload("prog ", progress)
    if step_run.status is not StepStatus.FAILED:
        return
    if with_error:
        yield _render_payload("error", format_last_error(step_run, full=full), "red")
    for line in traceback_lines(step_run) if full else []:
        yield Padding(Text(line, "red", overflow="fold"), (0, 0, 0, 10))


def _render_payload(label: str, text: str, style: str = "") -> RenderableType:
    return Padding(Text.assemble((f"{label} ", "dim"), (text, style), overflow="fold"), (0, 0, 0, 4))


def _render_attempt(attempt: Attempt) -> Text:
    times = f"began {format_time(attempt.started_at)} UTC"
    if attempt.ended_at is not None:
        times += f", took {format_duration((attempt.ended_at - attempt.started_at).total_seconds())}"
    outcome, owner = attempt.outcome.replace("_", " "), escaped(attempt.owner or "")
    return Text(f"    attempt {attempt.number}  {outcome}  {times}  {owner}".rstrip(), overflow="fold")
