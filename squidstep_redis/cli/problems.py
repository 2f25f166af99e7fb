"""`squidstep stuck` and `squidstep failed`: list the steps, in all runs, that need attention."""

from __future__ import annotations

import sys
from collections import defaultdict

import click
from rich.text import Text

from squidstep_redis import StepRun
from squidstep_redis.cli.connect import store_or_exit
from squidstep_redis.cli.formatting import clean, error_type, format_age, format_last_error, format_lease
from squidstep_redis.cli.json_output import step_run_as_dict
from squidstep_redis.cli.options import StoreOptions, json_option, limit_option, store_options
from squidstep_redis.cli.output import new_table, print_json, print_text


@click.command("stuck", epilog="Example: squidstep stuck --limit 20 || send-alert")
@store_options
@limit_option
@json_option
def stuck_command(options: StoreOptions, limit: int, as_json: bool) -> None:
    """Lists running steps whose lease has expired, the longest expired first.

    The next delivery of such a step takes it over. If steps stay in this list, they are not delivered again: check
    the queue.

    \b
    The exit code is for monitoring:
      0  there are none
      1  there are some
      2  the server cannot be reached
    """  # noqa: D301 -- \b is click's own
    with store_or_exit(options) as store:
        found = store.lapsed_claims(limit)
    if as_json:
        print_json([step_run_as_dict(step_run) for step_run in found])
    elif found:
        table = new_table({"run": "fold", "step": "fold", "owner": "fold", "attempt": "number", "lease": "fixed"})
        for step_run in found:
            names = (step_run.run_id, step_run.step, step_run.owner or "")
            lease = Text(format_lease(step_run), "magenta")
            table.add_row(*(Text(clean(name)) for name in names), str(step_run.attempt), lease)
        print_text(table)
    sys.exit(1 if found else 0)


@click.command("failed", epilog="Example: squidstep failed --by-type --limit 1000")
@store_options
@limit_option
@click.option("--by-type", is_flag=True, help="Group the steps by the type of their error.")
@json_option
def failed_command(options: StoreOptions, limit: int, by_type: bool, as_json: bool) -> None:
    """Lists failed steps, newest first.

    \b
    The exit code is for monitoring:
      0  there are none
      1  there are some
      2  the server cannot be reached
    """  # noqa: D301 -- \b is click's own
    with store_or_exit(options) as store:
        found = store.failed_steps(limit)
    groups: defaultdict[str, list[StepRun]] = defaultdict(list)
    for step_run in found:
        groups[error_type(step_run)].append(step_run)
    largest_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    if as_json and by_type:
        print_json({name: [step_run_as_dict(step_run) for step_run in group] for name, group in largest_first})
    elif as_json:
        print_json([step_run_as_dict(step_run) for step_run in found])
    elif found and by_type:
        _print_groups(largest_first)
    elif found:
        _print_failed(found)
    sys.exit(1 if found else 0)


def _print_failed(found: list[StepRun]) -> None:
    table = new_table({"failed": "fixed", "run": "fold", "step": "fold", "attempt": "number", "error": "fill"})
    for step_run in found:
        names = (Text(clean(step_run.run_id)), Text(clean(step_run.step)))
        error = Text(format_last_error(step_run), "red")
        table.add_row(format_age(step_run.ended_at), *names, str(step_run.attempt), error)
    print_text(table)


def _print_groups(groups: list[tuple[str, list[StepRun]]]) -> None:
    table = new_table({"steps": "number", "type": "fold", "newest": "fixed", "for example": "fill"})
    for name, group in groups:
        newest = group[0]
        example = f"{clean(newest.step)} of {clean(newest.run_id)}: {format_last_error(newest)}"
        table.add_row(str(len(group)), Text(name, "red"), format_age(newest.ended_at), Text(example))
    print_text(table)
