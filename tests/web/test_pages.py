"""What each page shows."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun
from support.web import Site, text_of

from squidstep_redis.web import reads
from squidstep_redis.web.looks import format_look
from squidstep_redis.web.reads import Counts
from squidstep_redis.web.settings import WebSettings


def fill(store: Any) -> None:
    """One run of each kind."""
    store.schedule_step("run-pending", "pay", {})
    store.complete_step(begun(store.begin_step("run-completed", "pay", {})), {})
    store.fail_step(begun(store.begin_step("run-failed", "pay", {})), TimeoutError("no reply"))
    store.fail_step(begun(store.begin_step("run-declined", "pay", {})), {"type": "Declined", "message": "no funds"})
    begun(store.begin_step("run-live", "pay", {}, lease=600, owner="worker-1"))
    store.cancel_run("run-pending", "wrong address")


def section(html: str, id: str) -> str:
    match = re.search(rf'<section id="{id}".*?</section>', html, re.DOTALL)
    assert match
    return text_of(match[0])


class TestOverview:
    def test_it_shows_running_stuck_and_failed_steps(self, bench: Bench, site: Site) -> None:
        fill(site.store)
        bench.lapse(begun(site.store.begin_step("run-stuck", "render", {}, lease=0.001, owner="gpu-1")))
        html = site.get("/").html
        assert section(html, "figures").startswith("Steps of all runs running under a lease 1 stuck: lease expired 1")
        assert "failed 2" in section(html, "figures")
        assert "run-stuck render gpu-1" in section(html, "stuck")
        assert "run-live pay worker-1" in section(html, "claims")
        assert re.search(r"(TimeoutError|Declined) 1 1 .* ago", section(html, "failures"))
        assert all(
            f"run-{kind}" in section(html, "runs") for kind in ("pending", "completed", "failed", "live", "stuck")
        )

    def test_an_empty_store_has_an_overview(self, site: Site) -> None:
        text = site.get("/").text
        for sentence in ("No lease has expired.", "No step has failed.", "There is no run yet."):
            assert sentence in text

    def test_changes_are_those_since_the_last_visit(self, site: Site) -> None:
        fill(site.store)
        assert "This is your first visit" in site.get("/").text
        site.store.fail_step(begun(site.store.begin_step("run-1", "pay", {})), {})
        site.store.release_step(site.store.get_step_run("run-live", "pay").id)
        page = site.get("/")
        assert "running under a lease 0 \u22121" in page.text
        assert "failed 3 +1" in page.text
        assert "Changes are since your last visit" in page.text
        assert "failed 3 no change" in site.get("/").text

    def test_a_live_update_keeps_the_last_visit(self, site: Site) -> None:
        site.get("/")
        site.store.fail_step(begun(site.store.begin_step("run-1", "pay", {})), {})
        page = site.get("/")
        fragment = next(
            link for link in re.findall(r'data-fragment="([^"]*)"', page.html.replace("&amp;", "&")) if "look=" in link
        )
        assert "failed 1 +1" in site.get(fragment).text
        assert "<html" not in site.get(fragment).html

    def test_runs_created_since_the_last_visit_are_counted(self, site: Site) -> None:
        site.store.schedule_step("run-0", "pay", {})
        assert "runs 1 This is your first visit" in site.get("/").text
        for number in range(1, 4):
            site.store.schedule_step(f"run-{number}", "pay", {})
        assert "runs 4 3 created" in site.get("/").text
        assert "runs 4 0 created" in site.get("/").text

    def test_a_forged_look_is_ignored(self, site: Site) -> None:
        site.cookies["squidstep_look"] = "1700000000-0-0-0.0000"
        assert "This is your first visit" in site.get("/").text
        settings = WebSettings(site.asyncio_store, "", False, False, None, None, b"another key")
        site.cookies["squidstep_look"] = format_look(settings, Counts(0, 0, 0), datetime.now(UTC))
        assert "This is your first visit" in site.get("/").text


class TestRuns:
    def test_it_lists_runs_with_their_steps(self, site: Site) -> None:
        fill(site.store)
        text = site.get("/runs").text
        assert "run-failed 1 failed" in text
        assert "run-pending cancelled: wrong address cancelled 1 pending" in text
        assert text.count("run-") == 5

    @pytest.mark.parametrize(
        ("query", "runs"),
        [
            ("q=run-l", {"run-live"}),
            ("status=failed", {"run-failed", "run-declined"}),
            ("q=run-f&status=failed", {"run-failed"}),
            ("q=nothing", set()),
        ],
    )
    def test_it_searches_by_prefix_and_status(self, site: Site, query: str, runs: set[str]) -> None:
        fill(site.store)
        page = site.get(f"/runs?{query}")
        assert set(re.findall(r"/run\?id=([\w-]+)", page.html)) == runs
        assert ("No run matches." in page.text) is not runs

    @pytest.mark.parametrize(
        ("query", "runs"),
        [
            ("label=tenant%3Dacme", {"a", "b"}),
            ("label=tenant%3Dacme&label=plan%3Dpro%3D1", {"b"}),
            ("label=&label=tenant%3Dacme&q=a", {"a"}),
            ("label=tenant%3Dnone", set()),
            ("within=hour", {"a", "b", "c"}),
        ],
    )
    def test_it_searches_by_label_and_age(self, site: Site, query: str, runs: set[str]) -> None:
        site.store.schedule_step("a", "pay", {}, labels={"tenant": "acme"})
        site.store.schedule_step("b", "pay", {}, labels={"tenant": "acme", "plan": "pro=1"})
        site.store.schedule_step("c", "pay", {}, labels={"tenant": "other"})
        page = site.get(f"/runs?{query}")
        assert set(re.findall(r"/run\?id=(\w+)", page.html)) == runs
        assert (f"{len(runs)} run" in page.text) is bool(runs)

    @pytest.mark.parametrize("label", ["tenant", "=", "a b%3Dc", "a%3Db&label=a%3Dc"])
    def test_a_malformed_label_is_rejected(self, site: Site, label: str) -> None:
        page = site.get(f"/runs?label={label}")
        assert page.status == 400
        assert "label" in page.text

    def test_labels_are_links_to_the_runs_that_have_them(self, site: Site) -> None:
        site.store.schedule_step("a", "pay", {}, labels={"tenant": "<b>&=1"})
        for path in ("/runs", "/run?id=a", "/"):
            page = site.get(path)
            assert "tenant=<b>&=1" in page.text
            link = next(each for each in page.links() if "label=" in each)
            assert re.findall(r"/run\?id=(\w+)", site.get(link).html) == ["a"]

    def test_the_run_with_the_exact_id_comes_first(self, site: Site) -> None:
        for run in ("a", "a-1", "a-2"):
            site.store.schedule_step(run, "pay", {})
        text = site.get("/runs?q=a").text
        assert text.index("The run with exactly this id") < text.index("All runs whose id begins with it")
        assert "The run with exactly this id" not in site.get("/runs?q=a-").text

    def test_pages_together_have_every_run_once(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reads, "RUNS_PER_PAGE", 7)
        for number in range(30):
            site.store.schedule_step(f"run-{number}", "pay", {})
        found: list[str] = []
        path: str | None = "/runs?q=run-"
        while path:
            page = site.get(path)
            found += re.findall(r"/run\?id=([\w-]+)", page.html)
            path = next((link for link in page.links() if "cursor=" in link), None)
        assert sorted(found) == sorted(f"run-{number}" for number in range(30))


class TestRun:
    def test_it_shows_every_attempt_with_its_bar(self, site: Site) -> None:
        for _ in range(2):
            site.store.fail_step(begun(site.store.begin_step("run-1", "pay", {}, owner="worker-2")), TimeoutError("no"))
        site.store.complete_step(begun(site.store.begin_step("run-1", "pay", {}, owner="worker-3")), {})
        site.store.schedule_step("run-1", "ship", {})
        html = site.get("/run?id=run-1").html
        text = section(html, "steps")
        assert "pay 1 failed TimeoutError: no" in text
        assert "pay 2 failed TimeoutError: no" in text
        assert "pay 3 completed" in text
        assert "worker-3" in text
        assert "ship pending" in text
        bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)" y="0" width="([\d.]+)"', html)
        assert [outcome for outcome, _, _ in bars] == ["failed", "failed", "completed"]
        assert all(0 <= float(x) <= 992 and float(width) >= 8 for _, x, width in bars)

    @pytest.mark.slow
    def test_ticks_are_at_their_places_on_the_axis(self, bench: Bench, site: Site) -> None:
        claim = begun(site.store.begin_step("run-1", "pay", {}, lease=0.5))
        bench.lapse(claim)
        html = site.get("/run?id=run-1").html
        ticks = re.findall(r'<text x="([\d.]+)%".*?>([\d.]+)(?: ms)?</text>', html)
        assert [(float(x), float(label)) for x, label in ticks] == [(0, 0), (40, 200), (80, 400)]
        assert re.search(r'<rect class="lease_expired" x="0.0" y="0" width="1000.0"', html)

    def test_a_run_of_many_steps_has_pages(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reads, "STEPS_PER_PAGE", 4)
        monkeypatch.setattr("squidstep_redis.web.pages.STEPS_PER_PAGE", 4)
        for number in range(10):
            site.store.complete_step(begun(site.store.begin_step("run-1", f"step-{number}", {})), {})
        site.store.schedule_step("run-1", "last", {})
        path: str | None = "/run?id=run-1"
        found: list[str] = []
        while path:
            page = site.get(path)
            assert "last pending" in section(page.html, "steps")
            found += re.findall(r"step=(step-\d)\"", page.html)
            path = next((link for link in page.links() if re.search("after=(4|8)$", link) and link > path), None)
        assert found == [f"step-{number}" for number in range(10)]
        assert "Completed steps 9 to 10 of 10." in site.get("/run?id=run-1&after=8").text
        beyond = site.get("/run?id=run-1&after=12")
        assert "None of the 10 completed steps is on this page." in beyond.text
        assert "/run?id=run-1&after=8" in beyond.links()

    def test_an_error_that_cannot_be_decoded_hides_nothing(self, bench: Bench) -> None:
        class Cipher:
            def encode(self, payload: dict[str, Any]) -> bytes:
                return b"\xc1secret"

            def decode(self, data: bytes) -> dict[str, Any]:
                return {}

        store: Any = bench.store(codec=Cipher())
        store.fail_step(begun(store.begin_step("run-1", "pay", {})), {"type": "Secret"})
        site = Site(bench, payloads=True)
        assert "undecodable: the store's codec cannot decode this error" in site.get("/run?id=run-1").text
        page = site.get("/step?run=run-1&step=pay")
        assert page.status == 200
        assert "cannot decode the stored input" in page.text


class TestFailedSteps:
    def test_they_are_grouped_by_the_types_of_their_errors(self, site: Site) -> None:
        fill(site.store)
        site.store.fail_step(begun(site.store.begin_step("run-2", "pay", {})), TimeoutError("no reply"))
        text = site.get("/failed").text
        assert "TimeoutError 2 steps of 2 runs" in text
        assert "Declined 1 step of 1 run" in text
        assert text.index("TimeoutError 2") < text.index("Declined 1")
        only = site.get("/failed?type=Declined").text
        assert "Declined: no funds" in only
        assert "TimeoutError" not in only

    def test_they_are_searched_by_run_and_step(self, site: Site) -> None:
        fill(site.store)
        site.store.fail_step(begun(site.store.begin_step("run-2", "ship", {})), {"type": "Late", "message": "…"})
        assert "1 step of 1 run" in site.get("/failed?step=ship").text
        assert "Declined" not in site.get("/failed?step=ship").text
        assert "Declined" in site.get("/failed?q=run-d").text
        assert "No failed step matches." in site.get("/failed?q=nothing").text

    def test_older_failures_are_on_further_pages(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reads, "FAILURES_PER_PAGE", 3)
        for number in range(5):
            site.store.fail_step(begun(site.store.begin_step(f"run-{number}", "pay", {})), {"type": "T"})
        first = site.get("/failed")
        older = next(link for link in first.links() if "cursor=" in link)
        assert "3 failures, newest first" in first.text
        second = site.get(older)
        found = re.findall(r"/run\?id=([\w-]+)", first.html + second.html)
        assert sorted(found) == [f"run-{number}" for number in range(5)]
        assert "2 failures, newest first" in second.text
        assert "/failed" in second.links()
        assert not [link for link in second.links() if "cursor=" in link]
        for number in range(5):
            site.store.retry_step(f"run-{number}", "pay")
        assert "No failed step matches." in site.get(older).text


@pytest.mark.slow
@pytest.mark.servers("fakeredis")
def test_the_overview_works_on_fakeredis(site: Site) -> None:
    fill(site.store)
    assert "failed 2" in site.get("/").text
    assert "Declined 1 step" in site.get("/failed").text


def test_counts_beyond_the_lists_are_those_of_the_indexes(site: Site) -> None:
    for number in range(13):
        begun(site.store.begin_step(f"live-{number}", "pay", {}, lease=600))
        site.store.fail_step(begun(site.store.begin_step(f"failed-{number}", "pay", {})), {"type": "T"})
    text = section(site.get("/").html, "figures")
    assert "running under a lease 13" in text
    assert "stuck: lease expired 0" in text
    assert "failed 13" in text
    assert "The first 10 of about 13." in site.get("/").text
