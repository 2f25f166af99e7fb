"""`squidstep timeline`: when each attempt of each step of a run ran."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from squidstep_redis import StepRunStore
from squidstep_redis.cli.bars import Bar, Timeline
from squidstep_redis.cli.base import (
    Where,
    as_json,
    complain,
    console_width,
    on_a_store,
    reached,
    show,
    show_json,
    steps_of,
)
from squidstep_redis.cli.drawing import as_html, as_svg
from squidstep_redis.cli.texts import attempt_as_dict


@click.command("timeline", epilog="Example: squidstep timeline order-1 --html order-1.html")
@on_a_store
@click.argument("run")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Write it as an SVG image.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write it as a page of its own.")
@as_json
def command(url: str, prefix: str, run: str, svg: Path | None, html: Path | None, as_json: bool) -> None:
    """Shows when each attempt of each step of a run ran, as bars: the last nine of each step.

    An --svg or --html file needs nothing but itself. The exit code is 1 if there is no such run.
    """
    with reached(Where(url, prefix)) as store:
        timeline = read(store, run)
    if timeline is None:
        complain(f"run {run!r}: there is no such run", 1)
    for path, drawn in ((svg, as_svg), (html, as_html)):
        if path is not None:
            try:
                path.write_text(drawn(timeline), "utf-8")
            except OSError as error:
                complain(f"{path}: {error.strerror}", 1)
    if as_json:
        show_json(_as_dict(timeline))
    elif svg is None and html is None:
        show(*timeline.lines(console_width()))
    else:
        sys.stdout.write("".join(f"{path}\n" for path in (svg, html) if path is not None))


def read(store: StepRunStore, run: str) -> Timeline | None:
    """Reads a run and its attempts; None if there is no such run."""
    step_runs = steps_of(store, run)
    if not step_runs:
        return None
    histories = store.batch([store.calls.attempts(run, step_run.step) for step_run in step_runs])
    bars: list[Bar] = []
    for step_run, attempts in zip(step_runs, histories, strict=True):
        if isinstance(attempts, Exception):
            raise attempts
        bars += [Bar(step_run.step, attempt) for attempt in attempts] or [Bar(step_run.step, None)]
    return Timeline(run, bars)


def _as_dict(timeline: Timeline) -> list[dict[str, Any]]:
    return [{"step": bar.step, **attempt_as_dict(bar.attempt)} for bar in timeline.bars if bar.attempt is not None]
