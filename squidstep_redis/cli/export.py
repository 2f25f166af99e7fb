"""`squidstep export`: runs as lines of JSON."""

from __future__ import annotations

import json
import sys

import click

from squidstep_redis.cli.base import Where, on_a_store, reached


@click.command("export", epilog="Example: squidstep export order-1 order-2 > runs.jsonl")
@on_a_store
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
def command(url: str, prefix: str, runs: tuple[str, ...]) -> None:
    """Writes runs as lines of JSON, one each, of which `import` makes the same runs.

    Payloads are in it as JSON, whatever the store's codec; and the tokens of claims: keep it as safe as the store.
    The exit code is 1 if there is no such run.
    """
    with reached(Where(url, prefix)) as store:
        for run in runs:
            sys.stdout.write(json.dumps(store.export_run(run), ensure_ascii=False) + "\n")
