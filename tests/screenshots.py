"""Generates the pictures of the guide: `python tests/screenshots.py`. It starts a server of its own.

`fill` writes what they show: an order with failures and a takeover, stuck claims, and a run of 200 steps.
"""

from __future__ import annotations

import re
import time
from html import escape, unescape
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.terminal_theme import MONOKAI
from support.servers import find_binary

from squidstep_redis import StepRun, StepRunStore
from squidstep_redis.cli.show import render_steps
from squidstep_redis.cli.timeline import read_timeline
from squidstep_redis.cli.timeline_chart import render_timeline
from squidstep_redis.cli.watch import render_run
from squidstep_redis.embedded import EmbeddedServer

IMAGES = Path(__file__).parent / "guide" / "images"
WIDTH = 100


def fill(store: StepRunStore) -> None:
    """Fills a store with finished, running, failed and stuck steps."""
    order(store, "order-7301")
    for number in range(12):
        run = f"order-{7302 + number}"
        claim = begin(store, run, "charge", {"amount": 10 + number}, f"worker-{number % 4}")
        if number % 4 == 3:
            store.fail_step(claim, ConnectionError("bank.example: connection reset by peer"))
        elif number % 4 == 2:
            store.fail_step(claim, {"type": "Declined", "message": "insufficient funds \x1b[31m\x07", "code": 51})
        else:
            store.complete_step(claim, {"charged": 10 + number}, schedule={"ship": {"city": "Bergen"}})
    for number in range(3):
        begin(store, f"stuck-{number}", "render", {"page": number}, f"gpu-{number}", lease=0.001)
    crawl(store, "crawl-2026-11")


def begin(store: StepRunStore, run: str, step: str, input: dict[str, Any], owner: str, **options: Any) -> StepRun:
    return store.begin_step(run, step, input, owner=owner, **{"lease": 30, **options}).step_run


def order(store: StepRunStore, run: str) -> None:
    """Creates a run of six steps: one failed twice, one was taken over, and one is running."""
    store.schedule_steps(run, {"reserve": {"items": ["kettle", "tea"]}, "invoice": {}, "notify": {"by": "mail"}})
    claim = begin(store, run, "reserve", {}, "worker-1")
    time.sleep(0.12)
    store.complete_step(claim, {"warehouse": "Oslo", "shelf": [4, 17], "until": "2026-12-01"})
    for attempt in range(3):
        claim = begin(store, run, "charge", {"amount": 42, "currency": "EUR", "card": "…4242"}, "worker-2")
        time.sleep(0.05 + 0.06 * attempt)
        if attempt < 2:
            store.fail_step(claim, TimeoutError("bank.example timed out after 50 ms"))
            time.sleep(0.04)
    store.complete_step(claim, {"receipt": "R-20261125-0042", "charged": 42})
    begin(store, run, "pack", {"parcels": 1}, "worker-3", lease=0.1)
    time.sleep(0.14)
    claim = begin(store, run, "pack", {"parcels": 1}, "worker-1")
    time.sleep(0.2)
    store.complete_step(claim, {"weight": 1.25})
    claim = begin(store, run, "invoice", {}, "worker-2")
    time.sleep(0.06)
    store.fail_step(claim, ValueError("no template for locale 'nn-NO'"))
    begin(store, run, "ship", {"city": "Bergen", "carrier": "Posten"}, "worker-4")
    time.sleep(0.05)


def crawl(store: StepRunStore, run: str) -> None:
    """Creates a run of 200 steps: most are completed, some failed, some are running or pending."""
    pages = {f"page-{number:03}": {"url": f"https://site.example/{number}"} for number in range(200)}
    store.schedule_steps(run, pages)
    for number, (page, input) in enumerate(pages.items()):
        if number < 150:
            claim = begin(store, run, page, input, f"worker-{number % 4}")
            if number % 37 == 5:
                store.fail_step(claim, LookupError("404 Not Found"))
            else:
                store.complete_step(claim, {"links": number % 11})
        elif number < 154:
            begin(store, run, page, input, f"worker-{number % 4}")


def screenshot(name: str, title: str, *renderables: Any) -> str:
    """Returns what a terminal shows, as an SVG image that loads nothing from elsewhere."""
    with Path("/dev/null").open("w") as discarded:
        console = Console(record=True, width=WIDTH, file=discarded, highlight=False, force_terminal=True)
        console.print(*renderables, sep="\n")
    svg = console.export_svg(title=title, theme=MONOKAI, unique_id=name)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # they refer to another host
    svg = svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace")
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<text class="([^"]*)" x="([^"]*)" ([^>]*?) textLength="([^"]*)"([^>]*)>([^<]*)</text>', _position_words, svg
    )
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


def _position_words(match: re.Match[str]) -> str:
    """Positions each group of words by itself, because some viewers drop spaces or ignore `textLength`."""
    style, x, before, length, after, escaped = match.groups()
    text = unescape(escaped).replace("\xa0", " ")
    width = float(length) / max(cell_len(text), 1)
    return "".join(
        f'<text class="{style}" x="{float(x) + width * cell_len(text[: part.start()]):g}" {before} '
        f'textLength="{width * cell_len(part[0]):g}"{after}>{escape(part[0], quote=False)}</text>'
        for part in re.finditer(r"\S+(?: \S+)*", text)
    )


def screenshots(store: StepRunStore) -> dict[str, str]:
    """Returns the pictures by name."""
    fill(store)
    run = "order-7301"
    timeline = read_timeline(store, run)
    assert timeline is not None
    pages = store.get_run("crawl-2026-11")
    summary = store.summarize_run(run)
    assert summary is not None
    counts = summary.counts
    return {
        "show": screenshot("show", f"squidstep show {run}", *render_steps(run, store.get_run(run), [], counts=counts)),
        "timeline": screenshot("timeline", f"squidstep timeline {run}", *render_timeline(timeline, WIDTH)),
        "watch": screenshot("watch", "squidstep watch crawl-2026-11", render_run("crawl-2026-11", pages, 22)),
    }


def main() -> None:
    with (
        EmbeddedServer(binary=find_binary("valkey"), port=0) as server,
        StepRunStore.from_url(server.url) as store,
    ):
        IMAGES.mkdir(exist_ok=True)
        for name, svg in screenshots(store).items():
            (IMAGES / f"{name}.svg").write_text(svg, "utf-8")


if __name__ == "__main__":
    main()
