"""Checks whether recorded calls on a store are linearizable (Herlihy and Wing).

Each call takes effect at some moment between its request and its reply. A history is linearizable if some order of
these moments explains every reply by the contract. The search is that of Wing and Gong, with Lowe's cache of states
that were already tried. Steps affect each other only through the completion order, so each step is searched
separately, and the completion order is checked for the whole run.

A call with an unknown reply (its worker was killed, or the server was away) may have taken effect at any time after it
was sent, or never, or more than once, because its client may have retried it and the network may hold copies. The same
holds for the copies of a call that was retried and then got a reply.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Final, NamedTuple

TOLERANCE: Final = 0.005  # the server truncates its clock to milliseconds, and reads it before the script runs
SEARCH_LIMIT: Final = 500_000  # states; histories of a correct store take about one per call
PAST_ATTEMPTS: Final = 8  # how many past attempts the store recognizes by their calls

Claim = str  # the claim's owner, as given to begin_step; unique for each claim
NO_CLAIM: Final = ""


@dataclass(frozen=True, slots=True)
class Op:
    """One call and its reply.

    Attributes:
        kind: the operation; "read" for get_step_run, "order" for a failed read of the completion order.
        run: the run.
        step: the step.
        claim: the claim that the call uses, or would create.
        sent: when it was sent, by the wall clock, which the server on the same machine shares.
        received: when the reply was received; inf if there is none.
        reply: None if it is unknown. For a begin: ("execute", attempt, author of the input, end of the lease),
            ("busy", "failed" or "exhausted", attempt, holder), ("completed", attempt, holder, output),
            ("superseded",) or ("mismatch",). For a
            schedule: ("schedule",) or ("skip",). For an extension: ("done", end of the lease). For other writes:
            ("done",). For a rejected write: ("stale", status, attempt, holder) or ("missing",). For a read: (status,
            attempt, holder, payload).
        value: the output of a completion, or the error of a failure.
        lease: the lease of a begin or an extension, in seconds.
        limit: max_attempts of a begin; inf for no limit.
        printed: the fingerprint of a begin; empty for none.
        resent: whether the client may have sent the call more than once, because it reconnected.
    """

    kind: str
    run: str
    step: str
    claim: Claim
    sent: float
    received: float = math.inf
    reply: tuple[Any, ...] | None = None
    value: int | None = None
    lease: float = 0.0
    limit: float = math.inf
    printed: str = ""
    resent: bool = False


class State(NamedTuple):
    """The state of a step between two calls. The end of its lease is known within bounds.

    Attributes:
        status: as a reply shows it, but "final" for a failure that only a retry ends.
    """

    status: str = "none"
    attempt: int = 0
    released: int = 0
    holder: Claim = NO_CLAIM
    payload: int | None = None  # the output, or the last error
    input_by: Claim = NO_CLAIM
    scheduled_by: Claim = NO_CLAIM
    earliest_end: float = math.inf
    latest_end: float = math.inf
    past: tuple[tuple[Claim, str, int | None], ...] = ()
    printed: str = ""  # the fingerprint of the input

    @property
    def shown(self) -> str:
        """The status in a reply."""
        return "failed" if self.status == "final" else self.status

    def is_held_by(self, claim: Claim) -> bool:
        return self.status == "running" and self.holder == claim

    def knows(self, claim: Claim) -> bool:
        return claim == self.holder or any(claim == past for past, _, _ in self.past)


Outcome = tuple[State, tuple[Any, ...]]

ENDS: Final = {"complete": "completed", "fail": "failed", "final": "final", "release": "pending"}


def outcomes(state: State, op: Op) -> Iterable[Outcome]:
    """The sequential contract: the states that a call may lead to, each with the call's reply."""
    match op.kind:
        case "begin":
            return _begin(state, op)
        case "read" | "order":
            return [(state, (state.shown, state.attempt, state.holder, state.payload))]
        case "schedule":
            return [_schedule(state, op)]
        case "extend" | "expire":
            if state.is_held_by(op.claim):
                return [(_with_lease(state, op), ("done", *_reported_end(op)))]
            return [(state, _stale(state))]
        case "retry":
            return _retry(state, op)
        case kind:
            return [_end(state, op, ENDS[kind])]


def _begin(state: State, op: Op) -> Iterator[Outcome]:
    if state.printed and op.printed not in ("", state.printed) and not state.knows(op.claim):
        yield state, ("mismatch",)
    elif state.status == "completed":
        yield state, ("completed", state.attempt, state.holder, state.payload)
    elif state.status == "final":
        yield state, ("failed", state.attempt, state.holder)
    elif state.is_held_by(op.claim):
        yield state, ("execute", state.attempt, state.input_by, *_reported_end(op, state))
    else:
        if state.status == "running" and state.latest_end > op.sent - TOLERANCE:
            yield state, ("busy", state.attempt, state.holder)
        if state.status != "running" or state.earliest_end <= op.received + TOLERANCE:
            yield _grant(state, op)


def _grant(state: State, op: Op) -> Outcome:
    if state.knows(op.claim):
        return state, ("superseded",)
    if state.status in ("running", "failed") and state.attempt - state.released >= op.limit:
        if state.status == "running":
            state = state._replace(status="failed", payload=None, earliest_end=math.inf, latest_end=math.inf)
        return state, ("exhausted", state.attempt, state.holder)
    granted = State(
        "running",
        state.attempt + 1,
        state.released,
        op.claim,
        None,
        state.input_by if state.status == "pending" else op.claim,
        state.scheduled_by,
        past=_past(state),
        printed=op.printed or (state.printed if state.status == "pending" else ""),
    )
    return _with_lease(granted, op), ("execute", granted.attempt, granted.input_by, *_reported_end(op))


def _past(state: State) -> tuple[tuple[Claim, str, int | None], ...]:
    """Returns the past attempts, when the latest becomes one of them."""
    if not state.holder:
        return state.past
    return (*state.past, (state.holder, state.status, state.payload))[-PAST_ATTEMPTS:]


def _retry(state: State, op: Op) -> Iterator[Outcome]:
    if state.knows(op.claim) or state.status == "pending":
        yield state, ("done",)
        return
    if state.status in ("none", "completed") or (state.status == "running" and state.latest_end > op.sent - TOLERANCE):
        yield state, _stale(state)
    if state.status in ("failed", "final") or (
        state.status == "running" and state.earliest_end <= op.received + TOLERANCE
    ):
        attempt = state.attempt + 1
        retried = State("pending", attempt, attempt, op.claim, None, state.input_by, state.scheduled_by)
        yield retried._replace(past=_past(state), printed=state.printed), ("done",)


def _schedule(state: State, op: Op) -> Outcome:
    if state.status == "none":
        return State("pending", input_by=op.claim, scheduled_by=op.claim), ("schedule",)
    return state, ("schedule" if state.scheduled_by == op.claim else "skip",)


def _end(state: State, op: Op, status: str) -> Outcome:
    if state.is_held_by(op.claim):
        released = state.released + (status == "pending")
        ended = state._replace(status=status, released=released, payload=op.value)
        return ended._replace(earliest_end=math.inf, latest_end=math.inf), ("done",)
    ended = (op.claim, status, op.value)
    if (state.holder, state.status, state.payload) == ended or ended in state.past:
        return state, ("done",)
    return state, _stale(state)


def _stale(state: State) -> tuple[Any, ...]:
    return ("stale", state.shown, state.attempt, state.holder) if state.status != "none" else ("missing",)


def _with_lease(state: State, op: Op) -> State:
    """Returns the state with the lease that the call set; the end is exact if the reply contains it."""
    end = _reported_end(op)
    if end:
        return state._replace(earliest_end=end[0], latest_end=end[0])
    return state._replace(earliest_end=op.sent + op.lease, latest_end=op.received + op.lease)


def _reported_end(op: Op, state: State | None = None) -> tuple[float, ...]:
    """Returns the end of the lease that a correct reply contains; an empty tuple if this reply contains none.

    Any end within the bounds is correct.

    Args:
        op: the call.
        state: the state whose lease the reply reports; None: the call sets the lease.
    """
    if op.reply is None or not isinstance(op.reply[-1], float):
        return ()
    earliest_end, latest_end = op.sent + op.lease, op.received + op.lease
    if state is not None:
        earliest_end, latest_end = state.earliest_end, state.latest_end
    return (min(max(op.reply[-1], earliest_end - TOLERANCE), latest_end + TOLERANCE),)


@dataclass(frozen=True, slots=True)
class Order:
    """A read of the completed steps of a run, in completion order."""

    run: str
    sent: float
    received: float
    steps: tuple[str, ...]


@dataclass
class Findings:
    """The errors in a history; none if a correct store could have produced it.

    Attributes:
        doubly_executed: attempts that were granted to two claims.
        lost: acknowledged completions that a later reply does not show.
        impossible: steps whose replies no order of the calls explains. After another finding they are not searched for.
        undecided: steps whose search was too long for a verdict.
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
    """Checks a history against the contract.

    Args:
        ops: the calls.
        orders: the reads of the completion order.
    """
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
    found.lost += find_lost(ops, [order for each in seen.values() for order in each])
    for run, step, history in (
        (run, step, history) for run, steps in by_run.items() for step, history in steps.items()
    ):
        if found.problems:
            break  # one is enough, and proving that no order exists takes long
        verdict, problem = _linearize(history)
        if not verdict:
            (found.undecided if verdict is None else found.impossible).append(f"run {run}, step {step}: {problem}")
    return found


def _doubly_executed(history: list[Op]) -> Iterator[str]:
    executed: dict[int, Claim] = {}
    for op in history:
        if op.kind == "begin" and op.reply is not None and op.reply[0] == "execute":
            other = executed.setdefault(op.reply[1], op.claim)
            if other != op.claim:
                yield f"attempt {op.reply[1]} was executed twice, by {other} and {op.claim}"


def find_lost(ops: Iterable[Op], orders: Iterable[Order]) -> list[str]:
    """Returns the acknowledged completions that a call sent later did not find.

    The search finds them too, but reports them as impossible.
    """
    done: dict[tuple[str, str], Op] = {}
    for op in ops:
        if op.kind == "complete" and op.reply == ("done",):
            first = done.setdefault((op.run, op.step), op)
            if op.received < first.received:
                done[op.run, op.step] = op
    forgotten: dict[tuple[str, str], Any] = {}
    for op in ops:
        completion = done.get((op.run, op.step))
        if completion is None or op.sent <= completion.received or op.reply in (None, ("mismatch",)):
            continue
        known = ("completed", completion.value)
        if (op.kind in ("begin", "read") and (op.reply[0], op.reply[-1]) != known) or (
            op.kind == "complete" and op.reply == ("done",) and op.value != completion.value
        ):
            forgotten[op.run, op.step] = op
    by_run: dict[str, list[tuple[str, Op]]] = defaultdict(list)
    for (run, step), completion in done.items():
        by_run[run].append((step, completion))
    for order in orders:
        for step, completion in by_run[order.run]:
            if completion.received < order.sent and step not in order.steps:
                forgotten[order.run, step] = order
    return [f"{done[place]} was acknowledged, but is missing from {later}" for place, later in forgotten.items()]


def _linearize(history: list[Op]) -> tuple[bool | None, str]:
    """Searches for an order that explains the replies.

    Returns:
        True if there is one, False if not, None if the search was too long; and the problem.
    """
    search = _Search(history)
    # The calls that have taken effect, as bits, and the state that they led to.
    stack: list[tuple[int, State]] = [(0, State())]
    seen: set[tuple[int, State]] = set()
    furthest = 0
    while stack:
        taken, state = stack.pop()
        taken, first, next_nodes = search.advance(taken, state)
        if first >= search.known:
            return True, ""
        furthest = max(furthest, first)
        for node in reversed(next_nodes):  # the call with the earliest reply is tried first, those without one last
            if node not in seen:
                seen.add(node)
                stack.append(node)
        if len(seen) > SEARCH_LIMIT:
            return None, f"undecided after {len(seen)} states of {search.known} calls; the first {furthest} fit"
    offender = search.ops[furthest]
    return False, f"no order explains all {search.known} replies: the first {furthest} fit, but not {offender}"


class _Search:
    """The calls of one step, indexed for the search: those with a reply, by time, and those without."""

    def __init__(self, history: list[Op]) -> None:
        self.ops = sorted((op for op in history if op.reply is not None), key=lambda op: (op.received, op.sent))
        self.known = len(self.ops)
        unknown = [op for op in history if (op.reply is None or op.resent) and op.kind != "read"]
        self._unknown = sorted((replace(op, received=math.inf, reply=None) for op in unknown), key=lambda op: op.sent)
        self._attempts = [_reported_attempt(op) for op in self.ops]
        # For each call and those after it: the earliest time of sending, and the lowest attempt in a reply.
        self._earliest = [math.inf] * (self.known + 1)
        highest = max([attempt for attempt in self._attempts if attempt < math.inf], default=0)
        unreported = len(unknown) + sum(op.kind == "retry" for op in self.ops)  # attempts that no reply may show
        self._lowest = [highest + unreported] * (self.known + 1)
        for index in reversed(range(self.known)):
            self._earliest[index] = min(self.ops[index].sent, self._earliest[index + 1])
            self._lowest[index] = min(self._attempts[index], self._lowest[index + 1])
        self._begins: dict[Claim, int] = defaultdict(int)  # as bits
        for index, op in enumerate(self.ops):
            if op.kind == "begin":
                self._begins[op.claim] |= 1 << index
        for op in self._unknown:
            if op.kind == "begin":
                self._begins[op.claim] |= 1 << self.known  # a bit that is never taken

    def advance(self, taken: int, state: State) -> tuple[int, int, list[tuple[int, State]]]:
        """Finds the calls that may be the next to take effect.

        Args:
            taken: the calls with a reply that have taken effect, as bits.
            state: the state that they led to.

        Returns:
            `taken` with the calls that have no effect added; the index of the first call that is not taken; and the
            nodes that the next call may lead to.
        """
        while True:
            first = (~taken & (taken + 1)).bit_length() - 1
            if first >= self.known:
                return taken, first, []
            next_nodes: list[tuple[int, State]] = []
            no_effect = 0
            end = self.ops[first].received  # any call sent before that may be next
            bound = math.inf  # the lowest attempt in the remaining replies; attempts only grow
            index = first
            while index < self.known and self._earliest[index] <= end:
                op = self.ops[index]
                if not taken >> index & 1 and op.sent <= end:
                    bound = min(bound, self._attempts[index])
                    for after, reply in outcomes(state, op):
                        if op.reply[: len(reply)] == reply:
                            if after == state and self._has_no_effect(op, taken | 1 << index):
                                no_effect |= 1 << index
                            next_nodes.append((taken | 1 << index, after))
                index += 1
            if not no_effect:
                break
            # A call that changes nothing, now or later, can be taken at once.
            taken |= no_effect
        for op in self._unknown:
            if op.sent > end:
                break
            next_nodes += [(taken, after) for after, _ in outcomes(state, op) if after != state]
        bound = min(bound, self._lowest[index])
        return taken, first, [node for node in next_nodes if node[1].attempt <= bound]

    def _has_no_effect(self, op: Op, taken: int) -> bool:
        """Returns whether a call that changes nothing here would change nothing later either.

        The end of a claim can still have an effect if the store forgot the claim and grants it again.
        """
        if op.reply != ("done",):
            return op.kind != "extend" or op.reply[0] != "done"
        return op.kind not in ("expire", "retry") and not self._begins[op.claim] & ~taken


def _reported_attempt(op: Op) -> float:
    """Returns the step's attempt according to the reply; inf if the reply does not contain it."""
    if op.reply is None:
        return math.inf
    attempts = [part for part in op.reply[1:3] if isinstance(part, int)]
    return attempts[0] if attempts else math.inf


def _check_order(seen: list[Order], completions: list[Op]) -> Iterator[str]:
    """Checks that all reads are prefixes of one order, which agrees with the times of the completions."""
    longest = max((order.steps for order in seen), key=len, default=())
    for order in seen:
        if order.steps != longest[: len(order.steps)]:
            yield f"two completion orders: {order.steps} and {longest}"
    done: dict[str, float] = {}
    sent: dict[str, float] = {}
    for op in completions:
        sent[op.step] = min(op.sent, sent.get(op.step, math.inf))
        if op.reply == ("done",):
            done[op.step] = min(op.received, done.get(op.step, math.inf))
    for step in longest:
        if step not in sent:
            yield f"{step} is in the completion order {longest}, but no call completed it"
    for earlier, step in combinations(longest, 2):
        if done.get(step, math.inf) < sent.get(earlier, -math.inf):
            yield f"{step} was completed before the completion of {earlier} was sent, but follows it in {longest}"
