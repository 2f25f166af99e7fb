"""A real browser: the Chromium of the system, without a window, and axe-core.

`SQUIDSTEP_CHROMIUM` names its binary; then a missing one is an error. Otherwise it is looked for on the path, and
without one the tests are skipped, and say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from playwright.async_api import Browser, Page, async_playwright

from support.http import serving

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60  # until something is on a page; a busy machine may need long


def find_chromium() -> str:
    """Returns the binary.

    Raises:
        LookupError: it is not the executable file that `SQUIDSTEP_CHROMIUM` names, or it is not on the path.
    """
    if named := os.environ.get("SQUIDSTEP_CHROMIUM"):
        if not os.access(named, os.X_OK):
            raise LookupError(f"SQUIDSTEP_CHROMIUM={named} is not an executable file")
        return named
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    raise LookupError("no Chromium: install the package chromium, or set SQUIDSTEP_CHROMIUM to its binary")


class Chromium:
    """Chromium on the event loop of a runner."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._playwright: Any = None
        self._browser: Browser | None = None

    def start(self) -> None:
        binary = find_chromium()

        async def start() -> None:
            self._playwright = await async_playwright().start()
            self._browser = await self._playwright.chromium.launch(executable_path=binary, args=["--disable-gpu"])

        self._runner.run(start())

    def stop(self) -> None:
        async def stop() -> None:
            if self._browser is not None:
                await self._browser.close()
            if self._playwright is not None:
                await self._playwright.stop()

        self._runner.run(stop())

    @contextlib.asynccontextmanager
    async def visit(self, app: Any, *, width: int = 1_440, **options: Any) -> AsyncIterator[Visit]:
        """Serves an application, and opens a window on it for the block.

        Args:
            app: the application.
            width: of the window, in pixels.
            options: of the browser's context, such as `color_scheme` and `java_script_enabled`.
        """
        assert self._browser is not None
        async with serving(app) as server:
            context = await self._browser.new_context(
                base_url=f"http://127.0.0.1:{server.port}", viewport={"width": width, "height": 900}, **options
            )
            context.set_default_timeout(1_000 * SECONDS)
            try:
                yield Visit(await context.new_page())
            finally:
                await context.close()


class Visit:
    """A window, and what went wrong in it.

    Attributes:
        page: the page of the window.
        problems: dialogs, errors, violations of the security policy, and requests to other hosts.
    """

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        page.on("dialog", self._on_dialog)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        page.on("request", self._on_request)

    async def _on_dialog(self, dialog: Any) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        await dialog.dismiss()

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith("http://127.0.0.1:"):
            self.problems.append(f"request: {request.url}")

    async def text(self) -> str:
        """Returns what the main part of the page shows."""
        return " ".join((await self.page.inner_text("main")).split())

    async def shows(self, text: str) -> None:
        """Waits until the page shows a text."""
        await self.page.get_by_text(text).first.wait_for()

    async def overflow(self) -> int:
        """Returns by how many pixels the page is wider than the window."""
        return await self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    async def faults(self) -> list[str]:
        """Returns the serious faults that axe-core finds."""
        axe = (files("axe_playwright_python") / "axe.min.js").read_text("utf-8")
        await self.page.evaluate(axe)
        found: Any = await self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{each['id']}: {each['help']} {[node['target'] for node in each['nodes']][:3]}"
            for each in found["violations"]
            if each["impact"] in ("serious", "critical")
        ]
