"""`squidstep purge`: forgets what is over and old."""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import click
from rich.console import Console

from squidstep_redis.cli.base import Where, as_json, destroys, may_go_on, on_a_store, reached, show_json
from squidstep_redis.cli.texts import clean, summary_as_dict

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class _Age(click.ParamType[timedelta] if TYPE_CHECKING else click.ParamType):
    name = "age"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is no age: such as 90d, 12h, or 3600 (seconds)", param, ctx)
        return timedelta(**{_UNITS[match[2] or "s"]: float(match[1])})


@click.command("purge", epilog="Example: squidstep purge --older-than 90d --dry-run")
@on_a_store
@click.option("--older-than", required=True, type=_Age(), help="How long nothing changed: 90d, 12h, 30m, 3600.")
@click.option("--run-prefix", default="", help="Only runs whose id begins so.")
@destroys
@as_json
def command(
    url: str, prefix: str, older_than: timedelta, run_prefix: str, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Deletes runs all of whose steps are completed or failed, and in which nothing changed for so long.

    A completed step that is delivered again after that is executed again. The server is not held up, however many
    there are; a run that changes meanwhile stays.
    """
    console = Console(stderr=True)
    with reached(Where(url, prefix)) as store:
        with console.status("looking for runs"):
            found = store.purge(older_than, run_id_prefix=run_prefix, dry_run=True)
        if not as_json and not found:
            sys.stderr.write("nothing to purge\n")
        elif not (as_json and dry_run) and found:
            examples = ", ".join(summary.run_id for summary in found[:3]) + (", …" if len(found) > 3 else "")
            what = f"delete {len(found):,} run{'s' * (len(found) != 1)}: {examples}"
            if not may_go_on(clean(what), yes=yes, dry_run=dry_run):
                return
            with console.status("deleting"):
                found = store.purge(older_than, run_id_prefix=run_prefix)
            if not as_json:
                sys.stdout.write(f"deleted {len(found):,} run{'s' * (len(found) != 1)}\n")
    if as_json:
        show_json([summary_as_dict(summary) for summary in found])
