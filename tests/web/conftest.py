"""The page on each server, and Chromium."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from support.backends import Bench
from support.browser import Chromium
from support.web import Site


@pytest.fixture(params=["asyncio"])
def bench(request: pytest.FixtureRequest, bench: Bench) -> Bench:
    return bench


@pytest.fixture
def site(bench: Bench) -> Site:
    """The page with its default settings: it hides payloads, and changes nothing."""
    return Site(bench)


@pytest.fixture
def acting_site(bench: Bench) -> Site:
    """The page with every right enabled."""
    return Site(bench, payloads=True, actions=True)


@pytest.fixture(scope="session")
def chromium(runner: asyncio.Runner) -> Iterator[Chromium]:
    """Chromium, started once. If there is none, the test fails."""
    chromium = Chromium(runner)
    try:
        chromium.start()
        yield chromium
    finally:
        chromium.stop()
