"""Hostile names, errors and payloads are text, wherever they appear."""

from __future__ import annotations

import pytest
from support.backends import Bench
from support.records import begun
from support.web import Page, Site, tags_of

from squidstep_redis.escaping import without_controls

pytestmark = pytest.mark.servers("valkey")  # fakeredis needs a second for each list of runs

SCRIPT = "<script>alert(1)</script>"
ATTRIBUTE = '"><img src=x onerror=alert(2)>'
ANSI = "\x1b[31mred\x1b[0m\x07\r\n\u202egnp.exe\u2066"
HOSTILE = [
    SCRIPT,
    ATTRIBUTE,
    ANSI,
    "{{ 7777 * 7777 }}",
    "../../etc",
    "..",
    "a/b?c=d&e#f%2f",
    "javascript:alert(1)",
    "ü 🦑",
]
CONTROLS = {"\x1b", "\x07", "\r", "\u202e", "\u2066", "\x00"}
SIZE = 1_000_000


def assert_harmless(page: Page) -> None:
    assert page.status == 200
    tags = tags_of(page.html)
    assert tags.count("script") <= 1  # live.js
    assert not {"img", "iframe", "object", "style"} & set(tags)
    assert not CONTROLS & set(page.html)
    assert "60481729" not in page.text  # 7777 * 7777
    assert not any(link.startswith("javascript") for link in page.links())


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_shown_as_text_and_work_as_links(bench: Bench, text: str) -> None:
    site = Site(bench, payloads=True, actions=True, title=text)
    claim = begun(site.store.begin_step(text, text, {text: text}, owner=without_controls(text)))
    site.store.fail_step(claim, {"type": text, "message": text, text: text, "traceback": text})
    site.store.cancel_run(text, without_controls(text))
    runs = site.get("/runs")
    assert_harmless(runs)
    run = site.get(next(link for link in runs.links() if link.startswith("/run?")))
    assert_harmless(run)
    step = site.get(next(link for link in run.links() if link.startswith("/step?")))
    assert_harmless(step)
    assert_harmless(site.get("/runs?q=" + "%3Cscript%3Ealert(1)%3C/script%3E%1b"))
    done = site.submit(run, "/resume?")
    assert done.status == 303
    assert_harmless(site.get(done.headers["location"]))
    assert site.store.summarize_run(text).cancel_reason is None


@pytest.mark.parametrize("text", HOSTILE[:3])
def test_lists_across_runs_show_hostile_text_as_text(bench: Bench, text: str) -> None:
    site = Site(bench, actions=True)
    claim = begun(site.store.begin_step(text, text, {}))
    site.store.fail_step(claim, {"type": text, "message": text})
    bench.lapse(begun(site.store.begin_step(text, f"{text}2", {}, lease=0.001)))
    begun(site.store.begin_step(text, f"{text}3", {}, lease=600))
    assert_harmless(site.get("/"))
    assert_harmless(site.get("/failed"))
    done = site.submit(site.get("/failed"), "/retry-group?")
    assert done.status == 303
    assert site.store.get_step_run(text, text).status == "pending"


def test_an_error_page_shows_hostile_text_as_text(site: Site) -> None:
    for path in (
        "/run?id=%3Cscript%3Ealert(1)%3C/script%3E",
        "/runs?cursor=%3Cimg%20src=x%3E%1b",
        "/%3Cscript%3E",
        "/runs?status=%3Cscript%3E",
    ):
        page = site.get(path)
        assert page.status in (400, 404)
        assert {"script", "img"} & set(tags_of(page.html)) == {"script"}
        assert tags_of(page.html).count("script") == 1
        assert not CONTROLS & set(page.html)


@pytest.mark.parametrize("value", ["x" * SIZE, ["<b>"] * (SIZE // 5), {str(n): n for n in range(80_000)}])
def test_a_payload_of_a_megabyte_is_cut(bench: Bench, value: object) -> None:
    site = Site(bench, payloads=True)
    claim = begun(site.store.begin_step("run-1", "pay", {"value": value}))
    site.store.fail_step(claim, {"type": "T", "message": "m" * SIZE})
    page = site.get("/step?run=run-1&step=pay")
    assert page.status == 200
    assert len(page.body) < 150_000
    assert "The first 16,384 characters." in page.text
    assert len(site.get("/run?id=run-1").body) < 20_000
    assert "b" not in tags_of(page.html)
