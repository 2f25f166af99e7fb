"""How `run_step` and `claim_step` handle a failure: whether and when the step is executed again."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pickle import PicklingError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.backends import Bench
from support.claims import DeclinedError, Worker, charge, decline, fakeredis_only, outcomes
from support.records import stored

from squidstep_redis import (
    ExponentialBackoff,
    InvalidArgumentError,
    MsgpackCodec,
    Outcome,
    PayloadError,
    PermanentError,
    RetryLater,
    StepDelayedError,
    StepFailedError,
    StepRunStore,
    StepStatus,
)

Work = Callable[[dict[str, Any]], Any]


def raising(error: BaseException) -> Work:
    def work(input: dict[str, Any]) -> Any:
        raise error

    return work


def delay_of(store: StepRunStore, step: str = "pay") -> float:
    """Returns for how many seconds a failed step cannot be claimed."""
    step_run = stored(store, step=step)
    if step_run.retry_at is None or step_run.ended_at is None:
        return 0
    return (step_run.retry_at - step_run.ended_at).total_seconds()


class TestPermanentFailure:
    @pytest.mark.parametrize(
        ("error", "permanent"),
        [
            (PermanentError("stolen"), ()),
            (DeclinedError("stolen"), (KeyError, DeclinedError)),
            (KeyError(1), LookupError),
            (ExceptionGroup("stolen", [DeclinedError(), ExceptionGroup("", [PermanentError(), RetryLater(5)])]), ()),
            (BaseExceptionGroup("stolen", [KeyError(1), KeyboardInterrupt()]), KeyError),
        ],
        ids=["PermanentError", "tuple", "base class", "PermanentError in a group", "base class in a group"],
    )
    def test_no_delivery_executes_the_step_again(
        self, worker: Worker, others: StepRunStore, error: BaseException, permanent: Any
    ) -> None:
        with pytest.raises(type(error)) as raised:
            worker.execute(raising(error), permanent=permanent)
        assert raised.value is error
        for _ in range(2):
            message = f"failed permanently in attempt 1 .*{re.escape(str(error))}"
            with pytest.raises(StepFailedError, match=message) as failed:
                worker.execute(charge)
        assert failed.value.current == stored(others)
        assert stored(others).final
        assert outcomes(others) == [Outcome.FAILED]

    def test_retry_step_lets_it_be_executed(self, worker: Worker, others: StepRunStore) -> None:
        with pytest.raises(PermanentError):
            worker.execute(raising(PermanentError()))
        others.retry_step("run", "pay")
        assert worker.execute(charge) == {"charged": 1}

    def test_other_errors_can_be_retried_at_once(self, worker: Worker, others: StepRunStore) -> None:
        with pytest.raises(DeclinedError):
            worker.execute(decline, permanent=ValueError)
        assert (stored(others).final, delay_of(others)) == (False, 0)
        assert worker.execute(charge) == {"charged": 1}

    def test_claim_without_a_lease_is_final_too(self, worker: Worker, others: StepRunStore) -> None:
        with pytest.raises(PermanentError):
            worker.execute(raising(PermanentError()), lease=None)
        assert stored(others).final

    @pytest.mark.parametrize("error", [DeclinedError, KeyboardInterrupt])
    def test_an_error_that_leaves_a_block_is_final(
        self, worker: Worker, others: StepRunStore, error: type[BaseException]
    ) -> None:
        """An interruption, too, if the caller says so."""
        with pytest.raises(error), worker.claim(permanent=error):
            raise error
        assert stored(others).final

    def test_a_block_can_fail_for_good_itself(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            assert claim.fail({"reason": "stolen"}, final=True).final
        with worker.claim("ship") as claim:
            claim.fail({"reason": "storm"}, retry_after=60)
        assert stored(others).final
        assert delay_of(others, "ship") == 60

    @fakeredis_only
    def test_waiting_for_a_busy_step_ends_when_it_fails_permanently(self, worker: Worker, others: StepRunStore) -> None:
        others.fail_step(others.begin_step("run", "pay", {}).step_run, {}, final=True)
        with pytest.raises(StepFailedError):
            worker.execute(charge, on_busy="wait")


class TestUnstorableResult:
    """The work may have taken effect, so it is not repeated."""

    @pytest.mark.parametrize(
        "output",
        [{"price": Decimal("9.99")}, {"n": 2**64}, {1: object()}, ["a list"], 42, "text"],
        ids=lambda output: re.sub(r" at 0x\w+", "", repr(output)),
    )
    def test_it_is_executed_once(self, worker: Worker, others: StepRunStore, output: Any) -> None:
        executed: list[int] = []

        def work(input: dict[str, Any]) -> Any:
            executed.append(1)
            return output

        with pytest.raises(PayloadError) as raised:
            worker.execute(work)
        for _ in range(2):
            with pytest.raises(StepFailedError, match="PayloadError: output"):
                worker.execute(work)
        assert len(executed) == 1
        assert any("cannot be stored" in note for note in raised.value.__notes__)
        assert stored(others).final
        assert "cannot be stored" in (stored(others).last_error or {})["traceback"]

    @pytest.mark.parametrize("error", [RecursionError("deep"), PicklingError("no"), KeyError("x"), MemoryError()])
    def test_output_that_the_codec_fails_on_is_not_repeated(self, bench: Bench, error: Exception) -> None:
        class Picky(MsgpackCodec):
            def encode(self, payload: dict[str, Any]) -> bytes:
                if "odd" in payload:
                    raise error
                return super().encode(payload)

        executed: list[int] = []

        def work(input: dict[str, Any]) -> Any:
            executed.append(1)
            return {"odd": 1}

        worker = Worker(bench, bench.store(codec=Picky()))
        with pytest.raises(type(error)):
            worker.execute(work)
        with pytest.raises(StepFailedError, match=type(error).__name__):
            worker.execute(work)
        assert executed == [1]

    def test_none_stands_for_an_empty_output(self, worker: Worker, others: StepRunStore) -> None:
        assert worker.execute(lambda _: None) == {}
        assert (stored(others).status, stored(others).output) == (StepStatus.COMPLETED, {})

    def test_a_block_may_complete_with_another_output(self, worker: Worker, others: StepRunStore) -> None:
        with worker.claim() as claim:
            with pytest.raises(PayloadError):
                claim.complete({"price": Decimal(9)})
            claim.complete({"price": "9"})
        assert stored(others).output == {"price": "9"}

    def test_a_block_that_fails_for_another_reason_can_be_retried(self, worker: Worker, others: StepRunStore) -> None:
        def work(claim: Any) -> None:
            with pytest.raises(PayloadError):
                claim.complete({"price": Decimal(9)})
            raise DeclinedError

        with pytest.raises(DeclinedError), worker.claim() as claim:
            work(claim)
        assert not stored(others).final

    def test_steps_to_schedule_that_cannot_be_stored_are_final_too(self, worker: Worker, others: StepRunStore) -> None:
        with pytest.raises(PayloadError), worker.claim() as claim:
            claim.complete({}, schedule={"ship": {"to": object()}})
        assert stored(others).final
        assert list(others.step_statuses("run")) == ["pay"]

    def test_a_rejected_payload_of_the_work_itself_can_be_retried(self, worker: Worker, others: StepRunStore) -> None:
        """For example, of another step: that step has failed, not the one around it."""

        def work(input: dict[str, Any]) -> dict[str, Any]:
            others.schedule_step("run", "ship", {"to": object()})
            return {}

        with pytest.raises(PayloadError):
            worker.execute(work)
        assert not stored(others).final


class TestDelay:
    @pytest.mark.parametrize("backoff", [None, lambda attempt: 7])
    def test_retry_later_names_its_delay(self, worker: Worker, others: StepRunStore, backoff: Any) -> None:
        with pytest.raises(RetryLater, match="closed"):
            worker.execute(raising(RetryLater(60, "closed")), backoff=backoff)
        with pytest.raises(StepDelayedError, match="closed.* may be retried in") as delayed:
            worker.execute(charge)
        assert 0 < delayed.value.retry_in <= 60
        assert delayed.value.current == stored(others)
        assert delay_of(others) == 60

    def test_retry_later_accepts_a_timedelta(self, worker: Worker, others: StepRunStore) -> None:
        with pytest.raises(RetryLater, match="^retry in 60 s$") as raised:
            worker.execute(raising(RetryLater(timedelta(minutes=1))))
        assert raised.value.retry_in == delay_of(others) == 60
        assert str(pickle.loads(pickle.dumps(raised.value))) == "retry in 60 s"

    def test_longest_delay_in_a_group_counts(self, worker: Worker, others: StepRunStore) -> None:
        delays = [RetryLater(timedelta(minutes=1)), ExceptionGroup("closed", [RetryLater(90), DeclinedError()])]
        with pytest.raises(ExceptionGroup):
            worker.execute(raising(ExceptionGroup("closed", delays)), backoff=lambda _: 120)
        assert delay_of(others) == 90

    def test_backoff_receives_the_attempts_that_count(self, worker: Worker, others: StepRunStore) -> None:
        received: list[int] = []

        def backoff(attempt: int) -> float:
            received.append(attempt)
            return 0

        for reset in (False, False, True, False):
            with pytest.raises(DeclinedError):
                worker.execute(decline, backoff=backoff)
            if reset:
                others.retry_step("run", "pay")
        with worker.claim() as claim:
            claim.release()
        with pytest.raises(DeclinedError):
            worker.execute(decline, backoff=backoff)
        assert received == [1, 2, 3, 1, 2]

    @pytest.mark.parametrize("delay", [60, 60.0, timedelta(minutes=1)], ids=str)
    def test_backoff_delays_the_next_attempt(self, worker: Worker, others: StepRunStore, delay: Any) -> None:
        with pytest.raises(DeclinedError):
            worker.execute(decline, backoff=lambda attempt: delay)
        with pytest.raises(StepDelayedError):
            worker.execute(charge)
        assert delay_of(others) == 60

    @pytest.mark.parametrize("error", [PermanentError(), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
    def test_backoff_does_not_apply(self, worker: Worker, others: StepRunStore, error: BaseException) -> None:
        with pytest.raises(type(error)), worker.claim(backoff=lambda attempt: 60):
            raise error
        assert delay_of(others) == 0

    @pytest.mark.parametrize("delay", [-1, "60", float("nan"), 10**10, None, ZeroDivisionError()], ids=repr)
    def test_an_invalid_delay_is_ignored_with_a_note(self, worker: Worker, others: StepRunStore, delay: Any) -> None:
        def backoff(attempt: int) -> Any:
            if isinstance(delay, Exception):
                raise delay
            return delay

        with pytest.raises(DeclinedError) as raised:
            worker.execute(decline, backoff=backoff)
        notes = getattr(raised.value, "__notes__", [])
        assert any("ignored the delay" in note for note in notes) is (delay is not None)
        assert worker.execute(charge) == {"charged": 1}

    @pytest.mark.slow
    def test_a_worker_may_wait_for_it(self, worker: Worker, others: StepRunStore) -> None:
        with pytest.raises(RetryLater):
            worker.execute(raising(RetryLater(0.2)))
        assert worker.execute(charge, on_busy="wait") == {"charged": 1}
        first, second = others.attempts("run", "pay")
        assert first.ended_at is not None
        assert second.started_at - first.ended_at >= timedelta(seconds=0.2)


class TestArguments:
    @pytest.mark.parametrize(
        "permanent", [ValueError(), "ValueError", (ValueError, 1), int, None, [ValueError]], ids=repr
    )
    def test_permanent_must_be_types_of_exceptions(self, worker: Worker, permanent: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^permanent: "):
            worker.execute(charge, permanent=permanent)

    def test_backoff_must_be_a_function(self, worker: Worker) -> None:
        with pytest.raises(InvalidArgumentError, match="^backoff: "):
            worker.execute(charge, backoff=60)

    @pytest.mark.parametrize(
        "options",
        [
            *({"first": 0}, {"cap": -1}, {"cap": 10**9}),
            *({"factor": 0.5}, {"factor": "2"}, {"factor": True}),
            *({"jitter": 1.1}, {"jitter": -0.1}, {"jitter": "x"}),
        ],
        ids=str,
    )
    def test_a_backoff_rejects_invalid_settings(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgumentError, match=f"^{next(iter(options))}: "):
            ExponentialBackoff(**options)


class TestExponentialBackoff:
    def test_delays_double_up_to_the_cap(self) -> None:
        backoff = ExponentialBackoff(first=2, cap=10, jitter=0)
        assert [backoff(attempt) for attempt in (1, 2, 3, 4, 5, 10_000)] == [2, 4, 8, 10, 10, 10]

    @given(st.floats(0.001, 1e6), st.floats(0.001, 1e6), st.floats(1, 1e9), st.floats(0, 1), st.integers(1, 10**9))
    def test_every_delay_is_within_the_cap_and_its_jitter(
        self, first: float, cap: float, factor: float, jitter: float, attempt: int
    ) -> None:
        delay = ExponentialBackoff(first, cap, factor, jitter)(attempt)
        assert min(first, cap) * (1 - jitter) * 0.999 <= delay <= cap * (1 + jitter) * 1.001
