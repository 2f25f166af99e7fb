"""The page in a real Chromium, served over HTTP, on a real server."""

from __future__ import annotations

from typing import Any

import pytest
import web_screenshots
from starlette.exceptions import HTTPException
from starlette.requests import Request
from support.backends import Bench
from support.browser import Chromium
from support.records import begun
from support.stuck_runs import STUCK_RUNS
from support.web import Site

from squidstep_redis import AsyncStepRunStore, RefusedError, StepRunStore
from squidstep_redis.web import live

pytestmark = [pytest.mark.browser, pytest.mark.servers("valkey")]

SCRIPT = "<script>alert(1)</script>"
HANDLER = '"><img src=x onerror="alert(2)">'
ANSI = "\x1b[31mred\x1b[0m\u202egnp.exe"
PAGES = ("/", "/runs", "/failed", "/run?id=order-1", "/step?run=order-1&step=charge", "/run?id=nope")


def fill(bench: Bench, store: Any) -> None:
    """Runs in every state, with names that are long, and with hostile text."""
    for number in range(3):
        store.complete_step(begun(store.begin_step(f"done-{number}", "pay", {})), {"ok": True})
    claim = begun(store.begin_step("order-1", "charge", {"card": SCRIPT}, owner="worker-1"))
    store.fail_step(claim, TimeoutError("bank.example timed out"))
    store.complete_step(begun(store.begin_step("order-1", "reserve", {}, owner="worker-2")), {})
    begun(store.begin_step("order-1", "pack", {}, lease=600, owner="worker-2"))
    store.schedule_step("order-1", "ship", {})
    bench.lapse(begun(store.begin_step("order-1", "render", {}, lease=0.001, owner="gpu-1")))
    store.schedule_step("run-" + "x" * 400, "step-" + "y" * 400, {})
    store.cancel_run("run-" + "x" * 400, "z" * 400)
    claim = begun(store.begin_step("long", "w" * 300, {}, owner="v" * 200))
    store.fail_step(claim, {"type": "T" * 300, "message": "m" * 3_000})


class TestVisit:
    def test_a_failed_step_is_found_understood_and_retried(self, bench: Bench, chromium: Chromium) -> None:
        site = Site(bench, payloads=True, actions=True)
        fill(bench, site.store)

        async def main() -> None:
            async with chromium.visit(site.app) as visit:
                page = visit.page
                await page.goto("/")
                await page.get_by_role("link", name="Runs", exact=True).click()
                await page.get_by_label("Run id begins with").fill("order")
                await page.get_by_label("Has a step that is").select_option("failed")
                await page.get_by_role("button", name="Search").click()
                await page.get_by_role("link", name="order-1").first.click()
                text = await visit.text()
                assert "failed: waits for the next delivery" in text
                assert "with TimeoutError: bank.example timed out" in text
                await page.get_by_role("link", name="charge").first.click()
                assert '"card": "<script>alert(1)</script>"' in await visit.text()
                await page.get_by_text("Retry the step…").click()
                await page.get_by_role("button", name="Make the step pending").click()
                await visit.shows("deliver the step again from your queue")
                assert visit.problems == []
            step_run = await site.asyncio_store.get_step_run("order-1", "charge")
            assert step_run is not None
            assert step_run.status == "pending"

        site.run(main())

    def test_a_running_run_is_watched_until_it_finishes(self, bench: Bench, chromium: Chromium) -> None:
        site = Site(bench)
        claim = begun(site.store.begin_step("order-1", "charge", {}, lease=600, owner="worker-1"))

        async def main() -> None:
            store: AsyncStepRunStore = site.asyncio_store
            async with chromium.visit(site.app) as visit:
                page = visit.page
                await page.goto("/run?id=order-1")
                await visit.shows("This page updates itself.")
                await page.get_by_role("link", name="charge").last.focus()
                await store.complete_step(claim, {}, schedule={"ship": {}})
                await visit.shows("completed")
                assert "ship pending: waits for a delivery" in await visit.text()
                focused = await page.evaluate("document.activeElement.textContent")
                assert focused == "charge"  # the table was replaced, and the focus is where it was
                ship, _ = await store.begin_step("order-1", "ship", {}, lease=60)
                await visit.shows("running: a worker holds it")
                await store.complete_step(ship, {})
                await visit.shows("It is finished")
                said = page.locator("#live-said")
                assert await said.inner_text() == "Updated: 2 completed"
                assert await said.get_attribute("role") == "status"
                assert visit.problems == []

        site.run(main())

    def test_what_a_person_does_survives_an_update(self, bench: Bench, chromium: Chromium) -> None:
        site = Site(bench, actions=True)
        site.store.schedule_step("order-1", "charge", {})

        async def main() -> None:
            async with chromium.visit(site.app) as visit:
                page = visit.page
                await page.goto("/run?id=order-1")
                await page.get_by_text("Cancel the run…").click()
                await page.get_by_label("Reason").fill("wrong addr")
                await site.asyncio_store.begin_step("order-1", "charge", {}, lease=600)
                await visit.shows("running: a worker holds it")
                assert await page.evaluate("document.activeElement.id") == "reason"
                await page.keyboard.type("ess")
                await page.keyboard.press("Enter")
                await visit.shows("The run is cancelled: wrong address")
                await page.get_by_role("button", name="Pause updates").click()
                await site.asyncio_store.resume_run("order-1")
                await visit.shows("Updates are paused.")
                await page.wait_for_timeout(1_500)
                assert "The run is cancelled: wrong address" in await visit.text()
                await page.get_by_role("button", name="Resume updates").click()
                await page.get_by_text("The run is cancelled: wrong address").wait_for(state="detached")
                assert visit.problems == []

        site.run(main())

    def test_a_lost_connection_is_reported(
        self, bench: Bench, chromium: Chromium, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(live, "_STREAM_SECONDS", 0.2)
        site = Site(bench)
        site.store.schedule_step("order-1", "charge", {})

        async def main() -> None:
            async with chromium.visit(site.app) as visit:
                await visit.page.goto("/run?id=order-1")
                await visit.shows("This page updates itself.")
                await visit.page.context.set_offline(True)
                await visit.shows("the connection is lost")
                await visit.page.context.set_offline(False)
                await visit.shows("This page updates itself.")

        site.run(main())

    def test_a_login_page_never_replaces_the_region(self, bench: Bench, chromium: Chromium) -> None:
        rights = ["see"]

        def authorize(request: Request, right: str) -> bool:
            if right not in rights:
                raise HTTPException(303, headers={"Location": "/static/style.css"})
            return True

        site = Site(bench, authorize=authorize)
        site.store.schedule_step("order-1", "charge", {})

        async def main() -> None:
            async with chromium.visit(site.app) as visit:
                await visit.page.goto("/run?id=order-1")
                await visit.shows("This page updates itself.")
                rights.clear()
                await site.asyncio_store.begin_step("order-1", "charge", {}, lease=60)
                await visit.shows("you are no longer allowed to see it")
                assert "waits for a delivery" in await visit.text()

        site.run(main())

    def test_an_unreachable_server_is_reported(
        self, bench: Bench, chromium: Chromium, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site = Site(bench)
        site.store.schedule_step("order-1", "charge", {})
        explain = AsyncStepRunStore.explain_run

        async def refuse(*_args: object, **_options: object) -> None:
            raise RefusedError("explain_run", "order-1", None, "LOADING", True)

        async def main() -> None:
            async with chromium.visit(site.app) as visit:
                await visit.page.goto("/run?id=order-1")
                await visit.shows("This page updates itself.")
                monkeypatch.setattr(AsyncStepRunStore, "explain_run", refuse)
                await visit.shows("the server responded with status 503")
                assert "waits for a delivery" in await visit.text()
                monkeypatch.setattr(AsyncStepRunStore, "explain_run", explain)
                await visit.shows("This page updates itself.")

        site.run(main())

    def test_the_page_works_without_scripts(self, bench: Bench, chromium: Chromium) -> None:
        site = Site(bench, actions=True)
        fill(bench, site.store)

        async def main() -> None:
            async with chromium.visit(site.app, java_script_enabled=False) as visit:
                page = visit.page
                await page.goto("/failed?q=order")
                await visit.shows("bank.example timed out")
                await page.get_by_text("Retry this step…").click()
                await page.get_by_role("button", name="Make 1 step pending").click()
                await visit.shows("1 step was made pending.")
                await page.goto("/")
                await visit.shows("Reload the page to see changes.")
                assert visit.problems == []

        site.run(main())

    def test_the_keyboard_alone_retries_a_step(self, bench: Bench, chromium: Chromium) -> None:
        site = Site(bench, actions=True)
        fill(bench, site.store)

        async def main() -> None:
            async with chromium.visit(site.app) as visit:
                page = visit.page
                await page.goto("/step?run=order-1&step=charge")
                await page.keyboard.press("Tab")
                assert await page.evaluate("document.activeElement.textContent") == "Skip to the content"
                await page.keyboard.press("Enter")
                for _ in range(20):
                    await page.keyboard.press("Tab")
                    if await page.evaluate("document.activeElement.textContent") == "Retry the step…":
                        break
                await page.keyboard.press("Enter")
                await page.keyboard.press("Tab")
                await page.keyboard.press("Enter")
                await visit.shows("The step is pending.")

        site.run(main())


def test_hostile_text_and_megabytes_do_nothing(bench: Bench, chromium: Chromium) -> None:
    site = Site(bench, payloads=True, actions=True)
    for name in (SCRIPT, HANDLER, ANSI):
        claim = begun(site.store.begin_step(name, name, {name: "x" * 1_000_000}))
        site.store.fail_step(claim, {"type": name, "message": name * 10_000, name: name, "traceback": name})

    async def main() -> None:
        async with chromium.visit(site.app) as visit:
            page = visit.page
            for path in ("/", "/failed"):
                await page.goto(path)
                assert SCRIPT in await visit.text()
            await page.goto("/runs")
            for run in await page.locator("td.name a").all_text_contents():
                await page.goto("/runs")
                await page.get_by_role("link", name=run, exact=True).click()
                await page.locator("#steps td a").first.click()
                assert "x" * 10_000 in await visit.text()
                assert "\x1b" not in await page.content()
            assert visit.problems == []
            assert await page.evaluate("document.scripts.length") == 1

    site.run(main())


def test_a_person_sees_why_a_run_is_stuck(bench: Bench, chromium: Chromium) -> None:
    site = Site(bench)
    for name, stuck in STUCK_RUNS.items():
        stuck.prepare(bench, site.store, f"order-{name}")

    async def main() -> None:
        async with chromium.visit(site.app, width=375) as visit:
            for name, stuck in STUCK_RUNS.items():
                await visit.page.goto("/runs")
                await visit.page.get_by_role("link", name=f"order-{name}").click()
                await visit.shows(stuck.headline)
                text = await visit.text()
                assert [sentence for sentence in stuck.says if sentence not in text] == [], name

    site.run(main())


@pytest.mark.parametrize(("width", "scheme"), [(1_440, "light"), (375, "dark")])
def test_no_page_has_a_serious_fault_or_is_too_wide(bench: Bench, chromium: Chromium, width: int, scheme: str) -> None:
    site = Site(bench, payloads=True, actions=True)
    fill(bench, site.store)

    async def main() -> None:
        async with chromium.visit(site.app, width=width, color_scheme=scheme) as visit:
            for path in PAGES:
                await visit.page.goto(path)
                for details in await visit.page.locator("summary").all():
                    await details.click()
                assert await visit.overflow() <= 0, path
                assert await visit.faults() == [], path

    site.run(main())


def test_axe_finds_a_planted_fault(bench: Bench, chromium: Chromium) -> None:
    site = Site(bench)

    async def main() -> None:
        async with chromium.visit(site.app) as visit:
            await visit.page.goto("/runs")
            await visit.page.evaluate("document.querySelector('label[for=q]').remove()")
            assert [fault.partition(":")[0] for fault in await visit.faults()] == ["label"]

    site.run(main())


def test_the_policy_blocks_a_planted_script(bench: Bench, chromium: Chromium) -> None:
    site = Site(bench)

    async def main() -> None:
        async with chromium.visit(site.app) as visit:
            await visit.page.goto("/runs")
            html = '<img src=x onerror="alert(1)"><p style="color:red">'
            await visit.page.evaluate("html => document.body.insertAdjacentHTML('beforeend', html)", html)
            await visit.page.evaluate("fetch('https://evil.example/').catch(() => null)")
            await visit.page.wait_for_timeout(200)
            assert not [problem for problem in visit.problems if problem.startswith("dialog")]
            assert len([problem for problem in visit.problems if "Content Security Policy" in problem]) >= 3

    site.run(main())


def test_the_pictures_of_the_guide_can_be_taken(bench: Bench, chromium: Chromium) -> None:
    """Run tests/web_screenshots.py, and look at the pictures, when the page changes."""
    site = Site(bench, actions=True)
    blocking = StepRunStore.from_url(str(bench.backend.url), prefix=bench.prefix)
    with blocking:
        web_screenshots.fill_for_web(blocking)
    pictures = site.run(web_screenshots.take_pictures(chromium, site.app))
    assert pictures.keys() == web_screenshots.PAGES.keys()
    for name, png in pictures.items():
        for picture in (png, (web_screenshots.IMAGES / f"{name}.png").read_bytes()):
            assert picture.startswith(b"\x89PNG")
            assert len(picture) < 150_000
            size = (int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24]))
            assert size == (web_screenshots.WIDTH, web_screenshots.HEIGHT)
