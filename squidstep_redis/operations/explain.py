"""The operations that say why a step, or a run, is not finished."""

from __future__ import annotations

from datetime import datetime
from typing import Final

from squidstep_redis.errors import CorruptRunError
from squidstep_redis.explanations import URGENCY, PastAttempt, RunExplanation, StepExplanation, explain
from squidstep_redis.model import OUTCOME, StepRun, StepStatus, moment
from squidstep_redis.operations.context import Context
from squidstep_redis.operations.reads import MAX_LIMIT, get_step_run
from squidstep_redis.operations.runs import scan_runs
from squidstep_redis.protocol import arguments
from squidstep_redis.protocol.arguments import Name, RunId, Step
from squidstep_redis.protocol.call import Call, Reply, new_nonce
from squidstep_redis.protocol.keys import Run
from squidstep_redis.protocol.scripts import script
from squidstep_redis.protocol.workflow import SendBatch, Workflow, raise_first_error

_BY_STATUS: Final = (StepStatus.FAILED, StepStatus.RUNNING, StepStatus.PENDING)


def explain_step(context: Context, run_id: RunId, step: Step) -> Workflow[StepExplanation | None]:
    """Explains in plain sentences why a step is in its state, what happens next, and what an operator can do.

    One round trip. It writes nothing, and a payload that the codec cannot decode does not hide the rest.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        step: the step: a non-empty str of at most 512 bytes of UTF-8, or an enum member (its value if that is a
            str, else its name).

    Returns:
        The explanation; None if there is no record.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    return _explain_step(context, context.keys.run(run_id), arguments.step(step))


def _explain_step(context: Context, run: Run, step: Name) -> Workflow[StepExplanation | None]:
    record = get_step_run(context, run.text, step.text)._replace(part_of="explain_step")
    calls: list[Call[object]] = [
        record,
        _history(context, run, step, "explain_step"),
        _cancellation(run),
        _clock(run, "explain_step"),
    ]
    step_run, history, cancel_reason, now = raise_first_error((yield SendBatch(calls)))
    if history:
        step_run = history[-1].step_run  # a later call of the batch read it
    return None if step_run is None else explain(step_run, history, cancel_reason, now)


def explain_run(context: Context, run_id: RunId, *, limit: int = 20) -> Workflow[RunExplanation | None]:
    """Says why a run is not finished: for each step that is not completed, what `explain_step` says.

    Two round trips, one more for every 500 fields of a run that has more. It writes nothing, and reads no payloads but
    the errors of the steps that it explains. The steps are not read at one moment.

    Args:
        run_id: the run: a non-empty str of at most 512 bytes of UTF-8, or a UUID.
        limit: how many steps to explain at most, from 1 to 1,000: failed steps first, then running steps in the order
            in which their leases end, then pending steps.

    Returns:
        The explanations; steps that need an operator come first. None if there is no such run.

    Raises:
        InvalidArgumentError: an argument was rejected before anything was sent.
        CorruptRunError: the stored data is corrupt.
        ServerError: the server or the connection failed.
    """
    return _explain_run(context, context.keys.run(run_id), arguments.integer("limit", limit, MAX_LIMIT))


def _explain_run(context: Context, run: Run, limit: int) -> Workflow[RunExplanation | None]:
    scans = yield from scan_runs(context, "explain_run", [run.text.encode()])
    if not scans:
        return None
    scan = scans[0]
    if scan.problem is not None:
        raise CorruptRunError(run.text, run.keys.steps.decode(), scan.problem)
    unfinished = sorted(scan.unfinished(context), key=_by_urgency)
    chosen = unfinished[:limit]
    names = [arguments.step(each.step) for each in chosen]
    histories = [_history(context, run, name, "explain_run") for name in names]
    now, *found = raise_first_error((yield SendBatch([_clock(run, "explain_run"), *histories])))
    explained: list[StepExplanation] = []
    for step_run, history in zip(chosen, found, strict=True):
        if history or not step_run.attempt:  # else it was deleted in the meantime
            latest = history[-1].step_run if history else step_run
            explained.append(explain(latest, history, scan.cancel_reason, now))
    explained.sort(key=lambda each: URGENCY.index(each.reason))
    return RunExplanation(scan.summary(), now, explained, len(unfinished) - len(chosen))


def _by_urgency(step_run: StepRun) -> tuple[int, bool, float, int]:
    """Returns the sort key: by status; permanently failed steps first, then by the end of lease or delay."""
    until = step_run.lease_ends_at or step_run.retry_at
    since = until.timestamp() if until else 0.0
    return _BY_STATUS.index(step_run.status), not step_run.final, since, step_run.position


def _history(context: Context, run: Run, step: Name, operation: str) -> Call[list[PastAttempt]]:
    """Reads the known attempts of a step, oldest first; an error is decoded when it is needed."""

    def parse(reply: Reply) -> list[PastAttempt]:
        found: list[PastAttempt] = []
        for entry in reply[2:]:
            line, _, error = entry.partition(b"\n")
            payloads = (None, None, error or None, None)
            step_run = context.records.step_run(run.text, step.text, line, payloads, run.keys.steps)
            found.append(PastAttempt(step_run, OUTCOME[line[1:2]]))
        return found

    args = (new_nonce(), step.data)
    return Call(run.text, script("attempts"), run.keys[:2], args, parse, list, step.text, part_of=operation)


def _cancellation(run: Run) -> Call[str | None]:
    """Reads why a run is cancelled; None if it is not."""

    def parse(reply: Reply) -> str | None:
        return reply[9].decode(errors="backslashreplace") if len(reply) > 9 else None

    args = (new_nonce(), b"0", b"1")
    return Call(
        run.text, script("summarize_run"), run.keys[:2], args, parse, lambda: None, None, part_of="explain_step"
    )


def _clock(run: Run, operation: str) -> Call[datetime]:
    """Reads the clock of the run's server, the only clock that decides whether a lease has expired."""

    def parse(reply: Reply) -> datetime:
        return moment(int(reply[4]))

    args = (new_nonce(), b"0", b"-", b"1")
    return Call(run.text, script("scan_runs"), (run.keys.claims,), args, parse, part_of=operation)
