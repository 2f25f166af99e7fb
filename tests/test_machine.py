"""The store and its specification: Hypothesis performs the same operations on both, and compares everything readable.

There are two runs of a few steps. Every claim that was ever acquired stays in use, so most claims are stale. Every call
is kept, and may be re-sent: at once, as after a lost reply, or much later.

    pytest tests/test_machine.py --hypothesis-profile=soak      runs longer histories, and more of them
"""

from __future__ import annotations

import functools
from binascii import crc32
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.backends import Bench
from support.machine import Holder, Operation, RecordedCall, as_model, expire_lease, index_members, without_unread
from support.model import MAX_PAST_ATTEMPTS, Claim, Model
from support.records import begun

from squidstep_redis import (
    BeginResult,
    InputMismatchError,
    RunExistsError,
    ScheduleResult,
    StaleStepRunError,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
)
from squidstep_redis.model import step_run_id
from squidstep_redis.protocol.keys import BUCKETS

T = TypeVar("T")

# The two runs of an example have the same index keys, or different ones. One run id is a prefix of the other, and the
# steps fit: an index that only concatenated run id and step would confuse ("run", "2x") with ("run2", "x").
TWIN = next(f"run{n}" for n in range(1_000_000) if crc32(f"run{n}".encode()) % BUCKETS == crc32(b"run") % BUCKETS)
RUN_PAIRS = [("run", TWIN), ("run", "another")]
STEPS = ("x", TWIN.removeprefix("run") + "x", "1:x")


# The operations. The machine knows the runs and the claims.

machines: st.SearchStrategy[Any] = st.runner()
runs = machines.flatmap(lambda machine: st.sampled_from([machine.runs[0], *machine.runs]))
steps = st.sampled_from([STEPS[0], STEPS[0], *STEPS])  # one is used more, for some long histories
payloads = st.integers(0, 3).map(lambda n: {"n": n})
inputs = st.dictionaries(steps, payloads, max_size=len(STEPS))
leases = st.sampled_from([1_000, 2_000, None])
limits = st.sampled_from([None, None, 1, 2, MAX_PAST_ATTEMPTS])
times = st.sampled_from([1, 1, 1, 2, 4])


def newest_first(items: list[T]) -> st.SearchStrategy[T]:
    """Draws from the last five items half of the time, and from all items otherwise."""
    return st.sampled_from(items[:-6:-1]) | st.sampled_from(items[::-1])


@st.composite
def holders(draw: st.DrawFn) -> Holder:
    machine: Machine = draw(machines)
    if machine.holders and draw(st.integers(0, 5)):
        return draw(newest_first(machine.holders))
    run, step = draw(runs), draw(steps)
    return Holder(step_run_id(machine.bench.prefix, run, step), Claim(run, step, None))


def operations(
    name: str, *args: st.SearchStrategy[Any], **kwargs: st.SearchStrategy[Any]
) -> st.SearchStrategy[Operation]:
    return st.builds(Operation, st.just(name), st.tuples(*args), st.fixed_dictionaries(kwargs))


PRINTS = {"fingerprint": st.sampled_from([None, None, None, "input 1", "input 2"])}
CLAIMS = {"lease": leases, "max_attempts": limits, "owner": st.sampled_from([None, "worker 1", "worker 2"]), **PRINTS}
BEGIN_STEP = operations("begin_step", runs, steps, payloads, **CLAIMS)
ADVANCE_STEP = operations("advance_step", holders(), payloads, steps, payloads, **CLAIMS).filter(
    lambda operation: operation.args[0].claim.step != operation.args[2]
)
COMPLETE_STEP = operations("complete_step", holders(), payloads, schedule=st.none() | inputs)
FAIL_STEP = st.one_of(
    operations("fail_step", holders(), payloads),
    operations("fail_step", holders(), payloads, final=st.just(True)),
    operations("fail_step", holders(), payloads, retry_after=st.sampled_from([1_000, 2_000])),
)
EXTEND_CLAIM = operations("extend_claim", holders(), leases, progress=st.none() | st.none() | payloads)
CHECKPOINT_STEP = operations("checkpoint_step", holders(), payloads)
RELEASE_STEP = operations("release_step", holders())
RETRY_STEP = operations("retry_step", runs, steps, owner=st.sampled_from([None, "operator"]))
SCHEDULE = st.one_of(
    operations("schedule_step", runs, steps, payloads, **PRINTS),
    operations("schedule_steps", runs, inputs, **PRINTS),
)
DELETE_PENDING_STEPS = operations("delete_pending_steps", runs, st.lists(steps, unique=True))
EXPIRE_RUN = operations("expire_run", runs, st.sampled_from([None, 10_000]))
DELETE_RUN = operations("delete_run", runs)
CANCEL_RUN = operations("cancel_run", runs, st.sampled_from([None, "wrong address", "other"]))
RESUME_RUN = operations("resume_run", runs)
ANY = st.one_of(
    BEGIN_STEP,
    COMPLETE_STEP,
    ADVANCE_STEP,
    FAIL_STEP,
    EXTEND_CLAIM,
    CHECKPOINT_STEP,
    RELEASE_STEP,
    RETRY_STEP,
    SCHEDULE,
    DELETE_PENDING_STEPS,
    EXPIRE_RUN,
    CANCEL_RUN,
    RESUME_RUN,
    RESUME_RUN,
    DELETE_RUN,
)


def rule_for(name: str, operations: st.SearchStrategy[Operation]) -> Callable[..., None]:
    """Returns a rule that sends such an operation, once, or several times as after lost replies."""

    def send(self: Machine, operation: Operation, times: int) -> None:
        self.send(self.record(operation), times)

    send.__name__ = name
    return rule(operation=operations, times=times)(send)


class Machine(RuleBasedStateMachine):
    """A store and its model. Each rule does the same to both, and everything readable is compared after it."""

    def __init__(self, bench: Bench, store: StepRunStore) -> None:
        super().__init__()
        self.bench = bench
        self.store = store
        self.model = Model()
        self.runs = RUN_PAIRS[0]
        self.recorded: list[RecordedCall] = []
        self.holders: list[Holder] = []
        self.granted: set[int] = set()

    @initialize(runs=st.sampled_from(RUN_PAIRS))
    def start(self, runs: tuple[str, str]) -> None:
        self.runs = runs
        for key in self.bench.backend.keys(self.bench.prefix):
            self.bench.backend.raw.delete(key)
        self.keys = {run: self.bench.keys(run) for run in runs}

    begin_step = rule_for("begin_step", BEGIN_STEP)
    complete_step = rule_for("complete_step", COMPLETE_STEP)
    advance_step = rule_for("advance_step", ADVANCE_STEP)
    fail_step = rule_for("fail_step", FAIL_STEP)
    extend_claim = rule_for("extend_claim", EXTEND_CLAIM)
    checkpoint_step = rule_for("checkpoint_step", CHECKPOINT_STEP)
    release_step = rule_for("release_step", RELEASE_STEP)
    retry_step = rule_for("retry_step", RETRY_STEP)
    schedule = rule_for("schedule", SCHEDULE)
    delete_pending_steps = rule_for("delete_pending_steps", DELETE_PENDING_STEPS)
    cancel_run = rule_for("cancel_run", CANCEL_RUN)
    resume_run = rule_for("resume_run", RESUME_RUN | RESUME_RUN)
    expire_or_delete_run = rule_for("expire_or_delete_run", EXPIRE_RUN | EXPIRE_RUN | DELETE_RUN)

    @rule(operations=st.lists(ANY, min_size=2, max_size=6))
    def batch(self, operations: list[Operation]) -> None:
        self.send_batch([self.record(operation) for operation in operations])

    @rule(run=runs, step=steps, times=st.integers(1, MAX_PAST_ATTEMPTS + 2), release=st.booleans())
    def fill_history(self, run: str, step: str, times: int, release: bool) -> None:
        """Begins and ends enough attempts to drop earlier ones from the history."""
        holder = Holder(step_run_id(self.bench.prefix, run, step), Claim(run, step, None))
        begin = Operation("begin_step", (run, step, {"n": 0}), {"lease": 1_000})
        end = Operation("release_step", (holder,), {}) if release else Operation("fail_step", (holder, {"n": 0}), {})
        self.send_batch([self.record(operation) for operation in (begin, end) * times])

    @rule(
        reverse=st.booleans(),
        free=st.sampled_from([True, True, False]),
        choice=st.one_of(
            st.just({}),
            st.fixed_dictionaries({"through": steps}),
            st.fixed_dictionaries({"steps": st.lists(steps, min_size=1, unique=True)}),
        ),
    )
    def fork_run(self, reverse: bool, free: bool, choice: dict[str, Any]) -> None:
        """Forks one of the runs to the other one, which is deleted before if it must be free."""
        source, new = self.runs[::-1] if reverse else self.runs
        if free and new in self.model.runs:
            self.send(self.record(Operation("delete_run", (new,), {})), times=1)
        if free and new in self.model.tombstones:
            self.end_tombstone(new)
        try:
            result: Any = self.store.fork_run(source, new, **choice)
        except (StaleStepRunError, StepRunNotFoundError, RunExistsError) as error:
            result = error
        assert as_model(result) == Operation("fork_run", (source, new), choice).apply(self.model)

    @precondition(lambda self: self.resendable())
    @rule(recorded=machines.flatmap(lambda machine: newest_first(machine.resendable())), times=times)
    def resend(self, recorded: RecordedCall, times: int) -> None:
        """Sends an earlier call after others: a re-send after a timeout, or a delayed copy."""
        self.send(recorded, times)

    @precondition(lambda self: self.model.leased_claims())
    @rule(
        claim=machines.flatmap(lambda machine: st.sampled_from(sorted(machine.model.leased_claims()))),
        take_over=st.booleans(),
        lease=leases,
        max_attempts=limits,
    )
    def lapse(self, claim: tuple[str, str], take_over: bool, lease: int | None, max_attempts: int | None) -> None:
        run, step = claim
        expire_lease(self.bench.backend.raw, self.keys[run], run, step)
        self.model.lapse(run, step)
        if take_over:
            begin = Operation("begin_step", (run, step, {"n": -1}), {"lease": lease, "max_attempts": max_attempts})
            self.send(self.record(begin), times=1)

    @precondition(lambda self: self.model.delayed_steps())
    @rule(step=machines.flatmap(lambda machine: st.sampled_from(sorted(machine.model.delayed_steps()))))
    def end_delay(self, step: tuple[str, str]) -> None:
        expire_lease(self.bench.backend.raw, self.keys[step[0]], *step)
        self.model.end_delay(*step)

    @precondition(lambda self: self.model.tombstones)
    @rule(run=machines.flatmap(lambda machine: st.sampled_from(sorted(machine.model.tombstones))))
    def end_a_tombstone(self, run: str) -> None:
        self.end_tombstone(run)

    def end_tombstone(self, run: str) -> None:
        """Deletes a tombstone, which would expire after an hour."""
        steps, *_ = self.keys[run]
        assert 3_000_000 < self.bench.backend.raw.pttl(steps) <= 3_600_000
        self.bench.backend.raw.delete(steps)
        self.model.end_tombstone(run)

    @rule(enabled=st.sampled_from([False] * 9 + [True]))
    def compare_indexes(self, enabled: bool) -> None:
        """Runs rarely, because each read takes 1,024 scripts."""
        if enabled:
            assert {(each.run_id, each.step) for each in self.store.lapsed_claims()} == self.model.lapsed_claims()
            assert {(each.run_id, each.step) for each in self.store.failed_steps()} == self.model.failed_steps()

    @invariant()
    def reads_agree(self) -> None:
        reads = [
            *(("get_run", run) for run in self.runs),
            *(("scan_steps", run) for run in self.runs),
            *(("step_statuses", run) for run in self.runs),
            *(("completed_steps", run) for run in self.runs),
            *(("completed_outputs", run) for run in self.runs),
            *(("attempts", run, step) for run in self.runs for step in STEPS),
        ]
        results = self.store.batch([getattr(self.store.calls, name)(*args) for name, *args in reads])
        for (name, *args), result in zip(reads, results, strict=True):
            expected = getattr(self.model, name)(*args)
            assert as_model(result) == expected, (name, *args)
            if isinstance(result, dict):
                assert list(result) == list(expected)

    @invariant()
    def nothing_is_left_over(self) -> None:
        """Each field has a record, each index entry a claim, failure or run, and the keys of a run expire together."""
        pipeline = self.bench.backend.raw.pipeline(transaction=False)
        for run in self.runs:
            steps, done, claims, failed = self.keys[run]
            pipeline.hkeys(steps).pttl(steps).pttl(done).zrange(claims, 0, -1).zrange(failed, 0, -1)
            pipeline.zrange(claims.removesuffix(b"claims") + b"runs", 0, -1)
        replies = iter(pipeline.execute())
        for run in self.runs:
            fields, steps_ttl, done_ttl, claims, failed, entries = (next(replies) for _ in range(6))
            assert {field.decode() for field in fields} == self.expected_fields(run)
            if run in self.model.runs:
                expires = self.model.runs[run].expires
                assert (steps_ttl > 0) == expires
                if self.model.completed_steps(run):
                    assert (done_ttl > 0) == expires
            bucket = {other for other in self.runs if self.keys[other][2] == self.keys[run][2]}
            assert set(claims) == index_members(bucket, self.model.leased_claims())
            assert set(failed) == index_members(bucket, self.model.failed_steps())
            existing = map(str.encode, bucket & self.model.runs.keys())
            assert set(entries) == {b"%d:%b" % (len(each), each) for each in existing}

    def expected_fields(self, run: str) -> set[str]:
        if run in self.model.tombstones:
            return {"r"}
        if run not in self.model.runs:
            return set()
        fields = {"r", "m"} if self.model.runs[run].is_fork else {"r"}
        fields |= set() if self.model.runs[run].cancel_reason is None else {"c"}
        for step, record in self.model.runs[run].records.items():
            kinds = {"completed": "sio", "failed": "sie"}.get(record.status, "si")
            kinds += "" if record.progress is None else "pw"
            fields |= {kind + step for kind in kinds}
            if record.fingerprint:
                fields.add(f"f{step}")
            fields |= {f"a{attempt.number}:{step}" for attempt in record.kept_attempts[:-1]}
        return fields

    # Helpers of the rules

    def resendable(self) -> list[RecordedCall]:
        """Returns all calls except those that acquired a claim of which no record is left.

        The record was deleted, or the claim has dropped out of the history: a re-send is then a new begin.
        """
        return [
            each
            for each in self.recorded
            if each.id not in self.granted or self.model.has_claim_of(each.operation.run, each.id)
        ]

    def record(self, operation: Operation) -> RecordedCall:
        self.recorded.append(RecordedCall(operation, operation.call(self.store.calls), len(self.recorded)))
        return self.recorded[-1]

    def send(self, recorded: RecordedCall, times: int) -> None:
        """Sends a call several times, as after lost replies. Each send returns the same."""
        results: list[Any] = []
        for _ in range(times):
            try:
                results.append(self.store.send(recorded.call))
            except (InputMismatchError, StaleStepRunError, StepRunNotFoundError) as error:
                results.append(error)
            self.compare(recorded, results[-1])
        seen = [without_unread(recorded, as_model(result)) for result in results]
        assert all(each == seen[0] for each in seen)
        self.compare_with_stored(results[-1])

    def send_batch(self, recorded: list[RecordedCall]) -> None:
        for each, result in zip(recorded, self.store.batch([each.call for each in recorded]), strict=True):
            self.compare(each, result)

    def compare(self, recorded: RecordedCall, result: object) -> None:
        assert without_unread(recorded, as_model(result)) == without_unread(
            recorded, recorded.operation.apply(self.model, recorded.id)
        )
        if recorded.operation.name == "retry_step" and self.model.has_claim_of(recorded.operation.run, recorded.id):
            self.granted.add(recorded.id)
        if isinstance(result, BeginResult):
            assert bool(result.step_run.token) == (result.decision == "execute")
            if result.step_run.token and recorded.id not in self.granted:
                claim = Claim(result.step_run.run_id, result.step_run.step, recorded.id)
                self.holders.append(Holder(result.step_run, claim))
                self.granted.add(recorded.id)

    def compare_with_stored(self, result: Any) -> None:
        """Asserts that a returned step run equals the stored one, times included, unless that has changed since."""
        step_run = result[0] if isinstance(result, BeginResult | ScheduleResult) else result
        if isinstance(step_run, StepRun):
            stored = self.store.get_step_run(step_run.run_id, step_run.step)
            assert as_model(stored) == self.model.get_step_run(step_run.run_id, step_run.step)
            if step_run.position and (stored is None or stored.attempt == step_run.attempt):
                assert step_run == stored


@pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")  # two runs, each in one slot
@pytest.mark.slow
@pytest.mark.timeout(3_600)  # shrinking a failure takes long
def test_store_and_model_return_the_same(bench: Bench, store: StepRunStore) -> None:
    examples = settings.default.max_examples // (14 if bench.backend.name == "fakeredis" else 7)
    run_state_machine_as_test(
        functools.partial(Machine, bench, store), settings=settings(max_examples=examples, report_multiple_bugs=False)
    )


def fail_and_begin_again(store: StepRunStore, claim: StepRun) -> None:
    store.fail_step(claim, {})
    begun(store.begin_step("run", "pay", {}))


def release_and_begin_again(store: StepRunStore, claim: StepRun) -> None:
    store.release_step(claim)
    begun(store.begin_step("run", "pay", {}))


class TestLateBegin:
    """A delayed copy of a begin arrives after its own re-send, and no caller waits for its reply.

    A second claim would have no holder, and would block all other workers. It would also have the token of the first
    claim, so that the fenced StepRun of the first claim would be valid again.
    """

    @pytest.mark.parametrize(
        "then",
        [
            lambda store, claim: store.complete_step(claim, {}),
            lambda store, claim: store.fail_step(claim, {}),
            lambda store, claim: store.release_step(claim),
            lambda store, claim: store.release_step(claim.id),
            fail_and_begin_again,
            release_and_begin_again,
        ],
        ids=["completed", "failed", "released", "released by id", "failed and begun", "released and begun"],
    )
    def test_late_begin_acquires_no_second_claim(
        self, bench: Bench, store: StepRunStore, then: Callable[..., object]
    ) -> None:
        call = store.calls.begin_step("run", "pay", {}, lease=60)
        then(store, begun(store.send(call)))
        before = bench.dump()

        assert store.send(call).decision == "skip"

        assert bench.dump() == before

    @pytest.mark.parametrize("max_attempts", [None, 1])
    def test_late_begin_after_a_takeover_acquires_no_claim(
        self, bench: Bench, store: StepRunStore, max_attempts: int | None
    ) -> None:
        call = store.calls.begin_step("run", "pay", {}, lease=60)
        begun(store.send(call))
        expire_lease(bench.backend.raw, bench.keys("run"), "run", "pay")
        taken_over = store.begin_step("run", "pay", {}, max_attempts=max_attempts)
        assert taken_over.exhausted == (max_attempts == 1)
        before = bench.dump()

        assert store.send(call).reason == ("superseded" if max_attempts else "busy")

        assert bench.dump() == before
