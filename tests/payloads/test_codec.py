"""Codecs: the default codec and a custom one return equal payloads; foreign bytes are detected."""

from __future__ import annotations

import itertools
import zlib
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis
from hypothesis import example, given, settings
from support.backends import Bench, offline_store
from support.payloads import ARGUMENTS, EDGES, assert_same, payloads, rejection, returned
from support.records import begun, stored

from squidstep_redis import (
    InvalidArgumentError,
    MsgpackCodec,
    StepRunStore,
    UndecodablePayloadError,
)


class TestRoundTrip:
    @given(payload=payloads)
    @example(payload=EDGES)
    def test_codec_returns_an_equal_payload(self, payload: dict[str, Any]) -> None:
        assert_same(MsgpackCodec().decode(MsgpackCodec().encode(payload)), returned(payload))

    @pytest.mark.slow
    @given(payload=payloads)
    def test_equal_payloads_encode_to_equal_bytes(self, payload: dict[str, Any]) -> None:
        assert MsgpackCodec().encode(payload) == MsgpackCodec().encode(dict(payload.items()))

    @pytest.mark.slow
    def test_store_returns_an_equal_payload(self, bench: Bench, store: StepRunStore) -> None:
        runs = (f"run {number}" for number in itertools.count())

        @settings(max_examples=max(1, settings.default.max_examples // 5))
        @given(scheduled=payloads, error=payloads, input=payloads, output=payloads)
        @example(scheduled=EDGES, error=EDGES, input=EDGES, output=EDGES)
        def round_trip(scheduled: Any, error: Any, input: Any, output: Any) -> None:
            run = next(runs)
            store.schedule_step(run, "pay", scheduled)
            claim = begun(store.begin_step(run, "pay", {}))
            assert_same(claim.input, returned(scheduled))
            assert_same(store.fail_step(claim, error).last_error, returned(error))
            assert_same(stored(store, run).last_error, returned(error))
            claim = begun(store.begin_step(run, "pay", input))
            assert_same(claim.input, returned(input))
            assert_same(store.complete_step(claim, output).output, returned(output))
            assert_same(store.begin_step(run, "pay", {}).step_run.output, returned(output))
            assert_same((stored(store, run).input, stored(store, run).output), (returned(input), returned(output)))
            assert_same(store.completed_outputs(run), [returned(output)])
            assert_same(store.attempts(run, "pay")[0].error, returned(error))

        round_trip()

    @pytest.mark.parametrize(
        "moment",
        [
            datetime(2021, 10, 31, 2, 30, fold=0, tzinfo=ZoneInfo("Europe/Berlin")),
            datetime(2021, 10, 31, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
            datetime(2021, 3, 28, 2, 30, tzinfo=ZoneInfo("Europe/Berlin")),
        ],
        ids=["repeated, first", "repeated, second", "skipped"],
    )
    def test_moment_within_a_clock_change_keeps_its_instant(self, moment: datetime) -> None:
        """Python never considers such a time equal to a UTC time, so the instants are compared."""
        (back,) = MsgpackCodec().decode(MsgpackCodec().encode({"at": moment})).values()

        assert back.timestamp() == moment.timestamp()

    @pytest.mark.parametrize("value", [bytearray(b"a"), memoryview(b"a")])
    def test_bytes_like_values_come_back_as_bytes(self, value: object) -> None:
        (back,) = MsgpackCodec().decode(MsgpackCodec().encode({"data": value})).values()

        assert type(back) is bytes
        assert back == value

    def test_returned_input_is_independent_of_the_callers_dict(self, store: StepRunStore) -> None:
        input: dict[str, Any] = {"items": [1]}
        claim = begun(store.begin_step("run", "pay", input))
        input["items"].append(2)

        assert claim.input == stored(store).input == {"items": [1]}


class Zlib:
    """A custom codec that wraps the default one."""

    def __init__(self) -> None:
        self.inner = MsgpackCodec()

    def encode(self, payload: dict[str, Any]) -> bytes:
        return zlib.compress(self.inner.encode(payload))

    def decode(self, data: bytes) -> dict[str, Any]:
        return self.inner.decode(zlib.decompress(data))


class FixedCodec:
    """A codec that encodes everything to the same bytes, or raises the same error."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def encode(self, payload: dict[str, Any]) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def decode(self, data: bytes) -> dict[str, Any]:
        return {}


class TestCustomCodec:
    def test_custom_codec_carries_all_payloads(self, bench: Bench) -> None:
        store = bench.store(codec=Zlib())
        payload = {"text": "abc" * 1_000, **EDGES}

        store.fail_step(begun(store.begin_step("run", "pay", payload)), payload)
        store.complete_step(begun(store.begin_step("run", "pay", payload)), payload)

        assert_same(stored(store).input, returned(payload))
        assert_same(store.completed_outputs("run"), [returned(payload)])
        assert_same(store.attempts("run", "pay")[0].error, returned(payload))
        assert len(bench.field("run", "opay") or b"") < len(MsgpackCodec().encode(payload)) / 10

    def test_error_of_a_wrapped_codec_names_the_path(self) -> None:
        with offline_store(codec=Zlib()) as store:
            assert rejection(store, "steps['pay']", {"a": [1j]}).argument == "steps['pay']['a'][0]"

    def test_size_limit_applies_to_the_encoded_bytes(self) -> None:
        with offline_store(codec=Zlib(), max_payload_bytes=1_000) as store:
            store.calls.begin_step("run", "pay", {"data": bytes(100_000)})

    @pytest.mark.parametrize("error", [ValueError("no key"), TypeError("no key")])
    @pytest.mark.parametrize("where", ARGUMENTS)
    def test_value_error_of_the_codec_is_a_payload_error(self, where: str, error: Exception) -> None:
        with offline_store(codec=FixedCodec(error)) as store:
            rejected = rejection(store, where if where in ("input", "output", "error") else "input", {})

        assert rejected.__cause__ is error
        assert "rejected by FixedCodec: no key" in str(rejected)

    def test_other_codec_errors_propagate_and_nothing_is_sent(self) -> None:
        with offline_store(codec=FixedCodec(RuntimeError("key server is down"))) as store:
            for send in ARGUMENTS.values():
                with pytest.raises(RuntimeError, match="key server is down"):
                    send(store, {})

    @pytest.mark.parametrize("result", ["text", b"", bytearray(b"a"), memoryview(b"a"), None, {}])
    def test_codec_must_return_non_empty_bytes(self, result: object) -> None:
        with offline_store(codec=FixedCodec(result)) as store:
            error = rejection(store, "input", {})

        assert error.argument == "input"
        assert "FixedCodec must encode to non-empty bytes, not " + type(result).__name__ in str(error)

    @pytest.mark.parametrize("codec", ["zlib", object(), zlib])
    def test_codec_must_have_encode_and_decode(self, codec: Any) -> None:
        with pytest.raises(InvalidArgumentError, match=r"^codec: must have encode\(\) and decode\(\)"):
            StepRunStore(redis.Redis(), codec=codec)


class TestForeignCodec:
    """What another codec wrote: only access to a payload raises; everything else works without decoding."""

    def test_only_access_to_the_payload_raises(self, bench: Bench) -> None:
        writer, reader = bench.store(codec=Zlib()), bench.store()
        writer.complete_step(begun(writer.begin_step("run", "pay", {"amount": 1})), {"receipt": 7})
        writer.fail_step(begun(writer.begin_step("run", "mail", {})), {"reason": "bounced"})

        assert reader.step_statuses("run") == {"pay": "completed", "mail": "failed"}
        assert reader.completed_steps("run") == ["pay"]
        pay, mail = reader.get_run("run")
        assert (pay.status, pay.attempt, mail.status) == ("completed", 1, "failed")
        assert reader.begin_step("run", "pay", {}).reason == "completed"
        assert reader.schedule_step("run", "pay", {}).decision == "skip"
        assert "pay" in repr(pay)
        for access, name in (
            (lambda: pay.input, "input"),
            (lambda: pay.output, "output"),
            (lambda: mail.last_error, "last_error"),
            (lambda: reader.completed_outputs("run"), "output"),
            (lambda: reader.attempts("run", "mail"), "last_error"),
        ):
            with pytest.raises(UndecodablePayloadError) as caught:
                access()
            step = "mail" if name == "last_error" else "pay"
            assert (caught.value.run_id, caught.value.step, caught.value.name) == ("run", step, name)
            assert str(caught.value) == f"run 'run', step '{step}': MsgpackCodec cannot decode the stored {name}"
            assert caught.value.__cause__ is not None

    def test_claim_with_an_undecodable_input_can_be_ended(self, bench: Bench) -> None:
        writer, reader = bench.store(codec=Zlib()), bench.store()
        writer.schedule_step("run", "pay", {"amount": 1})

        claim = begun(reader.begin_step("run", "pay", {}))
        with pytest.raises(UndecodablePayloadError):
            _ = claim.input
        reader.extend_claim(claim, 60)
        completed = reader.complete_step(claim, {"receipt": 7})

        assert completed.output == {"receipt": 7}

    def test_bytes_that_decode_to_no_dict_are_undecodable(self, bench: Bench) -> None:
        """b"\\x07" is msgpack for 7: bytes of another codec may happen to be valid msgpack."""
        begun(bench.store(codec=FixedCodec(b"\x07")).begin_step("run", "pay", {}))

        with pytest.raises(UndecodablePayloadError):
            _ = stored(bench.store()).input
