"""`explain_step` and `explain_run` say why a step is not finished, in words that need no guide."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun

from squidstep_redis import (
    CorruptRunError,
    InvalidArgumentError,
    StepExplanation,
    StepRunStore,
    StepStatus,
)
from squidstep_redis.durations import format_moment

WORKER = "host-3:4711"


def live(bench: Bench, store: StepRunStore) -> None:
    begun(store.begin_step("run", "pay", {}, lease=600, owner=WORKER))


def lapsed(bench: Bench, store: StepRunStore) -> None:
    bench.lapse(begun(store.begin_step("run", "pay", {}, lease=0.001, owner=WORKER)))


def without_lease(bench: Bench, store: StepRunStore) -> None:
    begun(store.begin_step("run", "pay", {}, owner=WORKER))


def fail(store: StepRunStore, **options: Any) -> None:
    store.fail_step(begun(store.begin_step("run", "pay", {}, owner=WORKER)), TimeoutError("no reply"), **options)


def exhausted(bench: Bench, store: StepRunStore) -> None:
    lapsed(bench, store)
    assert store.begin_step("run", "pay", {}, max_attempts=1).exhausted


def cancelled(bench: Bench, store: StepRunStore) -> None:
    store.schedule_step("run", "pay", {})
    store.cancel_run("run", "wrong address")


# What brings the step into its state; its reason; what a newcomer must read; what can be done.
CASES: dict[str, tuple[Callable[[Bench, StepRunStore], None], list[str], list[str | None]]] = {
    "leased": (
        live,
        [f"Worker {WORKER} began attempt 1 at 2", "until its lease ends, at 2", "(in ", "skipped as busy"],
        [None, "release_step"],
    ),
    "lapsed": (
        lapsed,
        [f"Worker {WORKER}", "lease ended at 2", "has died, hangs, or cannot reach", "delivery of the step takes over"],
        [None, "release_step", "complete_step"],
    ),
    "unleased": (
        without_lease,
        [f"Worker {WORKER}", "no lease", "never ends by itself", f"Find out whether the worker, {WORKER}, is alive"],
        [None, "release_step"],
    ),
    "delayed": (
        lambda bench, store: fail(store, retry_after=600),
        [
            "Attempt 1",
            "failed at 2",
            "TimeoutError: no reply",
            "cannot be claimed before 2",
            "(in ",
            "executes attempt 2",
        ],
        [None, "retry_step"],
    ),
    "failed": (
        lambda bench, store: fail(store),
        [
            "Attempt 1",
            "TimeoutError: no reply",
            "executes attempt 2",
            "(max_attempts) to 1 or fewer",
            "your queue does",
        ],
        [None, "retry_step", "complete_step"],
    ),
    "exhausted": (
        exhausted,
        ["lease of attempt 1", "the limit that", "(max_attempts) was reached", "Nothing: a delivery is skipped"],
        ["retry_step", "complete_step"],
    ),
    "final": (
        lambda bench, store: fail(store, final=True),
        [
            "failed permanently at 2",
            "TimeoutError: no reply",
            "no further attempt can succeed",
            "every delivery is skipped",
        ],
        ["retry_step", "complete_step"],
    ),
    "pending": (
        lambda bench, store: store.schedule_step("run", "pay", {}),
        ["was scheduled at 2", "no worker has claimed it", "next delivery", "whether the step is still queued"],
        [None],
    ),
    "cancelled": (
        cancelled,
        ["run is cancelled, with the reason: wrong address", "was scheduled", "until the run is resumed"],
        ["resume_run"],
    ),
}


def text_of(explained: StepExplanation) -> str:
    return " ".join([explained.why, explained.next, *(action.effect for action in explained.actions)])


def explain(store: StepRunStore) -> StepExplanation:
    explained = store.explain_step("run", "pay")
    assert explained is not None
    return explained


@pytest.mark.parametrize("reason", CASES)
def test_text_alone_says_why_a_step_is_stuck(bench: Bench, store: StepRunStore, reason: str) -> None:
    prepare, sentences, actions = CASES[reason]
    prepare(bench, store)
    before = bench.dump()

    explained = explain(store)

    assert explained.reason == reason
    assert [action.operation for action in explained.actions] == actions
    text = text_of(explained)
    for sentence in sentences:
        assert sentence in text
    assert re.search(r" \(([\d.]+ (ms|s) ago|in [\d.]+ (s|min)( \d+ s)?)\)", text)  # when, and how long ago
    assert "  " not in text
    assert bench.dump() == before
    of_run = store.explain_run("run")
    assert of_run is not None
    assert [(each.step, each.reason, each.actions) for each in of_run.steps] == [("pay", reason, explained.actions)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms ago"), (-0.0004, "0 ms ago"), (-90, "1 min 30 s ago"), (7_200, "in 2 h"), (0.02, "in 20 ms")],
)
def test_moments_have_their_distance_from_now(seconds: float, text: str) -> None:
    now = datetime(2026, 11, 27, 8, tzinfo=UTC)
    moment = now + timedelta(seconds=seconds)
    assert format_moment(moment, now) == f"{moment:%Y-%m-%d %H:%M:%S} UTC ({text})"


class TestStep:
    def test_step_without_a_record_has_no_explanation(self, store: StepRunStore) -> None:
        assert store.explain_step("run", "pay") is None
        store.schedule_step("run", "other", {})
        assert store.explain_step("run", "pay") is None
        store.delete_run("run")
        assert store.explain_step("run", "other") is None

    def test_completed_step_needs_nothing(self, store: StepRunStore) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {}, owner=WORKER)), {})

        explained = explain(store)

        assert (explained.reason, explained.status, explained.actions) == ("completed", StepStatus.COMPLETED, ())
        assert f"Attempt 1 by {WORKER} completed it at 2" in explained.why

    def test_earlier_failure_is_named(self, bench: Bench, store: StepRunStore) -> None:
        fail(store)
        store.retry_step("run", "pay", owner="retry by ann@desk")
        assert "Attempt 2 by retry by ann@desk was released" in explain(store).why
        assert "Before that, attempt 1 failed at 2" in explain(store).why
        live(bench, store)
        assert "Before that, attempt 1 failed at 2" in explain(store).why
        assert "TimeoutError: no reply" in explain(store).why

    def test_running_step_of_a_cancelled_run_may_finish(self, bench: Bench, store: StepRunStore) -> None:
        live(bench, store)
        store.cancel_run("run")

        explained = explain(store)

        assert explained.reason == "leased"
        assert "The run is cancelled: the worker learns this" in explained.next
        assert [action.operation for action in explained.actions] == [None, "release_step", "resume_run"]

    def test_lapsed_step_of_a_cancelled_run_needs_resume(self, bench: Bench, store: StepRunStore) -> None:
        lapsed(bench, store)
        store.cancel_run("run")

        assert explain(store).reason == "cancelled"
        assert "lease ended at" in explain(store).why

    def test_stored_control_characters_are_escaped_and_long_errors_cut(self, store: StepRunStore) -> None:
        evil = "\x1b[2J\u202e\n"
        store.fail_step(begun(store.begin_step("run", evil, {})), {"type": evil, "message": "x" * 10_000})

        explained = store.explain_step("run", evil)

        assert explained is not None
        assert text_of(explained).isprintable()
        assert len(text_of(explained)) < 2_000

    def test_error_that_cannot_be_decoded_hides_nothing(self, bench: Bench, store: StepRunStore) -> None:
        fail(store)
        bench.backend.raw.hset(bench.keys("run")[0], "epay", b"\xc1")

        assert "Attempt 1" in explain(store).why
        assert "cannot decode" in explain(store).why

    def test_lease_is_judged_by_the_clock_of_the_server(self, store: StepRunStore, monkeypatch: Any) -> None:
        begun(store.begin_step("run", "pay", {}, lease=60))
        of_run = store.explain_run("run")
        assert of_run is not None
        step_run = store.get_step_run("run", "pay")
        assert step_run is not None
        assert timedelta() <= of_run.read_at - step_run.created_at < timedelta(seconds=60)
        assert explain(store).until == step_run.lease_ends_at


class TestRun:
    def test_missing_run_has_no_explanation(self, store: StepRunStore) -> None:
        assert store.explain_run("run") is None

    def test_completed_steps_are_counted_only(self, store: StepRunStore) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})

        explained = store.explain_run("run")

        assert explained is not None
        assert (explained.steps, explained.omitted) == ([], 0)
        assert explained.summary == store.summarize_run("run")
        assert abs(explained.read_at - datetime.now(UTC)) < timedelta(hours=1)

    def test_steps_that_need_an_operator_come_first(self, bench: Bench, store: StepRunStore) -> None:
        store.schedule_steps("run", {"later": {}, "latest": {}})
        begun(store.begin_step("run", "works", {}, lease=600))
        bench.lapse(begun(store.begin_step("run", "dead", {}, lease=0.001)))
        store.fail_step(begun(store.begin_step("run", "soon", {})), {}, retry_after=600)
        store.fail_step(begun(store.begin_step("run", "never", {})), {}, final=True)

        explained = store.explain_run("run")
        some = store.explain_run("run", limit=3)

        assert explained is not None
        assert [each.step for each in explained.steps] == ["never", "dead", "soon", "later", "latest", "works"]
        assert some is not None
        assert [each.step for each in some.steps] == ["never", "dead", "soon"]
        assert (explained.omitted, some.omitted) == (0, 3)

    def test_corrupt_run_raises(self, bench: Bench, store: StepRunStore) -> None:
        store.complete_step(begun(store.begin_step("run", "pay", {})), {})
        bench.backend.raw.delete(bench.keys("run")[1])

        for explaining in (lambda: store.explain_run("run"), lambda: store.explain_step("run", "pay")):
            with pytest.raises(CorruptRunError):
                explaining()

    @pytest.mark.parametrize("limit", [0, 1_001, None])
    def test_invalid_limit_is_rejected(self, store: StepRunStore, limit: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^limit: "):
            store.explain_run("run", limit=limit)
