"""The changes that the page's forms make."""

from __future__ import annotations

import time
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun
from support.web import Site

from squidstep_redis import Outcome, StepRun, StepRunStore, StepStatus
from squidstep_redis.web import reads
from squidstep_redis.web.reads import Reader


def fail(store: Any, run: str, step: str = "pay", type_: str = "TimeoutError") -> None:
    store.fail_step(begun(store.begin_step(run, step, {})), {"type": type_, "message": "no reply"})


def statuses(site: Site, *runs: str) -> list[StepStatus]:
    return [site.store.get_step_run(run, "pay").status for run in runs]


def test_a_failed_step_is_retried(acting_site: Site) -> None:
    fail(acting_site.store, "run-1")
    page = acting_site.get("/step?run=run-1&step=pay")
    done = acting_site.submit(page, "/retry?")
    assert done.status == 303
    shown = acting_site.get(done.headers["location"])
    assert "The step is pending." in shown.text
    assert "deliver the step again from your queue" in shown.text
    attempts = acting_site.store.attempts("run-1", "pay")
    assert [(each.outcome, each.owner) for each in attempts] == [
        (Outcome.FAILED, None),
        (Outcome.RELEASED, "retry by the web page"),
    ]


def test_a_step_that_has_failed_again_is_not_retried(acting_site: Site) -> None:
    fail(acting_site.store, "run-1")
    page = acting_site.get("/step?run=run-1&step=pay")
    claim = begun(acting_site.store.begin_step("run-1", "pay", {}))
    acting_site.store.fail_step(claim, {"type": "Declined"}, final=True)
    refused = acting_site.submit(page, "/retry?")
    assert refused.status == 409
    assert "it has failed again, in attempt 2, since the page showed it. Nothing was written" in refused.text
    assert statuses(acting_site, "run-1") == [StepStatus.FAILED]
    assert acting_site.submit(acting_site.get("/run?id=run-1"), "/retry?").status == 303
    assert statuses(acting_site, "run-1") == [StepStatus.PENDING]


def test_all_failed_steps_of_a_run_are_retried(acting_site: Site) -> None:
    for step in ("a", "b"):
        fail(acting_site.store, "run-1", step)
    page = acting_site.get("/run?id=run-1")
    assert "Make 2 failed steps pending" in page.text
    assert acting_site.submit(page, "/retry-run?").status == 303
    assert set(acting_site.store.step_statuses("run-1").values()) == {StepStatus.PENDING}


def test_the_claim_that_was_shown_is_released(acting_site: Site) -> None:
    begun(acting_site.store.begin_step("run-1", "pay", {}, owner="worker-1"))
    page = acting_site.get("/step?run=run-1&step=pay")
    assert acting_site.submit(page, "/release?").status == 303
    assert statuses(acting_site, "run-1") == [StepStatus.PENDING]


def test_a_later_claim_is_not_released(acting_site: Site) -> None:
    acting_site.store.fail_step(begun(acting_site.store.begin_step("run-1", "pay", {})), {})
    begun(acting_site.store.begin_step("run-1", "pay", {}))
    page = acting_site.get("/step?run=run-1&step=pay")
    acting_site.store.fail_step(acting_site.store.get_step_run("run-1", "pay").id, {})
    begun(acting_site.store.begin_step("run-1", "pay", {}))
    refused = acting_site.submit(page, "/release?")
    assert refused.status == 409
    assert "it is running in attempt 3, not running in attempt 2. Nothing was written" in refused.text
    assert statuses(acting_site, "run-1") == [StepStatus.RUNNING]


def test_a_claim_of_a_run_created_again_is_not_released(acting_site: Site) -> None:
    begun(acting_site.store.begin_step("run-1", "pay", {}))
    page = acting_site.get("/step?run=run-1&step=pay")
    acting_site.store.delete_run("run-1", tombstone=0.001)
    time.sleep(0.005)
    begun(acting_site.store.begin_step("run-1", "pay", {}))
    refused = acting_site.submit(page, "/release?")
    assert refused.status == 409
    assert "it is running in a different attempt 1, which began at" in refused.text
    assert statuses(acting_site, "run-1") == [StepStatus.RUNNING]


def test_a_takeover_after_the_page_loaded_is_not_released(acting_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = begun(acting_site.store.begin_step("run-1", "pay", {}))
    page = acting_site.get("/step?run=run-1&step=pay")
    read = Reader.step_run

    async def read_before_a_takeover(reader: Reader, run_id: str, step: str) -> StepRun | None:
        found = await read(reader, run_id, step)
        await acting_site.asyncio_store.expire_claim(dead)
        await acting_site.asyncio_store.begin_step(run_id, step, {})
        return found

    monkeypatch.setattr(Reader, "step_run", read_before_a_takeover)
    refused = acting_site.submit(page, "/release?")
    assert refused.status == 409
    assert "attempt 2 holds the claim. Nothing was written" in refused.text
    assert statuses(acting_site, "run-1") == [StepStatus.RUNNING]


def test_a_run_is_cancelled_and_resumed(acting_site: Site) -> None:
    acting_site.store.schedule_step("run-1", "pay", {})
    done = acting_site.submit(acting_site.get("/run?id=run-1"), "/cancel?", reason=" wrong address ")
    shown = acting_site.get(done.headers["location"])
    assert "The run is cancelled: no step of it begins until it is resumed." in shown.text
    assert acting_site.store.summarize_run("run-1").cancel_reason == "wrong address"
    done = acting_site.submit(shown, "/resume?")
    assert "The run is resumed" in acting_site.get(done.headers["location"]).text
    assert acting_site.store.summarize_run("run-1").cancel_reason is None


def test_what_was_done_is_reported_while_it_is_so(acting_site: Site) -> None:
    """The back button, and a reload, load the page of the report again."""
    fail(acting_site.store, "run-1")
    retried, released = (f"/step?run=run-1&step=pay&done={what}" for what in ("retried", "released"))
    run = "/run?id=run-1&done="
    assert "is pending" not in acting_site.get(retried).text
    assert "are pending" not in acting_site.get(f"{run}retried-run").text
    assert "is cancelled" not in acting_site.get(f"{run}cancelled").text
    assert "The run is resumed" in acting_site.get(f"{run}resumed").text

    acting_site.store.cancel_run("run-1")
    acting_site.store.retry_run("run-1")
    assert "The step is pending." in acting_site.get(retried).text
    assert "The step is pending." in acting_site.get(released).text
    assert "The failed steps of the run are pending." in acting_site.get(f"{run}retried-run").text
    assert "The run is cancelled: no step" in acting_site.get(f"{run}cancelled").text
    assert "The run is resumed" not in acting_site.get(f"{run}resumed").text


def fail_in_order(store: StepRunStore, runs: list[str]) -> None:
    """Lets the step "pay" of each run fail, each at another millisecond."""
    for run in runs:
        fail(store, run)
        time.sleep(0.002)


class TestBulkRetry:
    def test_the_steps_of_one_type_are_retried(self, acting_site: Site) -> None:
        for run in ("run-1", "run-2"):
            fail(acting_site.store, run)
        fail(acting_site.store, "run-3", type_="Declined")
        page = acting_site.get("/failed")
        done = acting_site.submit(page, "/retry-group?type=TimeoutError")
        shown = acting_site.get(done.headers["location"])
        assert "2 steps were made pending." in shown.text
        assert statuses(acting_site, "run-1", "run-2", "run-3") == ["pending", "pending", "failed"]

    def test_steps_whose_errors_have_an_empty_type_are_retried(self, acting_site: Site) -> None:
        fail(acting_site.store, "run-1", type_="")
        page = acting_site.get("/failed")
        assert "(without a type) 1 step of 1 run" in page.text
        assert acting_site.submit(page, "/retry-group?").status == 303
        assert statuses(acting_site, "run-1") == ["pending"]

    def test_steps_that_failed_after_the_page_are_left_alone(self, bench: Bench, acting_site: Site) -> None:
        fail(acting_site.store, "run-1")
        page = acting_site.get("/failed")
        shown_at = acting_site.store.get_step_run("run-1", "pay").ended_at
        while bench.backend.now() <= shown_at.timestamp() + 0.002:
            pass
        fail(acting_site.store, "run-2")
        acting_site.submit(page, "/retry-group?")
        assert statuses(acting_site, "run-1", "run-2") == ["pending", "failed"]

    def test_steps_that_the_page_did_not_show_are_left_alone(
        self, acting_site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reads, "FAILURES_PER_PAGE", 3)
        runs = [f"run-{number}" for number in range(8)]
        fail_in_order(acting_site.store, runs)
        first = acting_site.get("/failed")
        second = acting_site.get(next(link for link in first.links() if "cursor=" in link))
        acting_site.store.retry_step("run-7", "pay")  # on the first page
        acting_site.store.retry_step("run-4", "pay")  # on the second page

        acting_site.submit(second, "/retry-group?")

        assert statuses(acting_site, *runs) == [*["failed"] * 2, *["pending"] * 3, *["failed"] * 2, "pending"]

    def test_a_search_limits_what_is_retried(self, acting_site: Site) -> None:
        for run in ("a-1", "b-1"):
            fail(acting_site.store, run)
        acting_site.submit(acting_site.get("/failed?q=a-"), "/retry-group?")
        assert statuses(acting_site, "a-1", "b-1") == ["pending", "failed"]

    def test_a_step_that_has_begun_again_is_left_alone(self, acting_site: Site) -> None:
        fail(acting_site.store, "run-1")
        page = acting_site.get("/failed")
        begun(acting_site.store.begin_step("run-1", "pay", {}))
        done = acting_site.submit(page, "/retry-group?")
        assert "0 steps were made pending." in acting_site.get(done.headers["location"]).text
        assert statuses(acting_site, "run-1") == [StepStatus.RUNNING]


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/retry?run=nope&step=pay", 404, "there is no such step run; nothing was written"),
        ("/retry?run=run-1&step=done", 409, "retry_step was refused: the step is completed. Nothing was written"),
        ("/retry?run=run-1", 400, "step: is missing from the form"),
        ("/retry-run?run=nope", 404, "there is no such run; nothing was written"),
        ("/release?run=nope&step=pay&attempt=1", 404, "there is no such step run; nothing was written"),
        ("/release?run=run-1&step=done&attempt=1", 409, "Nothing was written"),
        ("/cancel?run=nope", 404, "there is no such run; nothing was written"),
        ("/resume?run=nope", 404, "there is no such run; nothing was written"),
        ("/retry-group?type=T&since=2026-11-27&until=never", 400, "until: must be a time"),
        ("/retry-group?type=T&since=then&until=2026-11-27", 400, "since: must be a time"),
        ("/retry-group?type=T&since=2026-11-27&until=2026-11-27&cursor=nope", 400, "cursor: must be the cursor"),
    ],
)
def test_a_refused_action_says_that_nothing_was_written(acting_site: Site, path: str, status: int, text: str) -> None:
    acting_site.store.complete_step(begun(acting_site.store.begin_step("run-1", "done", {})), {})
    acting_site.store.schedule_step("run-1", "pay", {})
    token = next(iter(acting_site.get("/run?id=run-1").forms().values()))
    refused = acting_site.post(path, {"token": token})
    assert refused.status == status
    assert text in refused.text
