"""`squidstep failed`: what failed, across runs."""

from __future__ import annotations

import sys
from collections import defaultdict

import click
from rich.table import Table
from rich.text import Text

from squidstep_redis import StepRun, UndecodablePayloadError
from squidstep_redis.cli.base import Where, as_json, on_a_store, reached, show, show_json
from squidstep_redis.cli.texts import ago, brief_error, clean, error_type, step_run_as_dict


@click.command("failed", epilog="Example: squidstep failed --by-type --limit 1000")
@on_a_store
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1_000), help="How many at most.")
@click.option("--by-type", is_flag=True, help="Group them by the type of their error.")
@as_json
def command(url: str, prefix: str, limit: int, by_type: bool, as_json: bool) -> None:
    """Lists failed steps across runs, newest first.

    \b
    The exit code is for monitoring:
      0  there are none
      1  there are some
      2  the server was not reached
    """  # noqa: D301 -- \b is click's own
    with reached(Where(url, prefix)) as store:
        found = store.failed_steps(limit)
    groups: defaultdict[str, list[StepRun]] = defaultdict(list)
    for step_run in found:
        groups[_type_of(step_run)].append(step_run)
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    if as_json and by_type:
        show_json({name: [step_run_as_dict(step_run) for step_run in group] for name, group in largest_first})
    elif as_json:
        show_json([step_run_as_dict(step_run) for step_run in found])
    elif found and by_type:
        _show_groups(largest_first)
    elif found:
        _show(found)
    sys.exit(1 if found else 0)


def _type_of(step_run: StepRun) -> str:
    try:
        return error_type(step_run.last_error)
    except UndecodablePayloadError:
        return "(cannot be decoded)"


def _show(found: list[StepRun]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("failed", no_wrap=True)
    for name in ("run", "step"):
        table.add_column(name, overflow="fold")
    table.add_column("attempt", justify="right", no_wrap=True)
    table.add_column("error", overflow="fold", ratio=1)
    for step_run in found:
        names = (Text(clean(step_run.run_id)), Text(clean(step_run.step)))
        table.add_row(ago(step_run.ended_at), *names, str(step_run.attempt), Text(brief_error(step_run), "red"))
    show(table)


def _show_groups(groups: list[tuple[str, list[StepRun]]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("type", overflow="fold")
    table.add_column("newest", no_wrap=True)
    table.add_column("for example", overflow="fold", ratio=1)
    for name, group in groups:
        first = group[0]
        example = Text(f"{clean(first.step)} of {clean(first.run_id)}: {brief_error(first)}")
        table.add_row(str(len(group)), Text(name, "red"), ago(first.ended_at), example)
    show(table)
