"""`export_run` and `import_run`: an imported run equals the exported one, across stores, prefixes and codecs."""

from __future__ import annotations

import copy
import functools
import json
import zlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import Bench, running
from support.records import begun, in_batch, stored

from squidstep_redis import (
    InvalidArgumentError,
    MsgpackCodec,
    PayloadError,
    RunDeletedError,
    RunExistsError,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
    UndecodablePayloadError,
)
from squidstep_redis.operations.payload_json import from_json, to_json

# A run is in one slot, so a cluster adds nothing here.
pytestmark = pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")

UNUSUAL: dict[Any, Any] = {
    "bytes": bytes(range(256)),
    "when": datetime(2026, 3, 1, 12, 30, 0, 123456, tzinfo=UTC),
    "infinite": [float("inf"), float("-inf"), -0.0, 1e300, 2**64 - 1, -(2**63)],
    "keys": {1: "int", b"b": "bytes", None: [], False: {}, 1.5: ""},
    "$bytes": "no tag",
    "a tag?": {"$bytes": "no tag either"},
    "$dict": {"$dict": []},
    "text": "☃ \x1b[31m \u2028 \0",
    "nested": {"x": {"$encoded": b"\0"}},
}

PAYLOADS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(["$bytes", "$dict", "$x"]), inner),
    max_leaves=12,
)


class CompressingCodec:
    def encode(self, payload: dict[str, Any]) -> bytes:
        return zlib.compress(MsgpackCodec().encode(payload))

    def decode(self, data: bytes) -> dict[str, Any]:
        return MsgpackCodec().decode(zlib.decompress(data))


def prepare(bench: Bench, store: StepRunStore, run: str = "run") -> StepRun:
    """Creates a run with a step in every state, and a history; returns the claim of the running step."""
    store.schedule_steps(run, {"second": UNUSUAL, "deleted": {}, "scheduled ☃": {}})
    store.delete_pending_steps(run, ["deleted"])
    store.complete_step(begun(store.begin_step(run, "first", UNUSUAL, owner="w 1")), UNUSUAL)
    store.complete_step(begun(store.begin_step(run, "second", {}, lease=60)), {"second": 2})
    for number in range(11):
        store.fail_step(begun(store.begin_step(run, "failed", {}, owner=f"w{number}")), {"of": number, "odd": UNUSUAL})
    bench.lapse(begun(store.begin_step(run, "exhausted", {}, lease=0.001)))
    assert store.begin_step(run, "exhausted", {}, max_attempts=1).exhausted
    store.release_step(begun(store.begin_step(run, "released", {"x": 1}, owner="w")))
    store.fail_step(begun(store.begin_step(run, "retried", {})), {"no": 1})
    store.retry_step(run, "retried", owner="me")
    bench.lapse(begun(store.begin_step(run, "lapsed", {}, lease=0.001)))
    store.checkpoint_step(begun(store.begin_step(run, "unleased", {})), UNUSUAL)
    return begun(store.begin_step(run, "running", UNUSUAL, lease=60, owner="w"))


def all_fields(store: StepRunStore, run: str = "run") -> Any:
    """Returns every field that the reads return."""
    step_runs = store.get_run(run)
    names = [
        name
        for name in dir(StepRun)
        if name[0] != "_" and name not in ("prefix", "id", "after_transition", "with_claim")
    ]
    fields = [{name: getattr(step_run, name) for name in names} for step_run in step_runs]
    attempts = [store.attempts(run, step_run.step) for step_run in step_runs]
    return fields, attempts, store.completed_steps(run), store.completed_outputs(run), store.step_statuses(run)


def names_of(step_runs: list[StepRun]) -> list[tuple[str, str]]:
    return [(each.run_id, each.step) for each in step_runs]


def through_json(document: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(document, allow_nan=False))


class TestRoundTrip:
    @pytest.mark.slow
    def test_imported_run_is_equal_in_every_field(self, bench: Bench, store: StepRunStore) -> None:
        prepare(bench, store)
        other = bench.store(prefix=f"{bench.prefix}-other")

        assert other.import_run(through_json(store.export_run("run"))) == "run"

        assert all_fields(other) == all_fields(store)
        assert len(all_fields(store)[0]) == 10
        assert other.export_run("run") == store.export_run("run")
        assert names_of(other.failed_steps()) == names_of(store.failed_steps())
        assert names_of(other.lapsed_claims()) == names_of(store.lapsed_claims())
        assert names_of(other.live_claims()) == names_of(store.live_claims())
        copies = [summary._replace(created_at=None) for summary in other.runs().runs]
        assert copies == [summary._replace(created_at=None) for summary in store.runs().runs]

    @pytest.mark.servers("valkey", "redis-7")
    def test_run_can_be_imported_into_another_server(self, bench: Bench, store: StepRunStore) -> None:
        prepare(bench, store)
        with running("fakeredis") as backend:
            other = StepRunStore(backend.raw)
            other.import_run(through_json(store.export_run("run")))
            assert all_fields(other) == all_fields(store)

    def test_imported_run_continues_where_it_was(self, bench: Bench, store: StepRunStore) -> None:
        claim = prepare(bench, store)
        document = through_json(store.export_run("run"))
        store.delete_run("run", tombstone=0.001)
        bench.backend.raw.delete(*bench.keys("run")[:2])

        store.import_run(document)

        assert store.begin_step("run", "running", {}).busy
        completed = store.complete_step(claim, {"done": 1})
        assert store.completed_steps("run") == ["first", "second", "running"]
        assert store.complete_step(claim, {"done": 1}) == completed
        assert begun(store.begin_step("run", "released", {})).input == {"x": 1}
        unleased = stored(store, step="unleased")
        assert unleased.progress == UNUSUAL
        assert store.checkpoint_step(unleased.id, {"page": 1}).progress == {"page": 1}
        store.complete_step(unleased.id, {})
        assert bench.field("run", "punleased") is None
        assert begun(store.begin_step("run", "new", {})).position == 12
        for step in ("failed", "lapsed"):
            begun(store.begin_step("run", step, {}))
        assert store.begin_step("run", "exhausted", {}, max_attempts=1).exhausted
        with pytest.raises(StaleStepRunError):
            store.complete_step(claim, {"done": 2})

    @pytest.mark.parametrize("codec", [None, CompressingCodec()], ids=["default", "compressing"])
    def test_run_can_be_imported_with_another_codec(self, bench: Bench, codec: Any) -> None:
        store = bench.store(codec=CompressingCodec())
        prepare(bench, store)
        other = bench.store(prefix=f"{bench.prefix}-other", codec=codec)

        other.import_run(through_json(store.export_run("run")))

        assert all_fields(other) == all_fields(store)

    def test_payloads_that_cannot_be_decoded_are_copied_unchanged(self, bench: Bench, store: StepRunStore) -> None:
        prepare(bench, bench.store(codec=CompressingCodec()))
        document = through_json(store.export_run("run"))

        other = bench.store(prefix=f"{bench.prefix}-other", codec=CompressingCodec())
        other.import_run(document)

        assert all_fields(other) == all_fields(bench.store(codec=CompressingCodec()))
        with pytest.raises(UndecodablePayloadError):
            _ = store.get_run("run")[0].input

    def test_ttl_starts_at_the_import(self, bench: Bench) -> None:
        store = bench.store(run_ttl=100)
        store.complete_step(begun(store.begin_step("run", "a", {})), {})
        held = bench.store(run_ttl=200)
        begun(held.begin_step("held", "a", {}))
        other = bench.store(prefix=f"{bench.prefix}-other")
        for run in ("run", "held"):
            other.import_run(through_json(store.export_run(run)))
        raw, keys = bench.backend.raw, bench.store(prefix=other.calls.prefix).calls.keys

        assert all(90 < raw.ttl(key) <= 100 for key in keys.run("run").keys[:2])
        assert raw.ttl(keys.run("held").keys.steps) == -1
        other.complete_step(other.get_run("held")[0].id, {})
        assert 190 < raw.ttl(keys.run("held").keys.steps) <= 200

    def test_waiters_for_a_step_are_not_exported(self, bench: Bench, store: StepRunStore) -> None:
        begun(store.begin_step("run", "a", {}))
        bench.backend.raw.hset(bench.keys("run")[0], "wa", "w")  # as wait_for_step writes it
        other = bench.store(prefix=f"{bench.prefix}-other")

        other.import_run(through_json(store.export_run("run")))

        assert set(bench.backend.raw.hkeys(other.calls.keys.run("run").keys.steps)) == {b"r", b"m", b"sa", b"ia"}

    @pytest.mark.servers("valkey", "redis-7", "redis-6")  # on fakeredis it takes ten seconds
    def test_run_of_2100_steps_is_imported_completely(self, bench: Bench, store: StepRunStore) -> None:
        steps = [f"step-{number}" for number in range(2_100)]
        claims = in_batch(store, [store.calls.begin_step("run", step, {}) for step in steps])
        store.batch([store.calls.complete_step(claim.step_run, {}) for claim in reversed(claims)])
        other = bench.store(prefix=f"{bench.prefix}-other")

        other.import_run(through_json(store.export_run("run")))

        assert other.completed_steps("run") == steps[::-1]
        assert list(other.step_statuses("run")) == steps

    @pytest.mark.slow
    @settings(max_examples=settings.default.max_examples // 2)
    @given(st.dictionaries(st.text(), PAYLOADS))
    def test_any_payload_survives_json(self, payload: dict[str, Any]) -> None:
        assert from_json(json.loads(json.dumps(to_json(payload), allow_nan=False))) == payload

    def test_unusual_payload_survives_json(self) -> None:
        assert repr(from_json(through_json(to_json(UNUSUAL)))) == repr(UNUSUAL)


@functools.cache
def valid_document() -> dict[str, Any]:
    """Returns a valid document. Change only a copy: it is cached."""
    with running("fakeredis") as backend:
        bench = Bench(backend, None, "squidstep")
        prepare(bench, bench.store())
        return through_json(bench.store().export_run("run"))


class TestRejected:
    @pytest.fixture
    def document(self, bench: Bench, store: StepRunStore) -> dict[str, Any]:
        prepare(bench, store)
        return through_json(store.export_run("run"))

    def test_existing_run_is_not_overwritten(self, bench: Bench, store: StepRunStore, document: dict[str, Any]) -> None:
        before = bench.dump()
        with pytest.raises(RunExistsError, match="'run': already exists"):
            store.import_run(document)
        assert bench.dump() == before

    def test_deleted_run_cannot_be_imported_or_exported(
        self, bench: Bench, store: StepRunStore, document: dict[str, Any]
    ) -> None:
        store.delete_run("run")
        before = bench.dump()
        with pytest.raises(RunDeletedError):
            store.import_run(document)
        assert bench.dump() == before
        with pytest.raises(RunDeletedError):
            store.export_run("run")

    def test_missing_run_cannot_be_exported(self, store: StepRunStore) -> None:
        with pytest.raises(StepRunNotFoundError, match="there is no such run"):
            store.export_run("run")

    @pytest.mark.parametrize("lost_replies", [1, 11])
    def test_resent_import_takes_effect_once(self, bench: Bench, lost_replies: int) -> None:
        begun(bench.store().begin_step("run", "a", {}))
        document = bench.store().export_run("run")
        other = f"{bench.prefix}-other"

        assert bench.store(prefix=other, lost_replies=lost_replies).import_run(document) == "run"

        with pytest.raises(RunExistsError):
            bench.store(prefix=other).import_run(document)

    @pytest.mark.parametrize("key", [2, 3], ids=["claims", "failed"])
    def test_index_of_another_type_rejects_the_import(self, bench: Bench, store: StepRunStore, key: int) -> None:
        begun(store.begin_step("run", "a", {}))
        document = store.export_run("run")
        store.delete_run("run", tombstone=0.001)
        bench.backend.raw.delete(*bench.keys("run"))
        bench.backend.raw.set(bench.keys("run")[key], "x")
        before = bench.dump()
        with pytest.raises(Exception, match="a different type"):
            store.import_run(document)
        assert bench.dump() == before

    @pytest.mark.servers("fakeredis")
    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("squidstep_run",), 2),
            (("squidstep_run",), True),
            (("cancel_reason",), False),
            (("cancel_reason",), {}),
            (("run_id",), ""),
            (("ttl",), -1),
            (("steps_created",), "3"),
            (("steps_created",), 2),
            (("completed",), ["first"]),
            (("completed",), ["first", "first"]),
            (("completed",), "first"),
            (("steps",), []),
            (("steps",), {}),
            (("steps", 0), 7),
            (("steps", 0, "step"), None),
            (("steps", 0, "step"), "first"),
            (("steps", 0, "position"), 3),
            (("steps", 0, "state"), "done"),
            (("steps", 0, "state"), "running"),
            (("steps", 0, "token"), "a b"),
            (("steps", 0, "token"), "a\n"),
            (("steps", 0, "scheduled_by"), None),
            (("steps", 0, "owner"), "a\nb"),
            (("steps", 0, "created_at"), "yesterday"),
            (("steps", 0, "created_at"), None),
            (("steps", 0, "started_at"), "1999-01-01T00:00:00+00:00"),
            (("steps", 0, "started_at"), "2026-01-01T00:00:00"),
            (("steps", 0, "started_at"), None),
            (("steps", 0, "attempts_released"), -1),
            (("steps", 0, "input"), {"$nonsense": 1}),
            (("steps", 0, "input"), {"x": {"$bytes": "#"}}),
            (("steps", 0, "input"), None),
            (("steps", 0, "output"), None),
            (("steps", 0, "progress"), {"page": 1}),
            (("steps", 1, "progress"), []),
            (("steps", 3, "history", 0, "attempt"), 1),
            (("steps", 3, "history", 0, "attempt"), 99),
            (("steps", 3, "history"), None),
        ],
    )
    def test_invalid_document_is_rejected(self, bench: Bench, path: Any, value: Any) -> None:
        broken = copy.deepcopy(valid_document())
        part: Any = broken
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
        store = bench.store()

        with pytest.raises(InvalidArgumentError, match="^document"):
            store.import_run(broken)

        assert store.get_run("run") == []

    @pytest.mark.servers("fakeredis")
    @pytest.mark.parametrize("value", [None, [], "{}", 7, {}])
    def test_value_that_is_not_a_document_is_rejected(self, store: StepRunStore, value: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="^document"):
            store.import_run(value)

    @pytest.mark.servers("fakeredis")
    def test_payload_over_the_size_limit_is_rejected(self, bench: Bench, document: dict[str, Any]) -> None:
        other = bench.store(prefix=f"{bench.prefix}-other", max_payload_bytes=100)
        with pytest.raises(PayloadError, match=r"document\['steps'\]\[0\]\['input'\]"):
            other.import_run(document)


def test_exported_lease_end_is_exact(store: StepRunStore) -> None:
    begun(store.begin_step("run", "a", {}, lease=timedelta(days=3, milliseconds=7)))
    document = store.export_run("run")
    (step,) = document["steps"]
    assert datetime.fromisoformat(step["lease_ends_at"]) == store.get_run("run")[0].lease_ends_at
