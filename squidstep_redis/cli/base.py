"""What the commands share: the options that name a store, the store itself, and how they print."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, NoReturn

import click
import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError
from redis.retry import Retry
from rich.console import Console, RenderableType

from squidstep_redis import InvalidArgumentError, ServerError, SquidstepError, StepRun, StepRunStore

UNREACHED: Final = (RedisError, RedisClusterException)
"""What `opened` raises where no server answers."""

# Of a cluster's client, as `from_url` has it for a single server: the store sends again by itself.
_OPTIONS: Final[dict[str, Any]] = {
    "protocol": 2,
    "socket_timeout": 3.0,
    "socket_connect_timeout": 1.5,
    **(
        {"retry": Retry(NoBackoff(), 0)}
        if int(redis.__version__.partition(".")[0]) >= 6
        else {"cluster_error_retry_attempts": 0}
    ),
}
_STEPS_AT_ONCE: Final = 500  # 2 to 3 ms of the server's
_PLENTY: Final = 10_000  # columns: what reads a pipe does not want its lines folded


class Where(NamedTuple):
    """The store that a command is about."""

    url: str
    prefix: str

    def shown(self) -> dict[str, str]:
        """What may be shown of it: no password."""
        return {"url": _without_password(self.url), "prefix": self.prefix}


def on_a_store(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that name a store; it takes `url` and `prefix`."""
    url = click.option(
        "-u",
        "--url",
        envvar=["SQUIDSTEP_REDIS_URL", "RQ_REDIS_URL"],
        default="redis://localhost:6379",
        show_default=True,
        show_envvar=True,
        help="The server, or any node of a cluster: redis://, rediss:// or unix://.",
    )
    prefix = click.option(
        "--prefix",
        envvar="SQUIDSTEP_PREFIX",
        default="squidstep",
        show_default=True,
        show_envvar=True,
        help="The prefix of the store's keys.",
    )
    return url(prefix(command))


def as_json(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that reads the option `--json`; it takes `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


@contextmanager
def opened(where: Where) -> Generator[StepRunStore]:
    """The store, for as long as the block. A cluster is known by its answer, and then all its nodes are used.

    Raises:
        click.UsageError: the URL or the prefix is malformed.
        UNREACHED: a cluster of which no node can be reached. A single server is not looked for yet.
    """
    try:
        store = StepRunStore.from_url(where.url, prefix=where.prefix)
        is_cluster = _is_cluster(store.client)
    except InvalidArgumentError as error:
        raise click.BadParameter(str(error), param_hint="--prefix") from error
    except (ValueError, TypeError) as error:  # an option in the URL that redis-py does not know
        problem = str(error).partition(" as ")[0]  # what may be a part of the password
        raise click.BadParameter(f"{_without_password(where.url)}: {problem}", param_hint="--url") from error
    with store:
        if not is_cluster:
            yield store
            return
    connect: Any = redis.RedisCluster.from_url  # redis-py leaves parts of its types unknown
    with connect(where.url, **_OPTIONS) as cluster:
        yield StepRunStore(cluster, prefix=where.prefix)


@contextmanager
def reached(where: Where) -> Generator[StepRunStore]:
    """The store, for as long as the block. What goes wrong inside is one line, and an exit code: see the guide."""
    try:
        with opened(where) as store:
            yield store
    except (ServerError, *UNREACHED) as error:
        complain(str(error), 2)
    except InvalidArgumentError as error:
        raise click.UsageError(str(error)) from error
    except SquidstepError as error:
        complain(str(error), 1)


def steps_of(store: StepRunStore, run: str) -> list[StepRun]:
    """The step runs of a run, in the order they came to be; of a long run page by page, for no worker is to wait."""
    found: dict[str, StepRun] = {}
    cursor: str | None = None
    while True:
        page = store.scan_steps(run, limit=_STEPS_AT_ONCE, cursor=cursor)
        found |= {each.step: each for each in page.step_runs}
        cursor = page.cursor
        if cursor is None:
            return sorted(found.values(), key=lambda each: each.position)


def complain(problem: str, code: int) -> NoReturn:
    """Ends the command with one line."""
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in problem)
    sys.stderr.write(f"squidstep: {line}\n")
    sys.exit(code)


def may_change(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that changes something the option `--dry-run`; it takes `dry_run`."""
    return click.option("--dry-run", is_flag=True, help="Only say what would be done.")(command)


def destroys(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command that destroys something `--dry-run` and `--yes`; it takes `dry_run` and `yes`."""
    return may_change(click.option("-y", "--yes", is_flag=True, help="Do not ask first.")(command))


def may_go_on(question: str, *, yes: bool, dry_run: bool) -> bool:
    """Asks first, unless told not to. Answers whether to do it; on a dry run it says what would be done."""
    if dry_run:
        sys.stdout.write(f"would {question}\n")
        return False
    if not yes and not click.confirm(f"{question[0].upper()}{question[1:]}?", err=True):
        sys.exit(1)
    return True


def console_width(otherwise: int = 100) -> int:
    """The columns of the terminal; of what is no terminal, so many."""
    console = Console()
    return console.width if console.is_terminal else otherwise


def _is_cluster(client: Any) -> bool:
    """Whether it answers what a cluster's client asks first. Any other server refuses, and so may its ACL."""
    try:
        slots = client.execute_command("CLUSTER SLOTS")
    except UNREACHED:
        return False
    if not slots:
        raise RedisClusterException("none of its slots is served: see CLUSTER NODES")
    return True


def _without_password(url: str) -> str:
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"(://[^/@:]*:).*@", r"\1***@", url))


def show(*renderables: RenderableType) -> None:
    """Prints for people: coloured and folded on a terminal; into a pipe plain, a row a line, for grep."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PLENTY
    with console.capture() as shown:
        console.print(*renderables, sep="\n")
    for line in shown.get().splitlines():
        sys.stdout.write(f"{line.rstrip()}\n")


def show_json(value: Any) -> None:
    """Prints for programs."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
