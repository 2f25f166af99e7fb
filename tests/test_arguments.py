"""Bad input is refused before anything is sent, by an error that names the argument, the value and what is allowed."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio

from squidstep_redis import (
    AsyncStepRunStore,
    InvalidArgumentError,
    MsgpackCodec,
    NotSentError,
    PayloadError,
    PayloadTooLargeError,
    SquidstepError,
    StaleStepRunError,
    StepRun,
    StepRunStore,
    UnsupportedClientError,
)


@pytest.fixture
def store() -> Iterator[StepRunStore]:
    """A store whose server is not there: sending anything would fail with NotSentError."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield StepRunStore(redis.Redis(port=taken.getsockname()[1], retry=None), max_payload_bytes=100, timeout=0.05)


@pytest.fixture
def claim() -> StepRun:
    return StepRunStore(fakeredis.FakeRedis()).begin_step("run", "pay", {}).step_run


LEASES = [0, -1, 0.0001, math.nan, math.inf, 367 * 86_400, timedelta(0), timedelta(days=367), "30", True, b"1"]


class TestSpans:
    @pytest.mark.parametrize("value", LEASES)
    def test_leases_are_checked(self, store: StepRunStore, claim: StepRun, value: Any) -> None:
        for call in (
            lambda: store.begin_step("run", "pay", {}, lease=value),
            lambda: store.extend_claim(claim, value),
        ):
            with pytest.raises(InvalidArgumentError, match="lease: must be seconds from 0.001 to 31,622,400"):
                call()

    @pytest.mark.parametrize("value", [0, -1, math.nan, 3_661 * 86_400, "30", False])
    def test_times_to_live_are_checked(self, store: StepRunStore, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="ttl: must be seconds from 0.001 to 316,224,000"):
            store.expire_run("run", value)
        with pytest.raises(InvalidArgumentError, match="tombstone: must be"):
            store.delete_run("run", tombstone=value)
        with pytest.raises(InvalidArgumentError, match="run_ttl: must be"):
            StepRunStore(redis.Redis(), run_ttl=value)

    def test_a_tombstone_must_end(self, store: StepRunStore) -> None:
        with pytest.raises(InvalidArgumentError, match="tombstone"):
            store.delete_run("run", tombstone=None)

    def test_a_timedelta_is_accepted_for_seconds(self) -> None:
        store = StepRunStore(fakeredis.FakeRedis())
        step_run = store.begin_step("run", "pay", {}, lease=timedelta(minutes=1)).step_run
        assert step_run.started_at is not None
        assert step_run.lease_ends_at == step_run.started_at + timedelta(minutes=1)


class TestNumbers:
    @pytest.mark.parametrize("value", [0, -1, 1.0, "3", True, 1_000_001, math.nan])
    def test_max_attempts_is_checked(self, store: StepRunStore, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="max_attempts: must be an int from 1 to 1,000,000"):
            store.begin_step("run", "pay", {}, max_attempts=value)

    @pytest.mark.parametrize("value", [0, -1, 1.5, None, 2**40])
    def test_max_payload_bytes_is_checked(self, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="max_payload_bytes: must be an int from 1 to"):
            StepRunStore(redis.Redis(), max_payload_bytes=value)

    @pytest.mark.parametrize("value", [-1, 1.5, True, "1", 10**9 + 1])
    def test_places_of_the_order_are_checked(self, store: StepRunStore, value: Any) -> None:
        for read in (store.completed_steps, store.completed_outputs):
            with pytest.raises(InvalidArgumentError, match="after: must be an int from 0 to 1,000,000,000"):
                read("run", after=value)
            with pytest.raises(InvalidArgumentError, match="limit: must be an int from 1 to 1,000,000,000"):
                read("run", limit=value)

    @pytest.mark.parametrize("value", ["", "-1", "x", "1-2-", 0, b"0", "1" * 21, str(2**64), "٣"])
    def test_cursors_are_checked(self, store: StepRunStore, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="cursor: must be the cursor of another page"):
            store.scan_steps("run", cursor=value)


class TestNames:
    @pytest.mark.parametrize("value", ["", "x" * 513, "\ud800", 7, b"run", None])
    def test_identifiers_are_checked(self, store: StepRunStore, value: Any) -> None:
        for call in (store.get_run, store.completed_steps, store.delete_run):
            with pytest.raises(InvalidArgumentError, match="^run_id: "):
                call(value)
        for name, call in {
            "step": lambda: store.begin_step("run", value, {}),
            "a step of steps": lambda: store.schedule_steps("run", {value: {}}),
            r"steps\[1\]": lambda: store.delete_pending_steps("run", ["a", value]),
        }.items():
            with pytest.raises(InvalidArgumentError, match=f"^{name}: "):
                call()

    @pytest.mark.parametrize("value", ["", "w" * 257, "line\nbreak", "\x00", "\x7f", 7, b"worker"])
    def test_owner_is_checked(self, store: StepRunStore, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^owner: "):
            store.begin_step("run", "pay", {}, owner=value)

    @pytest.mark.parametrize("value", ["", "a{b", "a}b", "p" * 129, None, b"prefix"])
    def test_prefix_is_checked(self, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^prefix: "):
            StepRunStore(redis.Redis(), prefix=value)

    @pytest.mark.parametrize("value", ["ab", {"a": 1}, b"ab"])
    def test_a_str_is_not_a_list_of_steps(self, store: StepRunStore, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^steps"):
            store.delete_pending_steps("run", value)

    @pytest.mark.parametrize("value", [None, ["a"], "a", 7])
    def test_steps_to_schedule_come_in_a_dict(self, store: StepRunStore, claim: StepRun, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^steps: must be a dict of input by step"):
            store.schedule_steps("run", value)
        if value is not None:
            with pytest.raises(InvalidArgumentError, match="^schedule: must be a dict of input by step"):
                store.complete_step(claim, {}, schedule=value)


class TestPayloads:
    @pytest.mark.parametrize("value", [None, [], "text", 7, [("a", 1)], b"\x80"])
    def test_payload_must_be_a_dict_at_the_top(self, store: StepRunStore, claim: StepRun, value: Any) -> None:
        for argument, call in {
            "input": lambda: store.begin_step("run", "pay", value),
            "output": lambda: store.complete_step(claim, value),
            "error": lambda: store.fail_step(claim, value),
            r"steps\['pay'\]": lambda: store.schedule_steps("run", {"pay": value}),
            r"schedule\['ship'\]": lambda: store.complete_step(claim, {}, schedule={"ship": value}),
        }.items():
            with pytest.raises(PayloadError, match=f"^{argument}: must be a dict, not {type(value).__name__}"):
                call()

    def test_the_path_leads_to_the_offending_value(self, store: StepRunStore, claim: StepRun) -> None:
        with pytest.raises(PayloadError) as caught:
            store.complete_step(claim, {"items": [0, 1, 2, {"price": 1j}]})
        assert caught.value.argument == "output['items'][3]['price']"
        assert "complex 1j; allowed are" in str(caught.value)

    def test_payload_must_not_be_too_large(self, store: StepRunStore) -> None:
        with pytest.raises(
            PayloadTooLargeError, match="input: is 105 bytes, over the store's max_payload_bytes of 100"
        ):
            store.begin_step("run", "pay", {"a": b"x" * 100})


class TestStepRuns:
    def test_step_run_of_another_prefix_is_rejected(self, store: StepRunStore) -> None:
        other = StepRunStore(fakeredis.FakeRedis(), prefix="other").begin_step("run", "pay", {}).step_run
        with pytest.raises(
            InvalidArgumentError, match="belongs to a store with prefix 'other', this one has 'squidstep'"
        ):
            store.complete_step(other, {})
        with pytest.raises(InvalidArgumentError, match="is not the id of a step run of prefix 'squidstep'"):
            store.complete_step(other.id, {})

    @pytest.mark.parametrize("value", [None, 7, b"id", "", "nonsense", "AAAA", "é", "A" * 1_000, ("run", "pay")])
    def test_value_must_be_a_step_run_or_an_id(self, store: StepRunStore, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^step_run: "):
            store.complete_step(value, {})

    def test_changed_id_is_rejected(self, store: StepRunStore, claim: StepRun) -> None:
        for position in range(len(claim.id)):
            changed = claim.id[:position] + ("A" if claim.id[position] != "A" else "B") + claim.id[position + 1 :]
            with pytest.raises(InvalidArgumentError, match="is not the id of a step run"):
                store.release_step(changed)

    def test_step_run_without_a_claim_is_rejected(self, store: StepRunStore) -> None:
        fake = StepRunStore(fakeredis.FakeRedis())
        fake.begin_step("run", "pay", {})
        skipped = fake.begin_step("run", "pay", {}).step_run
        with pytest.raises(StaleStepRunError, match="carries no claim"):
            store.complete_step(skipped, {})


class TestClients:
    @pytest.mark.parametrize(
        "client", [None, "redis://localhost", redis.Redis, redis.asyncio.Redis(), redis.Redis().pipeline()]
    )
    def test_blocking_store_rejects_other_clients(self, client: Any) -> None:
        with pytest.raises(UnsupportedClientError, match=r"client: must be a redis\.client\.Redis or"):
            StepRunStore(client)

    def test_asyncio_store_rejects_other_clients(self) -> None:
        for client in (None, redis.Redis(), redis.asyncio.Redis().pipeline()):
            with pytest.raises(UnsupportedClientError, match=r"client: must be a redis\.asyncio\.client\.Redis or"):
                AsyncStepRunStore(client)

    def test_a_single_connection_client_is_rejected(self) -> None:
        with pytest.raises(UnsupportedClientError, match="has a single connection"):
            StepRunStore(fakeredis.FakeRedis(single_connection_client=True))

        async def refused() -> None:
            async with fakeredis.FakeAsyncRedis(single_connection_client=True) as client:
                with pytest.raises(UnsupportedClientError, match="has a single connection"):
                    AsyncStepRunStore(client)

        asyncio.run(refused())

    def test_a_codec_must_have_two_methods(self) -> None:
        with pytest.raises(InvalidArgumentError, match=r"codec: must have encode\(\) and decode\(\)"):
            StepRunStore(redis.Redis(), codec=object())
        with pytest.raises(InvalidArgumentError, match="codec: must have"):
            StepRunStore(redis.Redis(), codec=MsgpackCodec)

    def test_a_batch_rejects_other_values_than_calls(self, store: StepRunStore) -> None:
        with pytest.raises(InvalidArgumentError, match=r"calls\[1\]: must be a Call from store.calls, not str"):
            store.batch([store.calls.get_run("run"), "get_run"])
        assert store.batch([]) == []

    def test_operation_of_several_calls_is_no_call(self, store: StepRunStore) -> None:
        calls = store.calls
        for operation in (calls.runs, calls.failed_steps, lambda: calls.summarize_run("run")):
            with pytest.raises(InvalidArgumentError, match=r"calls\[1\]: is an operation of several calls"):
                store.batch([calls.get_run("run"), operation()])
            with pytest.raises(InvalidArgumentError, match=r"call: is an operation of several calls: use the method"):
                store.send(operation())
        with pytest.raises(InvalidArgumentError, match="call: must be a Call from store.calls, not str"):
            store.send("get_run")

    @pytest.mark.parametrize("value", [None, 7])
    def test_batches_and_completions_must_be_iterable(self, store: StepRunStore, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^calls: must be an iterable of calls"):
            store.batch(value)
        with pytest.raises(InvalidArgumentError, match="^completions: must be an iterable of pairs"):
            store.complete_steps(value)

    @pytest.mark.parametrize("value", ["no", 1, None])
    def test_final_must_be_a_bool(self, store: StepRunStore, claim: StepRun, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^final: must be a bool"):
            store.fail_step(claim, {}, final=value)


def test_every_error_has_one_root() -> None:
    for error in (InvalidArgumentError, PayloadError, PayloadTooLargeError, UnsupportedClientError, StaleStepRunError):
        assert issubclass(error, SquidstepError)
    assert issubclass(InvalidArgumentError, ValueError)


def test_valid_arguments_are_sent(store: StepRunStore) -> None:
    """The counterpart of this file: the store above would indeed have failed on sending."""
    with pytest.raises(NotSentError):
        store.begin_step("run", "pay", {}, lease=0.001, max_attempts=1, owner="worker é")
