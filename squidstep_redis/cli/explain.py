"""`squidstep explain`: explains why a run is not finished, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

import click
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from squidstep_redis import RunExplanation, StepExplanation
from squidstep_redis.cli.cancel import format_run
from squidstep_redis.cli.completion import run_argument
from squidstep_redis.cli.connect import store_or_exit
from squidstep_redis.cli.formatting import STATUS_STYLES, format_counts
from squidstep_redis.cli.json_output import as_dict
from squidstep_redis.cli.options import StoreOptions, json_option, store_options
from squidstep_redis.cli.output import fail, print_json, print_text
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import format_command, format_headline

_GONE: Final = "It was never begun, has expired, or was deleted; or it is in a store with another --url or --prefix."


@click.command("explain", epilog="Example: squidstep explain order-1 charge")
@store_options
@run_argument
@click.argument("step", required=False)
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(1, 1_000), help="The maximum number of steps."
)
@json_option
def explain_command(options: StoreOptions, run: str, step: str | None, limit: int, as_json: bool) -> None:
    """Explains why a run is stuck, and what to do.

    It explains every step that is not completed, those that need an operator first; or only STEP. It says why a step
    is in its state, what happens next, and what you can do. The exit code is 1 if the run or the step does not exist.
    """
    with store_or_exit(options) as store:
        if step is None:
            of_run = store.explain_run(run, limit=limit)
            if of_run is None:
                fail(f"run {run!r}: no such run. {_GONE}", 1)
            of_step = None
        else:
            of_run, of_step = None, store.explain_step(run, step)
            if of_step is None:
                fail(f"run {run!r}, step {step!r}: no such step: it has neither been scheduled nor begun", 1)
    if as_json:
        print_json(_run_as_dict(of_run) if of_run else _as_dict(of_step))
    elif of_run:
        print_text(*_render_run(of_run))
    elif of_step:
        print_text(*_render_step(of_step, f"{escaped(of_step.run_id)}  {escaped(of_step.step)}"))


def _render_run(explained: RunExplanation) -> Iterator[RenderableType]:
    summary = explained.summary
    yield Text.assemble((escaped(summary.run_id), "bold"), "  ", format_counts(summary.counts))
    for text, style in format_run(summary):
        yield Text(text, style)
    if not explained.steps:
        yield Text("Every step is completed: nothing is left to do, unless your code adds further steps.")
    for each in explained.steps:
        yield Text()
        yield from _render_step(each, escaped(each.step))
    if explained.omitted:
        yield Text(f"\n{explained.omitted:,} further steps are not completed: use --limit, or name a STEP", "dim")


def _render_step(explained: StepExplanation, name: str) -> Iterator[RenderableType]:
    yield Text.assemble((name, "bold"), "  ", (format_headline(explained), STATUS_STYLES[explained.status]))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    table.add_row("  why", Text(explained.why))  # rich would read brackets in a str as markup
    table.add_row("  next", Text(explained.next))
    for index, action in enumerate(explained.actions):
        command = format_command(explained, action)
        text = Text(f"- {action.effect}")
        if command:
            text.append(f"\n  $ {command}", "cyan")
        table.add_row("  you can" if not index else "", text)
    yield table


def _as_dict(explained: StepExplanation | None) -> dict[str, Any]:
    if explained is None:
        return {}
    actions = [action._asdict() for action in explained.actions]
    values = {**explained._asdict(), "actions": actions}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


def _run_as_dict(explained: RunExplanation) -> dict[str, Any]:
    return {
        "run": as_dict(explained.summary),
        "read_at": explained.read_at.isoformat(),
        "steps": [_as_dict(each) for each in explained.steps],
        "omitted": explained.omitted,
    }
