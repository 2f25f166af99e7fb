"""`squidstep doctor`: checks a server and its settings, and prints the findings of `store.doctor()`."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Final

import click
from redis.exceptions import RedisClusterException
from rich.table import Table
from rich.text import Text

from squidstep_redis import Diagnosis, Finding, Level
from squidstep_redis.cli.connect import UNREACHABLE, open_store
from squidstep_redis.cli.options import StoreOptions, json_option, store_options
from squidstep_redis.cli.output import print_json, print_text
from squidstep_redis.escaping import escaped

_STYLES: Final = {Level.FAILURE: "bold red", Level.WARNING: "yellow", Level.UNKNOWN: "magenta", Level.OK: "green"}
_PLURALS: Final = {Level.FAILURE: "failures", Level.WARNING: "warnings"}


@click.command("doctor", epilog="Example: squidstep doctor -u redis://db:6379 --lease 300 --job-timeout 180")
@store_options
@click.option("--lease", type=float, help="Also check a lease of this many seconds that no heartbeat extends.")
@click.option("--job-timeout", type=float, help="The maximum duration of the work under that lease, in seconds.")
@json_option
def doctor_command(options: StoreOptions, lease: float | None, job_timeout: float | None, as_json: bool) -> None:
    """Checks whether a server can provide the store's guarantees.

    It tests every transition on a temporary run, deletes that run, and reads the server's settings. On a cluster it
    checks every primary. Each finding includes advice.

    \b
    The exit code is for monitoring:
      0  all checks passed
      1  a warning: a guarantee is limited
      2  a failure: a guarantee is broken, or the server is unreachable
      3  no problem was found, but the server does not allow all checks
    """  # noqa: D301 -- \b is click's own
    try:
        with open_store(options) as store:
            diagnosis = store.doctor(lease=lease, job_timeout=job_timeout)
    except UNREACHABLE as error:
        what = "the cluster cannot be used" if isinstance(error, RedisClusterException) else "the server is unreachable"
        diagnosis = Diagnosis([Finding("connection", Level.FAILURE, f"{what}: {error}")])
    except ValueError as error:
        raise click.UsageError(escaped(str(error))) from error
    if as_json:
        findings = [{**finding._asdict(), "level": finding.level.name.lower()} for finding in diagnosis.findings]
        level = diagnosis.level.name.lower()
        print_json({"server": options.server, "prefix": options.prefix, "level": level, "findings": findings})
    else:
        _print_diagnosis(options, diagnosis)
    sys.exit(diagnosis.level)


def _print_diagnosis(options: StoreOptions, diagnosis: Diagnosis) -> None:
    """Prints the findings, worst first. A finding that several nodes of a cluster share is printed once."""
    all_nodes = {finding.server for finding in diagnosis.findings} - {""}
    nodes_of: dict[Finding, set[str]] = {}
    levels, checks = list(_STYLES), [finding.check for finding in diagnosis.findings]
    for finding in sorted(diagnosis.findings, key=lambda each: (levels.index(each.level), checks.index(each.check))):
        nodes_of.setdefault(finding._replace(server=""), set()).add(finding.server)
    table = Table.grid(padding=(0, 2))
    for (check, level, message, _), nodes in nodes_of.items():
        is_everywhere = len(nodes) == len(all_nodes) > 1
        location = f"all {len(nodes)} nodes" if is_everywhere else "\n".join(sorted(map(escaped, nodes)))
        table.add_row(
            Text(level.name.lower(), style=_STYLES[level]),
            Text(check, no_wrap=True),
            *([Text(location, no_wrap=True)] if all_nodes else []),
            Text(escaped(message)),
        )
    counts = Counter(finding.level for finding in nodes_of)
    totals = (f"{counts[level]} {_level_name(level, counts[level])}" for level in _STYLES if counts[level])
    print_text(
        Text(escaped(f"{options.server}, prefix {options.prefix}"), style="bold"),
        table,
        Text(", ".join(totals), style=_STYLES[diagnosis.level]),
    )


def _level_name(level: Level, count: int) -> str:
    name = level.name.lower()
    return name if count == 1 else _PLURALS.get(level, name)
