"""`squidstep runs`, `stuck` and `failed`: list runs, and the steps of all runs that need attention."""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from squidstep_redis import RunSummary, StepRun, StepRunStore, StepStatus
from squidstep_redis.cli.cancel import format_cancellation
from squidstep_redis.cli.connect import store_or_exit
from squidstep_redis.cli.formatting import error_type, format_age, format_counts, format_last_error, format_lease
from squidstep_redis.cli.json_output import as_dict
from squidstep_redis.cli.options import StoreOptions, json_option, limit_option, run_prefix_option, store_options
from squidstep_redis.cli.output import new_table, print_json, print_text
from squidstep_redis.escaping import escaped


@click.command("runs", epilog="Example: squidstep runs --status failed --run-prefix order-")
@store_options
@click.option(
    "--status", type=click.Choice([str(status) for status in StepStatus]), help="Only runs with a step of this status."
)
@run_prefix_option
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1_000), help="About how many runs.")
@click.option("--all", "every", is_flag=True, help="Read all pages, and sort all runs.")
@click.option("--cursor", help="Start at this cursor, which the previous page printed.")
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
    """Lists one page of runs, the most recently changed first.

    There is no index of runs: the command scans the server's keys, which have no order. Only the runs within a
    page are sorted; use --all to sort all runs. Pass the printed cursor to --cursor to read the next page.
    """
    with store_or_exit(options) as store:
        filters = {"status": status, "run_id_prefix": run_prefix}
        runs, cursor = _read_pages(store, filters, limit, every, cursor)
    if as_json:
        print_json({"runs": [as_dict(summary) for summary in runs], "cursor": cursor})
        return
    table = new_table({"run": "fold", "steps": "number", "of which": "fold", "last change": "fixed"})
    for summary in runs:
        is_sound = summary.problem is None
        table.add_row(
            Text(escaped(summary.run_id)),
            str(summary.steps) if is_sound else "",
            _format_state(summary) if is_sound else Text(escaped(summary.problem or ""), "bold red"),
            format_age(summary.changed_at),
        )
    if runs:
        print_text(table)
    if cursor is not None:
        sys.stderr.write(f"more: --cursor {cursor}, or --all\n")
    elif not runs:
        sys.stderr.write("no runs\n")


def _format_state(summary: RunSummary) -> Text:
    """Formats the counts of a run, and whether it is cancelled."""
    counts, cancellation = format_counts(summary.counts), format_cancellation(summary)
    return Text.assemble(counts, "  ", (cancellation, "yellow")) if cancellation else counts


def _read_pages(
    store: StepRunStore, filters: dict[str, Any], limit: int, every: bool, cursor: str | None
) -> tuple[list[RunSummary], str | None]:
    """Reads pages until `limit` runs are found. On a terminal it shows the progress of a long scan."""
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


@click.command("stuck", epilog="Example: squidstep stuck --limit 20 || send-alert")
@store_options
@limit_option
@json_option
def stuck_command(options: StoreOptions, limit: int, as_json: bool) -> None:
    """Lists running steps whose lease has expired, the longest expired first.

    The next delivery of such a step takes it over. If steps stay in this list, they are not redelivered: check the
    queue.

    \b
    The exit code is for monitoring:
      0  there are none
      1  there are some
      2  the server is unreachable
    """  # noqa: D301 -- \b is click's own
    with store_or_exit(options) as store:
        found = store.lapsed_claims(limit)
    if as_json:
        print_json([as_dict(step_run) for step_run in found])
    elif found:
        table = new_table({"run": "fold", "step": "fold", "owner": "fold", "attempt": "number", "lease": "fixed"})
        for step_run in found:
            names = (step_run.run_id, step_run.step, step_run.owner or "")
            lease = Text(format_lease(step_run), "magenta")
            table.add_row(*(Text(escaped(name)) for name in names), str(step_run.attempt), lease)
        print_text(table)
    sys.exit(1 if found else 0)


@click.command("failed", epilog="Example: squidstep failed --by-type --limit 1000")
@store_options
@limit_option
@click.option("--by-type", is_flag=True, help="Group the steps by the type of their error.")
@json_option
def failed_command(options: StoreOptions, limit: int, by_type: bool, as_json: bool) -> None:
    """Lists failed steps, newest first.

    \b
    The exit code is for monitoring:
      0  there are none
      1  there are some
      2  the server is unreachable
    """  # noqa: D301 -- \b is click's own
    with store_or_exit(options) as store:
        found = store.failed_steps(limit)
    groups: defaultdict[str, list[StepRun]] = defaultdict(list)
    for step_run in found:
        groups[error_type(step_run)].append(step_run)
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    if as_json and by_type:
        print_json({name: [as_dict(step_run) for step_run in group] for name, group in largest_first})
    elif as_json:
        print_json([as_dict(step_run) for step_run in found])
    elif found and by_type:
        _print_groups(largest_first)
    elif found:
        _print_failed(found)
    sys.exit(1 if found else 0)


def _print_failed(found: list[StepRun]) -> None:
    table = new_table({"failed": "fixed", "run": "fold", "step": "fold", "attempt": "number", "error": "fill"})
    for step_run in found:
        names = (Text(escaped(step_run.run_id)), Text(escaped(step_run.step)))
        error = Text(format_last_error(step_run), "red")
        table.add_row(format_age(step_run.ended_at), *names, str(step_run.attempt), error)
    print_text(table)


def _print_groups(groups: list[tuple[str, list[StepRun]]]) -> None:
    table = new_table({"steps": "number", "type": "fold", "newest": "fixed", "for example": "fill"})
    for name, group in groups:
        newest = group[0]
        example = f"{escaped(newest.step)} of {escaped(newest.run_id)}: {format_last_error(newest)}"
        table.add_row(str(len(group)), Text(name, "red"), format_age(newest.ended_at), Text(example))
    print_text(table)
