"""`squidstep stuck`: claims that were abandoned."""

from __future__ import annotations

import sys

import click
from rich.table import Table
from rich.text import Text

from squidstep_redis.cli.base import Where, as_json, on_a_store, reached, show, show_json
from squidstep_redis.cli.texts import clean, lease_left, step_run_as_dict


@click.command("stuck", epilog="Example: squidstep stuck --limit 20 || page-somebody")
@on_a_store
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 1_000), help="How many at most.")
@as_json
def command(url: str, prefix: str, limit: int, as_json: bool) -> None:
    """Lists claims whose lease is over and that nobody has taken over, longest over first.

    The next delivery takes such a step over. If they stay, nothing delivers them any more: look at the queue.

    \b
    The exit code is for monitoring:
      0  there are none
      1  there are some
      2  the server was not reached
    """  # noqa: D301 -- \b is click's own
    with reached(Where(url, prefix)) as store:
        found = store.lapsed_claims(limit)
    if as_json:
        show_json([step_run_as_dict(step_run) for step_run in found])
    elif found:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("run", "step", "owner"):
            table.add_column(name, overflow="fold")
        table.add_column("attempt", justify="right", no_wrap=True)
        table.add_column("lease", no_wrap=True)
        for step_run in found:
            names = (step_run.run_id, step_run.step, step_run.owner or "")
            left = Text(lease_left(step_run), "magenta")
            table.add_row(*(Text(clean(name)) for name in names), str(step_run.attempt), left)
        show(table)
    sys.exit(1 if found else 0)
