"""`squidstep export` and `squidstep import`: write runs as lines of JSON, and read them back."""

from __future__ import annotations

import json
import sys
from typing import IO

import click

from squidstep_redis import InvalidArgumentError, RunDeletedError, RunExistsError
from squidstep_redis.cli.connect import store_or_exit
from squidstep_redis.cli.formatting import clean
from squidstep_redis.cli.options import StoreOptions, dry_run_option, store_options
from squidstep_redis.cli.output import print_line
from squidstep_redis.operations.documents import from_document


@click.command("export", epilog="Example: squidstep export order-1 order-2 > runs.jsonl")
@store_options
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
def export_command(options: StoreOptions, runs: tuple[str, ...]) -> None:
    """Writes runs as lines of JSON, one line per run, for `import`.

    The lines contain all payloads as JSON, whatever codec the store uses, and the tokens of claims: protect the file
    like the store. The exit code is 1 if a run does not exist.
    """
    with store_or_exit(options) as store:
        for run in runs:
            sys.stdout.write(json.dumps(store.export_run(run), ensure_ascii=False) + "\n")


@click.command("import", epilog="Example: squidstep export order-1 | squidstep import -u redis://other:6379")
@store_options
@click.argument("file", type=click.File("r", encoding="utf-8"), default="-")
@dry_run_option
def import_command(options: StoreOptions, file: IO[str], dry_run: bool) -> None:
    """Creates the runs that `export` wrote. Each run is created completely or not at all.

    An existing run is never overwritten. Claims are also imported: a worker that has claimed a step can complete it in
    this store. The exit code is 1 if a run was not imported.
    """
    rejected = 0
    with store_or_exit(options) as store:
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
                print_line(f"{'would import' if dry_run else 'imported'} {run}")
            except (RunExistsError, RunDeletedError, InvalidArgumentError, ValueError) as error:
                rejected += 1
                sys.stderr.write(clean(f"squidstep: line {number}: {error}") + "\n")
    sys.exit(1 if rejected else 0)
