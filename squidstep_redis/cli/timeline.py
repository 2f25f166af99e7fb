"""`squidstep timeline`: shows when each attempt of each step of a run was executed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from squidstep_redis import Outcome, StepRunStore
from squidstep_redis.cli.completion import run_argument
from squidstep_redis.cli.connect import read_attempts, read_steps, store_or_exit
from squidstep_redis.cli.json_output import as_dict
from squidstep_redis.cli.options import StoreOptions, json_option, store_options
from squidstep_redis.cli.output import fail, print_json, print_line, print_text, terminal_width
from squidstep_redis.cli.timeline_chart import render_timeline
from squidstep_redis.cli.timeline_files import as_html, as_svg
from squidstep_redis.timelines import Bar, Timeline

_PIPE_WIDTH: Final = 100  # columns
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("timeline", epilog="Example: squidstep timeline order-1 --html order-1.html")
@store_options
@run_argument
@click.option("--svg", type=_FILE, help="Write the timeline to this file as an SVG image.")
@click.option("--html", type=_FILE, help="Write the timeline to this file as an HTML page.")
@json_option
def timeline_command(options: StoreOptions, run: str, svg: Path | None, html: Path | None, as_json: bool) -> None:
    """Shows the attempts of a run as bars.

    Only the last nine attempts of a step are recorded. The files are self-contained. The exit code is 1 if the
    run does not exist.
    """
    with store_or_exit(options) as store:
        timeline = read_timeline(store, run)
    if timeline is None:
        fail(f"run {run!r}: no such run", 1)
    files = [(path, render) for path, render in ((svg, as_svg), (html, as_html)) if path is not None]
    for path, render in files:
        try:
            path.write_text(render(timeline), "utf-8")
        except OSError as error:
            fail(f"{path}: {error.strerror}", 1)
    if as_json:
        attempts = [(bar.step, bar.attempt) for bar in timeline.bars if bar.attempt is not None]
        print_json([{"step": step, **as_dict(attempt)} for step, attempt in attempts])
    elif files:
        for path, _ in files:
            print_line(str(path))
    else:
        print_text(*render_timeline(timeline, terminal_width() or _PIPE_WIDTH))


def read_timeline(store: StepRunStore, run: str) -> Timeline | None:
    """Reads a run and its attempts. Returns None if the run does not exist."""
    step_runs = read_steps(store, run)
    if not step_runs:
        return None
    histories = read_attempts(store, run, [step_run.step for step_run in step_runs])
    bars: list[Bar] = []
    for step_run, attempts in zip(step_runs, histories, strict=True):
        lapsed_at = step_run.lease_ends_at
        bars += [
            Bar(step_run.step, attempt, lapsed_at if attempt.outcome is Outcome.RUNNING else None)
            for attempt in attempts
        ] or [Bar(step_run.step, None)]
    return Timeline(run, bars)
