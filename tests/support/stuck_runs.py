"""Runs that are stuck, each for a different reason, and what a page must say about each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from squidstep_redis import StepRunStore
from support.backends import Bench
from support.records import begun

WORKER = "host-3:4711"


class StuckRun(NamedTuple):
    """A run that is stuck.

    Attributes:
        prepare: brings a step `pay` of the run `run` into its state.
        headline: the state in a few words.
        says: sentences, or their parts, with the reason and what to do.
        actions: the paths of the forms that a page with actions offers for the step.
        commands: the commands that it names.
    """

    prepare: Callable[[Bench, StepRunStore, str], None]
    headline: str
    says: list[str]
    actions: list[str]
    commands: list[str]


def _fail(**options: Any) -> Callable[[Bench, StepRunStore, str], None]:
    def prepare(bench: Bench, store: StepRunStore, run: str) -> None:
        store.fail_step(begun(store.begin_step(run, "pay", {}, owner=WORKER)), TimeoutError("no reply"), **options)

    return prepare


def _without_lease(bench: Bench, store: StepRunStore, run: str) -> None:
    begun(store.begin_step(run, "pay", {}, owner=WORKER))


def _lapsed(bench: Bench, store: StepRunStore, run: str) -> None:
    bench.lapse(begun(store.begin_step(run, "pay", {}, lease=0.001, owner=WORKER)))


def _exhausted(bench: Bench, store: StepRunStore, run: str) -> None:
    _lapsed(bench, store, run)
    assert store.begin_step(run, "pay", {}, max_attempts=1).exhausted


def _pending(bench: Bench, store: StepRunStore, run: str) -> None:
    store.schedule_step(run, "pay", {})


def _cancelled(bench: Bench, store: StepRunStore, run: str) -> None:
    store.schedule_step(run, "pay", {})
    store.cancel_run(run, "wrong address")


STUCK_RUNS: dict[str, StuckRun] = {
    "held": StuckRun(
        _without_lease,
        "running: a worker holds it, without a lease",
        [
            f"Worker {WORKER} began attempt 1",
            "It has no lease: the claim never ends by itself, even if the worker is dead.",
            f"Find out whether the worker, {WORKER}, is alive.",
            "If it is dead: make the step pending.",
        ],
        ["/release"],
        ["squidstep release RUN pay"],
    ),
    "lapsed": StuckRun(
        _lapsed,
        "running, but the lease of its worker has expired",
        [
            "without a result: it has died, hangs, or cannot reach the server.",
            "The next delivery of the step takes over, with attempt 2",
            "Find out whether the step is still queued and whether workers are running.",
        ],
        ["/release"],
        ["squidstep release RUN pay", "squidstep complete RUN pay"],
    ),
    "delayed": StuckRun(
        _fail(retry_after=600),
        "failed: can be retried later",
        [
            "with TimeoutError: no reply",
            "Its worker asked for a delay: the step cannot be claimed before",
            "To retry now: make the step pending and reset its attempt counter.",
        ],
        ["/retry"],
        ["squidstep retry RUN --step pay"],
    ),
    "exhausted": StuckRun(
        _exhausted,
        "failed: no attempt is left",
        [
            "the limit that your worker passes (max_attempts) was reached",
            "Nothing: a delivery is skipped unless it allows more attempts than before.",
            "Once you know why the worker was lost: make the step pending",
        ],
        ["/retry"],
        ["squidstep retry RUN --step pay", "squidstep complete RUN pay"],
    ),
    "final": StuckRun(
        _fail(final=True),
        "failed permanently",
        [
            "Its worker reported that no further attempt can succeed.",
            "Nothing: every delivery is skipped, even one that allows more attempts.",
            "Once the cause of the failure is removed: make the step pending",
        ],
        ["/retry"],
        ["squidstep retry RUN --step pay", "squidstep complete RUN pay"],
    ),
    "cancelled": StuckRun(
        _cancelled,
        "pending: does not begin, because the run is cancelled",
        [
            "The run is cancelled, with the reason: wrong address.",
            "Nothing, until the run is resumed: every delivery of the step is skipped.",
            "Let the steps of the run begin again.",
        ],
        ["/resume"],
        ["squidstep resume RUN"],
    ),
    "pending": StuckRun(
        _pending,
        "pending: waits for a delivery",
        [
            "no worker has claimed it since.",
            "Until one arrives, nothing happens. The store itself delivers nothing: your queue does.",
            "If it is not queued, deliver it again: enqueue its job, or call the code that executes it.",
        ],
        [],
        [],
    ),
}
