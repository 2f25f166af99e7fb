"""Calls of a batch that are sent as one have the results, the effects and the errors of the same calls sent singly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backends import Bench, contents, timeless
from support.operations import seen

from squidstep_redis import BeginResult, Call, SquidstepError, StepRun, StepRunStore
from squidstep_redis.model import step_run_id
from squidstep_redis.operations import waiting
from squidstep_redis.operations.calls import Calls
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.groups import MAX_MERGED, group

_examples = itertools.count(1_000_000)

RUNS = st.sampled_from(["run", "run", "other"])
STEPS = st.sampled_from(["a", "b", "c"])
CLAIMS = st.integers(0, 5)
LEASES = st.sampled_from([None, 60])
PAYLOADS = st.sampled_from([{"n": 1}, {"n": 2}])
OPTIONS = st.sampled_from([(60, 1, None), (None, None, None), (60, 1, True)])
BEGIN = st.tuples(st.just("begin"), RUNS, STEPS, PAYLOADS, OPTIONS)
COMPLETE = st.one_of(
    st.tuples(st.just("complete"), CLAIMS, PAYLOADS, st.sampled_from([None, None, {"c": {}}])),
    st.tuples(st.just("complete by id"), RUNS, STEPS, PAYLOADS),
)
EXTEND = st.one_of(
    st.tuples(st.just("extend"), CLAIMS, LEASES),
    st.tuples(st.just("extend by id"), RUNS, STEPS, LEASES),
    st.tuples(st.just("expire"), CLAIMS),
)
OTHER = st.one_of(
    st.tuples(st.sampled_from(["fail", "release"]), CLAIMS),
    st.tuples(st.sampled_from(["schedule", "wait"]), RUNS, STEPS),
    st.tuples(st.sampled_from(["ttl", "delete"]), RUNS),
)
KINDS = (BEGIN, COMPLETE, EXTEND, BEGIN | COMPLETE | EXTEND | OTHER)
BATCHES = st.tuples(
    st.one_of(*(st.lists(each, min_size=1) for each in KINDS)),
    st.booleans(),
    st.none() | st.tuples(RUNS, st.sampled_from([(0, "gone"), (1, "gone"), (2, "gone"), (3, "gone"), (1, "string")])),
)


# These steps affect only some calls of a group. Such calls are sent singly, after the later calls of the batch, so
# there are no later calls.
def last_batch(steps: list[str]) -> st.SearchStrategy[Any]:
    """Returns one group on the run."""
    kinds = {
        "begin": (PAYLOADS, st.just((60, 1, None))),
        "complete by id": (PAYLOADS,),
        "extend by id": (st.just(60),),
    }
    return st.one_of(
        *(
            st.tuples(*(st.tuples(st.just(kind), st.just("run"), st.just(step), *rest) for step in steps))
            for kind, rest in kinds.items()
        )
    )


LAST = st.tuples(
    st.lists(STEPS, unique=True).flatmap(last_batch),
    st.booleans(),
    st.tuples(st.just("run"), st.sampled_from([(2, "string"), (3, "string"), (0, "state")])),
)


def call_of(calls: Calls, operation: tuple[Any, ...], claims: list[StepRun]) -> Call[Any] | None:
    kind, *rest = operation
    if kind == "begin":
        run, step, payload, (lease, limit, printed) = rest
        options: dict[str, Any] = {"lease": lease, "max_attempts": limit, "owner": "worker-1", "fingerprint": printed}
        return calls.begin_step(run, step, payload, **options)
    if kind == "complete by id":
        run, step, payload = rest
        return calls.complete_step(step_run_id(calls.prefix, run, step), payload)
    if kind == "extend by id":
        run, step, lease = rest
        return calls.extend_claim(step_run_id(calls.prefix, run, step), lease)
    if kind == "schedule":
        return calls.schedule_step(*rest, {})
    if kind == "wait":
        return waiting._await_step(calls, calls.keys.run(rest[0]), arguments.step(rest[1]))
    if kind == "ttl":
        return calls.expire_run(rest[0], 60)
    if kind == "delete":
        return calls.delete_run(rest[0])
    if not claims:
        return None
    claim = claims[-1 - rest[0] % len(claims)]  # also an earlier one
    if kind == "complete":
        return calls.complete_step(claim, rest[1], schedule=rest[2])
    if kind == "fail":
        return calls.fail_step(claim, {"why": "test"})
    if kind == "extend":
        return calls.extend_claim(claim, rest[1])
    return calls.release_step(claim) if kind == "release" else calls.expire_claim(claim)


def send_singly(store: StepRunStore, calls: list[Call[Any]]) -> list[Any]:
    outcomes: list[Any] = []
    for call in calls:
        try:
            outcomes.append(store.send(call))
        except SquidstepError as error:
            outcomes.append(error)
    return outcomes


def plain(outcome: Any) -> Any:
    if isinstance(outcome, SquidstepError):
        return type(outcome), str(outcome).replace("singly-", "groups-")
    if isinstance(outcome, BeginResult):
        return seen(outcome), outcome.reason, outcome.takeover, outcome.step_run.token
    return seen(outcome[0] if isinstance(outcome, tuple) else outcome)


def spoil(raw: Any, key: bytes, how: str) -> None:
    if how == "state":
        if raw.type(key) == b"hash":
            raw.hset(key, "sa", "1r spoiled")
        return
    raw.delete(key)
    if how == "string":
        raw.set(key, "other")


@pytest.mark.slow
@settings(max_examples=15)
@given(batches=st.lists(BATCHES, min_size=1, max_size=4), last=LAST)
def test_a_batch_has_the_effects_of_single_calls(bench: Bench, batches: list[Any], last: Any) -> None:
    number = next(_examples)
    prefixes = grouped, singly = f"groups-{number}", f"singly-{number}"
    stores = [bench.store(prefix=prefix) for prefix in prefixes]
    raw, calls = bench.backend.raw, stores[0].calls
    claims: list[StepRun] = []
    for operations, is_resent, spoiled in [*batches, last]:
        if spoiled is not None:
            run, (position, how) = spoiled
            for store in stores:
                spoil(raw, store.calls.keys.run(run).keys[position], how)
        made = [call_of(calls, operation, claims) for operation in operations]
        batch = [call for call in made if call is not None]
        # The same calls, tokens and nonces included, on the keys of the other store.
        copies = [
            call._replace(keys=tuple(key.replace(grouped.encode(), singly.encode()) for key in call.keys))
            for call in batch
        ]
        for _ in range(1 + is_resent):
            outcomes = stores[0].batch(batch)
            expected = send_singly(stores[1], copies)

        assert [plain(outcome) for outcome in outcomes] == [plain(outcome) for outcome in expected]
        ours, theirs = (
            {key[len(prefix) :]: value for key, value in contents(raw, prefix).items()} for prefix in prefixes
        )
        assert timeless(ours) == timeless(theirs)
        results = (outcome for outcome in outcomes if isinstance(outcome, BeginResult))
        claims += [result.step_run for result in results if result.decision == "execute"]


class TestGrouping:
    """Which calls are sent as one; by the names of their steps, in upper case for completions."""

    CALLS = Calls("squidstep", None, 10_000, None)

    def grouped(self, *calls: Call[Any]) -> list[str]:
        names = [(call.step or "-").upper() if "complete" in call.operation else call.step or "-" for call in calls]
        return ["".join(names[index] for index in indexes) for indexes in group(calls, range(len(calls)))]

    def begin(self, steps: str, run: str = "run", **options: Any) -> list[Call[Any]]:
        return [self.CALLS.begin_step(run, step, {}, **options) for step in steps]

    def complete(self, steps: str, run: str = "run", **options: Any) -> list[Call[Any]]:
        return [self.CALLS.complete_step(step_run_id("squidstep", run, step), {}, **options) for step in steps]

    def test_calls_of_one_kind_on_one_run_are_one_group(self) -> None:
        assert self.grouped(*self.begin("abc"), *self.complete("ab")) == ["abc", "AB"]

    def test_calls_on_other_runs_may_come_between(self) -> None:
        calls = zip(self.begin("abc"), self.complete("xyz", "other"), strict=True)
        assert self.grouped(*(call for pair in calls for call in pair)) == ["abc", "XYZ"]

    def test_another_call_on_the_run_ends_a_group(self) -> None:
        read = self.CALLS.get_run("run")
        calls = [*self.begin("ab"), read, *self.begin("c"), *self.complete("x"), *self.begin("d")]
        assert self.grouped(*calls) == ["ab", "-", "c", "X", "d"]

    def test_a_call_across_runs_ends_all_groups(self) -> None:
        across = self.CALLS.get_run("run")._replace(run_id=None, keys=(b"index",))
        assert self.grouped(*self.begin("a"), across, *self.begin("b")) == ["a", "-", "b"]

    def test_a_repeated_step_begins_another_group(self) -> None:
        assert self.grouped(*self.begin("aba")) == ["ab", "a"]

    def test_other_shared_arguments_begin_another_group(self) -> None:
        assert self.grouped(*self.begin("ab"), *self.begin("cd", lease=1), *self.begin("e")) == ["ab", "cd", "e"]

    def test_fingerprints_share_a_group_only_with_others(self) -> None:
        calls = [*self.begin("ab", fingerprint=True), *self.begin("c", fingerprint="other"), *self.begin("d")]
        assert self.grouped(*calls) == ["abc", "d"]

    def test_a_completion_with_successors_is_sent_singly(self) -> None:
        assert self.grouped(*self.complete("a", schedule={"next": {}}), *self.complete("bc")) == ["A", "BC"]

    def test_a_group_has_a_limited_size(self) -> None:
        calls = [self.CALLS.begin_step("run", f"step-{number}", {}) for number in range(2 * MAX_MERGED + 1)]
        assert [len(each) for each in group(calls, range(len(calls)))] == [MAX_MERGED, MAX_MERGED, 1]
