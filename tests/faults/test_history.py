"""The checker itself: histories that a right store can have made, and such as it cannot have."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from . import history
from .history import Findings, Op, Order, State, check, outcomes


def op(kind: str, claim: str, sent: float, answered: float, *answer: Any, **more: Any) -> Op:
    lease = 1.0 if kind in ("begin", "extend") else 0.0
    return Op(kind, "run", "step", claim, sent, answered, answer or None, **{"lease": lease, **more})


EXECUTED = op("begin", "a", 0, 1, "execute", 1, "a", 1.5)
COMPLETED = op("complete", "a", 2, 3, "done", value=7)
FAILED = op("fail", "a", 2, 3, "done", value=7)

POSSIBLE = {
    "one after the other": [EXECUTED, FAILED, op("begin", "b", 4, 5, "execute", 2, "b", 5.5)],
    "two at once, one is busy": [EXECUTED, op("begin", "b", 0, 1.2, "busy", 1, "a")],
    "a takeover when the lease is over": [
        EXECUTED,
        op("begin", "b", 1.4, 1.6, "execute", 2, "b", 2.5),
        op("complete", "a", 2, 3, "stale", "running", 2, "b", value=7),
    ],
    "late is not wrong": [EXECUTED, op("complete", "a", 9, 10, "done", value=7)],
    "an answer was lost, and its claim seen": [
        op("begin", "a", 0, math.inf),
        op("begin", "b", 0.5, 0.6, "busy", 1, "a"),
        op("begin", "b2", 3, 4, "execute", 2, "b2", 4.5),
    ],
    "an answer was lost, and the call never arrived": [
        op("begin", "a", 0, math.inf),
        op("read", "", 1, 2, "none", 0, "", None),
    ],
    "sent twice, and only the second copy answered": [
        op("begin", "a", 0, 9, "superseded", resent=True),
        op("begin", "b", 2, 3, "execute", 2, "b", 4.0),
    ],
    "a copy that arrives late": [
        op("extend", "a", 1, 1.2, "done", 2.1, resent=True),
        op("begin", "b", 3, 3.1, "busy", 1, "a"),
        EXECUTED,
    ],
    "an attempt that no reply showed": [op("begin", "a", 0, math.inf), op("begin", "b", 2, 3, "execute", 2, "b", 4.0)],
    "completed by the one whose answer was lost": [
        EXECUTED,
        op("complete", "a", 2, math.inf, value=7),
        op("begin", "b", 3, 4, "completed", 1, "a", 7),
    ],
    "a failure is sent again when the next attempt is at work": [
        EXECUTED,
        FAILED,
        op("begin", "b", 4, 5, "execute", 2, "b", 5.5),
        op("fail", "a", 5, 6, "done", value=7),
    ],
    "a released attempt does not count, and its input stays": [
        EXECUTED,
        op("release", "a", 2, 3, "done"),
        op("begin", "b", 4, 5, "execute", 2, "a", 5.5, limit=1),
    ],
    "no attempt is left": [
        EXECUTED,
        op("begin", "b", 4, 5, "exhausted", 1, "a", limit=1),
        op("read", "", 6, 7, "failed", 1, "a", None),
    ],
    "a scheduled input stays": [
        op("schedule", "a", 0, 1, "schedule"),
        op("schedule", "b", 1, 2, "skip"),
        op("begin", "c", 2, 3, "execute", 1, "a", 3.5),
        op("schedule", "a", 4, 5, "schedule"),
    ],
}  # fmt: skip -- one call a line

IMPOSSIBLE = {
    "an attempt executed twice": [EXECUTED, op("begin", "b", 2, 3, "execute", 1, "b", 4.0)],
    "a takeover of a live lease": [EXECUTED, op("begin", "b", 1.1, 1.2, "execute", 2, "b", 2.2)],
    "busy for ever": [EXECUTED, op("begin", "b", 2, 3, "busy", 1, "a")],
    "a longer lease than was asked for": [op("begin", "a", 0, 1, "execute", 1, "a", 2.5)],
    "an extension by too little": [EXECUTED, op("extend", "a", 1, 1.1, "done", 1.9)],
    "an attempt left out": [EXECUTED, FAILED, op("begin", "b", 4, 5, "execute", 3, "b", 5.5)],
    "a zombie that completes": [
        EXECUTED,
        op("begin", "b", 1.6, 1.7, "execute", 2, "b", 2.7),
        op("complete", "a", 2, 3, "done", value=7),
    ],
    "a completion without a claim": [COMPLETED],
    "an output that changes": [EXECUTED, COMPLETED, op("begin", "b", 4, 5, "completed", 1, "a", 8)],
    "a completion that is forgotten": [EXECUTED, COMPLETED, op("read", "", 4, 5, "running", 1, "a", None)],
    "a read of what is yet to come": [
        op("read", "", 0, 1, "running", 1, "a", None),
        op("begin", "a", 2, 3, "execute", 1, "a", 4.0),
    ],
    "stale without a takeover": [EXECUTED, op("complete", "a", 2, 3, "stale", "running", 1, "a", value=7)],
    "lost although it was sent once": [op("begin", "a", 0, 1, "superseded")],
    "sent again, and it says otherwise": [EXECUTED, FAILED, op("fail", "a", 4, 5, "done", value=8)],
    "a released attempt that counts": [
        EXECUTED,
        op("release", "a", 2, 3, "done"),
        op("begin", "b", 4, 5, "exhausted", 1, "a", limit=1),
    ],
    "one attempt too many": [EXECUTED, FAILED, op("begin", "b", 4, 5, "execute", 2, "b", 5.5, limit=1)],
    "a scheduled input that is replaced": [
        op("schedule", "a", 0, 1, "schedule"),
        op("begin", "b", 2, 3, "execute", 1, "b", 3.5),
    ],
}  # fmt: skip -- a table


@pytest.mark.parametrize("name", POSSIBLE)
def test_what_a_right_store_may_answer_is_accepted(name: str) -> None:
    assert check(POSSIBLE[name]) == Findings()


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_right_store_answers_is_found(name: str) -> None:
    assert check(IMPOSSIBLE[name]).problems


class TestWhatIsCounted:
    def test_an_attempt_that_two_executed(self) -> None:
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
    def test_a_completion_that_was_acknowledged_and_is_not_there(self, later: Op) -> None:
        assert len(check([EXECUTED, COMPLETED, later]).lost) == 1

    def test_a_completion_that_the_order_leaves_out(self) -> None:
        assert len(check([EXECUTED, COMPLETED], [Order("run", 4, 5, ())]).lost) == 1

    def test_no_completion_that_was_not_acknowledged_or_not_before(self) -> None:
        read = op("read", "", 2.5, 5, "running", 1, "a", None)
        assert not check([EXECUTED, COMPLETED, read]).lost
        assert not check([EXECUTED, replace(COMPLETED, answer=None), replace(read, sent=4)]).lost

    def test_too_much_to_search_is_neither_right_nor_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(history, "SEARCH_LIMIT", 1)
        found = check(POSSIBLE["one after the other"])
        assert (found.problems, len(found.undecided)) == ([], 1)


class TestTheOrderOfCompletion:
    DONE = [
        Op("complete", "run", step, step, sent, sent + 1, ("done",), 1) for step, sent in (("a", 0), ("b", 2), ("c", 4))
    ]

    @staticmethod
    def problems(*orders: Order) -> list[str]:
        begun = [
            Op("begin", "run", op.step, op.step, -2, -1, ("execute", 1, op.step, 97.5), None, 99.0)
            for op in TestTheOrderOfCompletion.DONE
        ]
        return check([*begun, *TestTheOrderOfCompletion.DONE], orders).problems

    def test_grows(self) -> None:
        assert self.problems(Order("run", 1.5, 1.6, ("a",)), Order("run", 9, 10, ("a", "b", "c"))) == []

    def test_is_one(self) -> None:
        assert self.problems(Order("run", 4.5, 4.6, ("b", "a")), Order("run", 9, 10, ("a", "b", "c")))

    def test_agrees_with_what_was_completed_before_what(self) -> None:
        assert self.problems(Order("run", 9, 10, ("b", "a", "c")))

    def test_leaves_none_out(self) -> None:
        assert self.problems(Order("run", 9, 10, ("a", "b")))

    def test_has_none_that_nobody_completed(self) -> None:
        assert self.problems(Order("run", 9, 10, ("a", "b", "c", "d")))


@st.composite
def histories(draw: st.DrawFn) -> list[Op]:
    """A few calls that overlap, as one after the other would have answered them: then some answers are spoilt."""
    state, ops = State(), []
    for number in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["begin", "begin", "begin", "fail", "complete", "release", "extend", "read"]))
        claim = "" if kind == "read" else draw(st.sampled_from("abc"))
        sent, answered = number - draw(st.sampled_from([0.1, 1.5])), number + draw(st.sampled_from([0.1, 1.5]))
        limit, resent = draw(st.sampled_from([math.inf, math.inf, 1])), draw(st.sampled_from([False, False, True]))
        value = None if kind == "release" else 1
        call = Op(kind, "run", "step", claim, sent, answered, None, value, 0.5, limit, resent)
        state, answer = draw(st.sampled_from(list(outcomes(state, call))))
        ops.append(replace(call, answer=answer))
    for index in draw(st.sets(st.integers(0, len(ops) - 1), max_size=2)):
        answer = draw(st.sampled_from([None, *(op.answer for op in ops if op.kind == ops[index].kind)]))
        ops[index] = replace(ops[index], answer=answer, answered=math.inf if answer is None else ops[index].answered)
    return ops


def has_order(ops: list[Op]) -> bool:
    """Tries every order."""
    unknown = [replace(op, answer=None, answered=math.inf) for op in ops if op.answer is None or op.resent]
    grants = sum(op.kind == "begin" for op in ops)  # and no more attempts than that
    seen: set[tuple[tuple[int, ...], State]] = set()

    def search(left: tuple[int, ...], state: State) -> bool:
        if not left:
            return True
        if (left, state) in seen or state.attempt > grants:
            return False
        seen.add((left, state))
        end = min(ops[index].answered for index in left)
        return any(
            search(tuple(other for other in left if other != index), after)
            for index in left
            if ops[index].sent <= end
            for after, answer in outcomes(state, ops[index])
            if ops[index].answer[: len(answer)] == answer
        ) or any(search(left, after) for op in unknown if op.sent <= end for after, _ in outcomes(state, op))

    return search(tuple(index for index, op in enumerate(ops) if op.answer is not None), State())


@settings(max_examples=500)
@given(histories())
@pytest.mark.slow
def test_the_search_finds_an_order_where_there_is_one_and_none_where_there_is_none(ops: list[Op]) -> None:
    verdict, _ = history._linearize(ops)
    assert verdict == has_order(ops)
