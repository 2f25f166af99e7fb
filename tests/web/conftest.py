"""The page on each server, and Chromium."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
from support.backends import Bench
from support.browser import Chromium, find_chromium
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
    """Chromium, started once."""
    try:
        find_chromium()
    except LookupError as error:
        if "SQUIDSTEP_CHROMIUM" in os.environ:
            raise
        pytest.skip(str(error))
    chromium = Chromium(runner)
    try:
        chromium.start()
        yield chromium
    finally:
        chromium.stop()
