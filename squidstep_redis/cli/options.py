"""Command-line options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import click
import redis


class StoreOptions(NamedTuple):
    """The server and the key prefix of the store that a command works on."""

    url: str
    prefix: str

    @property
    def server(self) -> str:
        """The server's address and database. Of the URL nothing else is ever shown: a part may be the password."""
        redis_py: Any = redis  # parts of its types are unknown
        options = redis_py.connection.parse_url(self.url)
        if "path" in options:
            address = str(options["path"])
        else:
            address = f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        return f"{address}, database {options.get('db', 0)}"


def store_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--url` and `--prefix`. The command receives them as one `StoreOptions`, its first argument."""

    @click.option(
        "-u",
        "--url",
        envvar=["SQUIDSTEP_REDIS_URL", "RQ_REDIS_URL"],
        default="redis://localhost:6379",
        show_default=True,
        show_envvar=True,
        help="The server, or any node of a cluster: redis://, rediss:// or unix://.",
    )
    @click.option(
        "--prefix",
        envvar="SQUIDSTEP_PREFIX",
        default="squidstep",
        show_default=True,
        show_envvar=True,
        help="The prefix of the store's keys.",
    )
    @wraps(command)
    def with_store_options(url: str, prefix: str, **rest: object) -> None:
        command(StoreOptions(url, prefix), **rest)

    return with_store_options


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would change, and change nothing.")
yes_option = click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
limit_option = click.option(
    "--limit",
    default=100,
    show_default=True,
    type=click.IntRange(1, 1_000),
    help="The maximum number of steps.",
)
run_prefix_option = click.option("--run-prefix", default="", help="Only runs whose id starts with this.")
