"""Text from outside cannot control a terminal: owners may not have control characters, everything else is escaped."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis.exceptions import ConnectionError, ReadOnlyError, ResponseError
from support.backends import Bench, offline_store
from support.records import begun, stored

from squidstep_redis import (
    CorruptRunError,
    Event,
    InvalidArgumentError,
    PayloadError,
    PayloadNotReadError,
    StepBusyError,
    StepDelayedError,
    StepExhaustedError,
    StepFailedError,
    UndecodablePayloadError,
)
from squidstep_redis.doctor.examine import examine
from squidstep_redis.errors import described
from squidstep_redis.escaping import escaped, has_controls, json_line, without_controls
from squidstep_redis.transport.retry import map_error

CONTROLS = [
    *map(chr, (*range(0x20), *range(0x7F, 0xA0))),
    *"\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
]
EVIL = "\x1b]0;gotcha\x07\x9b2J\u202e\u2066\u061c\u2028\n\r\0"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
)


class TestRule:
    @given(text=st.text(st.characters() | st.sampled_from(CONTROLS)))
    @example(text=EVIL)
    @example(text="caf\udce9 \U000e0001")
    def test_escaped_text_is_one_printable_line(self, text: str) -> None:
        safe = escaped(text)

        assert safe.isprintable()
        assert not has_controls(safe)
        assert safe == text or not text.isprintable()
        assert escaped(safe) == safe
        assert not has_controls(without_controls(text))
        assert len(without_controls(text)) == len(text)

    def test_every_control_character_is_found_and_escaped(self) -> None:
        for control in CONTROLS:
            assert has_controls(f"a{control}b"), hex(ord(control))
            assert control not in escaped(f"a{control}b")

    @pytest.mark.slow
    @given(value=JSON)
    @example(value={EVIL: [EVIL, "\U000e0001", "☃", "\\u001b", '"']})
    def test_json_line_is_printable_and_reads_back_equal(self, value: Any) -> None:
        line = json_line(value)

        assert line.isprintable()
        assert json.loads(line) == value

    def test_ordinary_text_is_unchanged(self) -> None:
        assert escaped("Grüße ☃ 你好 \\ 'x'") == "Grüße ☃ 你好 \\ 'x'"
        assert json_line({"a": "Grüße ☃"}) == '{"a": "Grüße ☃"}'


class TestOwners:
    def test_owner_with_a_control_character_is_rejected(self) -> None:
        with offline_store() as store:
            calls: tuple[Callable[[str], object], ...] = (
                lambda owner: store.begin_step("run", "pay", {}, owner=owner),
                lambda owner: store.begin_steps("run", {"pay": {}}, owner=owner),
                lambda owner: store.retry_step("run", "pay", owner=owner),
                lambda owner: store.live_claims(owner=owner),
            )
            for control in CONTROLS:
                for call in calls:
                    with pytest.raises(InvalidArgumentError, match="^owner: must not contain control char") as caught:
                        call(f"w{control}1")
                    assert str(caught.value).isprintable(), hex(ord(control))

    def test_owner_with_letters_and_emoji_is_stored(self, bench: Bench) -> None:
        owner = "Jürgen 👩\u200d💻\u00a01"
        assert begun(bench.store().begin_step("run", "pay", {}, owner=owner)).owner == owner

    def test_document_with_such_an_owner_is_rejected(self, bench: Bench) -> None:
        begun(bench.store().begin_step("run", "pay", {}, owner="w"))
        document = bench.store().export_run("run")
        document["steps"][0]["owner"] = "w\u202e"
        with pytest.raises(InvalidArgumentError, match=r"^document\['steps'\]\[0\]\['owner'\]: must not contain"):
            bench.store(prefix=f"{bench.prefix}-other").import_run(document)


class Evil:
    def __repr__(self) -> str:
        return EVIL


def failed_with(bench: Bench, text: str) -> Any:
    """Returns a running step whose owner and a failed one whose error has this text, as other programs may store it."""
    store = bench.store()
    store.fail_step(begun(store.begin_step("run", "failed", {})), {"type": text, "message": text})
    begun(store.begin_step("run", "pay", {}, owner="OWNER"))
    line = bench.field("run", "spay") or b""
    bench.backend.raw.hset(bench.keys("run")[0], "spay", line.replace(b"OWNER", text.replace("\n", "").encode()))
    return stored(store), stored(store, step="failed")


class TestMessages:
    def test_errors_escape_stored_text(self, bench: Bench) -> None:
        running, failed = failed_with(bench, EVIL)
        for error in (
            StepBusyError(running, 1.0),
            StepExhaustedError(failed),
            StepFailedError(failed),
            StepDelayedError(failed, 1.0),
            UndecodablePayloadError(EVIL, EVIL, "input", "Codec", EVIL),
            PayloadNotReadError(EVIL, EVIL, "input"),
            CorruptRunError(EVIL, EVIL, "holds a value"),
        ):
            assert "gotcha" in str(error)
            assert str(error).isprintable()

    def test_errors_escape_rejected_values(self) -> None:
        with offline_store() as store:
            for call in (
                lambda: store.begin_step(EVIL * 100, "pay", {}),
                lambda: store.begin_step("run", "pay", {EVIL: Evil()}),
                lambda: store.begin_step("run", "pay", {Evil(): 1}),
                lambda: store.begin_step("run", "pay", Evil()),
                lambda: store.import_run({"squidstep_run": 1, "run_id": "r", "steps": Evil()}),
            ):
                with pytest.raises(InvalidArgumentError) as caught:
                    call()
                assert str(caught.value).isprintable()
        assert described(Evil()).isprintable()

    @given(text=st.text(st.characters() | st.sampled_from(CONTROLS)))
    @example(text=EVIL)
    def test_codec_errors_are_escaped(self, text: str) -> None:
        class Failing:
            def encode(self, payload: dict[str, Any]) -> bytes:
                raise ValueError(text)

            def decode(self, data: bytes) -> dict[str, Any]:
                raise NotImplementedError

        with offline_store(codec=Failing()) as store, pytest.raises(PayloadError) as caught:
            store.begin_step("run", "pay", {})
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("error", [ResponseError(EVIL), ReadOnlyError(EVIL), ConnectionError(EVIL)], ids=repr)
    @pytest.mark.parametrize("may_have_run", [False, True])
    def test_text_of_a_server_is_escaped(self, error: Exception, may_have_run: bool) -> None:
        with offline_store() as store:
            call = store.calls.begin_step(EVIL, EVIL, {})
        mapped = map_error(error, call, may_have_run, 1.0)
        assert "gotcha" in mapped.problem
        assert str(mapped).isprintable()

    def test_log_lines_are_printable(self) -> None:
        event = Event("execute", "begin_step", EVIL, EVIL, 1, EVIL, None, False, 0.1, False, "squidstep")
        assert str(event).isprintable()

    def test_doctor_escapes_what_a_server_says(self) -> None:
        with offline_store() as store:
            from squidstep_redis.doctor.checks import Client  # noqa: PLC0415 -- one test uses it

            client = Client(False, 3.0, 3.0, 1, False, False, 0.0, False, 10.0, 0, False, 1.0, None, None)
            workflow = examine(store.calls, client)
            next(workflow)
            with pytest.raises(StopIteration) as stopped:
                workflow.send({"node": [ConnectionError(EVIL)]})
        messages = [finding.message for finding in stopped.value.value.findings]
        assert any("gotcha" in message for message in messages)
        assert all(message.isprintable() for message in messages)
