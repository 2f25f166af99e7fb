"""`squidstep export`, `import` and `fork`: write runs as lines of JSON, read them back, and copy completed steps."""

from __future__ import annotations

import json
import sys
from typing import IO

import click

from squidstep_redis import InvalidArgumentError, RunExistsError, ServerError, SquidstepError
from squidstep_redis.cli.completion import run_argument, runs_argument
from squidstep_redis.cli.connect import store_or_exit
from squidstep_redis.cli.options import StoreOptions, dry_run_option, json_option, store_options
from squidstep_redis.cli.output import print_json, print_json_line, print_line
from squidstep_redis.escaping import escaped
from squidstep_redis.operations.documents import from_document


@click.command("export", epilog="Example: squidstep export order-1 order-2 > runs.jsonl")
@store_options
@runs_argument
def export_command(options: StoreOptions, runs: tuple[str, ...]) -> None:
    """Writes runs as lines of JSON.

    It writes one line per run, for `import`. The lines contain all payloads as JSON, whatever the store's codec, and
    the tokens of claims: protect the file like the store. The exit code is 1 if a run was not exported: it does not
    exist, or is corrupt.
    """
    rejected = 0
    with store_or_exit(options) as store:
        for run in runs:
            try:
                print_json_line(store.export_run(run))
            except (InvalidArgumentError, ServerError):
                raise
            except SquidstepError as error:  # it must not hide the others
                rejected += 1
                sys.stderr.write(f"squidstep: {escaped(str(error))}\n")
    sys.exit(1 if rejected else 0)


@click.command("import", epilog="Example: squidstep export order-1 | squidstep import -u redis://other:6379")
@store_options
@click.argument("file", type=click.File("rb"), default="-")
@dry_run_option
def import_command(options: StoreOptions, file: IO[bytes], dry_run: bool) -> None:
    """Creates the runs that `export` wrote. Each run is created completely or not at all.

    An existing run is never overwritten. Claims are also imported: a worker that has claimed a step can complete it in
    this store, if it has the prefix of the other one. The exit code is 1 if a run was not imported.
    """
    rejected, planned = 0, set[str]()
    with store_or_exit(options) as store:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                document = json.loads(line.decode())
                if dry_run:
                    run = from_document(document, store.calls.payloads).run_id
                    if run in planned or store.send(store.calls.step_statuses(run)._replace(if_deleted=None)):
                        raise RunExistsError(run)
                    planned.add(run)
                else:
                    run = store.import_run(document)
                print_line(f"{'would import' if dry_run else 'imported'} {run}")
            except ServerError:
                raise
            except (SquidstepError, ValueError, RecursionError) as error:
                rejected += 1
                sys.stderr.write(escaped(f"squidstep: line {number}: {error}") + "\n")
    sys.exit(1 if rejected else 0)


@click.command("fork", epilog="Example: squidstep fork order-1 order-1-again --through reserve")
@store_options
@run_argument
@click.argument("new_run")
@click.option("--through", metavar="STEP", help="Copy the completed steps up to this one, in completion order.")
@click.option("--step", "steps", metavar="STEP", multiple=True, help="Copy this step. Repeat it for further steps.")
@dry_run_option
@json_option
def fork_command(
    options: StoreOptions,
    run: str,
    new_run: str,
    through: str | None,
    steps: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Copies the completed steps of a run to a new run.

    RUN stays as it is. The command executes nothing: deliver the other steps for NEW_RUN yourself. Steps are copied
    with their outputs, attempts and completion order, all of them or none. An existing run is never overwritten. The
    exit code is 1 if nothing was copied: NEW_RUN exists, RUN does not, or a given step is not completed.
    """
    with store_or_exit(options) as store:
        copied = store.fork_run(run, new_run, steps=steps or None, through=through, dry_run=dry_run)
    if as_json:
        print_json({"run_id": new_run, "steps": copied})
    else:
        count = f"{len(copied):,} completed step{'s' * (len(copied) != 1)}"
        print_line(f"{'would fork' if dry_run else 'forked'} {run} to {new_run}: {count}, through {copied[-1]}")
