"""`squidstep import`: runs out of lines of JSON."""

from __future__ import annotations

import json
import sys
from typing import IO

import click

from squidstep_redis import InvalidArgumentError, RunDeletedError, RunExistsError
from squidstep_redis.cli.base import Where, may_change, on_a_store, reached
from squidstep_redis.cli.texts import clean
from squidstep_redis.operations.documents import from_document


@click.command("import", epilog="Example: squidstep export order-1 | squidstep import -u redis://other:6379")
@on_a_store
@click.argument("file", type=click.File("r", encoding="utf-8"), default="-")
@may_change
def command(url: str, prefix: str, file: IO[str], dry_run: bool) -> None:
    """Makes the runs that `export` wrote, each wholly or not at all. A run that is there is never overwritten.

    Claims are made with the rest: whoever holds one can complete it here. The exit code is 1 if a run was left out.
    """
    left_out = 0
    with reached(Where(url, prefix)) as store:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
                if dry_run:
                    run = from_document(document, store.calls.payloads).run_id
                    if store.step_statuses(run):
                        raise RunExistsError(run)
                else:
                    run = store.import_run(document)
                sys.stdout.write(clean(f"{'would import' if dry_run else 'imported'} {run}") + "\n")
            except (RunExistsError, RunDeletedError, InvalidArgumentError, ValueError) as error:
                left_out += 1
                sys.stderr.write(clean(f"squidstep: line {number}: {error}") + "\n")
    sys.exit(1 if left_out else 0)
