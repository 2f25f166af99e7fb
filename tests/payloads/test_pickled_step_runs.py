"""A pickled step run includes its claim and its payloads, but not the user's codec."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
from support.backends import Bench
from support.records import begun

from squidstep_redis import MsgpackCodec, StaleStepRunError, StepRun, StepRunStore, UndecodablePayloadError

KEY = b"the key of the codec"


class SealingCodec:
    """A codec with a key, and with a part that cannot be pickled."""

    def __init__(self) -> None:
        self.key = KEY
        self.lock = threading.Lock()
        self.codec = MsgpackCodec()

    def encode(self, payload: dict[str, Any]) -> bytes:
        return b"sealed " + bytes(each ^ 0x5A for each in self.codec.encode(payload))

    def decode(self, data: bytes) -> dict[str, Any]:
        return self.codec.decode(bytes(each ^ 0x5A for each in data.removeprefix(b"sealed ")))


def travelled(value: Any) -> Any:
    """Returns what arrives in another process; asserts that neither the key nor a payload can be read on the way."""
    data = pickle.dumps(value)
    assert KEY not in data
    assert b"4111 1111" not in data
    return pickle.loads(data)


@pytest.fixture
def sealing(bench: Bench) -> StepRunStore:
    return bench.store(codec=SealingCodec())


def test_deep_copies_can_be_read_in_the_same_process(sealing: StepRunStore) -> None:
    result = sealing.begin_step("run", "pay", {"card": "4111 1111"})
    assert copy.deepcopy(result).step_run.input == {"card": "4111 1111"}


def test_payloads_of_the_default_codec_can_be_read_after_pickling(store: StepRunStore) -> None:
    claim = begun(store.begin_step("run", "pay", {"card": 1}))
    assert pickle.loads(pickle.dumps(claim)).input == {"card": 1}


def test_codec_of_the_user_is_not_pickled(sealing: StepRunStore) -> None:
    claim = begun(sealing.begin_step("run", "pay", {"card": "4111 1111"}))

    copy: StepRun = travelled(claim)

    with pytest.raises(UndecodablePayloadError, match="SealingCodec cannot decode the stored input") as caught:
        _ = copy.input
    assert "get_step_run" in str(caught.value.__cause__)
    with pytest.raises(UndecodablePayloadError):
        _ = travelled(copy).input


def test_payloads_that_were_read_are_not_pickled_decoded(sealing: StepRunStore) -> None:
    claim = begun(sealing.begin_step("run", "pay", {"card": "4111 1111"}))
    sealing.checkpoint_step(claim, {"card": "4111 1111"})
    failed = sealing.fail_step(claim, {"card": "4111 1111"})
    assert "4111 1111" in f"{claim.input} {failed.last_error} {failed.progress}"

    assert travelled(failed) is not failed
    assert travelled(sealing.begin_step("run", "pay", {})).step_run.attempt == 2


def test_pickled_step_run_equals_its_original(sealing: StepRunStore) -> None:
    claim = begun(sealing.begin_step("run", "pay", {"card": "4111 1111"}))
    assert travelled(claim) == claim == sealing.get_step_run("run", "pay")
    assert sealing.complete_step(claim, {}) != travelled(claim)


def test_step_runs_with_a_payload_unequal_to_itself_are_equal(bench: Bench) -> None:
    class LenientCodec:
        def encode(self, payload: dict[str, Any]) -> bytes:
            return pickle.dumps(payload)

        def decode(self, data: bytes) -> dict[str, Any]:
            return pickle.loads(data)

    claim = begun(bench.store(codec=LenientCodec()).begin_step("run", "pay", {"rate": float("nan")}))
    assert claim.input != {"rate": float("nan")}
    assert bench.store(codec=LenientCodec()).get_step_run("run", "pay") == claim


def test_deep_payload_that_was_read_is_pickled(store: StepRunStore) -> None:
    payload: dict[str, Any] = {}
    for _ in range(495):
        payload = {"a": payload}
    claim = begun(store.begin_step("run", "pay", payload))

    assert pickle.loads(pickle.dumps(claim)).input == claim.input == copy.deepcopy(claim).input


def test_changed_payload_is_not_what_an_operation_returns(store: StepRunStore) -> None:
    claim = begun(store.begin_step("run", "pay", {"amount": 1}))
    claim.input["amount"] = 2

    assert store.complete_step(claim, {}).input == {"amount": 1}


def test_pickled_claim_can_be_ended_and_read_with_a_store(sealing: StepRunStore) -> None:
    copy = travelled(begun(sealing.begin_step("run", "pay", {"card": "4111 1111"})))

    done = sealing.complete_step(copy, {"charged": 1})

    assert (done.input, done.output) == ({"card": "4111 1111"}, {"charged": 1})


def test_pickled_error_does_not_carry_the_codec(sealing: StepRunStore) -> None:
    begun(sealing.begin_step("run", "pay", {"card": "4111 1111"}))
    unclaimed = sealing.get_step_run("run", "pay")
    assert unclaimed is not None
    with pytest.raises(StaleStepRunError) as caught:
        sealing.complete_step(unclaimed, {})

    copy = travelled(caught.value)

    assert copy.current.status == "running"
