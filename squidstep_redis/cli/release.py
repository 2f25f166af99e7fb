"""`squidstep release`: takes a claim from its holder."""

from __future__ import annotations

import sys

import click

from squidstep_redis import StepStatus
from squidstep_redis.cli.base import Where, complain, destroys, may_go_on, on_a_store, reached
from squidstep_redis.cli.texts import clean, lease_left


@click.command("release", epilog="Example: squidstep release order-1 charge --yes")
@on_a_store
@click.argument("run")
@click.argument("step")
@destroys
def command(url: str, prefix: str, run: str, step: str, dry_run: bool, yes: bool) -> None:
    """Gives a claim back in its holder's place: the step is pending, and can be begun at once.

    What the holder records afterwards is refused, and the attempt does not count. Make sure that the holder is dead:
    one that is alive goes on with its work.
    """
    with reached(Where(url, prefix)) as store:
        held = store.get_step_run(run, step)
        if held is None:
            complain(f"run {run!r}, step {step!r}: there is no such step", 1)
        if held.status is not StepStatus.RUNNING:
            complain(f"run {run!r}, step {step!r}: is {held.status}, not running", 1)
        holder = f"attempt {held.attempt}{f' by {held.owner}' if held.owner else ''}, {lease_left(held)}"
        if may_go_on(clean(f"release {step} of {run} from {holder}"), yes=yes, dry_run=dry_run):
            store.release_step(held.id)
            sys.stdout.write(clean(f"released {step} of {run}") + "\n")
