"""What listings return: counts, summaries of runs, and pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import NamedTuple

from squidstep_redis.model import StepRun, StepStatus


class ClaimCounts(NamedTuple):
    """How many claims with a lease there are, according to the indexes."""

    live: int
    """Claims whose lease has not expired."""
    lapsed: int
    """Claims whose lease has expired and that no worker has taken over."""


class RunSummary(NamedTuple):
    """One run in a listing. If a large run changes while it is read, the counts may be slightly off.

    Attributes:
        run_id: the run.
        counts: number of steps by status.
        changed_at: when one of its steps was last created, claimed or ended; None if that cannot be read.
        problem: why its records are corrupt; None if they are not. `delete_run` removes such a run.
        cancel_reason: why the run was cancelled, empty without a reason; None if it is not cancelled.
        created_at: when the run was created here, by any call, also by `import_run`; None if the index does not say.
        labels: the labels of the run, by name.
    """

    run_id: str
    counts: dict[StepStatus, int]
    changed_at: datetime | None
    problem: str | None = None
    cancel_reason: str | None = None
    created_at: datetime | None = None
    labels: Mapping[str, str] = MappingProxyType({})

    @property
    def steps(self) -> int:
        """Number of steps."""
        return sum(self.counts.values())

    @property
    def is_over(self) -> bool:
        """Whether every step is completed or failed."""
        unfinished = self.counts[StepStatus.PENDING] + self.counts[StepStatus.RUNNING]
        return self.problem is None and not unfinished


class StepRunList(list[StepRun]):
    """A page of the step runs of all runs.

    Attributes:
        cursor: of the next page; None if this is the last.
    """

    def __init__(self, step_runs: Iterable[StepRun] = (), cursor: str | None = None) -> None:
        """Makes a list of step runs."""
        super().__init__(step_runs)
        self.cursor = cursor


class StoreOverview(NamedTuple):
    """The state of the whole store.

    Attributes:
        live: number of claims with a lease that has not expired.
        lapsed: number of claims whose lease has expired and that no worker has taken over.
        failed: number of failed steps.
        total: number of runs.
        lapsed_claims: the first lapsed claims, earliest expiry first.
        live_claims: the first live claims, soonest expiry first.
        failed_steps: the first failed steps, newest failure first.
        runs: the newest runs, newest first.
    """

    live: int
    lapsed: int
    failed: int
    total: int
    lapsed_claims: StepRunList
    live_claims: StepRunList
    failed_steps: StepRunList
    runs: list[RunSummary]


class RunPage(NamedTuple):
    """A page of runs.

    Attributes:
        runs: newest first; runs that were created in the same millisecond are ordered by run id.
        cursor: of the next page; None if this is the last.
    """

    runs: list[RunSummary]
    cursor: str | None


class StepPage(NamedTuple):
    """A page of the step runs of one run.

    Attributes:
        step_runs: in no particular order.
        cursor: of the next page; None if this is the last.
    """

    step_runs: list[StepRun]
    cursor: str | None
