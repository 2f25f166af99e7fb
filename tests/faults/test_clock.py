"""The clock of the server jumps, forward or back: a takeover comes early or late, and is fenced as ever.

Debian's Redis 7 is not tried: it shares its allocator, with which libfaketime does not start.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.records import begun
from support.servers import wait_until

from squidstep_redis import Outcome, StaleStepRunError, StepRunStore

from .kit import MovedClock, Stores

pytestmark = pytest.mark.servers("valkey", "redis-6")

HOUR = 3600


@pytest.fixture
def clock(request: pytest.FixtureRequest, binary: Path, tmp_path: Path) -> Iterator[MovedClock]:
    try:
        clock = MovedClock(binary, tmp_path)
    except LookupError as error:
        # pip does not install libfaketime: without it only a run that names its servers fails.
        if request.config.getoption("--servers") is None:
            pytest.skip(str(error))
        raise
    with clock.server:
        yield clock


@pytest.fixture
def store(clock: MovedClock, stores: Stores) -> StepRunStore:
    return stores.from_url(clock.server.url)


def test_forward_is_an_early_takeover_and_the_early_holder_is_refused(clock: MovedClock, store: StepRunStore) -> None:
    early = begun(store.begin_step("run", "pay", {}, lease=600, owner="early"))
    assert store.begin_step("run", "pay", {}, lease=600).busy

    clock.move(HOUR)

    late = begun(store.begin_step("run", "pay", {}, lease=600, owner="late"))
    assert late.attempt == 2
    for refused in (
        lambda: store.complete_step(early, {"by": "early"}),
        lambda: store.fail_step(early, {}),
        lambda: store.extend_claim(early, 60),
        lambda: store.release_step(early),
    ):
        with pytest.raises(StaleStepRunError, match="was taken over"):
            refused()
    assert store.complete_step(late, {"by": "late"}).output == {"by": "late"}
    assert [attempt.outcome for attempt in store.attempts("run", "pay")] == [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]


def test_back_is_a_late_takeover(clock: MovedClock, store: StepRunStore) -> None:
    clock.move(HOUR)
    held = begun(store.begin_step("run", "pay", {}, lease=0.01))
    lapsed = begun(store.begin_step("run", "mail", {}, lease=0.01))
    clock.move(0)

    # By this clock the leases end in an hour: no other worker may claim, but the holder may, and may give up.
    busy = store.begin_step("run", "mail", {}, lease=60)
    assert busy.busy
    assert busy.retry_in is not None
    assert busy.retry_in > HOUR / 2
    assert store.complete_step(held, {"by": "holder"}).output == {"by": "holder"}
    clock.move(HOUR)
    wait_until(store.lapsed_claims)
    successor = begun(store.begin_step("run", "mail", {}, lease=60))
    assert successor.attempt == 2
    with pytest.raises(StaleStepRunError):
        store.complete_step(lapsed, {})


def test_back_and_the_holder_renews_its_lease_by_the_clock_that_is(clock: MovedClock, store: StepRunStore) -> None:
    clock.move(HOUR)
    held = begun(store.begin_step("run", "pay", {}, lease=600))
    clock.move(0)

    extended = store.extend_claim(held, 600)

    assert extended.lease_ends_at is not None
    assert store.begin_step("run", "pay", {}, lease=60).busy
    assert store.complete_step(held, {"by": "holder"}).status == "completed"


def test_the_order_of_completion_is_the_order_in_which_they_came(clock: MovedClock, store: StepRunStore) -> None:
    steps = [f"step-{number}" for number in range(8)]
    claims = {step: begun(store.begin_step("run", step, {})) for step in steps}
    for step, offset in zip(steps, (0, -HOUR, HOUR, -2 * HOUR, 0, 3 * HOUR, -HOUR, 0), strict=True):
        clock.move(offset)
        store.complete_step(claims[step], {"of": step})

    assert store.completed_steps("run") == steps
    assert store.completed_outputs("run") == [{"of": step} for step in steps]
    for step in steps:  # and no attempt ends before it began
        (attempt,) = store.attempts("run", step)
        assert attempt.ended_at is not None
        assert attempt.ended_at >= attempt.started_at
