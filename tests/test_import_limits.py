"""What `import_run` rejects at its limits: the length of a history, and positions that two steps share."""

from __future__ import annotations

from typing import Any

import pytest
from support.backends import Bench
from support.records import begun

from squidstep_redis import InvalidArgumentError, StepRunStore

# One run is one slot: a cluster adds nothing here.
pytestmark = pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")

HISTORY = 8  # past attempts kept per step
ATTEMPTS = 12


@pytest.fixture
def other(bench: Bench) -> StepRunStore:
    """A store that the documents are imported into."""
    return bench.store(prefix=f"{bench.prefix}-other")


@pytest.fixture
def document(store: StepRunStore) -> Any:
    """Two steps: "pay", which failed 12 times, and "mail", which is pending."""
    for number in range(ATTEMPTS):
        store.fail_step(begun(store.begin_step("run", "pay", {})), {"number": number + 1})
    store.schedule_step("run", "mail", {})
    return store.export_run("run")


def test_history_of_eight_attempts_is_imported(store: StepRunStore, other: StepRunStore, document: Any) -> None:
    assert [past["attempt"] for past in document["steps"][0]["history"]] == list(range(4, ATTEMPTS))

    other.import_run(document)

    assert other.attempts("run", "pay") == store.attempts("run", "pay")
    assert len(other.attempts("run", "pay")) == HISTORY + 1


@pytest.mark.parametrize("attempt", [ATTEMPTS - HISTORY - 1, ATTEMPTS, 0])
def test_attempt_beyond_the_history_is_rejected(other: StepRunStore, document: Any, attempt: int) -> None:
    history = document["steps"][0]["history"]
    history.insert(0, {**history[0], "attempt": attempt})

    with pytest.raises(InvalidArgumentError, match=r"\['history'\]\[0\]\['attempt'\]"):
        other.import_run(document)

    assert other.get_run("run") == []


@pytest.mark.parametrize("position", [1, 2])
def test_two_steps_in_one_position_are_rejected(other: StepRunStore, document: Any, position: int) -> None:
    for step in document["steps"]:
        step["position"] = position

    with pytest.raises(InvalidArgumentError, match=r"\['steps'\]\[1\]\['position'\]"):
        other.import_run(document)

    assert other.get_run("run") == []


@pytest.mark.parametrize("position", [0, 3])
def test_position_beyond_the_steps_created_is_rejected(other: StepRunStore, document: Any, position: int) -> None:
    document["steps"][1]["position"] = position

    with pytest.raises(InvalidArgumentError, match=r"\['steps'\]\[1\]\['position'\]"):
        other.import_run(document)

    assert other.get_run("run") == []
