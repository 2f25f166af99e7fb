"""The command line of both demos: options, the bundled server, the summary and the exit code."""

from __future__ import annotations

import json
import secrets
import sys
import sysconfig
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import redis
from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table
from rich.text import Text

from squidstep_redis import SquidstepError, StepRunStore
from squidstep_redis.cli.output import new_console, print_text
from squidstep_redis.demo.check import find_problems
from squidstep_redis.demo.scenario import DemoContext, Scenario, describe
from squidstep_redis.demo.work import STEPS, Payload, find_files
from squidstep_redis.embedded import EmbeddedServer, ServerStartError

RUN_TTL: Final = 3_600.0  # seconds: of the runs of a demo, if it cannot delete them


def demo_options(*, files: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the parameters of a demo to its command: `path`, `files` and `as_json`.

    Args:
        files: The default of `--files`.
    """
    path = click.argument("path", required=False, type=click.Path(exists=True, readable=True, path_type=Path))
    limit = click.option(
        "--files", default=files, show_default=True, type=click.IntRange(1), help="The maximum number of files."
    )
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    return lambda command: path(limit(as_json(command)))


@contextmanager
def _keys_of_demo(url: str) -> Generator[tuple[str, str]]:
    """Provides a URL and a separate key prefix, and deletes the keys afterwards.

    If the demo is killed, its runs expire.
    """
    prefix = f"squidstep-demo-{secrets.token_hex(4)}"
    redis_py: Any = redis.Redis  # parts of its types are unknown
    try:
        client = redis_py.from_url(url)
    except (ValueError, TypeError) as error:  # their text may quote a part of the password
        raise click.BadParameter("must be redis://…, rediss://… or unix://…", param_hint="--url") from error
    with client:
        client.ping()
        yield url, prefix
        for key in client.scan_iter(match=f"{prefix}:*", count=1_000):
            client.unlink(key)


@contextmanager
def _bundled_server() -> Generator[tuple[str, str]]:
    with EmbeddedServer() as server:
        yield server.url, "squidstep"


def run_demo(
    scenario: Callable[[DemoContext], Scenario], *, path: Path | None, files: int, as_json: bool, url: str | None = None
) -> NoReturn:
    """Runs a demo and prints its result. Exits with 0 only if the check finds no problem.

    Args:
        scenario: Creates the scenario.
        path: The directory with the files; None: Python's standard library.
        files: The maximum number of files.
        as_json: Whether to print the result as JSON.
        url: The server; None: a bundled one.
    """
    root, suffix = (Path(sysconfig.get_path("stdlib")), ".py") if path is None else (path, "")
    found = find_files(root, files, suffix)
    if not found:
        raise click.BadParameter(f"there are no usable files in {root}", param_hint="PATH")
    console = new_console(stderr=as_json)
    # No thread refreshes the progress line: only this thread may receive signals while it starts a worker.
    try:
        with (
            _bundled_server() if url is None else _keys_of_demo(url) as (address, prefix),
            StepRunStore.from_url(address, prefix=prefix, run_ttl=RUN_TTL) as store,
            Live(console=console, auto_refresh=False, transient=True) as live,
        ):
            context = DemoContext(found, address, store, console.out, lambda line: live.update(line, refresh=True))
            result = _run(scenario(context), "a bundled server" if url is None else f"your server, prefix {prefix}")
    except (ImportError, ServerStartError, redis.RedisError, SquidstepError) as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_text(_summary(result))
        for problem in result["problems"][:10]:
            console.out(problem, style="red")
    sys.exit(0 if result["ok"] else 1)


def _run(scenario: Scenario, server: str) -> Payload:
    context = scenario.context
    size = {"files": len(context.files), "steps": len(context.files) * len(STEPS)}
    workers = f"{scenario.size} {scenario.title}"
    context.print_line(f"{size['files']} files, {size['steps']} steps, {workers}, {server}")
    scenario.run()
    context.show_progress("checking every output")
    problems = find_problems(scenario)
    return {
        "ok": not problems,
        **size,
        **scenario.counts,
        "workers_replaced": len(scenario.workers) - scenario.size,
        "seconds": round(scenario.seconds, 3),
        "killed": {
            f"{fault} inside {describe(key)}": [
                f"{attempt.outcome}, {attempt.owner}" for attempt in context.store.attempts(*key)
            ]
            for key, fault in scenario.kill_plan.items()
        },
        "problems": problems,
    }


def _summary(result: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False)
    for name, value in result.items():
        if name not in ("ok", "killed", "problems"):
            table.add_row(name.replace("_", " "), str(value))
    for killed, attempts in result["killed"].items():
        table.add_row(Text(f"killed: {killed}"), Text("\n".join(attempts)))
    table.add_row("check", "every output is correct, nothing is lost or duplicated" if result["ok"] else "FAILED")
    return table
