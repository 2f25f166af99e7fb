"""`run_step` and `claim_step` with a different input: they raise InputMismatchError, and hold and wait for nothing."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from support.backends import Bench
from support.claims import Worker, charge, decline
from support.records import begun, stored

from squidstep_redis import InputMismatchError, InvalidArgumentError, StepRunStore, StepStatus


class TestRunStep:
    @pytest.mark.parametrize("on_busy", ["raise", "wait"])
    def test_different_input_is_rejected_at_once(self, bench: Bench, store: StepRunStore, on_busy: Any) -> None:
        begun(store.begin_step("run", "pay", {"amount": 1}, lease=60, fingerprint=True))
        before = bench.dump()

        with pytest.raises(InputMismatchError, match="run 'run', step 'pay': the input has the fingerprint"):
            store.run_step("run", "pay", charge, {"amount": 2}, fingerprint=True, on_busy=on_busy)

        assert bench.dump() == before

    def test_the_same_input_returns_the_stored_output(self, store: StepRunStore) -> None:
        output = store.run_step("run", "pay", charge, {"amount": 1, "card": 7}, fingerprint=True)

        assert store.run_step("run", "pay", decline, {"card": 7, "amount": 1}, fingerprint=True) == output
        with pytest.raises(InputMismatchError):
            store.run_step("run", "pay", decline, {"amount": 2}, fingerprint=True)
        assert store.run_step("run", "pay", decline, {"amount": 2}) == output

    def test_the_setting_of_the_store_holds(self, bench: Bench) -> None:
        store = bench.store(fingerprint=lambda given: given["amount"])
        store.run_step("run", "pay", charge, {"amount": 1, "at": 1})
        store.run_step("run", "pay", decline, {"amount": 1, "at": 2})

        with pytest.raises(InputMismatchError):
            store.run_step("run", "pay", decline, {"amount": 2})
        with pytest.raises(InvalidArgumentError, match="^fingerprint: its function raised KeyError"):
            store.run_step("run", "ship", decline, {})
        assert store.run_step("run", "ship", charge, {"amount": 3}, fingerprint=False)


class TestClaimStep:
    def test_different_input_does_not_enter_the_block(self, bench: Bench, worker: Worker, others: StepRunStore) -> None:
        others.schedule_step("run", "pay", {"amount": 2}, fingerprint=True)
        before = bench.dump()
        block = worker.claim(fingerprint=True)

        with pytest.raises(InputMismatchError), block:
            raise AssertionError

        assert bench.dump() == before
        assert stored(others).status is StepStatus.PENDING

    def test_the_claim_has_the_fingerprint(self, bench: Bench, worker: Worker) -> None:
        with worker.claim(fingerprint="first") as claim:
            claim.complete({})

        assert bench.field("run", "fpay") == b"first"


def test_the_error_survives_pickling() -> None:
    error = InputMismatchError("run", "pay", "a", "b")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))
