"""A call repeated with an equal payload is recognized, however its codec encodes it."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from support.backends import Bench
from support.records import begun, stored

from squidstep_redis import StaleStepRunError, StepRunStore, StepStatus
from squidstep_redis.codecs import CompressedCodec, EncryptedCodec

KEYS = {"k": b"k" * 32}
CODECS = {"default": None, "encrypted": EncryptedCodec(KEYS, current="k", codec=CompressedCodec(threshold=0))}
OUTPUT, SAME, OTHER = {"a": 1, "b": [2]}, {"b": [2], "a": 1}, {"a": 1, "b": [3]}


@pytest.fixture(params=CODECS.values(), ids=CODECS)
def store(bench: Bench, request: pytest.FixtureRequest) -> StepRunStore:
    return bench.store(codec=request.param)


def test_repeated_completion_returns_the_same_result(bench: Bench, store: StepRunStore) -> None:
    claim = begun(store.begin_step("run", "pay", {}))
    completed = store.complete_step(claim, OUTPUT)
    before = bench.dump()

    for step_run in (claim, claim.id):
        for output in (OUTPUT, SAME):
            assert store.complete_step(step_run, output) == completed
            assert store.complete_steps([(step_run, output)]) == [completed]
            assert store.batch([store.calls.complete_step(step_run, output)]) == [completed]
        with pytest.raises(StaleStepRunError):
            store.complete_step(step_run, OTHER)
    assert bench.dump() == before


@pytest.mark.parametrize("final", [False, True])
def test_repeated_failure_returns_the_same_result(bench: Bench, store: StepRunStore, final: bool) -> None:
    claim = begun(store.begin_step("run", "pay", {"x": 1}))
    failed = store.fail_step(claim, OUTPUT, final=final)
    before = bench.dump()

    for step_run in (claim, claim.id):
        for error in (OUTPUT, SAME):
            again = store.fail_step(step_run, error, final=final)
            assert (again, again.last_error, again.input) == (failed, OUTPUT, {"x": 1})
        for error, is_final in ((OTHER, final), (OUTPUT, not final)):
            with pytest.raises(StaleStepRunError) as caught:
                store.fail_step(step_run, error, final=is_final)
            assert caught.value.current == failed
    assert bench.dump() == before


def test_repeated_failure_of_an_earlier_attempt_is_recognized(bench: Bench, store: StepRunStore) -> None:
    claim = begun(store.begin_step("run", "pay", {}))
    store.fail_step(claim, OUTPUT)
    begun(store.begin_step("run", "pay", {}))
    before = bench.dump()

    for error in (OUTPUT, SAME):
        again = store.fail_step(claim, error)
        assert (again.attempt, again.status, again.last_error) == (1, StepStatus.FAILED, OUTPUT)
    with pytest.raises(StaleStepRunError) as caught:
        store.fail_step(claim, OTHER)
    assert (caught.value.current.attempt, caught.value.current.status) == (2, StepStatus.RUNNING)
    assert bench.dump() == before


def test_repeated_exception_is_recognized(store: StepRunStore) -> None:
    claim = begun(store.begin_step("run", "pay", {}))
    error = ValueError("declined")

    assert store.fail_step(claim, error) == store.fail_step(claim, error)


class TestAdvance:
    def test_same_call_is_recognized(self, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "a", {}))
        call = store.calls.advance_step(claim, OUTPUT, "b", {}, lease=60)

        first, second = store.send(call), store.send(call)

        assert first.step_run.token == second.step_run.token != b""

    def test_new_call_finds_the_next_step_busy(self, bench: Bench, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "a", {}))
        store.advance_step(claim, OUTPUT, "b", {}, lease=60)
        before = bench.dump()

        for step_run in (claim, claim.id):
            for output in (OUTPUT, SAME):
                calls = [store.calls.advance_step(step_run, output, "b", {}, lease=60) for _ in range(2)]
                assert [each.reason for each in (store.send(calls[0]), *store.batch([calls[1]]))] == ["busy"] * 2
            with pytest.raises(StaleStepRunError, match="is completed by attempt 1, not by this call|not running"):
                store.advance_step(step_run, OTHER, "b", {}, lease=60)
        assert bench.dump() == before

    def test_new_call_claims_a_next_step_that_is_free(self, bench: Bench, store: StepRunStore) -> None:
        claim = begun(store.begin_step("run", "a", {}))
        store.release_step(begun(store.advance_step(claim, OUTPUT, "b", {"from": "a"}, lease=60)))

        result = store.advance_step(claim, SAME, "b", {}, lease=60)

        assert (result.decision, result.step_run.attempt, result.step_run.input) == ("execute", 2, {"from": "a"})
        assert store.completed_steps("run") == ["a"]

    def test_call_in_a_pipeline_is_refused_if_its_bytes_differ(self, bench: Bench) -> None:
        if bench.runner is not None or bench.backend.name == "cluster":
            pytest.skip("a pipeline of one blocking client")
        store = bench.store()
        claim = begun(store.begin_step("run", "a", {}))
        store.advance_step(claim, OUTPUT, "b", {}, lease=60)
        client: redis.Redis = bench.backend.raw
        with client.pipeline() as pipeline:
            queued = store.queue(pipeline, store.calls.advance_step(claim, SAME, "b", {}, lease=60))
            replies = pipeline.execute()

        with pytest.raises(StaleStepRunError, match="the stored output is encoded differently"):
            queued.result(replies)

    @pytest.mark.servers("valkey")
    def test_call_that_waits_for_durability_is_recognized(self, bench: Bench) -> None:
        bench.backend.raw.config_set("appendonly", "yes")
        try:
            store: Any = bench.store(wait_aof=True, wait_timeout=4, timeout=20)
            claim = begun(store.begin_step("run", "a", {}))
            store.advance_step(claim, OUTPUT, "b", {}, lease=60)

            assert store.advance_step(claim, SAME, "b", {}, lease=60).busy
            (result,) = store.batch([store.calls.advance_step(claim, SAME, "b", {}, lease=60)])
            assert result.busy
        finally:
            bench.backend.raw.config_set("appendonly", "no")


def test_group_of_completions_is_recognized(store: StepRunStore) -> None:
    claims = [result.step_run for result in store.begin_steps("run", {"a": {}, "b": {}, "pay": {}}).values()]
    done = store.complete_steps([(claim, OUTPUT) for claim in claims])

    assert store.complete_steps([(claim, SAME) for claim in claims]) == done
    assert stored(store).output == OUTPUT
