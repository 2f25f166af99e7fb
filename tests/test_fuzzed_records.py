"""For any content of a run's hash, operations and commands raise typed errors, and no script runs for long."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import Bench
from support.commands import invoke
from support.records import begun, stored

from squidstep_redis import SquidstepError, StepRun, StepRunStore

pytestmark = pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")

NUMBERS = [b"0", b"1", b"9" * 14, b"9" * 15, b"9" * 17, b"9" * 40, b"-1", b"1.5", b"1e9", b"0x1F", b"nan"]
PARTS = st.sampled_from([*NUMBERS, b"", b"\xff\xfe", b"\n"])


@st.composite
def changed(draw: st.DrawFn, line: bytes) -> bytes:
    """A line of which some parts were replaced, dropped or added."""
    parts = line.split(b" ")
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(parts) - 1))
        parts[index : index + draw(st.sampled_from([0, 1, 1, 1, 1, 2]))] = [draw(PARTS)]
    return b" ".join(parts)


STATES = st.sampled_from([b"1" + letter for letter in (b"p", b"r", b"c", b"f", b"x", b"n", b"z")])
STATE_LINES = st.binary(max_size=60) | STATES.flatmap(
    lambda state: changed(state + b" 2 1 Tk9wZ2xhc3Nl 30000 125  1790000000000 3  worker-7")
)
RUNS = st.sampled_from(
    [b"1 3 2", b"1 3 2 60000 0 1 1790000030000", b"1x token", b"1 3 2 c", b"1 3 2 60000 0 1 1790000030000 c"]
)
RUN_LINES = st.binary(max_size=40) | RUNS.flatmap(changed)
FIELDS = st.one_of(
    st.tuples(st.just(b"sa"), STATE_LINES),
    st.tuples(st.just(b"sa"), STATE_LINES),
    st.tuples(st.just(b"r"), RUN_LINES),
    st.tuples(st.just(b"a1:a"), STATE_LINES | STATE_LINES.map(lambda line: line + b"\n\x80")),
    st.tuples(st.sampled_from([b"ia", b"oa", b"ea", b"fa", b"wa", b"c"]), st.binary(max_size=20)),
    st.tuples(st.just(b"pa"), st.binary(max_size=20) | changed(b"1 sender 7").map(lambda line: line + b"\n\x80")),
    st.tuples(st.binary(min_size=1, max_size=5), STATE_LINES),
)


def operations(store: StepRunStore, claim: StepRun) -> dict[str, Callable[[], Any]]:
    """Operations on the run. Each of them also reads what it returns."""
    return {
        "get_run": lambda: [shown(each) for each in store.get_run("run")],
        "get_step_run": lambda: shown(store.get_step_run("run", "a")),
        "scan_steps": lambda: [shown(each) for each in store.scan_steps("run").step_runs],
        "step_statuses": lambda: store.step_statuses("run"),
        "attempts": lambda: store.attempts("run", "a"),
        "completed_outputs": lambda: store.completed_outputs("run"),
        "completed_steps": lambda: store.completed_steps("run"),
        "export_run": lambda: store.export_run("run"),
        "fork_run": lambda: store.fork_run("run", "new"),
        "schedule_steps": lambda: store.schedule_steps("run", {"a": {}, "new": {}}),
        "extend_claim": lambda: store.extend_claim(claim, 60),
        "checkpoint_step": lambda: shown(store.checkpoint_step(claim, {"page": 1})),
        "begin_steps": lambda: store.begin_steps("run", {"a": {}, "b": {}}, lease=60),
        "begin_step": lambda: shown(store.begin_step("run", "a", {}, lease=60, max_attempts=3).step_run),
        "begin_step, fingerprint": lambda: store.begin_step("run", "a", {}, fingerprint=True),
        "begin_steps, fingerprint": lambda: store.begin_steps("run", {"new": {}, "a": {}}, fingerprint=True),
        "schedule_step": lambda: store.schedule_step("run", "a", {}, fingerprint=True),
        "fail_step": lambda: store.fail_step(claim, {"reason": "declined"}),
        "fail_step by id": lambda: store.fail_step(claim.id, {}, retry_after=60),
        "release_step": lambda: store.release_step(claim.id),
        "retry_step": lambda: store.retry_step("run", "a"),
        "complete_step": lambda: store.complete_step(claim, {}),
        "complete_step by id": lambda: store.complete_step(claim.id, {}),
        "expire_run": lambda: store.expire_run("run", 60),
        "cancel_run": lambda: store.cancel_run("run", "stop"),
        "resume_run": lambda: store.resume_run("run"),
        "summarize_run": lambda: store.summarize_run("run"),
        "explain_step": lambda: store.explain_step("run", "a"),
        "explain_run": lambda: store.explain_run("run"),
        "delete_pending_steps": lambda: store.delete_pending_steps("run", ["a"]),
    }


def shown(step_run: StepRun | None) -> object:
    """Reads everything about a step run."""
    if step_run is None:
        return None
    payloads = (step_run.input, step_run.output, step_run.last_error, step_run.progress)
    values = (*payloads, step_run.owner, step_run.attempts_used)
    return (*values, step_run.lease_ends_at, step_run.retry_at, step_run.started_at, step_run.ended_at, repr(step_run))


def create(bench: Bench, store: StepRunStore, fields: list[tuple[bytes, bytes]]) -> StepRun:
    """Creates a run with a claim, and writes fields into its hash."""
    (steps, *others) = bench.keys("run")
    bench.backend.raw.delete(steps, *others)
    claim = begun(store.begin_step("run", "a", {"amount": 1}, lease=60))
    begun(store.begin_step("run", "b", {}, lease=60))
    bench.backend.raw.hset(steps, mapping=dict(fields))
    return claim


NAMES = (
    *("get_run", "get_step_run", "scan_steps", "step_statuses", "attempts", "completed_outputs", "completed_steps"),
    *("export_run", "fork_run", "schedule_steps", "extend_claim", "checkpoint_step", "begin_steps", "begin_step"),
    *("fail_step", "fail_step by id", "release_step", "retry_step", "complete_step", "complete_step by id"),
    *("expire_run", "delete_pending_steps", "begin_step, fingerprint", "begin_steps, fingerprint", "schedule_step"),
    *("cancel_run", "resume_run", "summarize_run", "explain_step", "explain_run"),
)


@pytest.mark.slow
@settings(max_examples=20)
@given(fields=st.lists(FIELDS, min_size=1, max_size=3), names=st.lists(st.sampled_from(NAMES), min_size=3, max_size=5))
def test_every_operation_returns_or_raises_a_typed_error(
    bench: Bench, store: StepRunStore, fields: list[tuple[bytes, bytes]], names: list[str]
) -> None:
    for name in names:
        claim = create(bench, store, fields)
        with contextlib.suppress(SquidstepError):
            operations(store, claim)[name]()


@pytest.mark.slow
@settings(max_examples=30)
@given(fields=st.lists(FIELDS, min_size=1, max_size=3))
def test_fork_of_any_run_is_whole_or_a_typed_error(
    bench: Bench, store: StepRunStore, fields: list[tuple[bytes, bytes]]
) -> None:
    store.complete_step(create(bench, store, [(b"ib", b"\x80")]), {"charged": 1})
    bench.backend.raw.hset(bench.keys("run")[0], mapping=dict(fields))
    bench.backend.raw.delete(*bench.keys("new")[:2])

    try:
        assert store.fork_run("run", "new") == ["a"]
    except SquidstepError:
        assert bench.backend.raw.exists(*bench.keys("new")[:1]) == 0
        return

    assert store.completed_steps("new") == ["a"]
    (copy,) = store.get_run("new")
    assert (copy.status, copy.position, copy.attempt) == ("completed", 1, stored(store, step="a").attempt)
    begun(store.begin_step("new", "b", {}))


COMMANDS = ("runs", "show run", "show run a", "show run --json", "timeline run", "stuck", "failed", "export run")


@pytest.mark.servers("valkey")
@pytest.mark.parametrize("bench", ["blocking"], indirect=True)
@settings(max_examples=25)
@given(fields=st.lists(FIELDS, min_size=1, max_size=3))
def test_every_command_ends_without_a_traceback(
    bench: Bench, store: StepRunStore, fields: list[tuple[bytes, bytes]]
) -> None:
    options = ("-u", bench.backend.url or "", "--prefix", bench.prefix)
    for command in COMMANDS:
        create(bench, store, fields)
        result = invoke(*command.split(), *options)  # raises what is not a SystemExit
        assert not set(result.stdout) & set("\x1b\x07\x00\x9b\u202e"), command
