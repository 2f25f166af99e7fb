"""`squidstep delete`: forgets a run."""

from __future__ import annotations

import sys

import click

from squidstep_redis import CorruptRunError
from squidstep_redis.cli.base import Where, complain, destroys, may_go_on, on_a_store, reached
from squidstep_redis.cli.texts import clean


@click.command("delete", epilog="Example: squidstep delete order-1 --dry-run")
@on_a_store
@click.argument("run")
@click.option("--tombstone", default=3_600.0, show_default=True, help="Seconds for which late writes are refused.")
@destroys
def command(url: str, prefix: str, run: str, tombstone: float, dry_run: bool, yes: bool) -> None:
    """Forgets a run: its steps, payloads and claims, for good.

    It also deletes a run that is corrupt. The exit code is 1 if there is no such run.
    """
    with reached(Where(url, prefix)) as store:
        try:
            statuses = list(store.step_statuses(run).values())
            counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
        except CorruptRunError as error:
            statuses, counts = [], f"which is corrupt: {error}"
        if not statuses and not counts:
            complain(f"run {run!r}: there is no such run", 1)
        if may_go_on(clean(f"delete {run} ({counts})"), yes=yes, dry_run=dry_run):
            store.delete_run(run, tombstone=tombstone)
            sys.stdout.write(clean(f"deleted {run}") + "\n")
