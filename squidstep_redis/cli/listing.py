"""`squidstep runs`, `stuck`, `failed` and `stats`: list and count runs, and the steps that need attention."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from squidstep_redis import RunPage, RunSummary, StepRun, StepRunList, StepRunStore, StepStatus
from squidstep_redis.cli.cancel import format_cancellation
from squidstep_redis.cli.connect import store_or_exit
from squidstep_redis.cli.filters import Filters, error_filter, filter_options, read_filtered
from squidstep_redis.cli.formatting import (
    format_counts,
    format_last_error,
    format_run_count,
)
from squidstep_redis.cli.json_output import as_dict, as_listed
from squidstep_redis.cli.options import (
    Since,
    StoreOptions,
    json_option,
    label_option,
    run_prefix_option,
    since_option,
    store_options,
)
from squidstep_redis.cli.output import Layout, new_table, print_json, print_text
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import cut, error_type, format_age, format_labels, format_lease

_MAX_ERROR = 120  # characters in a table, unless a command is called with --full
_MAX_TYPE = 60
_MAX_PAGE = 1_000

limit_option = click.option(
    "--limit", default=100, show_default=True, type=click.IntRange(1, 100_000), help="The maximum number of steps."
)
cursor_option = click.option("--cursor", help="Start at this cursor, which the previous page printed.")


@click.command("runs", epilog="Example: squidstep runs --label tenant=acme --status failed --since 2h")
@store_options
@click.option(
    "--status", type=click.Choice([str(status) for status in StepStatus]), help="Only runs with a step of this status."
)
@label_option
@run_prefix_option
@since_option("runs that were created")
@click.option("--until", type=Since(), metavar="TIME", help="Only runs that were created before then.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 100_000), help="How many runs at most.")
@click.option("--all", "every", is_flag=True, help="All runs, without a limit.")
@cursor_option
@json_option
def runs_command(
    options: StoreOptions,
    status: str | None,
    labels: dict[str, str],
    run_prefix: str,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    every: bool,
    cursor: str | None,
    as_json: bool,
) -> None:
    """Lists runs, newest first.

    They are sorted by creation time. Pass the printed cursor to --cursor to read the next page: it continues where this
    one ends, even if runs are created, change or are deleted in between.
    """
    filters: dict[str, Any] = {"labels": labels, "run_id_prefix": run_prefix, "since": since, "until": until}
    with store_or_exit(options) as store:
        pages = _read_pages(store, {"status": status, **filters}, sys.maxsize if every else limit, cursor)
        if as_json:
            read = list(pages)
            print_json({"runs": [as_dict(run) for page in read for run in page.runs], "cursor": read[-1].cursor})
            return
        shown, following = _print_pages(pages)
        total = store.count_runs(**filters) if following is not None and status is None else None
    if following is not None:
        many = f"{shown:,} of {total:,} runs" if total is not None else f"{format_run_count(shown)}; there may be more"
        sys.stderr.write(f"{many}: use --cursor {following} for the next page, or a larger --limit, or --all\n")
    elif not shown:
        sys.stderr.write("no runs\n")


def _read_pages(
    store: StepRunStore, filters: dict[str, Any], limit: int, cursor: str | None = None
) -> Iterator[RunPage]:
    """Reads up to `limit` runs, in pages of 1,000, except for the last. With a status, the store's pages have fewer."""
    left = limit
    while True:
        size, found = min(left, _MAX_PAGE), list[RunSummary]()
        while True:
            page = store.runs(cursor=cursor, limit=size - len(found), **filters)
            found += page.runs
            cursor = page.cursor
            if cursor is None or len(found) == size:
                break
        yield RunPage(found, cursor)
        left -= size
        if cursor is None or not left:
            return


def _print_pages(pages: Iterator[RunPage]) -> tuple[int, str | None]:
    """Prints each page as soon as it is read; returns the number of runs, and the cursor that follows them."""
    shown, following, headings = 0, None, list[str]()
    for page in pages:
        if page.runs:
            table = _table_of_runs(page.runs)
            printed, headings = headings, [str(column.header) for column in table.columns]
            table.show_header = headings != printed
            print_text(table)
        shown += len(page.runs)
        following = page.cursor
    return shown, following


def _table_of_runs(runs: list[RunSummary]) -> Table:
    """Returns a table of runs, with a column of labels if some of them have labels."""
    has_labels = any(summary.labels for summary in runs)
    columns: dict[str, Layout] = {"run": "fold", "labels": "fold"} if has_labels else {"run": "fold"}
    table = new_table({**columns, "steps": "number", "of which": "fold", "created": "fixed", "changed": "fixed"})
    for summary in runs:
        is_sound = summary.problem is None
        table.add_row(
            Text(escaped(summary.run_id)),
            *([Text(format_labels(summary.labels), "cyan")] if has_labels else []),
            str(summary.steps) if is_sound else "",
            _format_state(summary) if is_sound else Text(escaped(summary.problem or ""), "bold red"),
            format_age(summary.created_at),
            format_age(summary.changed_at),
        )
    return table


def _format_state(summary: RunSummary) -> Text:
    """Formats the counts of a run, and whether it is cancelled."""
    counts, cancellation = format_counts(summary.counts), format_cancellation(summary)
    return Text.assemble(counts, "  ", (cancellation, "yellow")) if cancellation else counts


@click.command("stuck", epilog="Example: squidstep stuck --limit 20 || send-alert")
@store_options
@filter_options("leases that ended")
@limit_option
@cursor_option
@json_option
def stuck_command(options: StoreOptions, filters: Filters, limit: int, cursor: str | None, as_json: bool) -> None:
    """Lists running steps whose lease has expired.

    The longest expired lease comes first. The next delivery of such a step takes it over. If steps stay in this list,
    they are not redelivered: check the queue. `squidstep explain RUN STEP` says more about one of them.

    \b
    The exit code is for monitoring:
      0  there are none
      1  there are some
      2  the server is unreachable
    """  # noqa: D301 -- \b is click's own
    with store_or_exit(options) as store:
        found = read_filtered(store, store.lapsed_claims, filters, limit, cursor)
        total = None if filters.are_given or cursor or found.cursor is None else store.count_claims().lapsed
    if as_json:
        print_json([as_listed(step_run) for step_run in found])
    elif found:
        table = new_table({"run": "fold", "step": "fold", "owner": "fold", "attempt": "number", "lease": "fixed"})
        for step_run in found:
            names = (step_run.run_id, step_run.step, step_run.owner or "")
            lease = Text(format_lease(step_run).removeprefix("lease "), "magenta")
            table.add_row(*(Text(escaped(name)) for name in names), str(step_run.attempt), lease)
        print_text(table)
    _print_rest(found, total, "stuck steps")
    sys.exit(1 if found else 0)


@click.command("failed", epilog="Example: squidstep failed --by-type --since 1d")
@store_options
@filter_options("steps that failed")
@click.option("--type", "type_", metavar="TYPE", help="Only steps whose error has this type.")
@limit_option
@cursor_option
@click.option("--by-type", is_flag=True, help="Group the steps by the type of their error.")
@click.option("--full", is_flag=True, help="Do not cut errors.")
@json_option
def failed_command(
    options: StoreOptions,
    filters: Filters,
    type_: str | None,
    limit: int,
    cursor: str | None,
    by_type: bool,
    full: bool,
    as_json: bool,
) -> None:
    """Lists failed steps, newest first.

    Long errors are cut: `squidstep show RUN STEP --full` shows all of one. `squidstep explain RUN STEP` says what
    to do.

    \b
    The exit code is for monitoring:
      0  there are none
      1  there are some
      2  the server is unreachable
    """  # noqa: D301 -- \b is click's own
    with store_or_exit(options) as store:
        found = read_filtered(store, store.failed_steps, filters, limit, cursor, error_filter(type_))
        is_part = filters.are_given or type_ is not None or cursor is not None
        total = None if is_part or found.cursor is None else store.count_failed()
    groups: defaultdict[str, list[StepRun]] = defaultdict(list)
    for step_run in found:
        groups[error_type(step_run)].append(step_run)
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    longest = sys.maxsize if full else _MAX_ERROR
    if as_json and by_type:
        print_json({name: [as_listed(step_run) for step_run in group] for name, group in largest_first})
    elif as_json:
        print_json([as_listed(step_run) for step_run in found])
    elif found and by_type:
        _print_groups(largest_first, longest)
    elif found:
        _print_failed(found, longest)
    _print_rest(found, total, "failed steps")
    sys.exit(1 if found else 0)


def _print_failed(found: list[StepRun], longest: int) -> None:
    table = new_table({"failed": "fixed", "run": "fold", "step": "fold", "attempt": "number", "error": "fill"})
    for step_run in found:
        names = (Text(escaped(step_run.run_id)), Text(escaped(step_run.step)))
        error = Text(cut(format_last_error(step_run), longest), "red")
        table.add_row(format_age(step_run.ended_at), *names, str(step_run.attempt), error)
    print_text(table)


def _print_groups(groups: list[tuple[str, list[StepRun]]], longest: int) -> None:
    table = new_table({"steps": "number", "type": "fold", "newest": "fixed", "for example": "fill"})
    for name, group in groups:
        newest = group[0]
        example = f"{escaped(newest.step)} of {escaped(newest.run_id)}: {format_last_error(newest)}"
        age = format_age(newest.ended_at)
        table.add_row(f"{len(group):,}", Text(cut(name, _MAX_TYPE), "red"), age, Text(cut(example, longest)))
    print_text(table)


def _print_rest(found: StepRunList, total: int | None, what: str) -> None:
    """Prints to stderr that a list is incomplete, and how to see the rest."""
    if found.cursor is None:
        return
    shown = len(found)
    many = f"{shown:,} of about {total:,} {what}" if total is not None else f"{shown:,} {what}; there may be more"
    sys.stderr.write(f"{many}: use --cursor {found.cursor} for the next page, or a larger --limit\n")


@click.command("stats", epilog="Example: squidstep stats --all")
@store_options
@click.option("--all", "every", is_flag=True, help="Also count the runs and steps by status, which reads every run.")
@json_option
def stats_command(options: StoreOptions, every: bool, as_json: bool) -> None:
    """Counts the runs, and the running, stuck and failed steps.

    Running steps without a lease are counted only with --all. The counts come from the indexes: they include entries of
    expired runs until `runs`, `stuck` or `failed` reads them, and at most 1,000 failed steps in each of 1,024 parts.
    """
    states, steps = Counter[str](), Counter[StepStatus]()
    with store_or_exit(options) as store:
        seen = store.overview(1, failures=1)
        for page in _read_pages(store, {}, sys.maxsize) if every else ():
            states.update(_state_of(summary) for summary in page.runs)
            for summary in page.runs:
                steps.update(summary.counts)
    counted: dict[str, int] = {"running": seen.live, "stuck": seen.lapsed, "failed": seen.failed}
    with_parts: dict[str, dict[str, int]] = {"runs": {"total": states.total() if every else seen.total, **states}}
    if every:
        with_parts["steps"] = {"total": steps.total(), **{str(status): steps[status] for status in StepStatus}}
    if as_json:
        print_json({**counted, **with_parts})
        return
    table = new_table({"": "fixed", "count": "number", "what it is": "fill"})
    for name, style, what in (
        ("running", "cyan", "steps that a worker holds under a lease"),
        ("stuck", "magenta", "steps whose worker lost its lease: see squidstep stuck"),
        ("failed", "red", "steps whose last attempt failed: see squidstep failed --by-type"),
    ):
        table.add_row(name, Text(f"{counted[name]:,}", style if counted[name] else ""), what)
    for name, parts in with_parts.items():
        listed = ", ".join(f"{count:,} {part}" for part, count in parts.items() if count and part != "total")
        table.add_row(name, f"{parts['total']:,}", listed if every else "in any state: see squidstep runs")
    print_text(table)


def _state_of(summary: RunSummary) -> str:
    if summary.problem is not None:
        return "corrupt"
    if summary.cancel_reason is not None:
        return "cancelled"
    if not summary.is_over:
        return "unfinished"
    return "failed" if summary.counts[StepStatus.FAILED] else "completed"
