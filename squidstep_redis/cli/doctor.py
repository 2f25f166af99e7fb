"""`squidstep doctor`: what `store.doctor()` finds, for people and for monitoring."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any, Final

import click
from rich.table import Table
from rich.text import Text

from squidstep_redis import Diagnosis, Finding, Level
from squidstep_redis.cli.base import UNREACHED, Where, as_json, on_a_store, opened, show, show_json

_STYLES: Final = {Level.FAILURE: "bold red", Level.WARNING: "yellow", Level.UNKNOWN: "magenta", Level.OK: "green"}
_PLURALS: Final = {Level.FAILURE: "failures", Level.WARNING: "warnings", Level.UNKNOWN: "unknown", Level.OK: "ok"}


@click.command("doctor", epilog="Example: squidstep doctor -u redis://db:6379 --lease 300 --job-timeout 180")
@on_a_store
@click.option("--lease", type=float, help="Seconds of the leases that nothing extends, to be examined too.")
@click.option("--job-timeout", type=float, help="Seconds that the work under such a lease may take.")
@as_json
def command(url: str, prefix: str, lease: float | None, job_timeout: float | None, as_json: bool) -> None:
    """Says whether a server can keep the promises.

    It takes a scratch run through every transition, deletes it, and looks at the server's settings: on a cluster, of
    every primary. Each finding says what to do.

    \b
    The exit code is for monitoring:
      0  all is well
      1  a warning: a promise has a limit here
      2  a failure: a promise cannot be kept, or no server was reached
      3  nothing is wrong as far as the server tells, but it does not tell all
    """  # noqa: D301 -- \b is click's own
    where = Where(url, prefix)
    try:
        with opened(where) as store:
            diagnosis = store.doctor(lease=lease, job_timeout=job_timeout)
    except UNREACHED as error:
        diagnosis = Diagnosis([Finding("connection", Level.FAILURE, f"the cluster cannot be used: {error}")])
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        show_json(_as_dict(where, diagnosis))
    else:
        _show(where, diagnosis)
    sys.exit(diagnosis.level)


def _as_dict(where: Where, diagnosis: Diagnosis) -> dict[str, Any]:
    findings = [{**finding._asdict(), "level": finding.level.name.lower()} for finding in diagnosis.findings]
    return {**where.shown(), "level": diagnosis.level.name.lower(), "findings": findings}


def _show(where: Where, diagnosis: Diagnosis) -> None:
    """The worst first; what several nodes of a cluster have in common once."""
    servers = {finding.server for finding in diagnosis.findings} - {""}
    found: dict[Finding, set[str]] = {}
    levels, checks = list(_STYLES), [finding.check for finding in diagnosis.findings]
    for finding in sorted(diagnosis.findings, key=lambda each: (levels.index(each.level), checks.index(each.check))):
        found.setdefault(finding._replace(server=""), set()).add(finding.server)
    table = Table.grid(padding=(0, 2))
    for (check, level, message, _), on in found.items():
        nodes = "" if on == {""} else f"all {len(on)} nodes" if len(on) == len(servers) > 1 else "\n".join(sorted(on))
        table.add_row(
            Text(level.name.lower(), style=_STYLES[level]),
            Text(check, no_wrap=True),
            *([Text(nodes, no_wrap=True)] if servers else []),
            Text(message),
        )
    counts = Counter(finding.level for finding in found)
    said = (f"{counts[level]} {_plural(level, counts[level])}" for level in _STYLES if counts[level])
    show(
        Text("{url}, prefix {prefix}".format(**where.shown()), style="bold"),
        table,
        Text(", ".join(said), style=_STYLES[diagnosis.level]),
    )


def _plural(level: Level, count: int) -> str:
    return level.name.lower() if count == 1 else _PLURALS[level]
