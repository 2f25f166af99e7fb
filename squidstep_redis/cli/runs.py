"""`squidstep runs`: lists runs."""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from squidstep_redis import RunSummary, StepRunStore, StepStatus
from squidstep_redis.cli.connect import store_or_exit
from squidstep_redis.cli.formatting import clean, format_age, format_counts
from squidstep_redis.cli.json_output import summary_as_dict
from squidstep_redis.cli.options import StoreOptions, json_option, run_prefix_option, store_options
from squidstep_redis.cli.output import new_table, print_json, print_text


@click.command("runs", epilog="Example: squidstep runs --status failed --run-prefix order-")
@store_options
@click.option(
    "--status", type=click.Choice([str(status) for status in StepStatus]), help="Only runs with a step of this status."
)
@run_prefix_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1_000), help="About how many runs.")
@click.option("--all", "every", is_flag=True, help="Read all pages, and sort all runs.")
@click.option("--cursor", help="Start at this cursor, which the page before printed.")
@json_option
def runs_command(
    options: StoreOptions,
    status: str | None,
    run_prefix: str,
    limit: int,
    every: bool,
    cursor: str | None,
    as_json: bool,
) -> None:
    """Lists one page of runs, the last changed first.

    There is no index of runs: the command scans the server's keys, which have no order. A page is sorted by itself;
    use --all to sort all runs. Pass the printed cursor to --cursor to read the next page.
    """
    with store_or_exit(options) as store:
        filters = {"status": status, "run_id_prefix": run_prefix}
        runs, cursor = _read_pages(store, filters, limit, every, cursor)
    if as_json:
        print_json({"runs": [summary_as_dict(summary) for summary in runs], "cursor": cursor})
        return
    table = new_table({"run": "fold", "steps": "number", "of which": "fold", "last change": "fixed"})
    for summary in runs:
        is_sound = summary.problem is None
        table.add_row(
            Text(clean(summary.run_id)),
            str(summary.steps) if is_sound else "",
            format_counts(summary.counts) if is_sound else Text(clean(summary.problem or ""), "bold red"),
            format_age(summary.changed_at),
        )
    if runs:
        print_text(table)
    if cursor is not None:
        sys.stderr.write(f"more: --cursor {cursor}, or --all\n")
    elif not runs:
        sys.stderr.write("no runs\n")


def _read_pages(
    store: StepRunStore, filters: dict[str, Any], limit: int, every: bool, cursor: str | None
) -> tuple[list[RunSummary], str | None]:
    """Reads pages until there are enough runs. On a terminal it shows the progress of a long scan."""
    found: list[RunSummary] = []
    console = Console(stderr=True)
    is_long = console.is_terminal and (every or any(filters.values()))
    columns = (TextColumn("scanning for runs"), BarColumn(), TextColumn("{task.fields[found]:,} found"))
    with Progress(*columns, console=console, transient=True, disable=not is_long) as progress:
        task = progress.add_task("", total=1.0, found=0)
        while True:
            page = store.runs(cursor=cursor, limit=1_000 if every else limit, **filters)
            found += page.runs
            cursor = page.cursor
            progress.update(task, completed=page.progress, found=len(found))
            if cursor is None or (not every and len(found) >= limit):
                break
    found.sort(key=lambda summary: summary.changed_at.timestamp() if summary.changed_at else 0, reverse=True)
    return found, cursor
