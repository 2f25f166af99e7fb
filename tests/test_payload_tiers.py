"""Where payloads appear: in details and exports, and not in logs, events, metrics, `repr`s, errors and lists.

`tests/guide/payloads.md` has the table of places.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from support.backends import Bench
from support.commands import empty_store, invoke, options_of
from support.records import begun
from support.servers import find_binary

from squidstep_redis import (
    Event,
    OutcomeUnknownError,
    PayloadError,
    PermanentError,
    ReplyMismatchError,
    SquidstepError,
    StepRunStore,
)
from squidstep_redis.embedded import EmbeddedServer
from squidstep_redis.metrics import observe

INPUT, OUTPUT, PROGRESS, ERROR = "in-4111", "out-4222", "progress-4333", "error-4444"
PAYLOADS = (INPUT, OUTPUT, PROGRESS)


def work(store: StepRunStore) -> list[str]:
    """Takes steps through every state. Returns the text and the `repr` of what was returned or raised."""
    seen: list[str] = []

    def see(call: Callable[[], Any]) -> Any:
        try:
            found = call()
        except SquidstepError as error:
            seen.extend((str(error), repr(error), repr(error.args)))
            return None
        seen.append(repr(found))
        return found

    payload = {"card": INPUT}
    claim = begun(see(lambda: store.begin_step("order", "charge", payload, lease=60, owner="host", fingerprint="a")))
    see(lambda: store.begin_step("order", "charge", payload, lease=60))
    see(lambda: store.begin_step("order", "charge", {"card": INPUT, "more": 1}, fingerprint="b"))
    see(lambda: store.checkpoint_step(claim, {"done": PROGRESS}))
    see(lambda: store.complete_step(claim, {"receipt": OUTPUT}))
    see(lambda: store.complete_step(claim, {"receipt": f"{OUTPUT}-again"}))
    see(lambda: store.begin_step("order", "charge", payload))
    see(lambda: store.schedule_step("order", "ship", payload))
    stuck = begun(see(lambda: store.begin_step("order", "notify", payload, lease=60)))
    see(lambda: store.checkpoint_step(stuck, {"done": PROGRESS}))
    see(lambda: store.expire_claim(stuck))
    see(lambda: store.begin_step("other", "charge", payload, max_attempts=1))
    see(lambda: store.summarize_run("order"))
    see(lambda: store.step_statuses("order"))
    call = store.calls.begin_step("order", "charge", payload)
    see(lambda: call)
    see(lambda: store.batch([call]))
    return seen


def test_events_logs_metrics_and_reprs_have_no_payload(
    bench: Bench, store: StepRunStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    events: list[Event] = []
    store.on_event(events.append)
    registry = CollectorRegistry()
    observe(store if bench.runner is None else store.store, registry)
    seen = work(store)
    claim = begun(store.begin_step("order", "print", {}))
    store.fail_step(claim, PermanentError(ERROR))
    seen.append(repr(store.get_step_run("order", "print")))
    seen.append(repr(store.begin_step("order", "print", {})))

    assert len(events) > 12
    assert "charge" in caplog.text
    exported = generate_latest(registry).decode()
    everything = "\n".join([*map(repr, events), *map(str, events), caplog.text, exported, *seen])
    for secret in (*PAYLOADS, ERROR):
        assert secret not in everything


def test_error_with_a_call_shows_none_of_its_arguments(store: StepRunStore) -> None:
    call = store.calls.begin_step("order", "charge", {"card": INPUT})
    error = OutcomeUnknownError("begin_step", "order", "charge", "no reply", True, call)
    assert INPUT.encode() in b"".join(call.args)
    assert INPUT not in repr(error) + str(error) + repr(error.args)
    assert repr(call) == "<Call begin_step run 'order', step 'charge'>"


def test_reply_mismatch_error_does_not_quote_the_reply(store: StepRunStore) -> None:
    with pytest.raises(ReplyMismatchError) as raised:
        store.calls.begin_step("order", "charge", {}).decode(INPUT.encode())
    assert INPUT not in repr(raised.value) + str(raised.value)
    assert "received a reply to it, of the type bytes" in str(raised.value)


def test_errors_about_failed_steps_quote_the_last_error(bench: Bench, store: StepRunStore) -> None:
    async def never() -> dict[str, Any]:
        raise AssertionError

    fn: Any = dict if bench.runner is None else never
    store.fail_step(begun(store.begin_step("order", "charge", {"card": INPUT})), ValueError(ERROR))
    with pytest.raises(SquidstepError) as raised:
        store.run_step("order", "charge", fn, {"card": INPUT}, lease=60, max_attempts=1)
    assert ERROR in str(raised.value)
    assert INPUT not in str(raised.value)
    assert ERROR in store.explain_step("order", "charge").why


def test_rejected_value_is_quoted_and_cut(store: StepRunStore) -> None:
    with pytest.raises(PayloadError) as raised:
        store.begin_step("order", "charge", {"card": {INPUT, "x" * 100}})
    assert len(str(raised.value)) < 300
    assert "set {" in str(raised.value)


class TestCommands:
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls) -> Iterator[EmbeddedServer]:
        with EmbeddedServer(binary=find_binary("valkey"), port=0) as server:
            yield server

    @pytest.fixture
    def options(self, server: EmbeddedServer) -> Iterator[list[str]]:
        """The options of a store with a step in every state."""
        with empty_store(server) as store:
            work(store)
            store.fail_step(begun(store.begin_step("order", "print", {"card": INPUT})), ValueError(ERROR))
            yield options_of(server, store)

    @pytest.mark.parametrize("command", ["runs", "runs --all", "stuck", "stats --all", "watch --once"])
    @pytest.mark.parametrize("form", ["", "--json"])
    def test_lists_show_no_payload(self, options: list[str], command: str, form: str) -> None:
        shown = invoke(*command.split(), *form.split(), *options).output
        assert shown
        for secret in PAYLOADS:
            assert secret not in shown

    @pytest.mark.parametrize(
        "command",
        ["failed", "failed --full", "failed --by-type", "watch order --once", "explain order", "explain order print",
         "timeline order"],
    )  # fmt: skip
    @pytest.mark.parametrize("form", ["", "--json"])
    def test_errors_are_listed_without_other_payloads(self, options: list[str], command: str, form: str) -> None:
        shown = invoke(*command.split(), *form.split(), *options).output
        assert ERROR in shown or command == "timeline order"
        for secret in PAYLOADS:
            assert secret not in shown

    def test_listed_error_is_cut_and_escaped(self, server: EmbeddedServer) -> None:
        with empty_store(server) as store:
            long = ValueError("\x1b[31m" + "x" * 200 + ERROR)
            store.fail_step(begun(store.begin_step("other", "long", {})), long)
            shown = invoke("failed", *options_of(server, store)).output
        assert r"\x1b[31m" in shown
        assert ERROR not in shown

    @pytest.mark.parametrize("command", ["show order", "show order charge", "show order --json", "export order"])
    def test_details_and_exports_show_payloads(self, options: list[str], command: str) -> None:
        shown = invoke(*command.split(), *options).output
        assert INPUT in shown
        assert OUTPUT in shown
