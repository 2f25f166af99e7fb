"""`squidstep retry`, `release`, `complete`, `delete` and `purge`: repair and delete runs."""

from __future__ import annotations

import getpass
import json
import socket
import sys
import time
from collections import Counter
from datetime import timedelta
from typing import Any, Final, cast

import click

from squidstep_redis import (
    CorruptRunError,
    ServerError,
    StaleStepRunError,
    StepRun,
    StepRunStore,
    StepStatus,
)
from squidstep_redis.cli.completion import optional_runs_argument, run_argument, runs_argument
from squidstep_redis.cli.connect import read_steps, store_or_exit
from squidstep_redis.cli.filters import Filters, error_filter, filter_options, read_filtered
from squidstep_redis.cli.formatting import format_run_count
from squidstep_redis.cli.json_output import as_dict
from squidstep_redis.cli.options import (
    Age,
    StoreOptions,
    dry_run_option,
    json_option,
    run_prefix_option,
    store_options,
    yes_option,
)
from squidstep_redis.cli.output import confirm, fail, new_console, print_json, print_line
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import format_lease

_STEPS_PER_BATCH: Final = 1_000
_OLDEST: Final = timedelta(days=3_660)  # that `purge` accepts
_LEASE: Final = 30  # seconds, of the claim of `complete`


@click.command("retry", epilog="Example: squidstep retry order-1 --step charge")
@store_options
@optional_runs_argument
@click.option("--all", "every", is_flag=True, help="Failed steps of all runs.")
@filter_options("steps that failed")
@click.option("--type", "type_", metavar="TYPE", help="Only steps whose error has this type.")
@dry_run_option
@yes_option
def retry_command(
    options: StoreOptions,
    runs: tuple[str, ...],
    every: bool,
    filters: Filters,
    type_: str | None,
    dry_run: bool,
    yes: bool,
) -> None:
    """Makes failed steps pending again.

    It retries the steps of each RUN, or with --all those of the whole store, and resets their attempt counters. It
    executes nothing: redeliver the steps yourself. With one RUN and --step, a step whose lease has expired also counts
    as failed. The exit code is 1 if there was nothing to retry.
    """
    if bool(runs) == every:
        raise click.UsageError("name one or more runs, or use --all")
    with store_or_exit(options) as store:
        if every:
            targets = _failed_of_store(store, filters, type_)
        else:
            targets = [target for run in runs for target in _failed_of_run(store, run, filters, type_)]
        if not targets:
            fail(f"run {runs[0]!r}: nothing to retry" if len(runs) == 1 else "nothing to retry", 1)
        if dry_run:
            sys.exit(0 if _print_plan(store, targets, named=not every and filters.step is not None) else 1)
        if every:
            of_runs = format_run_count(len({run for run, _ in targets}))
            confirm(f"retry {len(targets):,} failed steps of {of_runs}", yes=yes, dry_run=False)
        retried = _retry(store, targets)
    sys.exit(0 if retried else 1)


def _failed_of_store(store: StepRunStore, filters: Filters, type_: str | None) -> list[tuple[str, str]]:
    found = read_filtered(store, store.failed_steps, filters, sys.maxsize, is_wanted=error_filter(type_))
    return [(each.run_id, each.step) for each in found]


def _failed_of_run(store: StepRunStore, run: str, filters: Filters, type_: str | None) -> list[tuple[str, str]]:
    """Returns the steps of one run to retry. If a step is named, the store itself decides whether to retry it."""
    step_runs = read_steps(store, run)
    if not step_runs:
        fail(f"run {run!r}: no such run; nothing was changed. To name a step, use --step", 1)
    if filters.step is not None and type_ is None and filters.since is None and not filters.labels:
        if not any(each.step == filters.step for each in step_runs):
            fail(f"run {run!r}, step {filters.step!r}: no such step; nothing was changed", 1)
        return [(run, filters.step)]
    is_wanted, has_labels = error_filter(type_), filters.label_filter(store)
    if has_labels is not None and not has_labels(step_runs[0]):
        return []
    return [
        (run, each.step)
        for each in step_runs
        if each.status is StepStatus.FAILED
        and filters.step in (None, each.step)
        and (filters.since is None or (each.ended_at is not None and each.ended_at >= filters.since))
        and (is_wanted is None or is_wanted(each))
    ]


def _retry(store: StepRunStore, targets: list[tuple[str, str]]) -> int:
    """Retries steps and prints each; returns how many. It reports a step that cannot be retried, and continues."""
    retried = 0
    for first in range(0, len(targets), _STEPS_PER_BATCH):
        part = targets[first : first + _STEPS_PER_BATCH]
        results = store.batch([store.calls.retry_step(run, step, owner=_owner()) for run, step in part])
        for (run, step), result in zip(part, results, strict=True):
            if isinstance(result, ServerError):
                raise result
            if isinstance(result, Exception):
                sys.stderr.write(f"squidstep: {escaped(str(result))}\n")
            else:
                retried += 1
                print_line(f"pending: {step} of {run}")
    return retried


def _print_plan(store: StepRunStore, targets: list[tuple[str, str]], *, named: bool) -> int:
    """Prints the steps that would be retried, and reports those that would be refused; returns how many would be.

    Args:
        store: The store.
        targets: The steps.
        named: Whether the user named them: they may be in any state.
    """
    planned = 0
    for run, step in targets:
        if named and (state := _state_unless_ended(store, run, step)) is not None:
            problem = f"run {run!r}, step {step!r}: it would not be retried: the step is {state}"
            sys.stderr.write(f"squidstep: {escaped(problem)}\n")
        else:
            planned += 1
            print_line(f"would retry {step} of {run}")
    return planned


def _state_unless_ended(store: StepRunStore, run: str, step: str) -> str | None:
    """Returns the state of a step that is completed, or has a live claim; None if it can be retried."""
    explained = store.explain_step(run, step)
    current = store.get_step_run(run, step)
    if explained is None or current is None or explained.reason not in ("completed", "leased", "unleased"):
        return None
    return _state(current)


def _state(step_run: StepRun) -> str:
    """Returns the state of a step, such as `running by worker-1, lease ends in 5 s`."""
    held = f" by {step_run.owner}" if step_run.owner else ""
    lease = f", {lease}" if (lease := format_lease(step_run)) else ""
    return f"{step_run.status}{held}{lease}"


def _owner(command: str = "retry") -> str:
    """Returns the owner to record in the step's history: the user and the host that called the command."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a user id without a name, as in some containers
        name = "unknown"
    return escaped(f"{command} by {name}@{socket.gethostname()}")[:80]


@click.command("release", epilog="Example: squidstep release order-1 charge --yes")
@store_options
@run_argument
@click.argument("step")
@dry_run_option
@yes_option
def release_command(options: StoreOptions, run: str, step: str, dry_run: bool, yes: bool) -> None:
    """Releases the claim of a dead worker.

    The step becomes pending at once, and the attempt does not count. Check first that the worker is dead. A live worker
    is not stopped, but the store rejects its result. Only the claim that is shown is released: if another worker takes
    over before you confirm, nothing changes, and the exit code is 1.
    """
    with store_or_exit(options) as store:
        claimed = store.get_step_run(run, step)
        if claimed is None:
            fail(f"run {run!r}, step {step!r}: no such step", 1)
        if claimed.status is not StepStatus.RUNNING:
            fail(f"run {run!r}, step {step!r}: the step is {claimed.status}, not running", 1)
        owner = f" by {claimed.owner}" if claimed.owner else ""
        claim = f"attempt {claimed.attempt}{owner}, {format_lease(claimed)}"
        if confirm(f"release {step} of {run} from {claim}", yes=yes, dry_run=dry_run):
            store.release_step(claimed.with_claim())  # its id would also stand for a worker that took over meanwhile
            print_line(f"released {step} of {run}")


@click.command("complete", epilog="Example: squidstep complete order-1 charge --output '{\"receipt\": 7}'")
@store_options
@run_argument
@click.argument("step")
@click.option("--output", required=True, metavar="JSON", help="The output: a JSON object, or - to read it from stdin.")
@dry_run_option
@yes_option
def complete_command(options: StoreOptions, run: str, step: str, output: str, dry_run: bool, yes: bool) -> None:
    """Completes a step whose work was done by hand.

    It stores the output, which every later delivery receives. The step must be pending or failed, or the lease of its
    worker must have expired. Nothing is executed, and no further step is scheduled. The history names you as the owner.
    The exit code is 1 if the step cannot be completed.
    """
    payload = _parse_output(output)
    with store_or_exit(options) as store:
        current = store.get_step_run(run, step)
        if current is None:
            fail(f"run {run!r}, step {step!r}: no such step: it has neither been scheduled nor begun", 1)
        store.calls.complete_step(current.id, payload)  # rejects an output that cannot be stored; it sends nothing
        if (summary := store.summarize_run(run)) is not None and summary.cancel_reason is not None:
            fail(f"run {run!r}, step {step!r}: nothing was stored: the run is cancelled; resume it first", 1)
        if (state := _state_unless_ended(store, run, step)) is not None:
            fail(f"run {run!r}, step {step!r}: nothing was stored: the step is {state}", 1)
        owner = _owner("complete")
        if not confirm(f"complete {step} of {run}, which is {current.status}", yes=yes, dry_run=dry_run):
            return
        try:
            # Claiming a failed step would replace its input. It may have failed since it was shown, and be final.
            store.retry_step(run, step, owner=owner)
        except StaleStepRunError as error:
            fail(f"run {run!r}, step {step!r}: nothing was stored: the step is {_state(error.current)}", 1)
        begun = store.begin_step(run, step, {}, lease=_LEASE, owner=owner, fingerprint=False)
        if begun.decision == "skip":
            fail(f"run {run!r}, step {step!r}: the output was not stored: the step is {begun.reason}", 1)
        store.complete_step(begun.step_run, payload)
        print_line(f"completed {step} of {run}")


def _parse_output(text: str) -> dict[str, Any]:
    """Reads the output of `complete`; for "-" from stdin."""
    try:
        payload = json.loads(sys.stdin.buffer.read().decode() if text == "-" else text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(escaped(f"is not JSON: {error}"), param_hint="--output") from error
    if not isinstance(payload, dict):
        raise click.BadParameter('must be a JSON object, such as {"receipt": 7}', param_hint="--output")
    return cast("dict[str, Any]", payload)


@click.command("delete", epilog="Example: squidstep delete order-1 order-2 --dry-run")
@store_options
@runs_argument
@click.option(
    "--tombstone", default=3_600.0, show_default=True, help="Reject late writes to the run for this many seconds."
)
@dry_run_option
@yes_option
def delete_command(options: StoreOptions, runs: tuple[str, ...], tombstone: float, dry_run: bool, yes: bool) -> None:
    """Deletes runs.

    They are deleted permanently, with all their steps, payloads and claims. It also deletes a corrupt run. If one of
    the runs does not exist, nothing is deleted, and the exit code is 1.
    """
    with store_or_exit(options) as store:
        runs = tuple(dict.fromkeys(runs))  # one that is named twice is one run
        for run in runs:
            store.calls.delete_run(run, tombstone=tombstone)  # rejects a tombstone; it sends nothing
        contents = [f"{run} ({_contents(store, run)})" for run in runs]
        what = contents[0] if len(runs) == 1 else f"{format_run_count(len(runs))}: {', '.join(contents)}"
        if confirm(f"delete {what}", yes=yes, dry_run=dry_run):
            for run in runs:
                store.delete_run(run, tombstone=tombstone)
                print_line(f"deleted {run}")


def _contents(store: StepRunStore, run: str) -> str:
    """Describes the contents of a run. Exits the program if there is no such run."""
    try:
        counts = Counter(store.step_statuses(run).values())
    except CorruptRunError as error:
        return f"corrupt: {error}"
    if not counts:
        fail(f"run {run!r}: no such run; nothing was deleted", 1)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


@click.command("purge", epilog="Example: squidstep purge --older-than 90d --dry-run")
@store_options
@click.option("--older-than", required=True, type=Age(), help="Only runs unchanged for this long: 90d, 12h, 30m, 3600.")
@run_prefix_option
@click.option(
    "--status",
    type=click.Choice(["completed", "failed"]),
    help="Only runs in which every step is completed, or a step has failed.",
)
@dry_run_option
@yes_option
@json_option
def purge_command(
    options: StoreOptions,
    older_than: timedelta,
    run_prefix: str,
    status: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Deletes old runs that are completed or failed.

    Redelivered steps of a deleted run are re-executed. The command does not block workers while it scans and deletes.
    A run that changes in the meantime is not deleted.
    """
    console, began = new_console(stderr=True), time.monotonic()
    with store_or_exit(options) as store:
        with console.status("scanning for runs"):
            found = store.purge(older_than, run_id_prefix=run_prefix, status=status, dry_run=True)
        if not as_json and not found:
            sys.stderr.write("nothing to purge\n")
        elif not (as_json and dry_run) and found:
            examples = ", ".join(summary.run_id for summary in found[:3]) + (", …" if len(found) > 3 else "")
            if not confirm(f"delete {format_run_count(len(found))}: {examples}", yes=yes, dry_run=dry_run):
                return
            # Runs that have grown old enough since they were counted were not shown.
            older_than = min(older_than + timedelta(seconds=time.monotonic() - began), max(older_than, _OLDEST))
            with console.status("deleting"):
                found = store.purge(older_than, run_id_prefix=run_prefix, status=status)
            if not as_json:
                print_line(f"deleted {format_run_count(len(found))}")
    if as_json:
        print_json([as_dict(summary) for summary in found])
