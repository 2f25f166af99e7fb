"""`squidstep runs`: which runs there are."""

from __future__ import annotations

import sys
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from squidstep_redis import RunSummary, StepRunStore, StepStatus
from squidstep_redis.cli.base import Where, as_json, on_a_store, reached, show, show_json
from squidstep_redis.cli.texts import ago, clean, counts_of, summary_as_dict


@click.command("runs", epilog="Example: squidstep runs --status failed --run-prefix order-")
@on_a_store
@click.option(
    "--status", type=click.Choice([str(status) for status in StepStatus]), help="Only runs with a step of this status."
)
@click.option("--run-prefix", default="", help="Only runs whose id begins so.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1_000), help="About how many.")
@click.option("--all", "every", is_flag=True, help="Read all pages, and sort all runs.")
@click.option("--cursor", help="Where the page before ended.")
@as_json
def command(
    url: str,
    prefix: str,
    status: str | None,
    run_prefix: str,
    limit: int,
    every: bool,
    cursor: str | None,
    as_json: bool,
) -> None:
    """Lists runs: a page of them, newest change first.

    There is no index of runs, so the server's keys are passed bit by bit, in no order: newest first holds within a
    page, and with --all for all runs. The next page begins where --cursor says.
    """
    with reached(Where(url, prefix)) as store:
        runs, cursor = _read(store, status, run_prefix, limit, every, cursor)
    if as_json:
        show_json({"runs": [summary_as_dict(summary) for summary in runs], "cursor": cursor})
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("of which", overflow="fold")
    table.add_column("last change", no_wrap=True)
    for summary in runs:
        steps = str(summary.steps) if summary.problem is None else ""
        table.add_row(Text(clean(summary.run_id)), steps, counts_of(summary), ago(summary.changed_at))
    if runs:
        show(table)
    if cursor is not None:
        sys.stderr.write(f"more: --cursor {cursor}, or --all\n")
    elif not runs:
        sys.stderr.write("no runs\n")


def _read(
    store: StepRunStore, status: str | None, run_prefix: str, limit: int, every: bool, cursor: str | None
) -> tuple[list[RunSummary], str | None]:
    """Reads pages until there are enough runs, with a bar for who looks on."""
    options: dict[str, Any] = {"status": status, "run_id_prefix": run_prefix, "limit": 1_000 if every else limit}
    found: list[RunSummary] = []
    console = Console(stderr=True)
    is_long = console.is_terminal and bool(every or status or run_prefix)
    columns = (TextColumn("looking for runs"), BarColumn(), TextColumn("{task.fields[found]:,} found"))
    with Progress(*columns, console=console, transient=True, disable=not is_long) as progress:
        task = progress.add_task("", total=1.0, found=0)
        while True:
            page = store.runs(cursor=cursor, **options)
            found += page.runs
            cursor = page.cursor
            progress.update(task, completed=page.progress, found=len(found))
            if cursor is None or (not every and len(found) >= limit):
                break
    found.sort(key=lambda summary: summary.changed_at.timestamp() if summary.changed_at else 0, reverse=True)
    return found, cursor
