"""Generates the pictures of the web page: `python tests/web_screenshots.py`. It starts a server and Chromium."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from screenshots import IMAGES, begin, fill, order
from support.browser import Chromium
from support.servers import find_binary

from squidstep_redis import AsyncStepRunStore, StepRunStore
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.web import web_app

WIDTH, HEIGHT = 1_100, 930  # pixels
PAGES: Final = {"web-overview": "/", "web-run": "/run?id=order-7314"}


def fill_for_web(store: StepRunStore) -> None:
    """Fills a store as `fill` does, and adds an order with one failed step."""
    fill(store)
    run = "order-7314"
    order(store, run)
    ship = store.get_step_run(run, "ship")
    assert ship is not None
    store.complete_step(ship.id, {"parcel": "NO-4711"})
    store.complete_step(begin(store, run, "notify", {}, "worker-1"), {})


async def take_pictures(chromium: Chromium, app: Any) -> dict[str, bytes]:
    """Returns PNG images of the page of a store that `fill_for_web` has filled."""
    pictures: dict[str, bytes] = {}
    async with chromium.visit(app, width=WIDTH, color_scheme="light") as visit:
        await visit.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        for name, path in PAGES.items():
            await visit.page.goto(path)
            await visit.shows("This page updates itself.")
            pictures[name] = await visit.page.screenshot()
    return pictures


def main() -> None:
    with (
        EmbeddedServer(binary=find_binary("valkey"), port=0) as server,
        StepRunStore.from_url(server.url) as store,
        asyncio.Runner() as runner,
    ):
        fill_for_web(store)
        chromium = Chromium(runner)
        chromium.start()
        app = web_app(AsyncStepRunStore.from_url(server.url), actions=True)
        for name, png in runner.run(take_pictures(chromium, app)).items():
            (IMAGES / f"{name}.png").write_bytes(png)
        chromium.stop()


if __name__ == "__main__":
    main()
