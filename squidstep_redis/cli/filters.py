"""The filters `--since`, `--step`, `--run-prefix` and `--label` of steps across runs, and how the steps are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache, wraps
from types import MappingProxyType
from typing import Any, NamedTuple

import click

from squidstep_redis import StepRun, StepRunList, StepRunStore
from squidstep_redis.cli.options import label_option, run_prefix_option, since_option
from squidstep_redis.escaping import escaped
from squidstep_redis.formatting import error_type

_MAX_PAGE = 1_000


class Filters(NamedTuple):
    """Which steps to list; the names are those of the store's arguments."""

    run_id_prefix: str = ""
    step: str | None = None
    since: datetime | None = None
    labels: Mapping[str, str] = MappingProxyType({})

    @property
    def are_given(self) -> bool:
        """Whether any filter excludes steps."""
        return self != Filters()

    def label_filter(self, store: StepRunStore) -> Callable[[StepRun], bool] | None:
        """Returns whether a step belongs to a run with these labels; None: all do. It reads each run once."""
        if not self.labels:
            return None

        @cache
        def has_labels(run_id: str) -> bool:
            summary = store.summarize_run(run_id)
            return summary is not None and self.labels.items() <= summary.labels.items()

        return lambda step_run: has_labels(step_run.run_id)


def filter_options(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the filters. The command receives them as `filters`.

    Args:
        what: What `--since` is about, such as `steps that failed`.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @run_prefix_option
        @label_option
        @click.option("--step", help="Only steps of this name.")
        @since_option(what)
        @wraps(command)
        def with_filters(
            *args: Any,
            run_prefix: str,
            labels: dict[str, str],
            step: str | None,
            since: datetime | None,
            **rest: object,
        ) -> None:
            command(*args, filters=Filters(run_prefix, step, since, labels), **rest)

        return with_filters

    return add


def error_filter(type_: str | None) -> Callable[[StepRun], bool] | None:
    """Returns whether a failed step has an error of this type; None: all do."""
    return None if type_ is None else lambda step_run: error_type(step_run) == escaped(type_)


def read_filtered(
    store: StepRunStore,
    read: Callable[..., StepRunList],
    filters: Filters,
    limit: int,
    cursor: str | None = None,
    is_wanted: Callable[[StepRun], bool] | None = None,
) -> StepRunList:
    """Reads up to `limit` steps, in pages.

    Args:
        store: The store.
        read: The method of the store that lists steps.
        filters: The method's arguments, and labels, which the method does not support.
        limit: How many steps to return at most.
        cursor: Where to begin; None: with the first step.
        is_wanted: Rejects further steps.

    Returns:
        The steps, and the cursor of the next ones.
    """
    found: list[StepRun] = []
    conditions = [each for each in (is_wanted, filters.label_filter(store)) if each is not None]
    arguments = {name: value for name, value in filters._asdict().items() if name != "labels"}
    size = _MAX_PAGE if conditions else limit
    while True:
        page = read(min(size, _MAX_PAGE), payloads=False, cursor=cursor, **arguments)
        wanted = [number for number, each in enumerate(page, 1) if all(condition(each) for condition in conditions)]
        left = limit - len(found)
        if len(wanted) > left or (len(wanted) == left and wanted[-1] < len(page)):
            size = wanted[left - 1]  # read the page again, up to the last step that is returned, for its cursor
            continue
        found += [page[number - 1] for number in wanted]
        cursor = page.cursor
        if cursor is None or len(found) == limit:
            return StepRunList(found, cursor)
        size = _MAX_PAGE if conditions else limit - len(found)
