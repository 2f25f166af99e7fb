"""The status and the text of a page that cannot be shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun
from support.web import Site

from squidstep_redis import AsyncStepRunStore


@pytest.fixture
def offline(bench: Bench) -> Iterator[Site]:
    """The page of a store whose server cannot be reached."""
    store: Any = bench.from_url("redis://127.0.0.1:1", timeout=0.05)
    yield Site(bench, store, actions=True)
    store.close()


@pytest.mark.parametrize("path", ["/", "/runs", "/failed", "/run?id=run-1", "/step?run=run-1&step=pay"])
def test_an_unreachable_server_is_status_503(offline: Site, path: str) -> None:
    page = offline.get(path)
    assert page.status == 503
    assert page.headers["retry-after"] == "5"
    assert "could not connect" in page.text
    assert "nothing was sent" in page.text
    assert "<h1>" in page.html


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/run?id=nope", 404, "run 'nope': it was never begun, has expired, or was deleted"),
        ("/step?run=nope&step=pay", 404, "run 'nope', step 'pay': it has neither been scheduled nor begun"),
        ("/payload?run=nope&step=pay&name=input", 404, "it has no input"),
        ("/nope", 404, "Not Found"),
        ("/runs?cursor=nope", 400, "cursor: must be the cursor of another page"),
        ("/runs?status=nope", 400, "status: must be one of pending, running, completed, failed"),
        ("/runs?q=" + "x" * 600, 400, "run_id"),
        ("/run", 400, "id: is missing from the address of the page"),
        ("/run?id=run-1&after=x", 400, "after: must be a number"),
        ("/run?id=run-1&after=99999999999", 400, "after: must be a number"),
        ("/failed?cursor=nope", 400, "cursor: must be the cursor of another page"),
        ("/step?run=run-1", 400, "step: is missing"),
    ],
)
def test_a_request_that_cannot_be_served_says_why(bench: Bench, path: str, status: int, text: str) -> None:
    page = Site(bench, payloads=True).get(path)
    assert page.status == status
    assert text in page.text


@pytest.mark.servers("valkey", "cluster")
def test_a_corrupt_run_is_status_500_and_stays_in_lists(bench: Bench, site: Site) -> None:
    begun(site.store.begin_step("run-1", "pay", {}))
    bench.backend.raw.hset(bench.keys("run-1")[0], "spay", "no state line")
    page = site.get("/run?id=run-1")
    assert page.status == 500
    assert "The stored data is corrupt" in page.text
    assert f"key '{bench.keys('run-1')[0].decode()}'" in page.text
    listed = site.get("/runs")
    assert listed.status == 200
    assert "corrupt" in listed.text


def test_a_deleted_run_is_status_404(site: Site) -> None:
    site.store.schedule_step("run-1", "pay", {})
    site.store.delete_run("run-1")
    assert site.get("/run?id=run-1").status == 404


def test_an_unknown_error_is_logged_and_not_shown(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_args: object, **_options: object) -> None:
        raise RuntimeError("secret-1")

    monkeypatch.setattr(AsyncStepRunStore, "runs", fail)
    page = site.get("/runs")
    assert page.status == 500
    assert "secret-1" not in page.html
    assert "secret-1" in caplog.text
