"""`squidstep retry`, `release`, `delete` and `purge`: repair and delete runs."""

from __future__ import annotations

import getpass
import re
import socket
import sys
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console

from squidstep_redis import CorruptRunError, StepStatus
from squidstep_redis.cli.connect import read_steps, store_or_exit
from squidstep_redis.cli.formatting import format_lease
from squidstep_redis.cli.json_output import as_dict
from squidstep_redis.cli.options import (
    StoreOptions,
    dry_run_option,
    json_option,
    run_prefix_option,
    store_options,
    yes_option,
)
from squidstep_redis.cli.output import confirm, fail, print_json, print_line
from squidstep_redis.escaping import escaped

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@click.command("retry", epilog="Example: squidstep retry order-1 charge")
@store_options
@click.argument("run")
@click.argument("step", required=False)
@dry_run_option
def retry_command(options: StoreOptions, run: str, step: str | None, dry_run: bool) -> None:
    """Makes a failed step pending and resets its attempt limit. Without a STEP: all failed steps of the run.

    It executes nothing: redeliver the steps yourself. If the lease of STEP has expired, STEP counts as failed. The exit
    code is 1 if there was nothing to retry.
    """
    with store_or_exit(options) as store:
        if dry_run:
            failed = [each.step for each in read_steps(store, run) if each.status is StepStatus.FAILED]
            retried = [name for name in failed if step in (None, name)]
        elif step is None:
            retried = [each.step for each in store.retry_run(run, owner=_owner())]
        else:
            retried = [store.retry_step(run, step, owner=_owner()).step]
    if not retried:
        fail(f"run {run!r}: nothing to retry", 1)
    for name in retried:
        print_line(f"{'would retry' if dry_run else 'pending:'} {name} of {run}")


def _owner() -> str:
    """Returns the owner to record in the step's history: the user and the host that called `retry`."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as in some containers
        name = "unknown"
    return escaped(f"retry by {name}@{socket.gethostname()}")[:80]


@click.command("release", epilog="Example: squidstep release order-1 charge --yes")
@store_options
@click.argument("run")
@click.argument("step")
@dry_run_option
@yes_option
def release_command(options: StoreOptions, run: str, step: str, dry_run: bool, yes: bool) -> None:
    """Releases the claim of a dead worker: the step becomes pending at once, and the attempt does not count.

    Check first that the worker is dead. A live worker is not stopped, but the store rejects its result.
    """
    with store_or_exit(options) as store:
        claimed = store.get_step_run(run, step)
        if claimed is None:
            fail(f"run {run!r}, step {step!r}: no such step", 1)
        if claimed.status is not StepStatus.RUNNING:
            fail(f"run {run!r}, step {step!r}: the step is {claimed.status}, not running", 1)
        owner = f" by {claimed.owner}" if claimed.owner else ""
        claim = f"attempt {claimed.attempt}{owner}, {format_lease(claimed)}"
        if confirm(f"release {step} of {run} from {claim}", yes=yes, dry_run=dry_run):
            store.release_step(claimed.id)
            print_line(f"released {step} of {run}")


@click.command("delete", epilog="Example: squidstep delete order-1 --dry-run")
@store_options
@click.argument("run")
@click.option(
    "--tombstone", default=3_600.0, show_default=True, help="Reject late writes to the run for this many seconds."
)
@dry_run_option
@yes_option
def delete_command(options: StoreOptions, run: str, tombstone: float, dry_run: bool, yes: bool) -> None:
    """Deletes a run permanently, with all its steps, payloads and claims.

    It also deletes a corrupt run. The exit code is 1 if the run does not exist.
    """
    with store_or_exit(options) as store:
        try:
            counts = Counter(store.step_statuses(run).values())
            contents = ", ".join(f"{count} {status}" for status, count in counts.items())
        except CorruptRunError as error:
            contents = f"corrupt: {error}"
        if not contents:
            fail(f"run {run!r}: no such run", 1)
        if confirm(f"delete {run} ({contents})", yes=yes, dry_run=dry_run):
            store.delete_run(run, tombstone=tombstone)
            print_line(f"deleted {run}")


class _Age(click.ParamType[timedelta] if TYPE_CHECKING else click.ParamType):
    name = "age"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is not an age: use 90d, 12h, or 3600 (seconds)", param, ctx)
        return timedelta(**{_UNITS[match[2] or "s"]: float(match[1])})


@click.command("purge", epilog="Example: squidstep purge --older-than 90d --dry-run")
@store_options
@click.option(
    "--older-than", required=True, type=_Age(), help="Only runs unchanged for this long: 90d, 12h, 30m, 3600."
)
@run_prefix_option
@dry_run_option
@yes_option
@json_option
def purge_command(
    options: StoreOptions, older_than: timedelta, run_prefix: str, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Deletes old runs whose steps are all completed or failed.

    Redelivered steps of a deleted run are re-executed. The command does not block workers while it scans and deletes.
    A run that changes in the meantime is not deleted.
    """
    console = Console(stderr=True)
    with store_or_exit(options) as store:
        with console.status("scanning for runs"):
            found = store.purge(older_than, run_id_prefix=run_prefix, dry_run=True)
        if not as_json and not found:
            sys.stderr.write("nothing to purge\n")
        elif not (as_json and dry_run) and found:
            examples = ", ".join(summary.run_id for summary in found[:3]) + (", …" if len(found) > 3 else "")
            if not confirm(f"delete {_count(len(found))}: {examples}", yes=yes, dry_run=dry_run):
                return
            with console.status("deleting"):
                found = store.purge(older_than, run_id_prefix=run_prefix)
            if not as_json:
                print_line(f"deleted {_count(len(found))}")
    if as_json:
        print_json([as_dict(summary) for summary in found])


def _count(runs: int) -> str:
    return f"{runs:,} run{'s' * (runs != 1)}"
