"""`wait_for_step`: its mark on a step, and the stream entries and times that end its pauses."""

from __future__ import annotations

from typing import Any

import pytest
from support.backends import Bench
from support.records import begun

from squidstep_redis import StepRun, StepRunStore, StepStatus, WaitTimeoutError
from squidstep_redis.protocol.workflow import BlockOnStream, Send, Sleep, Workflow

LONG = 600  # seconds: far more than the longest pause


def pause_of(store: StepRunStore, waiting: Workflow[StepRun]) -> Any:
    """Lets a waiter read the step; returns the pause that it takes next."""
    effect = next(waiting)
    assert isinstance(effect, Send)
    return waiting.send(store.send(effect.call))


def test_deleting_a_pending_step_deletes_its_mark(bench: Bench, store: StepRunStore) -> None:
    store.schedule_steps("run", {"pay": {}, "mail": {}})
    for step in ("pay", "mail"):
        with pytest.raises(WaitTimeoutError):
            store.wait_for_step("run", step, 0.001)
        assert bench.field("run", f"w{step}") is not None

    assert store.delete_pending_steps("run", ["pay"]) == ["pay"]

    assert bench.field("run", "wpay") is None
    assert bench.field("run", "wmail") is not None


def test_waiter_reads_only_new_entries_of_the_stream(bench: Bench, store: StepRunStore) -> None:
    store.schedule_steps("run", {"pay": {}, "mail": {}})
    assert pause_of(store, store.calls.wait_for_step("run", "pay", LONG)).last == b"0-0"
    store.complete_step(begun(store.begin_step("run", "pay", {})), {})

    pause = pause_of(store, store.calls.wait_for_step("run", "mail", LONG))

    assert isinstance(pause, BlockOnStream)
    entries = bench.backend.raw.xrange(pause.stream)
    assert [(id_, entry) for id_, entry in entries] == [(pause.last, {b"step": b"pay"})]


def test_waiter_polls_once_a_second_without_a_notification(store: StepRunStore) -> None:
    claim = begun(store.begin_step("run", "pay", {}))
    waiting = store.calls.wait_for_step("run", "pay", LONG)

    pause = pause_of(store, waiting)
    assert isinstance(pause, BlockOnStream)
    assert pause.seconds == 1
    store.complete_step(claim, {"receipt": 7})
    poll = waiting.send(None)  # the pause ends without a notification

    assert isinstance(poll, Send)
    with pytest.raises(StopIteration) as ended:
        waiting.send(store.send(poll.call))
    assert (ended.value.value.status, ended.value.value.output) == (StepStatus.COMPLETED, {"receipt": 7})


def test_waiter_polls_a_missing_step_at_least_every_second(store: StepRunStore) -> None:
    waiting = store.calls.wait_for_step("run", "pay", LONG)
    pauses: list[float] = []

    effect: Any = next(waiting)
    for _ in range(10):
        effect = waiting.send(store.send(effect.call))
        assert isinstance(effect, Sleep)
        pauses.append(effect.seconds)
        effect = waiting.send(None)

    assert pauses == sorted(pauses)
    assert pauses[0] < 0.1
    assert pauses[-1] == 1


def test_last_pause_ends_at_the_timeout(store: StepRunStore) -> None:
    begun(store.begin_step("run", "pay", {}))

    pause = pause_of(store, store.calls.wait_for_step("run", "pay", 0.9))

    assert 0 < pause.seconds <= 0.9
