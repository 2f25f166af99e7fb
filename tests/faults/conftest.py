"""Stores of both flavours on whatever server a test of a fault sets up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from .kit import FLAVOURS, Stores


@pytest.fixture(params=FLAVOURS)
def stores(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[Stores]:
    with Stores(request.param, runner) as stores:
        yield stores
