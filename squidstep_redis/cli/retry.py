"""`squidstep retry`: new attempts for what failed."""

from __future__ import annotations

import getpass
import socket
import sys

import click

from squidstep_redis import StepStatus
from squidstep_redis.cli.base import Where, complain, may_change, on_a_store, reached, steps_of
from squidstep_redis.cli.texts import clean


@click.command("retry", epilog="Example: squidstep retry order-1 charge")
@on_a_store
@click.argument("run")
@click.argument("step", required=False)
@may_change
def command(url: str, prefix: str, run: str, step: str | None, dry_run: bool) -> None:
    """Makes a failed step pending again, with attempts that count anew: without a STEP, all failed ones of the run.

    It executes nothing: have the steps delivered again. A step whose lease is over counts as failed if it is named.
    The exit code is 1 if there was nothing to retry.
    """
    with reached(Where(url, prefix)) as store:
        if dry_run:
            found = [each.step for each in steps_of(store, run) if each.status is StepStatus.FAILED]
            retried = [name for name in found if step in (None, name)]
        elif step is None:
            retried = [each.step for each in store.retry_run(run, owner=_owner())]
        else:
            retried = [store.retry_step(run, step, owner=_owner()).step]
    if not retried:
        complain(f"run {run!r}: nothing to retry", 1)
    for name in retried:
        sys.stdout.write(clean(f"{'would retry' if dry_run else 'pending:'} {name} of {run}") + "\n")


def _owner() -> str:
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in some containers
        name = "somebody"
    return clean(f"retry by {name}@{socket.gethostname()}")[:80]
