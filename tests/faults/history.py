"""Was that history possible? Recorded calls on a store, held against what one call after the other could answer.

Each call was sent at some time and answered at some later one; a store is right if there is an order of all calls,
each somewhere between the two, in which every answer is the one that the contract gives (Herlihy and Wing's
linearizability). The search is Wing and Gong's, with Lowe's memory of states that led nowhere. Steps know of each other
by the order of completion alone, so each is searched by itself, and the order is checked for the whole run.

A call whose answer is not known (its worker was killed, the server went away) may have taken effect at any time after
it was sent, or never, or more than once: its client may have sent it again, and the network keeps copies. So may the
copies of a call that was answered, if it had to be sent again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Final, NamedTuple

TOLERANCE: Final = 0.005  # the server's clock is cut to milliseconds, and read before the script runs
SEARCH_LIMIT: Final = 500_000  # states; a right store's histories take about one for each call
REMEMBERED: Final = 8  # past attempts whose calls are known again

Claim = str  # its owner, as given to begin_step: each claim has its own
NOBODY: Final = ""


@dataclass(frozen=True, slots=True)
class Op:
    """One call, and what was answered.

    Attributes:
        kind: the operation; "read" for get_step_run.
        claim: whose it is, or whom it would make.
        sent: when, by the wall clock that the server on the same machine has too.
        answered: when; inf if it never was.
        answer: None if it is not known. "execute", attempt, whose input, end of the lease; "busy" or "exhausted",
            attempt, holder; "completed", attempt, holder, output; "superseded"; "schedule" or "skip"; of an extension
            "done", end of the lease; of the rest "done"; of a refused one "stale" with status, attempt and holder, or
            "missing"; of a read status, attempt, holder and payload.
        value: the output of a completion, the error of a failure.
        lease: seconds, of begin and extend.
        limit: max_attempts of a begin; inf for any number.
        resent: whether the client may have sent it more than once, because it connected anew.
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
    limit: float = math.inf
    resent: bool = False


class State(NamedTuple):
    """What is known of a step between two calls. How the lease ends is known within bounds."""

    status: str = "none"
    attempt: int = 0
    released: int = 0
    holder: Claim = NOBODY
    payload: int | None = None  # the output, or the last error
    input_by: Claim = NOBODY
    scheduled_by: Claim = NOBODY
    over_from: float = math.inf
    over_until: float = math.inf
    past: tuple[tuple[Claim, str, int | None], ...] = ()

    def is_held_by(self, claim: Claim) -> bool:
        return self.status == "running" and self.holder == claim


Outcome = tuple[State, tuple[Any, ...]]


def outcomes(state: State, op: Op) -> Iterable[Outcome]:
    """The sequential contract: what the call may do to a step in that state, and what it then returns."""
    match op.kind:
        case "begin":
            return _begin(state, op)
        case "read" | "order":  # the latter, if it was an error
            return [(state, (state.status, state.attempt, state.holder, state.payload))]
        case "schedule":
            return [_schedule(state, op)]
        case "extend" | "expire":
            return [
                (_leased(state, op), ("done", *_end_told(op))) if state.is_held_by(op.claim) else (state, _stale(state))
            ]
        case kind:
            return [_end(state, op, {"complete": "completed", "fail": "failed", "release": "pending"}[kind])]


def _begin(state: State, op: Op) -> Iterator[Outcome]:
    if state.status == "completed":
        yield state, ("completed", state.attempt, state.holder, state.payload)
    elif state.is_held_by(op.claim):
        yield state, ("execute", state.attempt, state.input_by, *_end_told(op, state))
    else:
        if state.status == "running" and state.over_until > op.sent - TOLERANCE:
            yield state, ("busy", state.attempt, state.holder)
        if state.status != "running" or state.over_from <= op.answered + TOLERANCE:
            yield _grant(state, op)


def _grant(state: State, op: Op) -> Outcome:
    if op.claim == state.holder or any(claim == op.claim for claim, _, _ in state.past):
        return state, ("superseded",)
    if state.status in ("running", "failed") and state.attempt - state.released >= op.limit:
        if state.status == "running":
            state = state._replace(status="failed", payload=None, over_from=math.inf, over_until=math.inf)
        return state, ("exhausted", state.attempt, state.holder)
    past = state.past
    if state.holder:
        past = (*past, (state.holder, state.status, state.payload))[-REMEMBERED:]
    granted = State(
        "running",
        state.attempt + 1,
        state.released,
        op.claim,
        None,
        state.input_by if state.status == "pending" else op.claim,
        state.scheduled_by,
        past=past,
    )
    return _leased(granted, op), ("execute", granted.attempt, granted.input_by, *_end_told(op))


def _schedule(state: State, op: Op) -> Outcome:
    if state.status == "none":
        return State("pending", input_by=op.claim, scheduled_by=op.claim), ("schedule",)
    return state, ("schedule" if state.scheduled_by == op.claim else "skip",)


def _end(state: State, op: Op, status: str) -> Outcome:
    if state.is_held_by(op.claim):
        released = state.released + (status == "pending")
        ended = state._replace(status=status, released=released, payload=op.value)
        return ended._replace(over_from=math.inf, over_until=math.inf), ("done",)
    ended = (op.claim, status, op.value)
    if (state.holder, state.status, state.payload) == ended or ended in state.past:
        return state, ("done",)
    return state, _stale(state)


def _stale(state: State) -> tuple[Any, ...]:
    return ("stale", state.status, state.attempt, state.holder) if state.status != "none" else ("missing",)


def _leased(state: State, op: Op) -> State:
    """The state with the lease that the call gave; its end is exact where the answer tells it."""
    told = _end_told(op)
    if told:
        return state._replace(over_from=told[0], over_until=told[0])
    return state._replace(over_from=op.sent + op.lease, over_until=op.answered + op.lease)


def _end_told(op: Op, state: State | None = None) -> tuple[float, ...]:
    """The end of the lease that a right answer tells, if this answer tells one.

    Of the lease that the call gives, or of the one that the state has: any end within the bounds is right.
    """
    if op.answer is None or not isinstance(op.answer[-1], float):
        return ()
    over_from, over_until = op.sent + op.lease, op.answered + op.lease
    if state is not None:
        over_from, over_until = state.over_from, state.over_until
    return (min(max(op.answer[-1], over_from - TOLERANCE), over_until + TOLERANCE),)


@dataclass(frozen=True, slots=True)
class Order:
    """A reading of the steps completed in a run, in their order."""

    run: str
    sent: float
    answered: float
    steps: tuple[str, ...]


@dataclass
class Findings:
    """What is wrong with a history: nothing, if a right store may have made it.

    Attributes:
        doubly_executed: attempts that two claims were told to execute.
        lost: completions that were acknowledged, and that a later answer does not know.
        impossible: what no order of the calls explains, in whatever way; not searched for after any other finding.
        undecided: what was too much to search: neither right nor wrong.
    """

    doubly_executed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    impossible: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        return self.doubly_executed + self.lost + self.impossible

    def add(self, other: Findings) -> None:
        self.doubly_executed += other.doubly_executed
        self.lost += other.lost
        self.impossible += other.impossible
        self.undecided += other.undecided


def check(ops: Sequence[Op], orders: Iterable[Order] = ()) -> Findings:
    """Holds a history against the contract, in each way that there is."""
    found = Findings()
    by_run: dict[str, dict[str, list[Op]]] = defaultdict(lambda: defaultdict(list))
    seen: dict[str, list[Order]] = defaultdict(list)
    for op in ops:
        by_run[op.run][op.step].append(op)
    for order in orders:
        seen[order.run].append(order)
    for run, steps in by_run.items():
        for step, history in steps.items():
            where = f"run {run}, step {step}: "
            found.doubly_executed += [where + problem for problem in _doubly_executed(history)]
        completions = [op for history in steps.values() for op in history if op.kind == "complete"]
        found.impossible += [f"run {run}: {problem}" for problem in _check_order(seen[run], completions)]
    found.lost += lost(ops, [order for each in seen.values() for order in each])
    for run, step, history in (
        (run, step, history) for run, steps in by_run.items() for step, history in steps.items()
    ):
        if found.problems:
            break  # one will do, and to find that there is no order takes long
        verdict, problem = _linearize(history)
        if not verdict:
            (found.undecided if verdict is None else found.impossible).append(f"run {run}, step {step}: {problem}")
    return found


def _doubly_executed(history: list[Op]) -> Iterator[str]:
    executed: dict[int, Claim] = {}
    for op in history:
        if op.kind == "begin" and op.answer is not None and op.answer[0] == "execute":
            other = executed.setdefault(op.answer[1], op.claim)
            if other != op.claim:
                yield f"attempt {op.answer[1]} was executed twice, by {other} and {op.claim}"


def lost(ops: Iterable[Op], orders: Iterable[Order]) -> list[str]:
    """The acknowledged completions that something sent later did not find: the search finds them, too, in its way."""
    done: dict[tuple[str, str], Op] = {}
    for op in ops:
        if op.kind == "complete" and op.answer == ("done",):
            first = done.setdefault((op.run, op.step), op)
            if op.answered < first.answered:
                done[op.run, op.step] = op
    forgotten: dict[tuple[str, str], Any] = {}
    for op in ops:
        completion = done.get((op.run, op.step))
        if completion is None or op.sent <= completion.answered or op.answer is None:
            continue
        known = ("completed", completion.value)
        if (op.kind in ("begin", "read") and (op.answer[0], op.answer[-1]) != known) or (
            op.kind == "complete" and op.answer == ("done",) and op.value != completion.value
        ):
            forgotten[op.run, op.step] = op
    by_run: dict[str, list[tuple[str, Op]]] = defaultdict(list)
    for (run, step), completion in done.items():
        by_run[run].append((step, completion))
    for order in orders:
        for step, completion in by_run[order.run]:
            if completion.answered < order.sent and step not in order.steps:
                forgotten[order.run, step] = order
    return [f"{done[place]} was acknowledged, and then not known to {what}" for place, what in forgotten.items()]


def _linearize(history: list[Op]) -> tuple[bool | None, str]:
    """Searches for an order: True if there is one, None if that is too much to find out; and what is the matter."""
    search = _Search(history)
    # The calls that have taken effect, as bits, and what they led to.
    stack: list[tuple[int, State]] = [(0, State())]
    seen: set[tuple[int, State]] = set()
    furthest = 0
    while stack:
        taken, state = stack.pop()
        taken, first, further = search.step(taken, state)
        if first >= search.known:
            return True, ""
        furthest = max(furthest, first)
        for node in reversed(further):  # what was answered first is tried first, the unanswered last
            if node not in seen:
                seen.add(node)
                stack.append(node)
        if len(seen) > SEARCH_LIMIT:
            return None, f"undecided after {len(seen)} states of {search.known} calls; the first {furthest} fit"
    offender = search.ops[furthest]
    return False, f"no order of the {search.known} answered calls explains them all: {furthest} fit, not {offender}"


class _Search:
    """What the search of one step looks up: calls with a reply, by time, and calls with an unknown outcome."""

    def __init__(self, history: list[Op]) -> None:
        self.ops = sorted((op for op in history if op.answer is not None), key=lambda op: (op.answered, op.sent))
        self.known = len(self.ops)
        unknown = [op for op in history if (op.answer is None or op.resent) and op.kind != "read"]
        self._unknown = sorted((replace(op, answered=math.inf, answer=None) for op in unknown), key=lambda op: op.sent)
        self._told = [_attempt_told(op) for op in self.ops]
        # Of each call and those after it: when the first was sent, and the lowest attempt that is told.
        self._earliest = [math.inf] * (self.known + 1)
        self._lowest = [max([told for told in self._told if told < math.inf], default=0) + len(unknown)] * (
            self.known + 1
        )
        for index in reversed(range(self.known)):
            self._earliest[index] = min(self.ops[index].sent, self._earliest[index + 1])
            self._lowest[index] = min(self._told[index], self._lowest[index + 1])
        self._begins: dict[Claim, int] = defaultdict(int)  # as bits
        for index, op in enumerate(self.ops):
            if op.kind == "begin":
                self._begins[op.claim] |= 1 << index
        for op in self._unknown:
            if op.kind == "begin":
                self._begins[op.claim] |= 1 << self.known  # which is never taken

    def step(self, taken: int, state: State) -> tuple[int, int, list[tuple[int, State]]]:
        """Which calls may be the next to take effect.

        Answers the answered calls that had, with those added that change nothing; the first of the rest; and what each
        of the calls that may be next leads to.
        """
        while True:
            first = (~taken & (taken + 1)).bit_length() - 1
            if first >= self.known:
                return taken, first, []
            further: list[tuple[int, State]] = []
            idle = 0
            end = self.ops[first].answered  # whatever was sent before that may be next
            bound = math.inf  # attempts only grow: none may be reached above what is still told
            index = first
            while index < self.known and self._earliest[index] <= end:
                op = self.ops[index]
                if not taken >> index & 1 and op.sent <= end:
                    bound = min(bound, self._told[index])
                    for after, answer in outcomes(state, op):
                        if op.answer[: len(answer)] == answer:
                            if after == state and self._is_idle(op, taken | 1 << index):
                                idle |= 1 << index
                            further.append((taken | 1 << index, after))
                index += 1
            if not idle:
                break
            # Where a call changes nothing, and never will, it can as well be there at once.
            taken |= idle
        for op in self._unknown:
            if op.sent > end:
                break
            further += [(taken, after) for after, _ in outcomes(state, op) if after != state]
        bound = min(bound, self._lowest[index])
        return taken, first, [node for node in further if node[1].attempt <= bound]

    def _is_idle(self, op: Op, taken: int) -> bool:
        """Whether a call that changes nothing where it is would do so anywhere later.

        The end of a claim could matter yet if the claim was forgotten and granted once more.
        """
        if op.answer != ("done",):
            return op.kind != "extend" or op.answer[0] != "done"
        return op.kind != "expire" and not self._begins[op.claim] & ~taken


def _attempt_told(op: Op) -> float:
    """The attempt that an answer tells of: the step was at it then."""
    if op.answer is None:
        return math.inf
    attempts = [part for part in op.answer[1:3] if isinstance(part, int)]
    return attempts[0] if attempts else math.inf


def _check_order(seen: list[Order], completions: list[Op]) -> Iterator[str]:
    """Every reading is the beginning of one and the same order, which agrees with what happened before what."""
    longest = max((order.steps for order in seen), key=len, default=())
    for order in seen:
        if order.steps != longest[: len(order.steps)]:
            yield f"two orders of completion: {order.steps} and {longest}"
    done: dict[str, float] = {}
    sent: dict[str, float] = {}
    for op in completions:
        sent[op.step] = min(op.sent, sent.get(op.step, math.inf))
        if op.answer == ("done",):
            done[op.step] = min(op.answered, done.get(op.step, math.inf))
    for step in longest:
        if step not in sent:
            yield f"{step} is among the completed {longest}, and no call completed it"
    for earlier, step in combinations(longest, 2):
        if done.get(step, math.inf) < sent.get(earlier, -math.inf):
            yield f"{step} was completed before {earlier} was begun to be, and comes after it in {longest}"
