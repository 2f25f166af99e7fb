"""The server's clock jumps forward or back: a takeover comes early or late, but is always fenced.

Debian's Redis 7 is not tested, because its shared allocator does not start under libfaketime.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.records import begun
from support.servers import wait_until

from squidstep_redis import Outcome, StaleStepRunError, StepRunStore

from .kit import MovableClock, Stores

pytestmark = pytest.mark.servers("valkey", "redis-6")

HOUR = 3600


@pytest.fixture
def clock(request: pytest.FixtureRequest, binary: Path, tmp_path: Path) -> Iterator[MovableClock]:
    try:
        clock = MovableClock(binary, tmp_path)
    except LookupError as error:
        # pip does not install libfaketime. Only a run that names its servers fails without it.
        if request.config.getoption("--servers") is None:
            pytest.skip(str(error))
        raise
    with clock.server:
        yield clock


@pytest.fixture
def store(clock: MovableClock, stores: Stores) -> StepRunStore:
    return stores.from_url(clock.server.url)


def test_forward_jump_allows_early_takeover_and_fences_the_holder(clock: MovableClock, store: StepRunStore) -> None:
    early = begun(store.begin_step("run", "pay", {}, lease=600, owner="early"))
    assert store.begin_step("run", "pay", {}, lease=600).busy

    clock.move(HOUR)

    late = begun(store.begin_step("run", "pay", {}, lease=600, owner="late"))
    assert late.attempt == 2
    for rejected_call in (
        lambda: store.complete_step(early, {"by": "early"}),
        lambda: store.fail_step(early, {}),
        lambda: store.extend_claim(early, 60),
        lambda: store.release_step(early),
    ):
        with pytest.raises(StaleStepRunError, match="was taken over"):
            rejected_call()
    assert store.complete_step(late, {"by": "late"}).output == {"by": "late"}
    assert [attempt.outcome for attempt in store.attempts("run", "pay")] == [Outcome.LEASE_EXPIRED, Outcome.COMPLETED]


def test_backward_jump_delays_the_takeover(clock: MovableClock, store: StepRunStore) -> None:
    clock.move(HOUR)
    held = begun(store.begin_step("run", "pay", {}, lease=0.01))
    lapsed = begun(store.begin_step("run", "mail", {}, lease=0.01))
    clock.move(0)

    # By this clock the leases end in an hour: another worker must wait, but the holder can complete.
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


def test_holder_can_extend_its_lease_after_a_backward_jump(clock: MovableClock, store: StepRunStore) -> None:
    clock.move(HOUR)
    held = begun(store.begin_step("run", "pay", {}, lease=600))
    clock.move(0)

    extended = store.extend_claim(held, 600)

    assert extended.lease_ends_at is not None
    assert store.begin_step("run", "pay", {}, lease=60).busy
    assert store.complete_step(held, {"by": "holder"}).status == "completed"


def test_completion_order_is_independent_of_clock_jumps(clock: MovableClock, store: StepRunStore) -> None:
    steps = [f"step-{number}" for number in range(8)]
    claims = {step: begun(store.begin_step("run", step, {})) for step in steps}
    for step, offset in zip(steps, (0, -HOUR, HOUR, -2 * HOUR, 0, 3 * HOUR, -HOUR, 0), strict=True):
        clock.move(offset)
        store.complete_step(claims[step], {"of": step})

    assert store.completed_steps("run") == steps
    assert store.completed_outputs("run") == [{"of": step} for step in steps]
    for step in steps:  # no attempt ends before it began
        (attempt,) = store.attempts("run", step)
        assert attempt.ended_at is not None
        assert attempt.ended_at >= attempt.started_at
