"""`EncryptedCodec`: payloads come back equal in their place, and nothing else is decrypted."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.backends import Bench
from support.payloads import EDGES, assert_same, payloads, returned
from support.records import begun, stored

from squidstep_redis import (
    InvalidArgumentError,
    MsgpackCodec,
    PayloadError,
    Place,
    PlacedCodec,
    StepRunStore,
    UndecodablePayloadError,
)
from squidstep_redis.codecs import CompressedCodec, EncryptedCodec
from squidstep_redis.protocol.codec import Payloads

OLD, NEW = b"o" * 32, b"n" * 32
CODEC = EncryptedCodec({"old": OLD}, current="old")
BOTH = EncryptedCodec({"old": OLD, "new": NEW}, current="new")
ONLY_NEW = EncryptedCodec({"new": NEW}, current="new")
PLACE = Place("squidstep", "run", "pay", "output")
SECRET = {"card": "4111 1111 1111 1111"}

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
places = st.builds(Place, text, text, text, st.sampled_from(["input", "output", "error"]))


def undecodable(step_run: Any, name: str) -> UndecodablePayloadError:
    with pytest.raises(UndecodablePayloadError) as caught:
        getattr(step_run, name)
    return caught.value


class TestRoundTrip:
    @given(payload=payloads, place=places)
    @example(payload=EDGES, place=PLACE)
    def test_payload_comes_back_equal_in_its_place(self, payload: dict[str, Any], place: Place) -> None:
        for codec in (CODEC, EncryptedCodec({"k": bytes(16)}, current="k", codec=CompressedCodec(threshold=0))):
            assert_same(codec.decode_at(codec.encode_at(payload, place), place), returned(payload))

    @given(one=places, other=places)
    @example(one=PLACE._replace(run_id="ab", step="c"), other=PLACE._replace(run_id="a", step="bc"))
    def test_payload_is_not_decrypted_in_another_place(self, one: Place, other: Place) -> None:
        data = CODEC.encode_at({}, one)
        if one == other:
            assert CODEC.decode_at(data, other) == {}
        else:
            with pytest.raises(PayloadError, match="key 'old' does not authenticate it"):
                CODEC.decode_at(data, other)

    @given(st.data())
    def test_changed_payload_is_never_decrypted(self, data: st.DataObject) -> None:
        sealed = CODEC.encode_at(SECRET, PLACE)
        changed = data.draw(
            st.integers(0, len(sealed) - 1).map(lambda end: sealed[:end])
            | st.binary(min_size=1).map(lambda tail: sealed + tail)
            | st.binary()
            | st.tuples(st.integers(0, len(sealed) - 1), st.integers(1, 255)).map(
                lambda at: sealed[: at[0]] + bytes([sealed[at[0]] ^ at[1]]) + sealed[at[0] + 1 :]
            )
        )
        with pytest.raises(PayloadError, match="^payload: (it is not what|key )"):
            CODEC.decode_at(changed, PLACE)

    def test_every_stored_payload_is_encrypted(self, bench: Bench) -> None:
        store = bench.store(codec=CODEC)
        store.schedule_steps("run", {"mail": SECRET})
        store.fail_step(begun(store.begin_step("run", "pay", SECRET)), SECRET)
        store.fail_step(begun(store.begin_step("run", "pay", SECRET)), ValueError(SECRET["card"]))
        claim = begun(store.begin_step("run", "pay", SECRET))
        store.advance_step(claim, SECRET, "ship", SECRET)
        store.begin_steps("run", {"a": SECRET, "b": SECRET})

        assert b"4111" not in repr(bench.dump()).encode()
        assert [each.input for each in store.get_run("run")] == [SECRET] * 5
        assert store.completed_outputs("run") == [SECRET]
        first, second, _ = store.attempts("run", "pay")
        assert first.error == SECRET
        assert second.error is not None
        assert second.error["message"] == SECRET["card"]

    def test_exhausted_step_has_a_readable_error(self, bench: Bench) -> None:
        """With every codec: one call may expire several steps, and their errors are written by one script."""
        store = bench.store(codec=CODEC)
        claims = store.begin_steps("run", {"a": {}, "b": {}}, lease=0.001)
        for claim in claims.values():
            bench.lapse(claim.step_run)
        again = store.begin_steps("run", {"a": {}, "b": {}}, max_attempts=1)

        for result in again.values():
            assert result.exhausted
            assert result.step_run.last_error is not None
            assert result.step_run.last_error["type"] == "LeaseExpired"
        store.retry_step("run", "a")
        begun(store.begin_step("run", "a", {}))
        error = store.attempts("run", "a")[0].error
        assert error is not None
        assert error["type"] == "LeaseExpired"


class TestMoved:
    """An attacker, or a mistake, with write access to the server: no payload is read in another place."""

    @pytest.mark.parametrize(
        ("field", "name"), [("ipay", "input"), ("opay", "output"), ("iother", "input"), ("oother", "output")]
    )
    def test_payload_moved_between_fields_is_refused(self, bench: Bench, field: str, name: str) -> None:
        store = bench.store(codec=CODEC)
        for step in ("pay", "other"):
            store.complete_step(begun(store.begin_step("run", step, SECRET)), SECRET)
        source = {"ipay": "opay", "opay": "iother", "iother": "ipay", "oother": "opay"}[field]
        bench.backend.raw.hset(bench.keys("run")[0], field, bench.field("run", source))

        error = undecodable(stored(store, step=field[1:]), name)

        assert (error.run_id, error.step, error.name, error.codec) == ("run", field[1:], name, "EncryptedCodec")
        assert "key 'old' does not authenticate it" in str(error)

    def test_record_copied_to_another_run_or_prefix_is_refused(self, bench: Bench) -> None:
        begun(bench.store(codec=CODEC).begin_step("run", "pay", SECRET))
        fields = bench.backend.raw.hgetall(bench.keys("run")[0])
        other = bench.store(codec=CODEC, prefix=f"{bench.prefix}-other")
        for store, run in ((bench.store(codec=CODEC), "run-2"), (other, "run")):
            bench.backend.raw.hset(store.calls.keys.run(run).keys.steps, mapping=fields)
            assert "was changed, truncated, or moved" in str(undecodable(stored(store, run), "input"))

    def test_error_stays_readable_in_the_history(self, bench: Bench) -> None:
        store = bench.store(codec=CODEC)
        for number in range(3):
            store.fail_step(begun(store.begin_step("run", "pay", {})), {"number": number})
        begun(store.begin_step("run", "pay", {}))

        errors = [each.error for each in store.attempts("run", "pay")]
        assert errors == [{"number": 0}, {"number": 1}, {"number": 2}, None]

    def test_default_codecs_payload_is_refused(self, bench: Bench) -> None:
        begun(bench.store().begin_step("run", "pay", SECRET))
        assert "it is not what EncryptedCodec writes" in str(undecodable(stored(bench.store(codec=CODEC)), "input"))


class TestRotation:
    def test_old_payloads_are_readable_and_new_ones_use_new_key(self, bench: Bench) -> None:
        begun(bench.store(codec=CODEC).begin_step("run", "pay", SECRET))
        store = bench.store(codec=BOTH)
        store.complete_step(stored(store).id, SECRET)

        assert (stored(store).input, stored(store).output) == (SECRET, SECRET)
        retired = stored(bench.store(codec=ONLY_NEW))
        assert retired.output == SECRET
        error = undecodable(retired, "input")
        assert str(error) == (
            "run 'run', step 'pay': EncryptedCodec cannot decode the stored input: key 'old' is not known, only ['new']"
        )

    def test_completion_repeated_after_a_rotation_is_recognized(self, bench: Bench) -> None:
        old, new = bench.store(codec=CODEC), bench.store(codec=BOTH)
        claim = begun(old.begin_step("run", "pay", {}))
        old.complete_step(claim, SECRET)

        assert new.complete_step(claim, SECRET).output == SECRET

    @pytest.mark.parametrize("codec", [ONLY_NEW, None], ids=["another key", "the default codec"])
    def test_import_encrypts_for_the_new_place(self, bench: Bench, codec: Any) -> None:
        store = bench.store(codec=CODEC)
        store.fail_step(begun(store.begin_step("run", "pay", SECRET)), SECRET)
        store.complete_step(begun(store.begin_step("run", "pay", SECRET)), SECRET)
        document = json.loads(json.dumps(store.export_run("run")))
        document["run_id"] = "copy"

        other = bench.store(prefix=f"{bench.prefix}-other", codec=codec)
        other.import_run(document)

        copied = stored(other, "copy")
        assert (copied.input, copied.output, other.attempts("copy", "pay")[0].error) == (SECRET, SECRET, SECRET)

    def test_fork_encrypts_for_the_new_run(self, bench: Bench) -> None:
        store = bench.store(codec=BOTH)
        old = bench.store(codec=CODEC)
        old.fail_step(begun(old.begin_step("run", "pay", SECRET)), SECRET)
        bench.lapse(begun(old.begin_step("run", "pay", SECRET, lease=0.001)))
        assert old.begin_step("run", "pay", SECRET, max_attempts=2).exhausted
        old.retry_step("run", "pay")
        old.complete_step(begun(old.begin_step("run", "pay", {})), SECRET)
        before = bench.dump()
        with pytest.raises(UndecodablePayloadError, match="key 'old' is not known"):
            bench.store(codec=ONLY_NEW).fork_run("run", "copy")
        assert bench.dump() == before

        assert store.fork_run("run", "copy") == ["pay"]

        forked = stored(bench.store(codec=ONLY_NEW), "copy")
        assert (forked.input, forked.output) == (SECRET, SECRET)
        assert bench.store(codec=ONLY_NEW).attempts("copy", "pay") == store.attempts("run", "pay")

    def test_payload_is_encrypted_again_for_another_run(self) -> None:
        payloads = Payloads(CODEC, 1_000, "p")
        for name in ("input", "output", "last_error", "error"):
            sealed = CODEC.encode_at(SECRET, Place("p", "run", "pay", "error" if "error" in name else name))
            moved = payloads.moved(sealed, "run", "pay", name, "copy")
            assert payloads.decode(moved, "copy", "pay", name) == SECRET
        assert Payloads(MsgpackCodec(), 1_000, "p").moved(b"any bytes", "run", "pay", "input", "copy") == b"any bytes"

    def test_payload_exported_without_the_key_stays_in_its_place(self, bench: Bench) -> None:
        begun(bench.store(codec=CODEC).begin_step("run", "pay", SECRET))
        document = bench.store().export_run("run")
        bench.backend.raw.delete(*bench.keys("run"))
        bench.store(codec=CODEC).import_run(document)
        bench.store(codec=CODEC).import_run({**document, "run_id": "copy"})

        assert stored(bench.store(codec=CODEC)).input == SECRET
        assert "moved" in str(undecodable(stored(bench.store(codec=CODEC), "copy"), "input"))


class TestKeys:
    @pytest.mark.parametrize(
        ("keys", "current", "argument"),
        [
            ({}, "k", "current"),
            (None, "k", "keys"),
            ({"k": bytes(32)}, ["k"], "current"),
            ({"k": bytes(32)}, "other", "current"),
            ({"k": bytes(31)}, "k", "keys"),
            ({"k": "k" * 32}, "k", "keys"),
            ({"": bytes(32)}, "", "keys"),
            ({"k" * 256: bytes(32)}, "k", "keys"),
            ({"\u202ek": bytes(32)}, "k", "keys"),
            ({1: bytes(32)}, 1, "keys"),
        ],
    )
    def test_invalid_key_is_rejected_without_quoting_it(self, keys: Any, current: Any, argument: str) -> None:
        with pytest.raises(InvalidArgumentError, match=f"^{argument}: ") as caught:
            EncryptedCodec(keys, current=current)
        assert "kkkkk" not in str(caught.value).replace("k" * 256, "")

    def test_keys_are_neither_shown_nor_pickled(self, bench: Bench) -> None:
        claim = begun(bench.store(codec=CODEC).begin_step("run", "pay", SECRET))

        assert "oooo" not in repr(CODEC)
        travelled = pickle.loads(pickle.dumps(claim))
        assert OLD not in pickle.dumps(claim)
        assert undecodable(travelled, "input").codec == "EncryptedCodec"
        with pytest.raises(TypeError):
            pickle.dumps(CODEC)

    def test_wrapped_codec_is_not_a_placed_codec(self) -> None:
        assert isinstance(CODEC, PlacedCodec)
        with pytest.raises(InvalidArgumentError, match=r"^codec: cannot be EncryptedCodec: encrypt last"):
            EncryptedCodec({"k": OLD}, current="k", codec=CODEC)

    def test_rejected_payload_names_the_path(self, bench: Bench) -> None:
        store: StepRunStore = bench.store(codec=CODEC)
        with pytest.raises(PayloadError) as caught:
            store.begin_step("run", "pay", {"a": [1j]})
        assert caught.value.argument == "input['a'][0]"

    def test_default_codec_can_be_named(self) -> None:
        assert repr(CODEC) == f"EncryptedCodec(['old'], current='old', codec={MsgpackCodec()!r})"
