"""Shell completion of run ids: the arguments `RUN` and `RUN...` of the commands."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from squidstep_redis import SquidstepError, StepRunStore
from squidstep_redis.cli.connect import UNREACHABLE, open_store
from squidstep_redis.cli.options import StoreOptions

_MAX_IDS = 50


def complete_run(context: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Returns the ids of runs that begin with the typed text. Without a server, it returns nothing."""
    del param
    given = context.params
    options = StoreOptions(given.get("url") or "redis://localhost:6379", given.get("prefix") or "squidstep")
    try:
        with open_store(options, timeout=1.0) as store:
            return [CompletionItem(run_id) for run_id in _find(store, incomplete)]
    except (SquidstepError, *UNREACHABLE, click.UsageError):
        return []


def _find(store: StepRunStore, prefix: str) -> list[str]:
    newest = store.runs(run_id_prefix=prefix, limit=_MAX_IDS).runs
    return sorted(summary.run_id for summary in newest if summary.run_id.isprintable())


run_argument = click.argument("run", shell_complete=complete_run)
runs_argument = click.argument("runs", metavar="RUN...", nargs=-1, required=True, shell_complete=complete_run)
optional_runs_argument = click.argument("runs", metavar="[RUN]...", nargs=-1, shell_complete=complete_run)
