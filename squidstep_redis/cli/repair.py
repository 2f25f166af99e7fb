"""`squidstep retry` and `squidstep release`: make steps pending again."""

from __future__ import annotations

import getpass
import socket

import click

from squidstep_redis import StepStatus
from squidstep_redis.cli.connect import read_steps, store_or_exit
from squidstep_redis.cli.formatting import clean, format_lease
from squidstep_redis.cli.options import StoreOptions, dry_run_option, store_options, yes_option
from squidstep_redis.cli.output import confirm, fail, print_line


@click.command("retry", epilog="Example: squidstep retry order-1 charge")
@store_options
@click.argument("run")
@click.argument("step", required=False)
@dry_run_option
def retry_command(options: StoreOptions, run: str, step: str | None, dry_run: bool) -> None:
    """Makes a failed step pending and resets its attempt limit. Without a STEP: all failed steps of the run.

    It executes nothing: deliver the steps again. With a STEP whose lease has expired, that step counts as failed. The
    exit code is 1 if there was nothing to retry.
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
    """Returns the owner to record in the step's history: who called `retry`, and where."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as in some containers
        name = "unknown"
    return clean(f"retry by {name}@{socket.gethostname()}")[:80]


@click.command("release", epilog="Example: squidstep release order-1 charge --yes")
@store_options
@click.argument("run")
@click.argument("step")
@dry_run_option
@yes_option
def release_command(options: StoreOptions, run: str, step: str, dry_run: bool, yes: bool) -> None:
    """Takes a running step from a dead worker: the step becomes pending at once, and the attempt does not count.

    Make sure that the worker is dead: a live one continues its work. The store rejects any result that it records
    afterwards.
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
