"""Command-line options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import click


class StoreOptions(NamedTuple):
    """The server and the key prefix of the store that a command works on."""

    url: str
    prefix: str

    @property
    def safe_url(self) -> str:
        """The URL without its password."""
        return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"(://[^/@:]*:).*@", r"\1***@", self.url))


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
