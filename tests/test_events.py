"""The events of a store: for listeners, the log and Prometheus; and the spans of OpenTelemetry."""

from __future__ import annotations

import importlib
import logging
import pickle
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.instrumentation.redis import RedisInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from support.backends import Backend, Bench
from support.internals import event_listeners, give_up_early, plain_store
from support.records import begun
from support.servers import wait_until

from squidstep_redis import (
    Event,
    InputMismatchError,
    InvalidArgumentError,
    PayloadError,
    RunDeletedError,
    ServerError,
    StaleStepRunError,
    StepRunStore,
)
from squidstep_redis.metrics import observe


@pytest.fixture
def events(store: StepRunStore) -> list[Event]:
    """All events that the store has emitted."""
    emitted: list[Event] = []
    store.on_event(emitted.append)
    return emitted


def kinds(events: list[Event]) -> list[tuple[str, str | None, str | None]]:
    return [(event.kind, event.step, event.reason) for event in events]


def test_a_group_emits_one_event_per_step(store: StepRunStore, events: list[Event]) -> None:
    store.schedule_step("run", "pay", {})
    results = store.begin_steps("run", {"pay": {}, "mail": {}})
    store.begin_steps("run", {"pay": {}})
    store.complete_steps([(result.step_run, {}) for result in results.values()])
    assert kinds(events) == [
        ("schedule", "pay", None),
        ("execute", "pay", None),
        ("execute", "mail", None),
        ("skip", "pay", "busy"),
        ("complete", "pay", None),
        ("complete", "mail", None),
    ]
    assert [event.operation for event in events[1:3]] == ["begin_steps"] * 2
    assert [event.first for event in events] == [True, True, False, True, True, True]


def test_each_decision_emits_one_event(store: StepRunStore, events: list[Event]) -> None:
    claim = begun(store.begin_step("run", "pay", {"card": "secret"}, lease=60, owner="worker-1"))
    store.begin_step("run", "pay", {})
    store.extend_claim(claim, 60)
    store.release_step(claim)
    store.schedule_step("run", "mail", {})
    claim = begun(store.begin_step("run", "mail", {}))
    store.fail_step(claim, {"why": "no paper"})
    claim = begun(store.begin_step("run", "mail", {}))
    store.complete_step(claim, {})
    store.begin_step("run", "mail", {})
    assert kinds(events) == [
        ("execute", "pay", None),
        ("skip", "pay", "busy"),
        ("extend", "pay", None),
        ("release", "pay", None),
        ("schedule", "mail", None),
        ("execute", "mail", None),
        ("fail", "mail", None),
        ("execute", "mail", None),
        ("complete", "mail", None),
        ("skip", "mail", "completed"),
    ]
    first = events[0]
    assert (first.run_id, first.operation, first.attempt, first.owner) == ("run", "begin_step", 1, "worker-1")
    assert first.seconds > 0
    assert pickle.loads(pickle.dumps(first)) == first


def test_interventions_emit_events(store: StepRunStore, events: list[Event]) -> None:
    store.expire_claim(begun(store.begin_step("run", "pay", {}, lease=60)))
    store.begin_step("run", "pay", {}, max_attempts=1)
    store.retry_step("run", "pay")
    store.schedule_steps("run", {"mail": {}, "ship": {}})
    store.fail_step(begun(store.begin_step("run", "ship", {})), {}, final=True)
    assert store.begin_step("run", "ship", {}).failed
    store.retry_run("run")
    store.delete_pending_steps("run", ["mail", "none"])
    store.expire_run("run", 60)
    document = store.export_run("run")
    store.delete_run("run")
    store.import_run({**document, "run_id": "copy"})
    assert kinds(events) == [
        ("execute", "pay", None),
        ("expire", "pay", None),
        ("skip", "pay", "exhausted"),
        ("retry", "pay", None),
        ("schedule", None, None),
        ("execute", "ship", None),
        ("fail", "ship", None),
        ("skip", "ship", "failed"),
        ("retry", "ship", None),
        ("delete", None, None),
        ("expire", None, None),
        ("delete", None, None),
        ("import", None, None),
    ]
    assert [event.run_id for event in events] == ["run"] * 12 + ["copy"]


def test_checkpoints_and_cancellations_emit_events(store: StepRunStore, events: list[Event]) -> None:
    claim = begun(store.begin_step("run", "pay", {}, lease=60))
    store.checkpoint_step(claim, {"page": 1})
    store.extend_claim(claim, 60, progress={"page": 2})
    store.cancel_run("run", "stop")
    store.schedule_step("run", "ship", {})
    assert store.schedule_steps("run", {"ship": {}, "pay": {}}) == []
    assert (
        store.schedule_steps("run", {"pay": {}}) == []
    )  # it has a record, so it is none of those that are not scheduled
    store.begin_step("run", "ship", {})
    store.resume_run("run")
    assert kinds(events) == [
        ("execute", "pay", None),
        ("checkpoint", "pay", None),
        ("extend", "pay", None),
        ("cancel", None, None),
        ("skip", "ship", "cancelled"),
        ("skip", None, "cancelled"),
        ("skip", "ship", "cancelled"),
        ("resume", None, None),
    ]


def test_call_without_effect_emits_no_event(store: StepRunStore, events: list[Event]) -> None:
    assert not store.cancel_run("none")
    assert not store.resume_run("none")
    assert not store.delete_run("none")
    assert not store.expire_run("none", 60)
    assert store.delete_pending_steps("none", []) == []
    assert kinds(events) == []
    store.schedule_step("run", "pay", {})
    assert store.schedule_step("run", "pay", {}).decision == "skip"
    assert store.schedule_steps("run", {"pay": {}}) == []
    assert kinds(events) == [("schedule", "pay", None)]


def test_purged_runs_emit_events(store: StepRunStore, events: list[Event]) -> None:
    store.complete_step(begun(store.begin_step("run", "pay", {})), {})
    wait_until(lambda: store.purge(0.001))
    assert kinds(events)[2:] == [("delete", None, None)]


def test_takeover_and_refused_zombie_emit_events(store: StepRunStore, events: list[Event]) -> None:
    zombie = begun(store.begin_step("run", "pay", {}, lease=60, owner="old"))
    store.expire_claim(zombie)
    result = store.begin_step("run", "pay", {}, lease=60, owner="new")
    assert result.takeover
    with pytest.raises(StaleStepRunError):
        store.complete_step(zombie, {})
    taken, refused = events[-2:]
    assert (taken.kind, taken.takeover, taken.attempt, taken.owner) == ("execute", True, 2, "new")
    assert (refused.kind, refused.reason, refused.owner) == ("refuse", "StaleStepRunError", "new")
    assert "run 'run', step 'pay': execute, attempt 2, a takeover by new (begin_step, " in str(taken)


@pytest.mark.parametrize("state", ["failed", "released", "scheduled"])
def test_reclaiming_a_free_step_is_not_a_takeover(store: StepRunStore, state: str) -> None:
    if state == "scheduled":
        store.schedule_step("run", "pay", {})
    else:
        claim = begun(store.begin_step("run", "pay", {}))
        _ = store.fail_step(claim, {}) if state == "failed" else store.release_step(claim)
    result = store.begin_step("run", "pay", {})
    assert (result.decision, result.takeover) == ("execute", False)
    assert pickle.loads(pickle.dumps(result)).takeover is False


def test_takeover_by_advance_step_is_marked(store: StepRunStore, events: list[Event]) -> None:
    store.expire_claim(begun(store.begin_step("run", "b", {}, lease=60)))
    claim = begun(store.begin_step("run", "a", {}))
    assert store.advance_step(claim, {}, "b", {}).takeover
    assert [(event.kind, event.step, event.takeover) for event in events[-2:]] == [
        ("complete", "a", False),
        ("execute", "b", True),
    ]


def test_batch_emits_an_event_for_each_call(store: StepRunStore, events: list[Event]) -> None:
    calls = store.calls
    missing = begun(store.begin_step("gone", "pay", {}))
    store.delete_run("gone")
    events.clear()
    store.batch(
        [
            calls.begin_step("run", "a", {}),
            calls.complete_step(missing, {}),
            calls.step_statuses("run"),
            calls.schedule_steps("run", {"b": {}, "c": {}}),
        ]
    )
    assert kinds(events) == [("execute", "a", None), ("refuse", "pay", "RunDeletedError"), ("schedule", None, None)]
    assert all(event.batched for event in events)


def test_unsent_calls_and_reads_emit_no_events(store: StepRunStore, events: list[Event]) -> None:
    with pytest.raises(PayloadError):
        store.begin_step("run", "pay", {"price": object()})
    store.get_run("run")
    store.lapsed_claims()
    store.step_statuses("run")
    assert events == []


def test_call_on_a_deleted_run_emits_a_refusal(store: StepRunStore, events: list[Event]) -> None:
    claim = begun(store.begin_step("run", "pay", {}))
    store.delete_run("run")
    events.clear()
    with pytest.raises(RunDeletedError):
        store.complete_step(claim, {})
    assert kinds(events) == [("refuse", "pay", "RunDeletedError")]


def test_failing_listener_is_logged_and_affects_nothing_else(
    store: StepRunStore, events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    @store.on_event
    def broken(event: Event) -> None:
        raise RuntimeError(event.kind)

    later: list[Event] = []
    store.on_event(later.append)
    assert begun(store.begin_step("run", "pay", {})).attempt == 1
    assert kinds(events) == kinds(later) == [("execute", "pay", None)]
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]


class AwaitedListener:
    async def __call__(self, event: Event) -> None: ...


async def awaited(event: Event) -> None: ...


def generated(event: Event) -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("listener", "problem"),
    [
        (5, "must be a function, not 5"),
        (awaited, "must not be a coroutine function"),
        (AwaitedListener(), "must not be a coroutine function"),
        (partial(awaited), "must not be a coroutine function"),
        (partial(partial(AwaitedListener())), "must not be a coroutine function"),
        (generated, "must not be a generator function"),
        (lambda: None, "cannot be called with 1 argument"),
    ],
)
def test_listener_that_cannot_receive_events_is_rejected(store: StepRunStore, listener: Any, problem: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^listener: .*{problem}"):
        store.on_event(listener)
    assert event_listeners(plain_store(store)) == []


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("batch", [False, True])
def test_unreachable_server_emits_an_error_event(bench: Bench, batch: bool) -> None:
    store = bench.store(timeout=0.05)
    client: Any = store.client
    client.connection_pool.connection_kwargs["path"] += ".gone"
    events: list[Event] = []
    store.on_event(events.append)
    call = store.calls.begin_step("run", "pay", {})
    with pytest.raises(ServerError):
        _ = store.batch([call]) if batch else store.send(call)
    assert kinds(events) == [("error", "pay", "NotSentError")]


class TestLog:
    def test_each_decision_is_logged_without_its_payload(
        self, store: StepRunStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "squidstep_redis")
        store.complete_step(begun(store.begin_step("run", "pay", {"card": "secret"})), {"receipt": "secret"})
        claim = begun(store.begin_step("run", "mail", {"to": "secret"}))
        store.fail_step(claim, {"why": "secret"})
        lines = [(record.levelname, record.getMessage().partition(" (")[0]) for record in caplog.records]
        assert lines == [
            ("DEBUG", "run 'run', step 'pay': execute, attempt 1"),
            ("DEBUG", "run 'run', step 'pay': complete, attempt 1"),
            ("DEBUG", "run 'run', step 'mail': execute, attempt 1"),
            ("INFO", "run 'run', step 'mail': fail, attempt 1"),
        ]
        assert "secret" not in caplog.text

    def test_nothing_is_logged_by_default(self, store: StepRunStore, capfd: pytest.CaptureFixture[str]) -> None:
        assert event_listeners(store) == []
        store.fail_step(begun(store.begin_step("run", "pay", {})), {})
        assert capfd.readouterr() == ("", "")


def test_count_claims_returns_live_and_lapsed_claims(store: StepRunStore) -> None:
    assert store.count_claims() == (0, 0)
    claims = [begun(store.begin_step(f"run-{number}", "pay", {}, lease=60)) for number in range(5)]
    store.begin_step("run-0", "without a lease", {})
    store.expire_claim(claims[0])
    store.expire_claim(claims[1])
    store.complete_step(claims[2], {})
    counts = store.count_claims()
    assert (counts.live, counts.lapsed) == (2, 2)


def unwrapped(bench: Bench, store: Any) -> Any:
    return store if bench.runner is None else store.store


class TestPrometheus:
    def test_every_metric_counts_its_decisions(self, bench: Bench, store: StepRunStore) -> None:
        registry = CollectorRegistry()
        observe(unwrapped(bench, store), registry)
        zombie = begun(store.begin_step("run", "pay", {}, lease=60))
        store.begin_step("run", "pay", {}, lease=60)
        store.expire_claim(zombie)
        claim = begun(store.begin_step("run", "pay", {}, lease=60))
        with pytest.raises(StaleStepRunError):
            store.complete_step(zombie, {})
        store.complete_step(claim, {})
        store.fail_step(begun(store.begin_step("run", "mail", {}, lease=60)), {})
        _ = store.batch([store.calls.begin_step("run", "live", {}, lease=60)])
        store.extend_claim(begun(store.begin_step("run", "print", {}, lease=60, fingerprint="one")), 60)
        with pytest.raises(InputMismatchError):
            store.begin_step("run", "print", {}, fingerprint="other")

        def value(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(f"squidstep_{name}", {"prefix": bench.prefix, **labels})

        assert value("executes_total") == 5
        assert value("takeovers_total") == 1
        assert value("skips_total", reason="busy") == 1
        assert value("completions_total") == 1
        assert value("failures_total") == 1
        assert value("stale_calls_total", operation="complete_step") == 1
        assert value("errors_total", operation="begin_step", error="InputMismatchError") == 1
        assert value("extensions_total") == 1
        assert value("batched_total", operation="begin_step") == 1
        assert value("transition_seconds_count", operation="begin_step") == 6
        if bench.runner is None:
            assert (value("live_claims"), value("lapsed_claims"), value("failed_steps")) == (2, 0, 1)

    def test_each_call_is_measured_once(self, bench: Bench, store: StepRunStore) -> None:
        registry = CollectorRegistry()
        observe(unwrapped(bench, store), registry)
        inputs: dict[str, dict[str, Any]] = {"a": {}, "b": {}, "c": {}}
        begun_steps = store.begin_steps("run", inputs)
        store.begin_steps("run", inputs)
        store.advance_step(begun_steps["a"].step_run, {}, "d", {})
        store.batch([store.calls.begin_steps("batch", inputs)])
        call = store.calls.schedule_steps("cancelled", {"a": {}, "b": {}})
        store.send(call)
        store.delete_pending_steps("cancelled", ["b"])
        store.cancel_run("cancelled", "stop")
        store.send(call)  # it has scheduled one step before, and does not schedule the other
        assert not store.cancel_run("missing")  # decides nothing

        def value(name: str, operation: str) -> float | None:
            labels = {"prefix": bench.prefix, "operation": operation}
            return registry.get_sample_value(f"squidstep_{name}", labels)

        assert value("transition_seconds_count", "begin_steps") == 2
        assert value("transition_seconds_count", "advance_step") == 1
        assert value("transition_seconds_count", "schedule_steps") == 2
        assert value("transition_seconds_count", "cancel_run") == 1
        assert value("batched_total", "begin_steps") == 3

    def test_two_stores_can_share_a_registry(self, bench: Bench) -> None:
        registry = CollectorRegistry()
        for number in range(2):
            store = bench.store(prefix=f"{bench.prefix}-{number}")
            observe(unwrapped(bench, store), registry)
            store.begin_step("run", "pay", {})
        for number in range(2):
            labels = {"prefix": f"{bench.prefix}-{number}"}
            assert registry.get_sample_value("squidstep_executes_total", labels) == 1

    def test_missing_prometheus_client_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "prometheus_client", None)
        monkeypatch.delitem(sys.modules, "squidstep_redis.metrics")
        with pytest.raises(ImportError, match=r"needs prometheus_client: pip install 'squidstep_redis\[prometheus\]'"):
            importlib.import_module("squidstep_redis.metrics")

    @pytest.mark.servers("valkey")
    def test_unreachable_server_hides_no_other_metric(self, backend: Backend, tmp_path: Path) -> None:
        registry, prefix = CollectorRegistry(), tmp_path.name
        with backend.connect() as client:
            store = StepRunStore(client, prefix=prefix)
            observe(store, registry)
            store.begin_step("run", "pay", {})
            give_up_early(store)
            client.connection_pool.connection_kwargs["path"] += ".gone"
            client.connection_pool.disconnect()
            client.connection_pool.reset()
            assert registry.get_sample_value("squidstep_executes_total", {"prefix": prefix}) == 1
            assert registry.get_sample_value("squidstep_live_claims", {"prefix": prefix}) is None


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    RedisInstrumentor().instrument(tracer_provider=provider)
    yield exporter
    RedisInstrumentor().uninstrument()


@pytest.mark.servers("valkey")
def test_open_telemetry_records_a_span_per_call(bench: Bench, spans: InMemorySpanExporter) -> None:
    store = bench.store()
    store.begin_step("run", "first", {})  # loads the scripts
    spans.clear()
    store.complete_step(begun(store.begin_step("run", "pay", {"card": "secret"})), {"receipt": "secret"})
    assert [span.name for span in spans.get_finished_spans()][-1] == "EVALSHA"
    before = len(spans.get_finished_spans())
    store.batch([store.calls.begin_step("run", "mail", {})])
    assert len(spans.get_finished_spans()) == before + 1
    assert not any("secret" in str(span.attributes) for span in spans.get_finished_spans())
