"""The site under test, on each server."""

from __future__ import annotations

import pytest
from support.asgi import Site
from support.backends import Bench


@pytest.fixture(params=["asyncio"])
def bench(request: pytest.FixtureRequest, bench: Bench) -> Bench:
    return bench


@pytest.fixture
def site(bench: Bench) -> Site:
    return Site(bench)
