"""The filters `--since`, `--step` and `--run-prefix` of steps across runs, and how the steps are read."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import Any, NamedTuple

import click

from squidstep_redis import StepRun
from squidstep_redis.cli.formatting import error_type
from squidstep_redis.cli.options import run_prefix_option, since_option
from squidstep_redis.escaping import escaped

_MAX_PAGE = 1_000


class Filters(NamedTuple):
    """Which steps to list; the names are those of the store's arguments."""

    run_id_prefix: str = ""
    step: str | None = None
    since: datetime | None = None

    @property
    def are_given(self) -> bool:
        """Whether any of them excludes steps."""
        return self != Filters()


def filter_options(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the filters. The command receives them as `filters`.

    Args:
        what: What `--since` is about, such as `steps that failed`.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @run_prefix_option
        @click.option("--step", help="Only steps of this name.")
        @since_option(what)
        @wraps(command)
        def with_filters(*args: Any, run_prefix: str, step: str | None, since: datetime | None, **rest: object) -> None:
            command(*args, filters=Filters(run_prefix, step, since), **rest)

        return with_filters

    return add


def error_filter(type_: str | None) -> Callable[[StepRun], bool] | None:
    """Returns whether a failed step has an error of this type; None: all have."""
    return None if type_ is None else lambda step_run: error_type(step_run) == escaped(type_)


def read_filtered(
    read: Callable[..., list[StepRun]],
    filters: Filters,
    limit: int,
    after: int = 0,
    is_wanted: Callable[[StepRun], bool] | None = None,
) -> tuple[list[StepRun], int | None]:
    """Reads up to `limit` steps, in pages.

    Args:
        read: The store's method.
        filters: Its arguments.
        limit: How many steps to return at most.
        after: How many to skip.
        is_wanted: Rejects further steps.

    Returns:
        The steps, and the `after` of the next page; None if there is none.
    """
    found: list[StepRun] = []
    while True:
        size = min(_MAX_PAGE, limit - len(found)) if is_wanted is None else _MAX_PAGE
        page = read(size, after=after, **filters._asdict())
        for number, step_run in enumerate(page, 1):
            if is_wanted is None or is_wanted(step_run):
                found.append(step_run)
            if len(found) == limit:
                is_last = number == len(page) < size
                return found, None if is_last else after + number
        after += len(page)
        if len(page) < size:
            return found, None
