"""The checker itself: histories that a correct store can produce, and histories that it cannot."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import history
from .history import Findings, Op, Order, State, check, outcomes


def op(kind: str, claim: str, sent: float, received: float, *reply: Any, **more: Any) -> Op:
    lease = 1.0 if kind in ("begin", "extend") else 0.0
    return Op(kind, "run", "step", claim, sent, received, reply or None, **{"lease": lease, **more})


EXECUTED = op("begin", "a", 0, 1, "execute", 1, "a", 1.5)
COMPLETED = op("complete", "a", 2, 3, "done", value=7)
FAILED = op("fail", "a", 2, 3, "done", value=7)

POSSIBLE = {
    "one after the other": [EXECUTED, FAILED, op("begin", "b", 4, 5, "execute", 2, "b", 5.5)],
    "two at once, one gets busy": [EXECUTED, op("begin", "b", 0, 1.2, "busy", 1, "a")],
    "a takeover after the lease has ended": [
        EXECUTED,
        op("begin", "b", 1.4, 1.6, "execute", 2, "b", 2.5),
        op("complete", "a", 2, 3, "stale", "running", 2, "b", value=7),
    ],
    "a completion after the lease, without a takeover": [EXECUTED, op("complete", "a", 9, 10, "done", value=7)],
    "a reply was lost, and another call saw its claim": [
        op("begin", "a", 0, math.inf),
        op("begin", "b", 0.5, 0.6, "busy", 1, "a"),
        op("begin", "b2", 3, 4, "execute", 2, "b2", 4.5),
    ],
    "a request was lost": [
        op("begin", "a", 0, math.inf),
        op("read", "", 1, 2, "none", 0, "", None),
    ],
    "sent twice, and only the second copy got a reply": [
        op("begin", "a", 0, 9, "superseded", resent=True),
        op("begin", "b", 2, 3, "execute", 2, "b", 4.0),
    ],
    "a copy that arrives late": [
        op("extend", "a", 1, 1.2, "done", 2.1, resent=True),
        op("begin", "b", 3, 3.1, "busy", 1, "a"),
        EXECUTED,
    ],
    "an attempt that no reply shows": [op("begin", "a", 0, math.inf), op("begin", "b", 2, 3, "execute", 2, "b", 4.0)],
    "a completion whose reply was lost": [
        EXECUTED,
        op("complete", "a", 2, math.inf, value=7),
        op("begin", "b", 3, 4, "completed", 1, "a", 7),
    ],
    "a failure is sent again during the next attempt": [
        EXECUTED,
        FAILED,
        op("begin", "b", 4, 5, "execute", 2, "b", 5.5),
        op("fail", "a", 5, 6, "done", value=7),
    ],
    "a released attempt does not count and keeps its input": [
        EXECUTED,
        op("release", "a", 2, 3, "done"),
        op("begin", "b", 4, 5, "execute", 2, "a", 5.5, limit=1),
    ],
    "no attempt is left": [
        EXECUTED,
        op("begin", "b", 4, 5, "exhausted", 1, "a", limit=1),
        op("read", "", 6, 7, "failed", 1, "a", None),
    ],
    "a final failure is retried": [
        EXECUTED,
        op("final", "a", 2, 3, "done", value=7),
        op("begin", "b", 4, 5, "failed", 1, "a"),
        op("retry", "r", 6, 7, "done"),
        op("begin", "c", 8, 9, "execute", 3, "a", 9.5, limit=1),
        op("final", "a", 10, 11, "done", value=7),
    ],
    "a different input is refused until a call without a fingerprint replaces it": [
        op("begin", "a", 0, 1, "execute", 1, "a", 1.5, printed="x"),
        op("begin", "b", 1, 1.2, "mismatch", printed="y"),
        op("begin", "b", 1, 1.2, "busy", 1, "a", printed="x"),
        FAILED,
        op("begin", "c", 4, 5, "mismatch", printed="y"),
        op("begin", "d", 6, 7, "execute", 2, "d", 7.5),
        op("begin", "a", 7, 7.1, "superseded", printed="x"),
        op("begin", "e", 9, 10, "execute", 3, "e", 10.5, printed="y"),
    ],
    "a scheduled input is kept": [
        op("schedule", "a", 0, 1, "schedule"),
        op("schedule", "b", 1, 2, "skip"),
        op("begin", "c", 2, 3, "execute", 1, "a", 3.5),
        op("schedule", "a", 4, 5, "schedule"),
    ],
}  # fmt: skip -- one call per line

IMPOSSIBLE = {
    "an attempt executed twice": [EXECUTED, op("begin", "b", 2, 3, "execute", 1, "b", 4.0)],
    "a takeover of a live lease": [EXECUTED, op("begin", "b", 1.1, 1.2, "execute", 2, "b", 2.2)],
    "busy after the lease has ended": [EXECUTED, op("begin", "b", 2, 3, "busy", 1, "a")],
    "a longer lease than requested": [op("begin", "a", 0, 1, "execute", 1, "a", 2.5)],
    "an extension that is too short": [EXECUTED, op("extend", "a", 1, 1.1, "done", 1.9)],
    "a skipped attempt": [EXECUTED, FAILED, op("begin", "b", 4, 5, "execute", 3, "b", 5.5)],
    "a completion by a zombie": [
        EXECUTED,
        op("begin", "b", 1.6, 1.7, "execute", 2, "b", 2.7),
        op("complete", "a", 2, 3, "done", value=7),
    ],
    "a completion without a claim": [COMPLETED],
    "an output that changes": [EXECUTED, COMPLETED, op("begin", "b", 4, 5, "completed", 1, "a", 8)],
    "a forgotten completion": [EXECUTED, COMPLETED, op("read", "", 4, 5, "running", 1, "a", None)],
    "a read of a later state": [
        op("read", "", 0, 1, "running", 1, "a", None),
        op("begin", "a", 2, 3, "execute", 1, "a", 4.0),
    ],
    "stale without a takeover": [EXECUTED, op("complete", "a", 2, 3, "stale", "running", 1, "a", value=7)],
    "superseded although it was sent once": [op("begin", "a", 0, 1, "superseded")],
    "a failure sent again with another error": [EXECUTED, FAILED, op("fail", "a", 4, 5, "done", value=8)],
    "a released attempt that counts": [
        EXECUTED,
        op("release", "a", 2, 3, "done"),
        op("begin", "b", 4, 5, "exhausted", 1, "a", limit=1),
    ],
    "an attempt after a final failure": [
        EXECUTED,
        op("final", "a", 2, 3, "done", value=7),
        op("begin", "b", 4, 5, "execute", 2, "b", 5.5),
    ],
    "a final failure that is sent again as an ordinary one": [
        EXECUTED,
        op("final", "a", 2, 3, "done", value=7),
        op("fail", "a", 4, 5, "done", value=7),
    ],
    "a retry that has no effect": [
        EXECUTED,
        op("final", "a", 2, 3, "done", value=7),
        op("retry", "r", 4, 5, "done"),
        op("begin", "b", 6, 7, "failed", 1, "a"),
    ],
    "a retry of a live claim": [EXECUTED, op("retry", "r", 1.1, 1.2, "done")],
    "one attempt too many": [EXECUTED, FAILED, op("begin", "b", 4, 5, "execute", 2, "b", 5.5, limit=1)],
    "a different input that is accepted": [
        op("begin", "a", 0, 1, "execute", 1, "a", 1.5, printed="x"),
        op("begin", "b", 4, 5, "execute", 2, "b", 5.5, printed="y"),
    ],
    "the same input refused": [
        op("begin", "a", 0, 1, "execute", 1, "a", 1.5, printed="x"),
        op("begin", "b", 4, 5, "mismatch", printed="x"),
    ],
    "a replaced input that keeps its fingerprint": [
        op("begin", "a", 0, 1, "execute", 1, "a", 1.5, printed="x"),
        op("begin", "b", 4, 5, "execute", 2, "b", 5.5),
        op("begin", "c", 5.2, 5.3, "mismatch", printed="y"),
    ],
    "a scheduled input that is replaced": [
        op("schedule", "a", 0, 1, "schedule"),
        op("begin", "b", 2, 3, "execute", 1, "b", 3.5),
    ],
}  # fmt: skip -- a table


@pytest.mark.parametrize("name", POSSIBLE)
def test_possible_history_is_accepted(name: str) -> None:
    assert check(POSSIBLE[name]) == Findings()


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_history_is_found(name: str) -> None:
    assert check(IMPOSSIBLE[name]).problems


class TestFindings:
    def test_attempt_granted_twice_counts_as_doubly_executed(self) -> None:
        found = check(IMPOSSIBLE["an attempt executed twice"])
        assert (len(found.doubly_executed), len(found.lost)) == (1, 0)

    @pytest.mark.parametrize(
        "later",
        [
            op("read", "", 4, 5, "running", 1, "a", None),
            op("read", "", 4, 5, "none", 0, "", None),
            op("begin", "b", 4, 5, "execute", 2, "b", 5.5),
            op("begin", "b", 4, 5, "busy", 1, "a"),
            op("begin", "b", 4, 5, "completed", 1, "a", 8),
            op("complete", "b", 4, 5, "done", value=8),
        ],
    )
    def test_acknowledged_completion_missing_from_later_reply_counts_as_lost(self, later: Op) -> None:
        assert len(check([EXECUTED, COMPLETED, later]).lost) == 1

    def test_completion_missing_from_a_later_order_counts_as_lost(self) -> None:
        assert len(check([EXECUTED, COMPLETED], [Order("run", 4, 5, ())]).lost) == 1

    def test_completion_not_acknowledged_before_the_read_is_not_lost(self) -> None:
        read = op("read", "", 2.5, 5, "running", 1, "a", None)
        assert not check([EXECUTED, COMPLETED, read]).lost
        assert not check([EXECUTED, replace(COMPLETED, reply=None), replace(read, sent=4)]).lost

    def test_search_that_exceeds_its_limit_is_undecided(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(history, "SEARCH_LIMIT", 1)
        found = check(POSSIBLE["one after the other"])
        assert (found.problems, len(found.undecided)) == ([], 1)


class TestCompletionOrder:
    DONE = [
        Op("complete", "run", step, step, sent, sent + 1, ("done",), 1) for step, sent in (("a", 0), ("b", 2), ("c", 4))
    ]

    @staticmethod
    def problems(*orders: Order) -> list[str]:
        begun = [
            Op("begin", "run", op.step, op.step, -2, -1, ("execute", 1, op.step, 97.5), None, 99.0)
            for op in TestCompletionOrder.DONE
        ]
        return check([*begun, *TestCompletionOrder.DONE], orders).problems

    def test_order_may_grow(self) -> None:
        assert self.problems(Order("run", 1.5, 1.6, ("a",)), Order("run", 9, 10, ("a", "b", "c"))) == []

    def test_two_different_orders_are_found(self) -> None:
        assert self.problems(Order("run", 4.5, 4.6, ("b", "a")), Order("run", 9, 10, ("a", "b", "c")))

    def test_order_that_contradicts_the_times_is_found(self) -> None:
        assert self.problems(Order("run", 9, 10, ("b", "a", "c")))

    def test_acknowledged_completion_missing_from_the_order_is_found(self) -> None:
        assert self.problems(Order("run", 9, 10, ("a", "b")))

    def test_step_without_completion_in_the_order_is_found(self) -> None:
        assert self.problems(Order("run", 9, 10, ("a", "b", "c", "d")))


KINDS = ("begin", "begin", "begin", "fail", "final", "complete", "release", "extend", "retry", "read")


@st.composite
def histories(draw: st.DrawFn) -> list[Op]:
    """Overlapping calls with the replies of a sequential execution; then some replies are changed or dropped."""
    state, ops = State(), []
    for number in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(KINDS))
        claim = "" if kind == "read" else draw(st.sampled_from("abc"))
        sent, received = number - draw(st.sampled_from([0.1, 1.5])), number + draw(st.sampled_from([0.1, 1.5]))
        limit, resent = draw(st.sampled_from([math.inf, math.inf, 1])), draw(st.sampled_from([False, False, True]))
        value = None if kind == "release" else 1
        call = Op(kind, "run", "step", claim, sent, received, None, value, 0.5, limit, resent=resent)
        state, reply = draw(st.sampled_from(list(outcomes(state, call))))
        ops.append(replace(call, reply=reply))
    for index in draw(st.sets(st.integers(0, len(ops) - 1), max_size=2)):
        reply = draw(st.sampled_from([None, *(op.reply for op in ops if op.kind == ops[index].kind)]))
        ops[index] = replace(ops[index], reply=reply, received=math.inf if reply is None else ops[index].received)
    return ops


def has_order(ops: list[Op]) -> bool:
    """Returns whether an order explains the replies, by trying every order."""
    unknown = [replace(op, reply=None, received=math.inf) for op in ops if op.reply is None or op.resent]
    grants = sum(op.kind in ("begin", "retry") for op in ops)  # the most attempts that are possible
    seen: set[tuple[tuple[int, ...], State]] = set()

    def search(left: tuple[int, ...], state: State) -> bool:
        if not left:
            return True
        if (left, state) in seen or state.attempt > grants:
            return False
        seen.add((left, state))
        end = min(ops[index].received for index in left)
        return any(
            search(tuple(other for other in left if other != index), after)
            for index in left
            if ops[index].sent <= end
            for after, reply in outcomes(state, ops[index])
            if ops[index].reply[: len(reply)] == reply
        ) or any(search(left, after) for op in unknown if op.sent <= end for after, _ in outcomes(state, op))

    return search(tuple(index for index, op in enumerate(ops) if op.reply is not None), State())


@settings(max_examples=250)
@given(histories())
@pytest.mark.slow
def test_search_agrees_with_trying_every_order(ops: list[Op]) -> None:
    verdict, _ = history._linearize(ops)
    assert verdict == has_order(ops)
