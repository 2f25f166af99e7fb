"""A fixture for stores of both flavors, on the server that a fault test starts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from .kit import FLAVORS, Stores


@pytest.fixture(params=FLAVORS)
def stores(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Stores]:
    with Stores(request.param, runner) as stores:
        yield stores
