"""`squidstep watch`: a run, or the whole store, while it works."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Final

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from squidstep_redis import StepRun, StepRunStore, StepStatus
from squidstep_redis.cli.base import Where, as_json, complain, on_a_store, reached, show, steps_of
from squidstep_redis.cli.show import heading, line_of
from squidstep_redis.cli.texts import (
    STYLES,
    ago,
    brief_error,
    clean,
    fitted,
    lease_left,
    step_run_as_dict,
    width_of,
)

_MOST: Final = 1_000  # of each kind

# Where the lines do not all fit on the screen, these come first.
_URGENT: Final = (StepStatus.RUNNING, StepStatus.FAILED, StepStatus.PENDING, StepStatus.COMPLETED)


@click.command("watch", epilog="Example: squidstep watch order-1")
@on_a_store
@click.argument("run", required=False)
@click.option("--interval", default=1.0, show_default=True, type=click.FloatRange(0.05, 3_600), help="Seconds.")
@click.option("--once", is_flag=True, help="Show it as it is now, and end.")
@as_json
def command(url: str, prefix: str, run: str | None, interval: float, once: bool, as_json: bool) -> None:
    """Shows a run while it works, until all its steps are completed or failed; without a RUN, the whole store.

    In a pipe it prints a line for each change in a run; of the store, all of it each time. With --json each line is an
    object: the step run that changed, or what is at work, stuck and failed. Control-C ends it.

    \b
    The exit code, with a RUN:
      0  all its steps are completed; with --once, or it is still at work
      1  a step has failed, or there is no such run
      2  the server was not reached
    """  # noqa: D301 -- \b is click's own
    with reached(Where(url, prefix)) as store:
        console = Console(highlight=False)
        if run is None:
            _watch_all(store, console, interval, once=once, as_json=as_json)
        elif console.is_terminal and not as_json:
            sys.exit(_watch_run(store, run, console, interval, once=once))
        else:
            sys.exit(_log_run(store, run, interval, once=once, as_json=as_json))


def _read(store: StepRunStore, run: str) -> list[StepRun]:
    step_runs = steps_of(store, run)
    if _code(step_runs) is not None:
        step_runs = store.get_run(run)  # whether that was all is to be seen at one moment
    if not step_runs:
        complain(f"run {run!r}: there is no such run", 1)
    return step_runs


def _code(step_runs: Iterable[StepRun]) -> int | None:
    """What to exit with: None, as long as the run is at work."""
    statuses = {step_run.status for step_run in step_runs}
    if statuses <= {StepStatus.COMPLETED}:
        return 0
    return None if statuses & {StepStatus.PENDING, StepStatus.RUNNING} else 1


def _watch_run(store: StepRunStore, run: str, console: Console, interval: float, *, once: bool) -> int:
    step_runs = _read(store, run)
    with Live(run_screen(run, step_runs, console.height), console=console, auto_refresh=False) as live:
        while (code := _code(step_runs)) is None and not once:
            time.sleep(interval)
            step_runs = _read(store, run)
            live.update(run_screen(run, step_runs, console.height), refresh=True)
    return code or 0


def _log_run(store: StepRunStore, run: str, interval: float, *, once: bool, as_json: bool) -> int:
    """A line for each change, for logs."""
    line_for = _json_of if as_json else _change_of
    before: dict[str, StepRun] = {}
    while True:
        step_runs = _read(store, run)
        for step_run in step_runs:
            old = before.get(step_run.step)
            if old is None or (old.status, old.attempt) != (step_run.status, step_run.attempt):
                sys.stdout.write(f"{line_for(step_run)}\n")
        sys.stdout.flush()
        before = {step_run.step: step_run for step_run in step_runs}
        if (code := _code(step_runs)) is not None or once:
            return code or 0
        time.sleep(interval)


def _change_of(step_run: StepRun) -> str:
    error = f"  {brief_error(step_run)}" if step_run.status is StepStatus.FAILED else ""
    owner = f"  {clean(step_run.owner)}" if step_run.owner else ""
    line = f"{clean(step_run.step)}  {step_run.status}  attempt {step_run.attempt}{owner}{error}"
    return f"{datetime.now(UTC):%H:%M:%S}  {line}"


def _json_of(step_run: StepRun) -> str:
    return json.dumps(step_run_as_dict(step_run))


def run_screen(run: str, step_runs: list[StepRun], height: int) -> RenderableType:
    """The run, in no more lines than there are: what is at work or has failed first, if they are too few."""
    counts = {status: sum(each.status is status for each in step_runs) for status in _URGENT}
    bar = Text()
    for status, glyph in zip((StepStatus.COMPLETED, StepStatus.FAILED, StepStatus.RUNNING), "██▒", strict=True):
        bar.append(glyph * round(40 * counts[status] / len(step_runs)), STYLES[status])
    bar.append("·" * max(40 - len(bar), 0), "dim")
    bar.append(f"  {counts[StepStatus.COMPLETED]} of {len(step_runs)}")
    room = max(height - 4, 3)
    shown = step_runs
    if len(step_runs) > room:
        by_urgency = sorted(step_runs, key=_urgency)
        shown = sorted(by_urgency[: room - 1], key=lambda each: each.position)
    names = width_of((each.step for each in shown), 30)
    owners = width_of((each.owner or "" for each in shown), 24)
    lines: list[RenderableType] = [heading(run, step_runs), bar]
    for each in shown:
        line = line_of(each, names, owners)
        if each.status is StepStatus.FAILED:
            line.append(f"  {brief_error(each)}", "red")
        line.no_wrap, line.overflow = True, "ellipsis"
        lines.append(line)
    if len(shown) < len(step_runs):
        lines.append(Text(f"… and {len(step_runs) - len(shown)} more", "dim"))
    return Group(*lines)


def _urgency(step_run: StepRun) -> tuple[int, int]:
    """What is at work comes first; of what is pending, what comes next."""
    is_next = step_run.status is StepStatus.PENDING
    return _URGENT.index(step_run.status), step_run.position if is_next else -step_run.position


def _watch_all(store: StepRunStore, console: Console, interval: float, *, once: bool, as_json: bool) -> None:
    if once or as_json or not console.is_terminal:
        while True:
            if as_json:
                told = {name: [step_run_as_dict(each) for each in found] for name, found in _at_hand(store).items()}
                sys.stdout.write(json.dumps(told) + "\n")
            else:
                show(_store_screen(store, console.height if console.is_terminal else 10_000))
            sys.stdout.flush()
            if once:
                return
            time.sleep(interval)
    with Live(_store_screen(store, console.height), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(_store_screen(store, console.height), refresh=True)


def _store_screen(store: StepRunStore, height: int) -> RenderableType:
    """What is at work in the store, what is stuck and what has failed, in no more lines than there are."""
    found = _at_hand(store, max((height - 8) // 3, 2))
    groups = (("at work", "cyan", "at_work"), ("stuck", "magenta", "stuck"), ("failed", "red", "failed"))
    return Group(*(line for name, style, key in groups for line in _lines(name, style, found[key])))


def _at_hand(store: StepRunStore, room: int = _MOST) -> dict[str, list[StepRun]]:
    limit = min(room, _MOST)
    return {
        "at_work": store.live_claims(limit),
        "stuck": store.lapsed_claims(limit),
        "failed": store.failed_steps(limit),
    }


def _lines(name: str, style: str, found: list[StepRun]) -> Iterator[Text]:
    yield Text(name if found else f"{name}: nothing", f"bold {style}" if found else "dim")
    runs = width_of((each.run_id for each in found), 24)
    steps = width_of((each.step for each in found), 20)
    for each in found:
        when = brief_error(each) if each.status is StepStatus.FAILED else lease_left(each)
        since = ago(each.ended_at or each.started_at)
        line = (
            f"  {fitted(each.run_id, runs)}  {fitted(each.step, steps)}  {since:>14}  {clean(each.owner or '')}  {when}"
        )
        yield Text(line, no_wrap=True, overflow="ellipsis")
