"""What every demo stands on: its options, its files, its server, what it shows, and how it ends."""

from __future__ import annotations

import json
import secrets
import sys
import sysconfig
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import click
import redis
from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from squidstep_redis import SquidstepError, StepRunStore
from squidstep_redis.demo.work import EFFECTS, Payload, Tally, find_files
from squidstep_redis.embedded import EmbeddedServer, ServerStartError

FORGOTTEN_AFTER: Final = 3_600  # seconds: by a server of the user's, should the demo be killed


class Options(NamedTuple):
    """What was asked for on the command line."""

    path: Path | None
    files: int
    workers: int
    url: str | None
    keep: bool
    as_json: bool


def options(*, files: int, workers: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a demo's command its arguments and options: the fields of `Options`.

    Args:
        files: how many, unless asked for.
        workers: likewise.
    """
    path = click.Path(exists=True, readable=True, path_type=Path)
    wanted: list[Callable[[Callable[..., None]], Callable[..., None]]] = [
        click.argument("path", required=False, type=path),
        click.option(
            "--files", default=files, show_default=True, type=click.IntRange(1), help="How many files at most."
        ),
        click.option(
            "--workers", default=workers, show_default=True, type=click.IntRange(2, 64), help="How many processes work."
        ),
        click.option("--url", help="A server of yours. Without: an embedded Valkey, for this run alone."),
        click.option("--keep", is_flag=True, help="Keep the keys on the server of yours."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    ]
    return lambda command: reduce(lambda made, add: add(made), reversed(wanted), command)


@dataclass
class Stage:
    """Where a demo takes place.

    Attributes:
        files: to work on, by run id.
        workers: how many are to work.
        prefix: of the store, and of whatever else the demo leaves on the server.
        settings: for `StepRunStore.from_url`, of the workers' stores as of this one.
        keep: whether the keys are to stay.
        store: the parent's own.
        where: the server, for people.
    """

    files: dict[str, Path]
    workers: int
    prefix: str
    settings: Payload
    keep: bool
    store: StepRunStore
    console: Console
    where: str
    started: float = field(default_factory=time.monotonic)

    @property
    def steps(self) -> int:
        """How many steps there are to execute."""
        return len(self.files) * len(EFFECTS)

    @property
    def say(self) -> Callable[..., None]:
        """Prints a line, above what is shown live."""
        return self.console.out

    @contextmanager
    def showing(self, workers: str, screen: Callable[[], RenderableType]) -> Generator[None]:
        """Says what is about to happen, and shows how far it is for as long as the block."""
        self.say(f"{len(self.files)} files, {self.steps} steps, {workers}, {self.where}")
        with Live(get_renderable=screen, console=self.console, refresh_per_second=10, transient=True):
            yield

    def figures(self, tally: Tally, problems: list[str], work_seconds: float, **own: Any) -> dict[str, Any]:
        """The result, as `--json` prints it."""
        return {
            "ok": not problems,
            "files": len(self.files),
            "steps": self.steps,
            "steps_executed": tally.counts["completed"],
            "effects_begun": tally.begun.total(),
            "effects_ended": tally.ended.total(),
            **own,
            "steps_per_second": round(tally.counts["completed"] / work_seconds, 1),
            "work_seconds": round(work_seconds, 3),
            "elapsed_seconds": round(time.monotonic() - self.started, 3),
            "problems": problems,
        }


def progress(done: int, total: int) -> RenderableType:
    """A bar, and the figures beside it."""
    bar = Table.grid(padding=(0, 2))
    bar.add_row(ProgressBar(total, done, width=30), f"{done} of {total}")
    return bar


def screen(rows: dict[str, RenderableType]) -> RenderableType:
    """What is shown live."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in rows.items():
        grid.add_row(name, value)
    return grid


def perform(
    chosen: Options, play: Callable[[Stage], dict[str, Any]], rows: Callable[[dict[str, Any]], dict[str, Any]]
) -> NoReturn:
    """Runs a demo, prints its result and ends the program: with 0 only if all holds.

    Args:
        chosen: the options.
        play: the demo; answers its `figures`.
        rows: what the summary says of them, beyond what it says of every demo's.
    """
    if chosen.keep and chosen.url is None:
        raise click.UsageError("--keep needs --url: an embedded server's keys end with it")
    root = Path(sysconfig.get_path("stdlib")) if chosen.path is None else chosen.path
    files = find_files(root, chosen.files, ".py" if chosen.path is None else "")
    if not files:
        raise click.BadParameter(f"there is no file to work on in {root}", param_hint="PATH")
    console = Console(stderr=chosen.as_json, highlight=False)
    console.quiet = chosen.as_json and not console.is_terminal
    try:
        with _set(chosen, files, console) as stage:
            result = play(stage)
    except ImportError as error:
        raise click.ClickException("no server to start: pip install 'squidstep_redis[demo]', or give --url") from error
    except (ServerStartError, redis.RedisError, SquidstepError, ValueError) as error:
        raise click.ClickException(f"{type(error).__name__}: {error}") from error
    if chosen.as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        console.print(_summary(result, rows(result)))
        for problem in result["problems"][:10]:
            console.out(problem, style="red")
    sys.exit(0 if result["ok"] else 1)


@contextmanager
def _set(chosen: Options, files: dict[str, Path], console: Console) -> Generator[Stage]:
    prefix, started = f"squidstep-demo-{secrets.token_hex(4)}", time.monotonic()
    with ExitStack() as stack:
        settings: Payload = {"prefix": prefix, "run_ttl": None if chosen.keep else FORGOTTEN_AFTER}
        settings["url"] = chosen.url or stack.enter_context(EmbeddedServer()).url
        store = stack.enter_context(StepRunStore.from_url(**settings))
        client: Any = store.client  # redis-py leaves parts of its types unknown
        client.ping()
        if chosen.url and not chosen.keep:
            stack.callback(lambda: [client.unlink(key) for key in client.scan_iter(f"*{prefix}*", 1_000)])
        where = f"your server, prefix {prefix}" if chosen.url else "an embedded Valkey"
        yield Stage(files, chosen.workers, prefix, settings, chosen.keep, store, console, where, started)


def _summary(result: dict[str, Any], own: dict[str, Any]) -> RenderableType:
    rows = {
        "files": result["files"],
        "steps executed": f"{result['steps_executed']} of {result['steps']}",
        **own,
        "steps per second": f"{result['steps_per_second']:.0f}",
        "elapsed": f"{result['elapsed_seconds']:.1f} s, of which the work took {result['work_seconds']:.1f} s",
        "check": "every output agrees, nothing lost, nothing twice" if result["ok"] else "FAILED",
    }
    table = Table(box=SIMPLE_HEAD, show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table
