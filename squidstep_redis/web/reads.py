"""Reads the data of the pages: every call that reads from the store is here."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from squidstep_redis import (
    AsyncStepRunStore,
    Attempt,
    RunExplanation,
    RunPage,
    RunSummary,
    StepExplanation,
    StepRun,
    StepRunList,
    StoreOverview,
    UndecodablePayloadError,
)
from squidstep_redis.formatting import error_type, opaque_calls
from squidstep_redis.timelines import Bar, Timeline

RUNS_PER_PAGE: Final = 50
STEPS_PER_PAGE: Final = 100
EXPLAINED_STEPS: Final = 50
FAILURES_PER_PAGE: Final = 500
OVERVIEW_FAILURES: Final = 100
OVERVIEW_ROWS: Final = 10


class RunSearch(NamedTuple):
    """Which runs to list; the names are those of the store's arguments."""

    labels: dict[str, str] = {}  # noqa: RUF012 -- a NamedTuple's default, which is never changed
    run_id_prefix: str = ""
    status: str | None = None
    since: datetime | None = None

    @property
    def is_given(self) -> bool:
        """Whether the search excludes any run."""
        return self != RunSearch()


class RunList(NamedTuple):
    """A page of runs.

    Attributes:
        page: the runs, and the cursor of the next page.
        exact: the run whose id is exactly what was searched for, on the first page.
        total: how many runs match; None if they are more than a page, and counting them would be slow.
    """

    page: RunPage
    exact: RunSummary | None
    total: int | None


class FailureGroup(NamedTuple):
    """The failed steps whose errors have the same type, newest first."""

    type: str
    step_runs: list[StepRun]

    @property
    def runs(self) -> int:
        """Number of runs that the steps belong to."""
        return len({each.run_id for each in self.step_runs})


class Counts(NamedTuple):
    """How many steps of the store are in these states."""

    live: int
    stuck: int
    failed: int


class Overview(NamedTuple):
    """The state of the whole store.

    Attributes:
        store: the counts, and the first claims and runs.
        groups: the newest failures by type, the most frequent type first.
        read_at: when it was read, by this machine's clock.
    """

    store: StoreOverview
    groups: list[FailureGroup]
    read_at: datetime

    @property
    def counts(self) -> Counts:
        """The counts that one visit compares with the next."""
        return Counts(self.store.live, self.store.lapsed, self.store.failed)


class StepRow(NamedTuple):
    """One step of a run.

    Attributes:
        step: its name.
        explained: why it is not completed; None if it is.
        bars: its known attempts, oldest first; one without an attempt for a step that was never claimed.
    """

    step: str
    explained: StepExplanation | None
    bars: list[Bar]


class RunView(NamedTuple):
    """One run.

    Attributes:
        explained: its counts, and why its unfinished steps are not completed.
        rows: the explained steps, and one page of completed steps, in the order in which they began.
        timeline: all their attempts.
        after: how many completed steps precede this page.
        completed: how many completed steps are on this page.
    """

    explained: RunExplanation
    rows: list[StepRow]
    timeline: Timeline
    after: int
    completed: int


class StepView(NamedTuple):
    """One step.

    Attributes:
        explained: why it is in its state.
        bars: its known attempts, oldest first.
        step_run: its record, with its payloads; None if the payloads were not requested.
        read_at: when it was read, by this machine's clock.
    """

    explained: StepExplanation
    bars: list[Bar]
    step_run: StepRun | None
    read_at: datetime


class Reader:
    """Reads pages from a store."""

    def __init__(self, store: AsyncStepRunStore) -> None:
        self._store = store

    async def overview(self) -> Overview:
        """Reads the state of the whole store."""
        found = await self._store.overview(OVERVIEW_ROWS, failures=OVERVIEW_FAILURES)
        return Overview(found, group_by_type(found.failed_steps), datetime.now(UTC))

    async def created_since(self, moment: datetime) -> int:
        """Counts the runs that were created at or after a moment and still exist."""
        return await self._store.count_runs(since=moment)

    async def runs(self, search: RunSearch, cursor: str | None) -> RunList:
        """Reads a page of runs."""
        store, exact = self._store, None
        if search.run_id_prefix and cursor is None:
            exact = await store.summarize_run(search.run_id_prefix)
        page = await store.runs(**search._asdict(), limit=RUNS_PER_PAGE, cursor=cursor)
        if cursor is None and page.cursor is None:
            return RunList(page, exact, len(page.runs))
        if search._replace(since=None).is_given:  # counting them would take as long as the page, or longer
            return RunList(page, exact, None)
        return RunList(page, exact, await store.count_runs(since=search.since))

    async def explanation(self, run_id: str) -> RunExplanation | None:
        """Reads why a run is not finished; None if there is no such run."""
        return await self._store.explain_run(run_id, limit=EXPLAINED_STEPS)

    async def run(self, run_id: str, after: int) -> RunView | None:
        """Reads one run, without payloads except errors; None if there is no such run.

        Args:
            run_id: the run.
            after: how many completed steps to skip.
        """
        explained = await self.explanation(run_id)
        if explained is None:
            return None
        completed = await self._store.completed_steps(run_id, after=after, limit=STEPS_PER_PAGE)
        unfinished = {each.step: each for each in explained.steps}
        # A step may have been completed between the two reads.
        steps = [*unfinished, *(step for step in completed if step not in unfinished)]
        histories = await self._attempts(run_id, steps)
        rows = [
            StepRow(step, unfinished.get(step), _bars(step, unfinished.get(step), attempts))
            for step, attempts in zip(steps, histories, strict=True)
            if attempts or step in unfinished
        ]
        rows.sort(key=_began)
        bars = [bar for row in rows for bar in row.bars]
        return RunView(explained, rows, Timeline(run_id, bars, explained.read_at), after, len(completed))

    async def step(self, run_id: str, step: str, *, payloads: bool) -> StepView | None:
        """Reads one step; None if there is no record.

        Args:
            run_id: the run.
            step: the step.
            payloads: whether to read its payloads, too.
        """
        explained = await self._store.explain_step(run_id, step)
        if explained is None:
            return None
        attempts = (await self._attempts(run_id, [step]))[0]
        step_run = await self._store.get_step_run(run_id, step) if payloads else None
        return StepView(explained, _bars(step, explained, attempts), step_run, datetime.now(UTC))

    async def step_run(self, run_id: str, step: str) -> StepRun | None:
        """Reads the record of a step, with its payloads; None if there is none."""
        return await self._store.get_step_run(run_id, step)

    async def failures(self, run_id_prefix: str, step: str | None, cursor: str | None) -> StepRunList:
        """Reads a page of failed steps, newest failure first.

        Args:
            run_id_prefix: only of runs whose id begins with it; empty: of all runs.
            step: only steps of this name; None: all.
            cursor: of the page; None: the first page.
        """
        return await self._store.failed_steps(
            FAILURES_PER_PAGE, run_id_prefix=run_id_prefix, step=step, payloads=False, cursor=cursor
        )

    async def _attempts(self, run_id: str, steps: list[str]) -> list[list[Attempt]]:
        """Reads the attempts of each of these steps. An error that cannot be decoded does not hide them."""
        store = self._store
        found: list[Any] = list(await store.batch([store.calls.attempts(run_id, step) for step in steps]))
        opaque = opaque_calls(store.calls.prefix)
        for index, attempts in enumerate(found):
            if isinstance(attempts, UndecodablePayloadError):
                found[index] = await store.send(opaque.attempts(run_id, steps[index]))
            elif isinstance(attempts, Exception):
                raise attempts
        return found


def group_by_type(failures: list[StepRun]) -> list[FailureGroup]:
    """Groups failed steps by the type of their errors, the most frequent type first."""
    groups: dict[str, list[StepRun]] = {}
    for each in failures:
        groups.setdefault(error_type(each), []).append(each)
    sizes = Counter({type_: len(members) for type_, members in groups.items()})
    return [FailureGroup(type_, groups[type_]) for type_, _ in sizes.most_common()]


def _bars(step: str, explained: StepExplanation | None, attempts: list[Attempt]) -> list[Bar]:
    """Returns the attempts of a step; a single None for a step that was never claimed."""
    until = explained.until if explained is not None and explained.reason in ("leased", "lapsed") else None
    bars = [Bar(step, attempt, until if attempt.ended_at is None else None) for attempt in attempts]
    return bars or [Bar(step, None)]


def _began(row: StepRow) -> tuple[bool, float]:
    first = row.bars[0].attempt
    return first is None, first.started_at.timestamp() if first is not None else 0.0
