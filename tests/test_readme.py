"""Every code block of the README and of the guides is run, as a reader would run it."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from servers import find_binary

import squidstep_redis.rq
from squidstep_redis.embedded import EmbeddedServer

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "tests" / "guide").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEFAULT_URL = "redis://localhost:6379/0"


def blocks(page: Path, *languages: str) -> list[tuple[int, str]]:
    """The blocks in those languages, each with the number of its first line."""
    text = page.read_text("utf-8")
    found = [(text.count("\n", 0, match.start(2)) + 1, match[1], match[2]) for match in BLOCK.finditer(text)]
    return [(line, code) for line, language, code in found if language in languages]


@pytest.fixture
def url() -> Iterator[str]:
    with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
        yield server.url


@pytest.fixture
def module(page: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page, as a module that others can import its functions from."""
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(squidstep_redis.rq, "_stores", type(squidstep_redis.rq._stores)())  # what a page configures
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield module
    for number, handler in handlers.items():  # an RQ worker leaves its own
        signal.signal(number, handler)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_blocks_of_a_page_run_in_order(page: Path, module: ModuleType, url: str) -> None:
    found = blocks(page, "python")
    assert found
    for line, code in found:
        # The blank lines in front make a traceback point into the page.
        source = "\n" * (line - 1) + code.replace(DEFAULT_URL, url)
        exec(compile(source, str(page), "exec"), module.__dict__)
    module.store.close()


def test_ci_runs_the_commands_of_the_readme() -> None:
    lines = [line for _, code in blocks(PAGES[0], "console") for line in code.splitlines()]
    assert len(lines) == 2
    assert all(line.startswith("$ python3 -m venv .venv && .venv/bin/pip install -e ") for line in lines)
    assert r"sed -n 's/^\$ //p' README.md" in (REPOSITORY / ".ci" / "run").read_text("utf-8")


def test_no_block_is_in_a_language_that_nothing_runs() -> None:
    for page in PAGES:
        assert len(blocks(page, "python", "console")) == len(BLOCK.findall(page.read_text("utf-8")))


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
