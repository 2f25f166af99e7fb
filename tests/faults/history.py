"""Was that history possible? Recorded calls on a store, held against what one call after the other could answer.

Each call was sent at some time and answered at some later one; a store is right if there is an order of all calls,
each somewhere between the two, in which every answer is the one that the contract gives (Herlihy and Wing's
linearizability). The search is Wing and Gong's, with Lowe's memory of states that led nowhere. Steps know of each other
by the order of completion alone, so each is searched by itself, and the order is checked for the whole run.

A call whose answer is not known (its worker was killed, the server went away) may have taken effect at any time after
it was sent, or never.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

TOLERANCE: Final = 0.005  # the server's clock is cut to milliseconds, and read before the script runs
SEARCH_LIMIT: Final = 200_000
REMEMBERED: Final = 8  # past attempts whose calls are known again

Claim = str  # its owner, as given to begin_step: each claim has its own
NOBODY: Final = ""


@dataclass(frozen=True, slots=True)
class Op:
    """One call, and what was answered.

    Attributes:
        kind: the operation; "read" for get_step_run.
        claim: whose it is, or whom it would make.
        value: the output of a completion.
        lease: seconds, of begin and extend.
        resent: whether the client may have sent it more than once, because it had to connect anew.
        sent: when, by the wall clock that the server on the same machine has too.
        answered: when; inf if it never was.
        answer: None if it is not known. "execute", attempt, end of the lease; "busy", attempt, holder; "completed",
            attempt, output; "lost"; or for others "done", "stale" with status, attempt and holder; of a read status,
            attempt, holder and output.
    """

    kind: str
    run: str
    step: str
    claim: Claim
    sent: float
    answered: float = math.inf
    answer: tuple[Any, ...] | None = None
    value: int | None = None
    lease: float = 0.0
    resent: bool = False


class State(NamedTuple):
    """What is known of a step between two calls. How the lease ends is known within bounds."""

    status: str = "none"
    attempt: int = 0
    holder: Claim = NOBODY
    output: int | None = None
    over_from: float = math.inf
    over_until: float = math.inf
    past: tuple[tuple[Claim, str], ...] = ()

    def is_held_by(self, claim: Claim) -> bool:
        return self.status == "running" and self.holder == claim


def outcomes(state: State, op: Op) -> Iterator[tuple[State, tuple[Any, ...]]]:
    """The sequential contract: what the call may do to a step in that state, and what it then answers."""
    if op.kind == "begin":
        yield from _begin(state, op)
    elif op.kind == "read":
        yield state, (state.status, state.attempt, state.holder, state.output)
    elif op.kind == "extend":
        yield (_leased(state, op), ("done",)) if state.is_held_by(op.claim) else (state, _stale(state))
    else:
        yield _end(state, op, {"complete": "completed", "fail": "failed", "release": "pending"}[op.kind])


def _begin(state: State, op: Op) -> Iterator[tuple[State, tuple[Any, ...]]]:
    if state.status == "completed":
        yield state, ("completed", state.attempt, state.output)
    elif state.is_held_by(op.claim):
        yield state, ("execute", state.attempt)
    else:
        if state.status == "running" and state.over_until > op.sent - TOLERANCE:
            yield state, ("busy", state.attempt, state.holder)
        if state.status != "running" or state.over_from <= op.answered + TOLERANCE:
            if op.claim == state.holder or any(claim == op.claim for claim, _ in state.past):
                yield state, ("lost",)
                return
            past = (*state.past, (state.holder, state.status))[-REMEMBERED:] if state.holder else state.past
            granted = State("running", state.attempt + 1, op.claim, past=past)
            yield _leased(granted, op), ("execute", granted.attempt)


def _end(state: State, op: Op, status: str) -> tuple[State, tuple[Any, ...]]:
    if state.is_held_by(op.claim):
        return state._replace(status=status, output=op.value, over_from=math.inf, over_until=math.inf), ("done",)
    sent_again = (state.holder, state.status, state.output) == (op.claim, status, op.value)
    if sent_again or (status != "completed" and (op.claim, status) in state.past):
        return state, ("done",)
    return state, _stale(state)


def _stale(state: State) -> tuple[Any, ...]:
    return ("stale", state.status, state.attempt, state.holder) if state.status != "none" else ("missing",)


def _leased(state: State, op: Op) -> State:
    """The state with the lease that the call gave; its end is exact where the answer tells it."""
    if op.kind == "begin" and op.answer is not None and op.answer[0] == "execute":
        return state._replace(over_from=op.answer[2], over_until=op.answer[2])
    return state._replace(over_from=op.sent + op.lease, over_until=op.answered + op.lease)


def check(ops: Sequence[Op], orders: Iterable[Order] = ()) -> list[str]:
    """What is wrong with a history: nothing, if a right store may have made it."""
    problems: list[str] = []
    by_step: dict[tuple[str, str], list[Op]] = defaultdict(list)
    for op in ops:
        by_step[op.run, op.step].append(op)
    for (run, step), history in by_step.items():
        problem = _one_execute_per_attempt(history) or _linearize(history)
        if problem:
            problems.append(f"run {run}, step {step}: {problem}")
    by_run: dict[str, list[Order]] = defaultdict(list)
    for order in orders:
        by_run[order.run].append(order)
    for run, seen in by_run.items():
        completions = [op for op in ops if op.run == run and op.kind == "complete"]
        problems += [f"run {run}: {problem}" for problem in _check_order(seen, completions)]
    return problems


def _one_execute_per_attempt(history: list[Op]) -> str | None:
    """Follows from the search, but says more plainly what is wrong."""
    executed: dict[int, Claim] = {}
    for op in history:
        if op.kind == "begin" and op.answer is not None and op.answer[0] == "execute":
            other = executed.setdefault(op.answer[1], op.claim)
            if other != op.claim:
                return f"attempt {op.answer[1]} was executed twice, by {other} and {op.claim}"
    return None


def _linearize(history: list[Op]) -> str | None:
    """Searches for an order; None if there is one."""
    # Of a call that was sent twice, the first copy may have taken effect, and the second been refused. One that is
    # granted tells of both.
    refused = [op for op in history if op.resent and op.kind in ("begin", "extend") and op.answer is not None]
    history = history + [replace(op, answer=None) for op in refused if op.answer[:1] not in (("execute",), ("done",))]
    history.sort(key=lambda op: (op.answer is None, op.answered, op.sent))
    known = sum(op.answer is not None for op in history)
    # Which calls may be the next to take effect, if this is the first whose answer is still to be explained.
    next_after = [
        [index for index in range(first, len(history)) if history[index].sent <= history[first].answered]
        for first in range(known)
    ]
    seen: set[tuple[int, State]] = set()
    # The calls that have taken effect, as bits; what they led to; when the last of them was sent.
    stack: list[tuple[int, State, float]] = [(0, State(), -math.inf)]
    furthest = 0
    while stack:
        taken, state, now = stack.pop()
        first = (~taken & (taken + 1)).bit_length() - 1
        if first >= known:
            return None
        if (taken, state) in seen:
            continue
        seen.add((taken, state))
        if len(seen) > SEARCH_LIMIT:
            return f"undecided after {len(seen)} states"
        furthest = max(furthest, first)
        further: list[tuple[int, State, float]] = []
        for index in next_after[first]:
            op = history[index]
            if not taken >> index & 1 and op.answered >= now:
                for after, answer in outcomes(state, op):
                    if op.answer[: len(answer)] == answer if op.answer is not None else after != state:
                        further.append((taken | 1 << index, after, max(now, op.sent)))
        stack += reversed(further)  # what was answered first is tried first, the unanswered last
    return (
        f"no order of the {known} answered calls explains them all; the first {furthest} fit, not {history[furthest]}"
    )


@dataclass(frozen=True, slots=True)
class Order:
    """A reading of the steps completed in a run, in their order."""

    run: str
    sent: float
    answered: float
    steps: tuple[str, ...]


def _check_order(seen: list[Order], completions: list[Op]) -> Iterator[str]:
    """Every reading is the beginning of one and the same order, which agrees with what happened before what."""
    longest = max((order.steps for order in seen), key=len, default=())
    place = {step: index for index, step in enumerate(longest)}
    first_done: dict[str, float] = {}
    first_sent: dict[str, float] = {}
    for op in completions:
        first_sent[op.step] = min(op.sent, first_sent.get(op.step, math.inf))
        if op.answer == ("done",):
            first_done[op.step] = min(op.answered, first_done.get(op.step, math.inf))
    for order in seen:
        if order.steps != longest[: len(order.steps)]:
            yield f"two orders of completion: {order.steps} and {longest}"
        for step, done in first_done.items():
            if done < order.sent and step not in order.steps:
                yield f"{step} was completed before {order.steps} was read"
    for step, other in ((a, b) for a in first_done for b in first_done if first_done[a] < first_sent[b]):
        if step in place and other in place and place[step] > place[other]:
            yield f"{step} was completed before {other} was begun to be, and comes after it in {longest}"
