"""`squidstep watch`: follows a run, or the whole store."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from math import isnan
from typing import Any, Final

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from squidstep_redis import StepRun, StepRunStore, StepStatus
from squidstep_redis.cli.completion import complete_run
from squidstep_redis.cli.connect import read_steps, store_or_exit
from squidstep_redis.cli.formatting import (
    STATUS_STYLES,
    fit,
    format_last_error,
    widest,
)
from squidstep_redis.cli.json_output import as_listed
from squidstep_redis.cli.options import StoreOptions, json_option, store_options
from squidstep_redis.cli.output import fail, new_console, print_text, terminal_width
from squidstep_redis.cli.show import column_widths, render_heading, render_line
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import format_age, format_lease, format_time

_MAX_LISTED: Final = 1_000  # step runs of each kind

# If the screen is too small for all step runs, those with the first of these statuses are shown.
_BY_URGENCY: Final = (StepStatus.RUNNING, StepStatus.FAILED, StepStatus.PENDING, StepStatus.COMPLETED)


class _Interval(click.FloatRange):
    """Seconds to sleep. Rejects NaN, which passes every range check."""

    def __init__(self) -> None:
        super().__init__(0.05, 3_600)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Converts the text of an option."""
        seconds = super().convert(value, param, ctx)
        if isnan(seconds):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return seconds


@click.command("watch", epilog="Example: squidstep watch order-1")
@store_options
@click.argument("run", required=False, shell_complete=complete_run)
@click.option("--interval", default=1.0, show_default=True, type=_Interval(), help="Seconds between two reads.")
@click.option("--once", is_flag=True, help="Show the current state, and exit.")
@json_option
def watch_command(options: StoreOptions, run: str | None, interval: float, once: bool, as_json: bool) -> None:
    """Follows a run, or the whole store.

    With a RUN, it ends when all its steps are completed or failed.

    In a pipe, it prints one line for each change of a run, or repeats the state of the store. With --json, each line
    is an object: the step run that changed, or the running, stuck and failed steps of the store. Control-C stops it.

    \b
    The exit code, with a RUN:
      0  all its steps are completed, or --once was given and the run is not finished
      1  a step has failed, or the run does not exist
      2  the server is unreachable
    """  # noqa: D301 -- \b is click's own
    console = new_console()
    on_screen = console.is_terminal and not as_json
    with store_or_exit(options) as store:
        if run is None:
            _watch_store(store, console, interval, once, as_json)
        elif on_screen:
            sys.exit(_show_run(store, run, console, interval, once))
        else:
            sys.exit(_print_changes(store, run, interval, once, as_json))


def _read_run(store: StepRunStore, run: str) -> tuple[list[StepRun], int | None]:
    """Returns a run's step runs, and the exit code; None if the run is not finished."""
    step_runs = read_steps(store, run)
    if _exit_code(step_runs) is not None:
        step_runs = store.get_run(run)  # the pages are not one snapshot: confirm with one atomic read
    if not step_runs:
        fail(f"run {run!r}: no such run", 1)
    return step_runs, _exit_code(step_runs)


def _exit_code(step_runs: list[StepRun]) -> int | None:
    statuses = {step_run.status for step_run in step_runs}
    if statuses <= {StepStatus.COMPLETED}:
        return 0
    return None if statuses & {StepStatus.PENDING, StepStatus.RUNNING} else 1


def _show_run(store: StepRunStore, run: str, console: Console, interval: float, once: bool) -> int:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            step_runs, code = _read_run(store, run)
            live.update(render_run(run, step_runs, console.height), refresh=True)
            if code is not None or once:
                return code or 0
            time.sleep(interval)


def _print_changes(store: StepRunStore, run: str, interval: float, once: bool, as_json: bool) -> int:
    """Prints one line for each change, for logs and programs."""
    seen: dict[str, tuple[StepStatus, int]] = {}
    while True:
        step_runs, code = _read_run(store, run)
        for step_run in step_runs:
            if seen.get(step_run.step) != (step_run.status, step_run.attempt):
                seen[step_run.step] = (step_run.status, step_run.attempt)
                sys.stdout.write(f"{json.dumps(as_listed(step_run)) if as_json else _log_line(step_run)}\n")
        sys.stdout.flush()
        if code is not None or once:
            return code or 0
        time.sleep(interval)


def _log_line(step_run: StepRun) -> str:
    error = f"  {format_last_error(step_run)}" if step_run.status is StepStatus.FAILED else ""
    owner = f"  {escaped(step_run.owner)}" if step_run.owner else ""
    line = f"{escaped(step_run.step)}  {step_run.status}  attempt {step_run.attempt}{owner}{error}"
    return f"{format_time(datetime.now(UTC))} UTC  {line}"


def render_run(run: str, step_runs: list[StepRun], height: int) -> RenderableType:
    """Renders a run for a screen of `height` lines. A small screen shows running and failed steps first."""
    counts = {status: sum(each.status is status for each in step_runs) for status in _BY_URGENCY}
    bar = Text()
    for status, glyph in zip((StepStatus.COMPLETED, StepStatus.FAILED, StepStatus.RUNNING), "██▒", strict=True):
        bar.append(glyph * round(40 * counts[status] / len(step_runs)), STATUS_STYLES[status])
    bar.append("·" * max(40 - len(bar), 0), "dim")
    bar.append(f"  {counts[StepStatus.COMPLETED]} of {len(step_runs)}")
    max_lines = max(height - 4, 3)
    shown = step_runs
    if len(step_runs) > max_lines:
        shown = sorted(sorted(step_runs, key=_urgency)[: max_lines - 1], key=lambda each: each.position)
    lines: list[RenderableType] = [render_heading(run, counts), bar]
    widths = column_widths(shown, terminal_width())
    for each in shown:
        line = render_line(each, *widths)
        if each.status is StepStatus.FAILED:
            line.append(f"  {format_last_error(each)}", "red")
        line.no_wrap, line.overflow = True, "ellipsis"
        lines.append(line)
    if len(shown) < len(step_runs):
        lines.append(Text(f"… and {len(step_runs) - len(shown)} more", "dim"))
    return Group(*lines)


def _urgency(step_run: StepRun) -> tuple[int, int]:
    """Returns the sort key: by status; then pending steps in order, all others from the newest."""
    is_pending = step_run.status is StepStatus.PENDING
    return _BY_URGENCY.index(step_run.status), step_run.position if is_pending else -step_run.position


def _read_store(store: StepRunStore, limit: int = _MAX_LISTED) -> dict[str, list[StepRun]]:
    limit = min(limit, _MAX_LISTED)
    return {
        "at_work": store.live_claims(limit, payloads=False),
        "stuck": store.lapsed_claims(limit, payloads=False),
        "failed": store.failed_steps(limit, payloads=False),
    }


def _totals(store: StepRunStore, found: dict[str, list[StepRun]], limit: int) -> dict[str, int]:
    """Counts the steps of the incomplete lists."""
    cut = {key for key, step_runs in found.items() if len(step_runs) >= limit}
    totals: dict[str, int] = {}
    if cut & {"at_work", "stuck"}:
        totals["at_work"], totals["stuck"] = store.count_claims()
    if "failed" in cut:
        totals["failed"] = store.count_failed()
    return totals


def _watch_store(store: StepRunStore, console: Console, interval: float, once: bool, as_json: bool) -> None:
    if console.is_terminal and not as_json and not once:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_render_store(store, console.height), refresh=True)
                time.sleep(interval)
    while True:
        if as_json:
            found = {key: [as_listed(each) for each in step_runs] for key, step_runs in _read_store(store).items()}
            sys.stdout.write(json.dumps(found) + "\n")
        else:
            print_text(_render_store(store, console.height if console.is_terminal else 10_000))
        sys.stdout.flush()
        if once:
            return
        time.sleep(interval)


def _render_store(store: StepRunStore, height: int) -> RenderableType:
    """Renders the running, stuck and failed steps of the store in at most `height` lines."""
    limit = min(max((height - 8) // 3, 2), _MAX_LISTED)
    found = _read_store(store, limit)
    totals = _totals(store, found, limit)
    groups = (("running", "cyan", "at_work"), ("stuck", "magenta", "stuck"), ("failed", "red", "failed"))
    return Group(
        *(line for name, style, key in groups for line in _render_group(name, style, found[key], totals.get(key)))
    )


def _render_group(name: str, style: str, step_runs: list[StepRun], total: int | None) -> Iterator[Text]:
    is_cut = total is not None and total > len(step_runs)
    heading = f"{name}: {len(step_runs):,} of about {total:,}" if is_cut else name
    yield Text(heading if step_runs else f"{name}: none", f"bold {style}" if step_runs else "dim")
    run_width = widest((each.run_id for each in step_runs), 24)
    step_width = widest((each.step for each in step_runs), 20)
    is_failed = name == "failed"
    states = [f"failed {format_age(each.ended_at)}" if is_failed else format_lease(each) for each in step_runs]
    state_width = widest(states, 40)
    for each, state in zip(step_runs, states, strict=True):
        names = f"{fit(each.run_id, run_width)}  {fit(each.step, step_width)}"
        detail = format_last_error(each) if is_failed else f"began {format_age(each.started_at)}"
        line = f"  {names}  {fit(state, state_width)}  {escaped(each.owner or '')}  {detail}"
        yield Text(line, no_wrap=True, overflow="ellipsis")
