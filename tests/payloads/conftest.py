"""Fixtures of the payload tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.backends import offline_store

from squidstep_redis import StepRunStore


@pytest.fixture
def offline() -> Iterator[StepRunStore]:
    """A store without a server: everything that it sends raises NotSentError."""
    with offline_store() as store:
        yield store
