"""The store against its specification: Hypothesis drives it and model.py side by side, and compares all there is.

Two runs of a few steps, and as many claimants as claims were ever granted: none forgets its claim, so most of them are
zombies. Every call that was made is kept too, and may be sent again: at once, as after a lost reply, or much later.

    pytest tests/test_machine.py --hypothesis-profile=soak      for longer histories, and more of them
"""

from __future__ import annotations

import functools
import time
from binascii import crc32
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

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
from support.model import KEPT, Claim, Model, PastAttempt, RefusedError, Shown
from support.records import begun

from squidstep_redis import (
    Attempt,
    BeginResult,
    Call,
    RunDeletedError,
    ScheduleResult,
    StaleStepRunError,
    StepPage,
    StepRun,
    StepRunNotFoundError,
    StepRunStore,
)
from squidstep_redis.model import step_run_id
from squidstep_redis.protocol.keys import BUCKETS

T = TypeVar("T")

# The runs of an example: with indexes in common, or on nodes of their own. A run id that begins with the other, and
# steps to match, so that an index that only strung the two together would take ("run", "2x") for ("run2", "x").
TWIN = next(f"run{n}" for n in range(1_000_000) if crc32(f"run{n}".encode()) % BUCKETS == crc32(b"run") % BUCKETS)
RUN_PAIRS = [("run", TWIN), ("run", "another")]
STEPS = ("x", TWIN.removeprefix("run") + "x", "1:x")


class Holder(NamedTuple):
    """Whoever wants to end a claim: with the step run it was granted, or with a bare id."""

    step_run: StepRun | str
    claim: Claim


class Order(NamedTuple):
    """One operation, said once for the store and once for the model."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, calls: Any) -> Call[Any]:
        args = (arg.step_run if isinstance(arg, Holder) else arg for arg in self.args)
        return getattr(calls, self.name)(*args, **self.kwargs)

    def apply(self, model: Model, call: int) -> object:
        args = (arg.claim if isinstance(arg, Holder) else arg for arg in self.args)
        try:
            return getattr(model, self.name)(*args, **self.kwargs, call=call)
        except RefusedError as refusal:
            return refusal.args


class Sent(NamedTuple):
    """An order that has been sent, and can be sent again."""

    order: Order
    call: Call[Any]
    id: int

    def __repr__(self) -> str:
        return f"<call {self.id}, {self.order}>"


def plain(answer: object) -> object:
    """What the store answered, in the model's words."""
    match answer:
        case StepRun():
            return shown(answer)
        case BeginResult():
            assert answer.decision == ("skip" if answer.reason else "execute")
            return shown(answer.step_run), answer.reason, seconds(answer.retry_in)
        case StepPage():
            assert answer.cursor is None
            return [shown(each) for each in sorted(answer.step_runs, key=lambda step_run: step_run.position)]
        case ScheduleResult():
            return shown(answer.step_run), answer.decision
        case Attempt():
            assert_in_order(answer.started_at, answer.ended_at)
            assert (answer.ended_at is None) == (answer.outcome == "running")
            return PastAttempt(answer.number, answer.owner, answer.outcome, answer.error)
        case RunDeletedError():
            return ("deleted", None)
        case StepRunNotFoundError():
            return ("missing", None)
        case StaleStepRunError():
            return ("stale", shown(answer.current))
        case Exception():
            raise answer
        case list():
            return [plain(each) for each in answer]
        case _:
            return answer


def shown(step_run: StepRun) -> Shown:
    assert_in_order(step_run.created_at, step_run.started_at, step_run.ended_at)
    assert (step_run.started_at is None) == (step_run.attempt == 0)
    assert (step_run.ended_at is None) == (step_run.attempt == 0 or step_run.status == "running")
    return Shown(
        step_run.run_id,
        step_run.step,
        step_run.status,
        step_run.attempt,
        step_run.owner,
        step_run.input,
        step_run.output,
        step_run.last_error,
        seconds(step_run.lease_ends_at and step_run.lease_ends_at.timestamp() - time.time()),
        step_run.position,
    )


def seconds(left: float | None) -> int | None:
    """What is left of a lease as the model has it: leases are so long that the time a test takes rounds away."""
    return None if left is None else max(0, round(left, -3))


def assert_in_order(*times: datetime | None) -> None:
    assert all(earlier <= later for earlier, later in pairwise(time for time in times if time is not None))


def end_lease(raw: Any, keys: list[bytes], run: str, step: str) -> None:
    """Lets the lease of the step's claim end without waiting for it: by setting it to no time at all.

    What is rewritten is what the scripts wrote: the lease in the step's state line (lua/lib/record.lua) and the score
    of the entry in the claims index (lua/lib/indexes.lua), if they made one.
    """
    steps, _, claims, _ = keys
    head, attempt, released, token, _, started, ended, created, rest = raw.hget(steps, f"s{step}").split(b" ", 8)
    raw.hset(steps, f"s{step}", b" ".join((head, attempt, released, token, b"0", started, ended, created, rest)))
    raw.zadd(claims, {f"{len(run)}:{run}{step}": int(created) + int(started)}, xx=True)


# What can be ordered. The machine knows which runs there are, and who holds what.

the_machine: st.SearchStrategy[Any] = st.runner()
runs = the_machine.flatmap(lambda machine: st.sampled_from([machine.runs[0], *machine.runs]))
steps = st.sampled_from([STEPS[0], STEPS[0], *STEPS])  # one is busier: some histories are to grow long
payloads = st.integers(0, 3).map(lambda n: {"n": n})
inputs = st.dictionaries(steps, payloads, max_size=len(STEPS))
leases = st.sampled_from([1_000, 2_000, None])
limits = st.sampled_from([None, None, 1, 2, KEPT])
times = st.sampled_from([1, 1, 1, 2, 4])


def newest_first(items: list[T]) -> st.SearchStrategy[T]:
    """One of the last few as often as one of all."""
    return st.sampled_from(items[:-6:-1]) | st.sampled_from(items[::-1])


@st.composite
def holders(draw: st.DrawFn) -> Holder:
    machine: Machine = draw(the_machine)
    if machine.holders and draw(st.integers(0, 5)):
        return draw(newest_first(machine.holders))
    run, step = draw(runs), draw(steps)
    return Holder(step_run_id(machine.bench.prefix, run, step), Claim(run, step, None))


def order(name: str, *args: st.SearchStrategy[Any], **kwargs: st.SearchStrategy[Any]) -> st.SearchStrategy[Order]:
    return st.builds(Order, st.just(name), st.tuples(*args), st.fixed_dictionaries(kwargs))


CLAIMS = {"lease": leases, "max_attempts": limits, "owner": st.sampled_from([None, "worker 1", "worker 2"])}
BEGIN_STEP = order("begin_step", runs, steps, payloads, **CLAIMS)
ADVANCE_STEP = order("advance_step", holders(), payloads, steps, payloads, **CLAIMS).filter(
    lambda order: order.args[0].claim.step != order.args[2]
)
COMPLETE_STEP = order("complete_step", holders(), payloads, schedule=st.none() | inputs)
FAIL_STEP = order("fail_step", holders(), payloads)
EXTEND_CLAIM = order("extend_claim", holders(), leases)
RELEASE_STEP = order("release_step", holders())
RETRY_STEP = order("retry_step", runs, steps, owner=st.sampled_from([None, "operator"]))
SCHEDULE = order("schedule_step", runs, steps, payloads) | order("schedule_steps", runs, inputs)
DELETE_PENDING_STEPS = order("delete_pending_steps", runs, st.lists(steps, unique=True))
EXPIRE_RUN = order("expire_run", runs, st.sampled_from([None, 10_000]))
DELETE_RUN = order("delete_run", runs)
ANY = st.one_of(
    BEGIN_STEP,
    COMPLETE_STEP,
    ADVANCE_STEP,
    FAIL_STEP,
    EXTEND_CLAIM,
    RELEASE_STEP,
    RETRY_STEP,
    SCHEDULE,
    DELETE_PENDING_STEPS,
    EXPIRE_RUN,
    DELETE_RUN,
)


def rule_for(name: str, orders: st.SearchStrategy[Order]) -> Callable[..., None]:
    """The rule that orders this, once or as after a number of lost replies."""

    def ordered(self: Machine, order: Order, times: int) -> None:
        self.send(self.make(order), times)

    ordered.__name__ = name
    return rule(order=orders, times=times)(ordered)


class Machine(RuleBasedStateMachine):
    """A store and the model of it. Each rule does the same to both, and all that can be read is compared after it."""

    def __init__(self, bench: Bench, store: StepRunStore) -> None:
        super().__init__()
        self.bench = bench
        self.store = store
        self.model = Model()
        self.runs = RUN_PAIRS[0]
        self.sent: list[Sent] = []
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
    release_step = rule_for("release_step", RELEASE_STEP)
    retry_step = rule_for("retry_step", RETRY_STEP)
    schedule = rule_for("schedule", SCHEDULE)
    delete_pending_steps = rule_for("delete_pending_steps", DELETE_PENDING_STEPS)
    expire_or_delete_run = rule_for("expire_or_delete_run", EXPIRE_RUN | EXPIRE_RUN | DELETE_RUN)

    @rule(orders=st.lists(ANY, min_size=2, max_size=6))
    def batch(self, orders: list[Order]) -> None:
        self.send_all([self.make(order) for order in orders])

    @rule(run=runs, step=steps, times=st.integers(1, KEPT + 2), release=st.booleans())
    def try_in_vain(self, run: str, step: str, times: int, release: bool) -> None:
        """Attempts enough to push earlier ones out of the history."""
        holder = Holder(step_run_id(self.bench.prefix, run, step), Claim(run, step, None))
        begin = Order("begin_step", (run, step, {"n": 0}), {"lease": 1_000})
        end = Order("release_step", (holder,), {}) if release else Order("fail_step", (holder, {"n": 0}), {})
        self.send_all([self.make(order) for order in (begin, end) * times])

    @precondition(lambda self: self.may_come_late())
    @rule(sent=the_machine.flatmap(lambda machine: newest_first(machine.may_come_late())), times=times)
    def send_again(self, sent: Sent, times: int) -> None:
        """A call arrives late, when others have come between: a re-send after a time-out, or the copy it overtook."""
        self.send(sent, times)

    @precondition(lambda self: self.model.leased_claims())
    @rule(
        claim=the_machine.flatmap(lambda machine: st.sampled_from(sorted(machine.model.leased_claims()))),
        take_over=st.booleans(),
        lease=leases,
        max_attempts=limits,
    )
    def lapse(self, claim: tuple[str, str], take_over: bool, lease: int | None, max_attempts: int | None) -> None:
        run, step = claim
        end_lease(self.bench.backend.raw, self.keys[run], run, step)
        self.model.lapse(run, step)
        if take_over:
            order = Order("begin_step", (run, step, {"n": -1}), {"lease": lease, "max_attempts": max_attempts})
            self.send(self.make(order), times=1)

    @precondition(lambda self: self.model.tombstones)
    @rule(run=the_machine.flatmap(lambda machine: st.sampled_from(sorted(machine.model.tombstones))))
    def end_tombstone(self, run: str) -> None:
        """It goes by itself after an hour: waiting for that is the server's business."""
        steps, *_ = self.keys[run]
        assert 3_000_000 < self.bench.backend.raw.pttl(steps) <= 3_600_000
        self.bench.backend.raw.delete(steps)
        self.model.end_tombstone(run)

    @rule(look=st.sampled_from([False] * 9 + [True]))
    def look_across_runs(self, look: bool) -> None:
        """Now and then only: each reads 1,024 buckets."""
        if look:
            assert {(each.run_id, each.step) for each in self.store.lapsed_claims()} == self.model.lapsed_claims()
            assert {(each.run_id, each.step) for each in self.store.failed_steps()} == self.model.failed_steps()

    @invariant()
    def all_that_is_read_agrees(self) -> None:
        reads = [
            *(("get_run", run) for run in self.runs),
            *(("scan_steps", run) for run in self.runs),
            *(("step_statuses", run) for run in self.runs),
            *(("completed_steps", run) for run in self.runs),
            *(("completed_outputs", run) for run in self.runs),
            *(("attempts", run, step) for run in self.runs for step in STEPS),
        ]
        answers = self.store.batch([getattr(self.store.calls, name)(*args) for name, *args in reads])
        for (name, *args), answer in zip(reads, answers, strict=True):
            expected = getattr(self.model, name)(*args)
            assert plain(answer) == expected, (name, *args)
            if isinstance(answer, dict):
                assert list(answer) == list(expected)

    @invariant()
    def nothing_is_left_behind(self) -> None:
        """Each field belongs to a record, each index entry to a claim or a failure, and a run's keys expire as one."""
        pipeline = self.bench.backend.raw.pipeline(transaction=False)
        for run in self.runs:
            steps, done, claims, failed = self.keys[run]
            pipeline.hkeys(steps).pttl(steps).pttl(done).zrange(claims, 0, -1).zrange(failed, 0, -1)
        replies = iter(pipeline.execute())
        for run in self.runs:
            fields, steps_ttl, done_ttl, claims, failed = (next(replies) for _ in range(5))
            assert {field.decode() for field in fields} == self.expected_fields(run)
            if run in self.model.runs:
                expires = self.model.runs[run].expires
                assert (steps_ttl > 0) == expires
                if self.model.completed_steps(run):
                    assert (done_ttl > 0) == expires
            bucket = {other for other in self.runs if self.keys[other][2] == self.keys[run][2]}
            assert set(claims) == members(bucket, self.model.leased_claims())
            assert set(failed) == members(bucket, self.model.failed_steps())

    def expected_fields(self, run: str) -> set[str]:
        if run in self.model.tombstones:
            return {"r"}
        if run not in self.model.runs:
            return set()
        fields = {"r"}
        for step, record in self.model.runs[run].records.items():
            kinds = {"completed": "sio", "failed": "sie"}.get(record.status, "si")
            fields |= {kind + step for kind in kinds}
            fields |= {f"a{attempt.number}:{step}" for attempt in record.remembered[:-1]}
        return fields

    # What the rules share

    def may_come_late(self) -> list[Sent]:
        """All calls, but for those that were granted a claim of which nothing is known any more.

        Its record was deleted, or it lies further back than the history reaches: there such a begin is a new one.
        """
        return [each for each in self.sent if each.id not in self.granted or self.model.remembers(each.id)]

    def make(self, order: Order) -> Sent:
        self.sent.append(Sent(order, order.call(self.store.calls), len(self.sent)))
        return self.sent[-1]

    def send(self, sent: Sent, times: int) -> None:
        """Sends a call; the answer that gets through is the last one, and it is what the first would have been."""
        answers: list[Any] = []
        for _ in range(times):
            try:
                answers.append(self.store.send(sent.call))
            except (StaleStepRunError, StepRunNotFoundError) as refusal:
                answers.append(refusal)
            self.compare(sent, answers[-1])
        assert all(plain(answer) == plain(answers[0]) for answer in answers)
        self.look_closely(answers[-1])

    def send_all(self, sent: list[Sent]) -> None:
        for each, answer in zip(sent, self.store.batch([each.call for each in sent]), strict=True):
            self.compare(each, answer)

    def compare(self, sent: Sent, answer: object) -> None:
        assert plain(answer) == sent.order.apply(self.model, sent.id)
        if sent.order.name == "retry_step" and self.model.remembers(sent.id):
            self.granted.add(sent.id)
        if isinstance(answer, BeginResult):
            assert bool(answer.step_run.token) == (answer.decision == "execute")
            if answer.step_run.token and sent.id not in self.granted:
                claim = Claim(answer.step_run.run_id, answer.step_run.step, sent.id)
                self.holders.append(Holder(answer.step_run, claim))
                self.granted.add(sent.id)

    def look_closely(self, answer: Any) -> None:
        """A step run that was answered equals the one that is stored, times included, unless that has moved on."""
        step_run = answer[0] if isinstance(answer, BeginResult | ScheduleResult) else answer
        if isinstance(step_run, StepRun):
            stored = self.store.get_step_run(step_run.run_id, step_run.step)
            assert plain(stored) == self.model.get_step_run(step_run.run_id, step_run.step)
            if stored is None or stored.attempt == step_run.attempt:
                assert step_run == stored


def members(runs: set[str], entries: set[tuple[str, str]]) -> set[bytes]:
    """Entries as an index of these runs has them."""
    return {f"{len(run)}:{run}{step}".encode() for run, step in entries if run in runs}


@pytest.mark.servers("fakeredis", "valkey", "redis-7", "redis-6")  # two runs, each in one slot
@pytest.mark.slow
@pytest.mark.timeout(3_600)  # a failure is made small before it is shown
def test_the_store_does_what_the_model_does(bench: Bench, store: StepRunStore) -> None:
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


class TestABeginThatArrivesLate:
    """The copy of a call that was overtaken by its own re-send: no caller waits for its reply any more.

    Granted a second time it would be a claim without a holder, which locks all others out; and as it comes with the
    token of the first, the first one's StepRun would hold the claim again, against which it is to be fenced.
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
        ids=["completed", "failed", "released", "released by its id", "failed and begun", "released and begun"],
    )
    def test_it_is_not_granted_again(self, bench: Bench, store: StepRunStore, then: Callable[..., object]) -> None:
        call = store.calls.begin_step("run", "pay", {}, lease=60)
        then(store, begun(store.send(call)))
        before = bench.dump()

        assert store.send(call).decision == "skip"

        assert bench.dump() == before

    @pytest.mark.parametrize("max_attempts", [None, 1])
    def test_it_is_not_granted_again_after_its_lease(
        self, bench: Bench, store: StepRunStore, max_attempts: int | None
    ) -> None:
        call = store.calls.begin_step("run", "pay", {}, lease=60)
        begun(store.send(call))
        end_lease(bench.backend.raw, bench.keys("run"), "run", "pay")
        taken_over = store.begin_step("run", "pay", {}, max_attempts=max_attempts)
        assert taken_over.exhausted == (max_attempts == 1)
        before = bench.dump()

        assert store.send(call).reason == ("superseded" if max_attempts else "busy")

        assert bench.dump() == before
