"""Payloads: hidden unless enabled, shown in part, downloaded as a whole."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import pytest
from support.backends import Bench
from support.records import begun
from support.web import Site

from squidstep_redis import AsyncStepRunStore
from squidstep_redis.web.payloads import SHOWN_CHARACTERS, shown_payloads

SECRET = "4242-4242"


def fill(store: Any) -> None:
    claim = begun(store.begin_step("run-1", "pay", {"card": SECRET, "at": datetime(2026, 11, 27, tzinfo=UTC)}))
    store.checkpoint_step(claim, {"progress": SECRET})
    store.fail_step(claim, {"type": "Declined", "message": "no funds", "detail": SECRET, "traceback": SECRET})
    store.complete_step(begun(store.begin_step("run-1", "ship", {})), {"label": SECRET, "data": b"\xff"})


@pytest.mark.servers("valkey")
def test_no_page_has_payloads_unless_they_are_enabled(site: Site) -> None:
    fill(site.store)
    for path in ("/runs", "/run?id=run-1", "/step?run=run-1&step=pay", "/step?run=run-1&step=ship"):
        page = site.get(path)
        assert page.status == 200
        assert SECRET not in page.html
    assert "Payloads are hidden." in page.text
    refused = site.get("/payload?run=run-1&step=pay&name=input")
    assert refused.status == 403
    assert SECRET not in refused.html


@pytest.mark.servers("valkey")
def test_lists_across_runs_never_have_payloads(bench: Bench) -> None:
    site = Site(bench, payloads=True, actions=True)
    fill(site.store)
    for path in ("/", "/runs", "/failed"):
        assert SECRET not in site.get(path).html


def test_hidden_payloads_are_not_even_read(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(site.store)

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a payload was read")

    monkeypatch.setattr(AsyncStepRunStore, "get_step_run", refuse)
    monkeypatch.setattr(AsyncStepRunStore, "get_run", refuse)
    monkeypatch.setattr(AsyncStepRunStore, "scan_steps", refuse)
    assert site.get("/step?run=run-1&step=pay").status == 200
    assert site.get("/run?id=run-1").status == 200


def test_a_step_shows_its_payloads_if_they_are_enabled(bench: Bench) -> None:
    site = Site(bench, payloads=True)
    fill(site.store)
    failed = site.get("/step?run=run-1&step=pay").text
    assert f'Input {{ "card": "{SECRET}", "at": "2026-11-27T00:00:00+00:00" }}' in failed
    assert f'Progress {{ "progress": "{SECRET}" }}' in failed
    assert '"detail": "4242-4242"' in failed
    assert "Traceback 4242-4242" in failed
    completed = site.get("/step?run=run-1&step=ship").text
    assert f'Output {{ "label": "{SECRET}", "data": "<1 bytes>" }}' in completed


def test_a_whole_payload_is_downloaded_as_json(bench: Bench) -> None:
    site = Site(bench, payloads=True)
    fill(site.store)
    page = site.get("/step?run=run-1&step=ship")
    link = next(link for link in page.links() if "name=output" in link)
    file = site.get(link)
    assert file.headers["content-type"] == "application/json"
    assert file.headers["content-disposition"] == "attachment; filename*=UTF-8''run-1.ship.output.json"
    assert json.loads(file.body) == {"label": SECRET, "data": {"$bytes": "/w=="}}
    assert site.get("/payload?run=run-1&step=ship&name=progress").status == 404
    assert site.get("/payload?run=run-1&step=ship&name=__class__").status == 404


@pytest.mark.parametrize("run", ["a/b\r\nX: y", 'quote".html', "…" * 100, ".hidden"])
def test_the_name_of_a_file_cannot_break_a_header(bench: Bench, run: str) -> None:
    site = Site(bench, payloads=True)
    site.store.schedule_step(run, "pay", {"a": 1})
    page = site.get("/run?" + urlencode({"id": run}))
    step = next(link for link in page.links() if link.startswith("/step?"))
    file = site.get(next(link for link in site.get(step).links() if link.startswith("/payload?")))
    assert file.status == 200
    name = file.headers["content-disposition"].removeprefix("attachment; filename*=UTF-8''")
    assert name.isascii()
    assert not set(name) & set('/\\"\r\n ')
    assert not name.startswith(".")


def test_a_payload_of_500_levels_is_shown_and_downloaded(bench: Bench) -> None:
    site = Site(bench, payloads=True)
    value: Any = "deep"
    for _ in range(490):
        value = [value]
    site.store.schedule_step("run-1", "pay", {"value": value})
    assert site.get("/step?run=run-1&step=pay").status == 200
    file = site.get("/payload?run=run-1&step=pay&name=input")
    assert file.status == 200
    assert b"deep" in file.body


@pytest.mark.parametrize(
    "value", [{}, {"a": [], "b": {}}, {"a": [1, 2.5, None, True, "x\ny"], "ü": {"c": [[1], {"d": "e"}]}}]
)
def test_shown_text_of_a_small_payload_is_json(bench: Bench, value: dict[str, Any]) -> None:
    store: Any = bench.store()
    store.schedule_step("run-1", "pay", value)
    shown = shown_payloads(store.get_step_run("run-1", "pay"))
    assert [each.name for each in shown] == ["input"]
    assert "\n".join(shown[0].lines) == json.dumps(value, indent=2, ensure_ascii=False)
    assert not shown[0].is_cut


def test_a_shown_payload_has_the_documented_length(bench: Bench) -> None:
    store: Any = bench.store()
    store.schedule_step("run-1", "pay", {"a": "x" * 100_000})
    shown = shown_payloads(store.get_step_run("run-1", "pay"))[0]
    assert shown.is_cut
    assert len("\n".join(shown.lines)) == SHOWN_CHARACTERS
