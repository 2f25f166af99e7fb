"""`squidstep cancel` and `resume`: stop a run from beginning steps, and let it continue."""

from __future__ import annotations

from collections.abc import Iterator

import click

from squidstep_redis import RunSummary, StepRunStore
from squidstep_redis.cli.completion import run_argument
from squidstep_redis.cli.connect import store_or_exit
from squidstep_redis.cli.options import StoreOptions, dry_run_option, store_options
from squidstep_redis.cli.output import fail, print_line
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import format_labels, format_time


@click.command("cancel", epilog="Example: squidstep cancel order-1 --reason 'wrong address'")
@store_options
@run_argument
@click.option("--reason", help="The reason, shown to other operators and to the workers. The first reason is kept.")
@dry_run_option
def cancel_command(options: StoreOptions, run: str, reason: str | None, dry_run: bool) -> None:
    """Cancels a run.

    No step of it begins or is scheduled until it is resumed. Running steps may end. Their workers learn of the
    cancellation with the next extension of their lease. The exit code is 1 if the run does not exist.
    """
    with store_or_exit(options) as store:
        call = store.calls.cancel_run(run, reason)  # rejects a reason; it sends nothing
        found = _exists(store, run) if dry_run else store.send(call)
    _report(run, found, "would cancel" if dry_run else "cancelled")


@click.command("resume", epilog="Example: squidstep resume order-1")
@store_options
@run_argument
@dry_run_option
def resume_command(options: StoreOptions, run: str, dry_run: bool) -> None:
    """Resumes a cancelled run.

    Its steps can begin again. It executes nothing: redeliver the steps yourself. The exit code is 1 if the run does not
    exist.
    """
    with store_or_exit(options) as store:
        found = _exists(store, run) if dry_run else store.resume_run(run)
    _report(run, found, "would resume" if dry_run else "resumed")


def format_cancellation(summary: RunSummary | None) -> str:
    """Returns whether and why a run is cancelled; empty if it is not."""
    if summary is None or summary.cancel_reason is None:
        return ""
    return f"cancelled: {escaped(summary.cancel_reason)}" if summary.cancel_reason else "cancelled"


def format_run(summary: RunSummary | None) -> Iterator[tuple[str, str]]:
    """Yields lines about a run other than its steps, with their styles: labels and creation time, and cancellation."""
    if summary is not None and summary.labels:
        created = f"  created {format_time(summary.created_at)} UTC" if summary.created_at else ""
        yield f"{format_labels(summary.labels)}{created}", "cyan"
    if cancellation := format_cancellation(summary):
        yield cancellation, "yellow"


def _exists(store: StepRunStore, run: str) -> bool:
    """Returns whether there is a run. Like a change, raises CorruptRunError if it is corrupt, and not only a step."""
    store.completed_steps(run, limit=1)
    return store.summarize_run(run) is not None


def _report(run: str, found: bool, what: str) -> None:
    if not found:
        fail(f"run {run!r}: no such run", 1)
    print_line(f"{what} {run}")
