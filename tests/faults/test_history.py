"""The checker itself: histories that a right store can have made, and such as it cannot have."""

from __future__ import annotations

import math
from typing import Any

import pytest

from .history import Findings, Op, Order, check


def op(kind: str, claim: str, sent: float, answered: float, *answer: Any, value: int | None = None) -> Op:
    lease = 1.0 if kind in ("begin", "extend") else 0.0
    return Op(kind, "run", "step", claim, sent, answered, answer or None, value, lease)


EXECUTED = op("begin", "a", 0, 1, "execute", 1, "a", 1.5)

POSSIBLE = {
    "one after the other": [EXECUTED, op("fail", "a", 2, 3, "done"), op("begin", "b", 4, 5, "execute", 2, "b", 5.5)],
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
        Op("begin", "run", "step", "a", 0, 9, ("lost",), None, 1.0, copies=1),
        op("begin", "b", 2, 3, "execute", 2, "b", 4.0),
    ],
    "an attempt that nobody saw": [op("begin", "a", 0, math.inf), op("begin", "b", 2, 3, "execute", 2, "b", 4.0)],
    "completed by the one whose answer was lost": [
        EXECUTED,
        op("complete", "a", 2, math.inf, value=7),
        op("begin", "b", 3, 4, "completed", 1, "a", 7),
    ],
}  # fmt: skip -- one call a line

IMPOSSIBLE = {
    "an attempt executed twice": [EXECUTED, op("begin", "b", 2, 3, "execute", 1, "b", 4.0)],
    "a takeover of a live lease": [EXECUTED, op("begin", "b", 1.1, 1.2, "execute", 2, "b", 2.2)],
    "busy for ever": [EXECUTED, op("begin", "b", 2, 3, "busy", 1, "a")],
    "an attempt left out": [EXECUTED, op("fail", "a", 2, 3, "done"), op("begin", "b", 4, 5, "execute", 3, "b", 5.5)],
    "a zombie that completes": [
        EXECUTED,
        op("begin", "b", 1.6, 1.7, "execute", 2, "b", 2.7),
        op("complete", "a", 2, 3, "done", value=7),
    ],
    "an output that changes": [
        EXECUTED,
        op("complete", "a", 2, 3, "done", value=7),
        op("begin", "b", 4, 5, "completed", 1, "a", 8),
    ],
    "a completion that is forgotten": [
        EXECUTED,
        op("complete", "a", 2, 3, "done", value=7),
        op("read", "", 4, 5, "running", 1, "a", None),
    ],
    "a read of what is yet to come": [
        op("read", "", 0, 1, "running", 1, "a", None),
        op("begin", "a", 2, 3, "execute", 1, "a", 4.0),
    ],
    "stale although nobody took over": [EXECUTED, op("complete", "a", 2, 3, "stale", "running", 1, "a", value=7)],
    "lost although it was sent once": [op("begin", "a", 0, 1, "lost")],
}  # fmt: skip -- likewise


@pytest.mark.parametrize("name", POSSIBLE)
def test_what_a_right_store_may_answer_is_accepted(name: str) -> None:
    assert check(POSSIBLE[name]) == Findings()


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_right_store_answers_is_found(name: str) -> None:
    assert check(IMPOSSIBLE[name]).problems


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
